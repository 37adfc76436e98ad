//! The card between a driver and a host: a tap in a namespace of its own, passt, or the other end of a socket.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::backend::net::{Forward, Passt, Tap, namespace};
use crate::mem::{Bytes, GuestAddress};
use crate::virtio::driver::Driver;
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};

const RX: usize = 0;
const TX: usize = 1;
const PLAIN: u64 = F_VERSION_1 | VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS;
const MERGE: u64 = PLAIN | VIRTIO_NET_F_MRG_RXBUF;
const HEADER: [u8; 12] = [0; 12];
const OURS: [u8; 4] = [10, 9, 8, 2];
const HOSTS: [u8; 4] = [10, 9, 8, 1];

fn mac() -> Mac {
    Mac::of("test", 0)
}

/// A card whose host is the other end of a socket.
fn over_socket() -> (Net, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let backend = Passt::over(ours).unwrap();
    (Net::new(0, mac(), Box::new(backend)), theirs)
}

/// A card on a tap of a host at 10.9.8.1 that knows 10.9.8.2 to be us.
fn on_tap(queues: u16) -> Net {
    let tap = Tap::open("card", queues).unwrap();
    namespace::run("ip link set card up addrgenmode none");
    namespace::run("ip addr add 10.9.8.1/24 dev card");
    namespace::run(&format!(
        "ip neigh replace 10.9.8.2 lladdr {} dev card nud permanent",
        mac()
    ));
    Net::new(0, mac(), Box::new(tap))
}

/// Does what the event loop does, until `done` or for at most 10 seconds; `false` when nothing is ready for 300 ms.
fn serve(net: &mut Net, mut done: impl FnMut(&mut Net) -> bool) -> bool {
    let start = Instant::now();
    while !done(net) {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it takes too long"
        );
        if !turn(net) {
            return false;
        }
    }
    true
}

/// One turn of the event loop; `false` when nothing is ready for 300 ms.
fn turn(net: &mut Net) -> bool {
    let sources = net.sources();
    let interests = net.interests();
    assert_eq!(sources.len(), interests.len());
    let mut fds: Vec<PollFd<'_>> = Vec::new();
    let mut waiting = Vec::new();
    for (number, interest) in interests.into_iter().enumerate() {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.contains(Interest::READ));
        flags.set(PollFlags::OUT, interest.contains(Interest::WRITE));
        if !flags.is_empty() {
            fds.push(PollFd::from_borrowed_fd(sources[number].as_fd(), flags));
            waiting.push((number, interest));
        }
    }
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: 300_000_000,
    };
    if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
        return false;
    }
    for ((number, interest), fd) in waiting.into_iter().zip(&fds) {
        let flags = fd.revents();
        let broken = flags.intersects(PollFlags::HUP | PollFlags::ERR);
        for (flag, ready) in [
            (PollFlags::IN, Interest::READ),
            (PollFlags::OUT, Interest::WRITE),
        ] {
            if interest.contains(ready) && (broken || flags.contains(flag)) {
                net.ready(number, ready).unwrap();
            }
        }
    }
    true
}

fn start(net: &mut Net, features: u64) -> Driver {
    let driver = Driver::start(net, features);
    for queue in 0..net.queue_sizes().len() {
        net.process(queue).unwrap();
    }
    driver
}

/// The next received frame, put together from its buffers: header and the rest.
fn received(driver: &mut Driver, queue: usize) -> Option<(Vec<u8>, Vec<u8>, usize)> {
    let first = driver.used(queue)?;
    let mut bytes = driver.written(queue, first.head);
    bytes.truncate(first.len as usize);
    let buffers = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
    for _ in 1..buffers {
        let more = driver.used(queue).expect("all buffers of a frame at once");
        let piece = driver.written(queue, more.head);
        bytes.extend(&piece[..more.len as usize]);
    }
    let frame = bytes.split_off(12);
    Some((bytes, frame, buffers))
}

/// An ARP request for `target` (RFC 826).
fn arp_request(target: [u8; 4]) -> Vec<u8> {
    let mut frame = [0xff; 6].to_vec();
    frame.extend(mac().bytes());
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac().bytes());
    frame.extend(OURS);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

