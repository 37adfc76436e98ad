//! A card with rate limits, and a socket at whose other end the test is.

use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::*;
use crate::backend::net::Passt;

/// Two frames pass at once, and then two a second.
const TWO: Limits = Limits {
    bandwidth: None,
    operations: NonZeroU64::new(2),
};
/// Of frames of 100 bytes, two pass at once, a third on credit, and then two a second.
const BYTES: Limits = Limits {
    bandwidth: NonZeroU64::new(200),
    operations: None,
};
/// That many frames have to wait this long.
const FRAMES: u8 = 4;
const AT_LEAST: Duration = Duration::from_millis(490);

fn limited(limits: Limits) -> (Net, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let backend = Passt::over(ours).unwrap();
    let net = Net::new(0, mac(), Box::new(backend));
    (net.limited(limits).unwrap(), theirs)
}

/// What passt reads and writes.
fn framed(number: u8) -> Vec<u8> {
    [&100_u32.to_be_bytes()[..], &[number; 100]].concat()
}

#[test]
fn frames_to_the_host_wait_in_the_queue_for_the_timer_and_none_is_lost() {
    for limits in [TWO, BYTES] {
        let (mut net, mut theirs) = limited(limits);
        let mut driver = start(&mut net, PLAIN);
        let start = Instant::now();
        for number in 0..FRAMES {
            driver.send(TX, &[&HEADER, &[number; 100]], &[]);
            net.process(TX).unwrap();
        }
        let at_once = std::iter::from_fn(|| driver.used(TX)).count();
        assert!(at_once < usize::from(FRAMES), "{at_once} at once");
        let only_timers = [Interest::NONE, Interest::READ, Interest::READ];
        assert_eq!(net.interests(), only_timers, "the host has room enough");
        for number in 0..FRAMES {
            let mut frame = [0; 104];
            while net.counters().sent <= number.into() {
                turn(&mut net);
            }
            theirs.read_exact(&mut frame).unwrap();
            assert_eq!(frame[..], framed(number));
        }
        assert!(start.elapsed() >= AT_LEAST, "{:?}", start.elapsed());
        assert_eq!(net.counters().transmit_dropped, 0);
        let rest = std::iter::from_fn(|| driver.used(TX)).count();
        assert_eq!(at_once + rest, usize::from(FRAMES));
    }
}

#[test]
fn frames_from_the_host_wait_there_for_the_timer_and_none_is_lost() {
    for limits in [TWO, BYTES] {
        let (mut net, mut theirs) = limited(limits);
        let mut driver = start(&mut net, PLAIN);
        for _ in 0..32 {
            driver.send(RX, &[], &[200]);
        }
        net.process(RX).unwrap();
        let start = Instant::now();
        let all: Vec<u8> = (0..FRAMES).flat_map(framed).collect();
        theirs.write_all(&all).unwrap();
        let mut frames = Vec::new();
        while frames.len() < usize::from(FRAMES) {
            turn(&mut net);
            while let Some((_, frame, _)) = received(&mut driver, RX) {
                frames.push(frame);
            }
            if frames.len() < usize::from(FRAMES) {
                let only_timers = [Interest::NONE, Interest::READ, Interest::READ];
                assert_eq!(net.interests(), only_timers, "nothing spins");
            }
        }
        assert!(start.elapsed() >= AT_LEAST, "{:?}", start.elapsed());
        for (number, frame) in (0..).zip(frames) {
            assert_eq!(frame, [number; 100]);
        }
        assert_eq!(net.counters().receive_dropped, 0);
    }
}

#[test]
fn each_direction_has_a_limit_of_its_own() {
    let (mut net, mut theirs) = limited(TWO);
    let mut driver = start(&mut net, PLAIN);
    for number in 0..FRAMES {
        driver.send(TX, &[&HEADER, &[number; 100]], &[]);
        driver.send(RX, &[], &[200]);
    }
    net.process(TX).unwrap();
    net.process(RX).unwrap();
    assert!(net.counters().sent >= 2);
    theirs.write_all(&framed(1)).unwrap();
    assert!(turn(&mut net));
    assert!(received(&mut driver, RX).is_some());
}

#[test]
fn a_reset_forgets_who_waited_for_a_timer() {
    let (mut net, _theirs) = limited(TWO);
    let mut driver = start(&mut net, PLAIN);
    for number in 0..FRAMES {
        driver.send(TX, &[&HEADER, &[number; 100]], &[]);
    }
    net.process(TX).unwrap();
    let sent = net.counters().sent;
    net.reset();
    assert_eq!(net.interests(), [Interest::NONE; 3]);
    assert!(!turn(&mut net), "no timer");
    assert_eq!(net.counters().sent, sent);
}

#[test]
fn without_limits_there_are_no_timers() {
    let (net, _theirs) = limited(Limits::default());
    assert_eq!(net.sources().len(), 1);
    let (net, _theirs) = limited(TWO);
    assert_eq!(net.sources().len(), 3);
}
