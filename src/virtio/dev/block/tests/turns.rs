//! Who does what when: the device between a driver and a host that ends operations when the test says so.

use std::sync::{Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::backend::disk::Engine;
use crate::mem::{Bytes, GuestAddress};

const CAPACITY: u64 = 64 * MIB;

#[derive(Default)]
struct Script {
    /// Operations end when they begin.
    at_once: bool,
    /// The next operations are refused.
    fails: bool,
    /// What the device has submitted.
    log: Vec<&'static str>,
    under_way: Vec<u64>,
    ended: Vec<Completion>,
    stuck: bool,
}

/// A host's end of a disk, shared with the test.
#[derive(Clone, Default)]
struct Host(Arc<Mutex<Script>>);

impl Host {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    /// Ends the operation that was submitted first.
    fn end(&self) {
        let mut script = self.script();
        let token = script.under_way.remove(0);
        script.ended.push(Completion {
            token,
            result: Ok(()),
        });
    }
}

impl Engine for Host {
    fn event(&self) -> Arc<OwnedFd> {
        Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
    }

    fn submit(&mut self, token: u64, _: &GuestRam, operation: Operation) -> Poll<io::Result<()>> {
        let mut script = self.script();
        script.log.push(match operation {
            Operation::Read { .. } => "read",
            Operation::Write { .. } => "write",
            Operation::Flush => "flush",
            Operation::Discard { .. } => "discard",
            Operation::WriteZeroes { .. } => "write zeroes",
        });
        if script.fails {
            return Poll::Ready(Err(io::ErrorKind::Other.into()));
        }
        if script.at_once {
            return Poll::Ready(Ok(()));
        }
        script.under_way.push(token);
        Poll::Pending
    }

    fn proceed(&mut self) -> Vec<Completion> {
        std::mem::take(&mut self.script().ended)
    }

    fn is_stuck(&mut self) -> bool {
        self.script().stuck
    }

    fn drain(&mut self) {
        self.script().under_way.clear();
    }
}

fn disk(host: &Host, features: u64) -> (Block, Driver) {
    let disk = Disk::of(Box::new(host.clone()), CAPACITY);
    let mut device = Block::new(disk, settings()).unwrap();
    let features = device.features() | features;
    let driver = Driver::start(&mut device, features);
    (device, driver)
}

fn send(driver: &mut Driver, kind: u32, out: &[u8], into: &[u32]) {
    let header = header(kind, 0);
    driver.send(0, &[&header, out], &[into, &[1]].concat());
}

/// `avail_event`: the device wants to be notified when the available index goes past it (§2.7.10).
fn avail_event(driver: &Driver) -> u16 {
    driver
        .ram
        .read_obj(GuestAddress(0x2000 + 4 + 8 * 64))
        .unwrap()
}

#[test]
fn without_a_cache_each_write_is_flushed_before_it_is_answered() {
    let host = Host::default();
    let (mut device, mut driver) = disk(&host, 0);
    device.write_config(CONFIG_WRITEBACK, &[0]);
    send(&mut driver, T_OUT, &[1; 512], &[]);
    device.process(0).unwrap();
    assert_eq!(host.script().log, ["write"]);
    host.end();
    device.ready(0, Interest::READ).unwrap();
    assert_eq!(host.script().log, ["write", "flush"]);
    assert_eq!(driver.used(0), None, "written, not flushed");
    host.end();
    device.ready(0, Interest::READ).unwrap();
    assert!(driver.used(0).is_some());

    host.script().at_once = true;
    send(&mut driver, T_OUT, &[1; 512], &[]);
    device.process(0).unwrap();
    assert_eq!(host.script().log[2..], ["write", "flush"]);
    assert!(driver.used(0).is_some());

    device.write_config(CONFIG_WRITEBACK, &[1]);
    send(&mut driver, T_OUT, &[1; 512], &[]);
    device.process(0).unwrap();
    assert_eq!(host.script().log[4..], ["write"]);
    assert!(driver.used(0).is_some());
    assert!(device.active.unwrap().pending.is_empty());
}

#[test]
fn what_the_host_refuses_is_answered_with_an_error_and_not_flushed() {
    let host = Host::default();
    let (mut device, mut driver) = disk(&host, 0);
    device.write_config(CONFIG_WRITEBACK, &[0]);
    host.script().fails = true;
    let header = header(T_OUT, 0);
    let head = driver.send(0, &[&header, &[1; 512]], &[1]);
    device.process(0).unwrap();
    assert_eq!(driver.used(0), Some(Used { head, len: 1 }));
    assert_eq!(driver.written(0, head), [IOERR]);
    assert_eq!(host.script().log, ["write"]);
    assert_eq!(device.active.unwrap().running, [0]);
}

#[test]
fn a_turn_ends_after_a_mebibyte_so_that_others_have_theirs() {
    let host = Host::default();
    host.script().at_once = true;
    let (mut device, mut driver) = disk(&host, 0);
    for _ in 0..20 {
        send(&mut driver, T_IN, &[], &[128 << 10]);
    }
    for (expected, again) in [(8, true), (8, true), (4, false)] {
        device.process(0).unwrap();
        let answered = std::iter::from_fn(|| driver.used(0)).count();
        assert_eq!((answered, driver.wants_another_call(0)), (expected, again));
    }
}

#[test]
fn a_driver_that_looks_itself_is_asked_to_notify_only_when_it_had_another_turn() {
    let used_event = GuestAddress(0x1000 + 4 + 2 * 64);
    for (wanted, looks) in [(0_u16, false), (0x8000, true)] {
        let host = Host::default();
        host.script().at_once = true;
        let (mut device, mut driver) = disk(&host, F_EVENT_IDX);
        device.process(0).unwrap();
        driver.ram.write_obj(wanted, used_event).unwrap();
        send(&mut driver, T_IN, &[], &[512]);
        device.process(0).unwrap();
        assert!(driver.used(0).is_some());
        assert_eq!(driver.line.edges(), u64::from(!looks));
        assert_eq!(driver.wants_another_call(0), looks);
        assert_eq!(avail_event(&driver), u16::from(!looks));
        device.process(0).unwrap();
        assert_eq!(avail_event(&driver), 1, "nothing came, so now");
        assert!(!driver.wants_another_call(0));
    }
}

#[test]
fn a_full_queue_is_looked_at_again_when_one_of_its_requests_has_ended() {
    let host = Host::default();
    let (mut device, mut driver) = disk(&host, 0);
    send(&mut driver, T_IN, &[], &[512]);
    // The driver says the same head 65 times, one more than the queue has descriptors.
    driver.ram.write_obj(64_u16, GuestAddress(0x1002)).unwrap();
    device.process(0).unwrap();
    driver.ram.write_obj(65_u16, GuestAddress(0x1002)).unwrap();
    device.process(0).unwrap();
    assert_eq!(host.script().under_way.len(), 64);
    while driver.wants_another_call(0) {}
    host.end();
    device.ready(0, Interest::READ).unwrap();
    assert!(driver.wants_another_call(0));
    device.process(0).unwrap();
    assert_eq!(host.script().under_way.len(), 64);
    host.end();
    device.ready(0, Interest::READ).unwrap();
    host.end();
    while driver.wants_another_call(0) {}
    device.ready(0, Interest::READ).unwrap();
    assert!(!driver.wants_another_call(0), "it was not full any more");
}

#[test]
fn a_host_that_takes_nothing_is_asked_again() {
    let host = Host::default();
    let (mut device, mut driver) = disk(&host, 0);
    host.script().stuck = true;
    send(&mut driver, T_IN, &[], &[512]);
    device.process(0).unwrap();
    assert!(driver.wants_another_call(0));
    host.script().stuck = false;
    device.process(0).unwrap();
    assert!(!driver.wants_another_call(0));
}