fn is_arp_reply(frame: &[u8], from: [u8; 4]) -> bool {
    frame.len() >= 42
        && frame[..6] == mac().bytes()
        && frame[12..14] == [8, 6]
        && frame[20..22] == [0, 2]
        && frame[28..32] == from
}

/// Whether `frame` is a UDP datagram to port 7, and its payload.
fn datagram(frame: &[u8]) -> Option<&[u8]> {
    (frame.len() > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == [0, 7])
        .then(|| &frame[42..])
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

#[test]
fn an_arp_request_is_answered_by_the_hosts_stack() {
    if !namespace::entered("virtio::dev::net::tests::an_arp_request_is_answered_by_the_hosts_stack")
    {
        return;
    }
    let mut net = on_tap(1);
    let features = net.features() | F_VERSION_1 | F_EVENT_IDX;
    assert_ne!(features & VIRTIO_NET_F_HOST_TSO4, 0);
    let mut driver = start(&mut net, features);
    for _ in 0..16 {
        driver.send(RX, &[], &[2048]);
    }
    net.process(RX).unwrap();
    let request = arp_request(HOSTS);
    let head = driver.send(TX, &[&HEADER, &request[..10], &request[10..]], &[]);
    net.process(TX).unwrap();
    let used = driver.used(TX).unwrap();
    assert_eq!((used.head, used.len), (head, 0));
    let mut answered = false;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, buffers)) = received(&mut driver, RX) {
            assert_eq!(buffers, 1);
            answered |= is_arp_reply(&frame, HOSTS);
        }
        answered
    }));
    assert!(driver.line.edges() >= 2);
    assert_eq!(net.counters().sent, 1);

    // What the host's stack cannot make sense of is dropped and handed back.
    let bad_header = [0xff; 12];
    driver.send(TX, &[&bad_header, &request], &[]);
    driver.send(TX, &[&HEADER, &[0; 13]], &[]);
    driver.send(TX, &[&HEADER, &[0; 65_551]], &[]);
    namespace::run("ip link set card down");
    driver.send(TX, &[&HEADER, &request], &[]);
    net.process(TX).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used(TX)).count(), 4);
    assert_eq!(net.counters().transmit_dropped, 4);
}

#[test]
fn a_frame_that_is_longer_than_one_buffer_takes_several_or_is_dropped_whole() {
    if !namespace::entered(
        "virtio::dev::net::tests::a_frame_that_is_longer_than_one_buffer_takes_several_or_is_dropped_whole",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    let payload: Vec<u8> = (0..1400).map(|i| i as u8).collect();

    let mut driver = start(&mut net, MERGE);
    for _ in 0..16 {
        driver.send(RX, &[], &[300, 212]);
    }
    net.process(RX).unwrap();
    socket.send_to(&payload, "10.9.8.2:7").unwrap();
    let mut got = None;
    assert!(serve(&mut net, |_| {
        while let Some((header, frame, buffers)) = received(&mut driver, RX) {
            if let Some(data) = datagram(&frame) {
                assert_eq!(header[0], 0, "no checksum offload was agreed on");
                got = Some((data.to_vec(), buffers));
            }
        }
        got.is_some()
    }));
    // 12 + 14 + 28 + 1400 bytes in buffers of 512.
    assert_eq!(got, Some((payload.clone(), 3)));

    net.reset();
    assert!(net.interests().iter().all(|interest| interest.is_empty()));
    let mut driver = start(&mut net, PLAIN);
    driver.send(RX, &[], &[300, 212]);
    net.process(RX).unwrap();
    let before = net.counters();
    socket.send_to(&payload, "10.9.8.2:7").unwrap();
    socket.send_to(b"short", "10.9.8.2:7").unwrap();
    let mut got = Vec::new();
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, buffers)) = received(&mut driver, RX) {
            assert_eq!(buffers, 1);
            if let Some(data) = datagram(&frame) {
                got.push(data.to_vec());
            }
        }
        !got.is_empty()
    }));
    assert_eq!(got, [b"short"]);
    assert_eq!(net.counters().receive_dropped, before.receive_dropped + 1);
}

