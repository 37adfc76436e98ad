//! The card between a driver and a host: a tap in a namespace of its own, passt, or the other end of a socket.

mod limits;
mod on_a_host;
mod on_a_stream;

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::virtio::driver::Driver;
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};

const RX: usize = 0;
const TX: usize = 1;
const PLAIN: u64 = F_VERSION_1 | VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS;
const MERGE: u64 = PLAIN | VIRTIO_NET_F_MRG_RXBUF;
const HEADER: [u8; 12] = [0; 12];

fn mac() -> Mac {
    Mac::of("test", 0)
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