#[test]
fn without_buffers_nothing_spins_and_frames_wait_in_the_host() {
    if !namespace::entered(
        "virtio::dev::net::tests::without_buffers_nothing_spins_and_frames_wait_in_the_host",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let mut driver = start(&mut net, MERGE | F_EVENT_IDX);
    assert_eq!(net.interests(), [Interest::NONE]);
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    for number in 0..300_u32 {
        socket.send_to(&number.to_le_bytes(), "10.9.8.2:7").unwrap();
    }
    assert_eq!(net.interests(), [Interest::NONE]);
    let mut next = 0_u32;
    while next < 300 {
        for _ in 0..50 {
            driver.send(RX, &[], &[1526]);
        }
        let edges = driver.line.edges();
        net.process(RX).unwrap();
        assert!(driver.line.edges() <= edges + 1, "one interrupt for many");
        serve(&mut net, |net| net.interests() == [Interest::NONE]);
        while let Some((_, frame, _)) = received(&mut driver, RX) {
            if let Some(data) = datagram(&frame) {
                assert_eq!(data, next.to_le_bytes());
                next += 1;
            }
        }
    }
    assert_eq!(net.counters().receive_dropped, 0);
}

#[test]
fn a_driver_that_offloads_gets_tcp_packets_and_checksums_unfinished() {
    if !namespace::entered(
        "virtio::dev::net::tests::a_driver_that_offloads_gets_tcp_packets_and_checksums_unfinished",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let features = net.features() | F_VERSION_1;
    let mut driver = start(&mut net, features);
    driver.send(RX, &[], &[2048]);
    net.process(RX).unwrap();
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    socket.send_to(b"unfinished", "10.9.8.2:7").unwrap();
    let mut header = Vec::new();
    assert!(serve(&mut net, |_| {
        while let Some((head, frame, _)) = received(&mut driver, RX) {
            if datagram(&frame).is_some() {
                header = head;
            }
            driver.send(RX, &[], &[2048]);
        }
        !header.is_empty()
    }));
    // NEEDS_CSUM, from byte 34 on, at offset 6 of the UDP header (§5.1.6).
    assert_eq!(header[..10], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
}

#[test]
fn the_driver_says_how_many_pairs_of_queues_it_uses() {
    if !namespace::entered(
        "virtio::dev::net::tests::the_driver_says_how_many_pairs_of_queues_it_uses",
    ) {
        return;
    }
    let mut net = on_tap(3);
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    let mut pairs = [0; 2];
    net.read_config(8, &mut pairs);
    assert_eq!(pairs, [3, 0]);
    let mut driver = start(&mut net, MERGE | VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ);
    let ask = |driver: &mut Driver, net: &mut Net, words: &[&[u8]]| {
        let head = driver.send(6, words, &[1]);
        net.process(6).unwrap();
        let used = driver.used(6).unwrap();
        assert_eq!((used.head, used.len), (head, 1));
        driver.written(6, head)[0]
    };
    for (words, ack) in [
        (&[&[4, 0][..], &[2, 0]][..], 0),
        (&[&[4, 0], &[0, 0]], 1),
        (&[&[4, 0], &[4, 0]], 1),
        (&[&[4, 0], &[0xff, 0xff]], 1),
        (&[&[4, 0], &[2]], 1),
        (&[&[4, 1], &[2, 0]], 1),
        (&[&[0x77, 0], &[2, 0]], 1),
        (&[&[1, 0], &[1]], 1),
        (&[], 1),
    ] {
        assert_eq!(ask(&mut driver, &mut net, words), ack, "{words:?}");
    }
    assert_eq!(net.state.pairs, 2);
    for queue in [0, 2] {
        for _ in 0..8 {
            driver.send(queue, &[], &[2048]);
        }
        net.process(queue).unwrap();
    }
    let expected = [Interest::READ, Interest::READ, Interest::NONE];
    assert_eq!(net.interests(), expected);
    driver.send(3, &[&HEADER, &arp_request(HOSTS)], &[]);
    net.process(3).unwrap();
    assert!(driver.used(3).is_some());
    let mut answered = false;
    assert!(serve(&mut net, |_| {
        for queue in [0, 2] {
            while let Some((_, frame, _)) = received(&mut driver, queue) {
                answered |= is_arp_reply(&frame, HOSTS);
            }
        }
        answered
    }));
    let saved = net.save();
    net.reset();
    assert_eq!(net.state.pairs, 1);
    net.restore(&saved).unwrap();
    assert_eq!((net.state.pairs, net.counters().sent), (2, 1));

    driver.send(6, &[&[4, 0], &[1, 0]], &[]);
    let mut driver = start(&mut net, MERGE | VIRTIO_NET_F_CTRL_VQ);
    // Without MQ, the control queue is number 2.
    let head = driver.send(2, &[&[4, 0], &[1, 0]], &[1]);
    net.process(2).unwrap();
    assert_eq!(driver.written(2, head), [0]);
    driver.send(2, &[&[4, 0], &[1, 0]], &[]);
    assert_eq!(
        net.process(2),
        Err(Malformed::Request),
        "no place to answer"
    );
}

#[test]
fn the_configuration_has_the_address_and_the_link() {
    let (net, _theirs) = over_socket();
    let mut space = [0xee; 16];
    space.fill(0);
    net.read_config(0, &mut space);
    assert_eq!(space[..6], mac().bytes());
    assert_eq!(space[6..12], [1, 0, 1, 0, 0, 0]);
    let mut past = [0; 4];
    net.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
    assert_eq!((net.name(), net.device_id()), ("NET0", 1));
    assert_eq!(net.queue_sizes(), [256, 256]);
    let offered = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS | VIRTIO_NET_F_MRG_RXBUF;
    assert_eq!(net.features(), offered, "no header, no offloads");
}

#[test]
fn frames_cross_a_stream_both_ways_however_it_is_cut() {
    let (mut net, mut theirs) = over_socket();
    let mut driver = start(&mut net, MERGE | F_EVENT_IDX);
    for _ in 0..40 {
        driver.send(RX, &[], &[1526]);
    }
    net.process(RX).unwrap();
    let long: Vec<u8> = (0..9000).map(|i| (i / 7) as u8).collect();
    let stream = [framed(&[1; 14]), framed(&long), framed(&[2; 60])].concat();
    let mut frames = Vec::new();
    for piece in stream.chunks(997) {
        theirs.write_all(piece).unwrap();
        turn(&mut net);
        while let Some((header, frame, buffers)) = received(&mut driver, RX) {
            assert_eq!(header[..10], [0; 10]);
            frames.push((frame, buffers));
        }
    }
    assert_eq!(frames, [(vec![1; 14], 1), (long, 6), (vec![2; 60], 1)]);

    driver.send(TX, &[&HEADER[..5], &HEADER[5..], &[3; 20], &[4; 10]], &[]);
    net.process(TX).unwrap();
    let mut got = [0; 34];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(got[..], framed(&[&[3; 20][..], &[4; 10]].concat()));
}

#[test]
fn a_frame_waits_for_the_buffers_it_needs_and_the_spare_ones_stay_in_the_queue() {
    let (mut net, mut theirs) = over_socket();
    let mut driver = start(&mut net, MERGE);
    let long: Vec<u8> = (0..5000).map(|i| (i / 3) as u8).collect();
    driver.send(RX, &[], &[1000]);
    net.process(RX).unwrap();
    theirs.write_all(&framed(&long)).unwrap();
    theirs.write_all(&framed(&[9; 100])).unwrap();
    assert!(turn(&mut net));
    assert_eq!(net.interests(), [Interest::NONE]);
    for _ in 0..4 {
        driver.send(RX, &[], &[1000]);
        net.process(RX).unwrap();
        assert_eq!(driver.used(RX), None);
    }
    for _ in 0..20 {
        driver.send(RX, &[], &[1000]);
    }
    net.process(RX).unwrap();
    assert_eq!(received(&mut driver, RX).unwrap().1, long);
    // The next was expected to be as long, and found many buffers posted; it takes one.
    let (_, frame, buffers) = received(&mut driver, RX).unwrap();
    assert_eq!((frame, buffers), (vec![9; 100], 1));
    for number in 0..18 {
        theirs.write_all(&framed(&[number; 50])).unwrap();
        assert!(turn(&mut net));
        assert_eq!(received(&mut driver, RX).unwrap().1, [number; 50]);
    }
    assert_eq!(net.interests(), [Interest::NONE], "all 25 are used up");
}

#[test]
fn a_frame_that_all_buffers_together_cannot_hold_is_dropped() {
    let (mut net, mut theirs) = over_socket();
    let mut driver = start(&mut net, MERGE);
    for _ in 0..64 {
        driver.send(RX, &[], &[100]);
    }
    net.process(RX).unwrap();
    theirs.write_all(&framed(&[1; 7000])).unwrap();
    theirs.write_all(&framed(&[2; 70])).unwrap();
    assert!(turn(&mut net));
    assert_eq!(received(&mut driver, RX).unwrap().1, [2; 70]);
    assert_eq!(net.counters().receive_dropped, 1);
}

#[test]
fn a_flood_of_short_frames_in_one_read_is_not_left_lying() {
    let (mut net, mut theirs) = over_socket();
    let mut driver = start(&mut net, PLAIN);
    for _ in 0..64 {
        driver.send(RX, &[], &[64]);
    }
    net.process(RX).unwrap();
    theirs.write_all(&framed(&[5; 14]).repeat(200)).unwrap();
    let mut count = 0;
    while count < 200 {
        // All frames came with the first read, and nothing is ready after it.
        if count == 0 {
            assert!(turn(&mut net));
        }
        while received(&mut driver, RX).is_some() {
            count += 1;
            driver.send(RX, &[], &[64]);
        }
        net.process(RX).unwrap();
    }
    assert_eq!(count, 200);
}

#[test]
fn when_the_host_has_no_room_frames_wait_in_the_queue_in_order() {
    let (mut net, mut theirs) = over_socket();
    let mut driver = start(&mut net, PLAIN);
    let mut sent = 0_u8;
    let mut send = |driver: &mut Driver| {
        driver.send(TX, &[&HEADER, &[sent; 30_000]], &[]);
        sent += 1;
    };
    let mut unanswered = 0;
    while net.interests() == [Interest::NONE] {
        send(&mut driver);
        unanswered += 1;
        net.process(TX).unwrap();
        unanswered -= usize::from(driver.used(TX).is_some());
    }
    for _ in 0..3 {
        send(&mut driver);
        unanswered += 1;
        net.process(TX).unwrap();
        unanswered -= usize::from(driver.used(TX).is_some());
    }
    assert_eq!(net.interests(), [Interest::WRITE]);
    assert!(unanswered >= 2);
    let mut stream: Vec<u8> = Vec::new();
    let total = usize::from(sent) * 30_004;
    while stream.len() < total {
        let mut piece = vec![0; 50_000];
        let count = theirs.read(&mut piece).unwrap();
        stream.extend(&piece[..count]);
        if net.interests() == [Interest::WRITE] {
            turn(&mut net);
        }
    }
    for (number, frame) in stream.chunks(30_004).enumerate() {
        assert_eq!(frame, framed(&[number as u8; 30_000]));
    }
    unanswered -= std::iter::from_fn(|| driver.used(TX)).count();
    assert_eq!((unanswered, net.interests()), (0, vec![Interest::NONE]));
}

#[test]
fn the_link_goes_down_with_the_host_and_the_driver_gets_its_frames_back() {
    let (mut net, theirs) = over_socket();
    let mut driver = start(&mut net, MERGE);
    driver.send(RX, &[], &[2048]);
    net.process(RX).unwrap();
    assert_eq!(net.interests(), [Interest::READ]);
    drop(theirs);
    assert!(turn(&mut net));
    assert_eq!(net.interests(), [Interest::NONE]);
    let mut status = [0; 2];
    net.read_config(6, &mut status);
    assert_eq!((status, driver.line.edges()), ([0, 0], 1));
    for _ in 0..60 {
        driver.send(TX, &[&HEADER, &[0; 60]], &[]);
    }
    net.process(TX).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used(TX)).count(), 60);
    assert_eq!(net.counters().transmit_dropped, 60);
    assert_eq!(driver.used(RX), None);
}

#[test]
fn drivers_that_break_the_rules_are_told_so() {
    let (mut net, mut theirs) = over_socket();
    let mut driver = start(&mut net, MERGE);
    driver.send(TX, &[&HEADER[..11]], &[]);
    assert_eq!(net.process(TX), Err(Malformed::Request));
    net.reset();
    let mut driver = start(&mut net, MERGE);
    theirs.write_all(&framed(&[1; 20])).unwrap();
    driver.send(RX, &[], &[11]);
    assert_eq!(net.process(RX), Err(Malformed::Request));
    net.reset();
    let mut driver = start(&mut net, MERGE);
    driver.send(RX, &[b"readable only"], &[]);
    assert_eq!(net.process(RX), Err(Malformed::Request));
}

#[test]
fn no_header_or_chain_brings_the_card_down() {
    let mut seed = 0x5a5a_1234_dead_beef_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for round in 0..300 {
        let (mut net, mut theirs) = over_socket();
        theirs.set_nonblocking(true).unwrap();
        let features = match round % 3 {
            0 => MERGE,
            1 => PLAIN | F_EVENT_IDX,
            _ => u64::MAX,
        };
        let mut driver = Driver::start(&mut net, features);
        for _ in 0..20 {
            let queue = random(2) as usize;
            let pieces: Vec<(u64, u32, u16)> = (0..=random(5))
                .map(|_| {
                    let address = match random(8) {
                        0 => (32 << 20) - random(64),
                        1 => u64::MAX - random(64),
                        _ => 0x10_0000 + random(1 << 20),
                    };
                    let len = match random(6) {
                        0 => 0,
                        1 => random(1 << 32),
                        _ => random(3000),
                    };
                    let flags = if random(4) == 0 {
                        random(8)
                    } else {
                        (queue as u64 ^ 1) * 2
                    };
                    (address, len as u32, flags as u16)
                })
                .collect();
            driver.send_raw(queue, &pieces);
            let noise: Vec<u8> = (0..random(3000)).map(|_| random(256) as u8).collect();
            driver
                .ram
                .write_slice(&noise, GuestAddress(0x10_0000 + random(1 << 20)))
                .unwrap();
            let len = 14 + random(4000) as usize;
            let _ = theirs.write_all(&framed(&vec![round as u8; len]));
            if random(50) == 0 {
                let _ = theirs.write_all(&noise);
            }
            let outcome = match random(4) {
                0 => net.ready(0, Interest::READ),
                1 => net.ready(0, Interest::WRITE),
                _ => net.process(random(4) as usize),
            };
            assert_eq!(net.interests().len(), 1);
            if outcome.is_err() {
                net.reset();
                driver = Driver::start(&mut net, features);
            }
            let _ = theirs.read(&mut [0; 60_000]);
        }
    }
}

#[test]
fn passt_answers_the_guest_and_leads_a_port_of_the_host_to_it() {
    if !namespace::entered(
        "virtio::dev::net::tests::passt_answers_the_guest_and_leads_a_port_of_the_host_to_it",
    ) {
        return;
    }
    // No interface with a route, so passt has nothing to offer the guest.
    let mut lost = match Passt::start(&[]) {
        Err(error) => {
            assert!(error.to_string().contains("install it"), "{error}");
            println!("skipped: {error}");
            return;
        }
        Ok(passt) => passt,
    };
    let error = lost.settle().unwrap_err().to_string();
    assert!(error.contains("interface"), "{error}");

    let _outside = Tap::open("outside", 1).unwrap();
    namespace::run("ip addr add 10.9.8.2/24 dev outside");
    namespace::run("ip link set outside up");
    namespace::run("ip route add default via 10.9.8.1");
    let ssh = Forward {
        host: 2222,
        guest: 22,
    };
    let mut passt = Passt::start(&[ssh]).unwrap();
    passt.settle().unwrap();
    let error = Passt::start(&[ssh]).unwrap().settle().unwrap_err();
    assert!(error.to_string().contains("2222"), "{error}");
    let mut net = Net::new(0, mac(), Box::new(passt));
    let mut driver = start(&mut net, MERGE);
    for _ in 0..32 {
        driver.send(RX, &[], &[2048]);
    }
    net.process(RX).unwrap();
    driver.send(TX, &[&HEADER, &arp_request(HOSTS)], &[]);
    net.process(TX).unwrap();
    let mut answered = false;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, _)) = received(&mut driver, RX) {
            answered |= is_arp_reply(&frame, HOSTS);
        }
        answered
    }));
    // A connection to the host's port becomes a SYN to the guest's port 22.
    let host = std::thread::spawn(|| {
        let address = ([127, 0, 0, 1], 2222).into();
        std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok()
    });
    let mut knocked = false;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, _)) = received(&mut driver, RX) {
            knocked |= frame.len() > 54
                && frame[12..14] == [8, 0]
                && frame[23] == 6
                && frame[36..38] == [0, 22];
        }
        knocked
    }));
    drop(net);
    host.join().unwrap();
}
