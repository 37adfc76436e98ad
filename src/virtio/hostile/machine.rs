//! A device with its transport and event loop, and the hostile driver's hands on its registers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::operation::Operation;
use super::rings::{REGISTERS, Rings};
use super::{Host, Target};
use crate::bus::Device;
use crate::hv::Hypervisor;
use crate::hv::fake::FakeHypervisor;
use crate::irq::{CountingLine, Irq};
use crate::mem::{Bytes, GuestAddress};
use crate::virtio::F_VERSION_1;
use crate::virtio::transport::mmio::MmioTransport;
use crate::virtio::transport::mmio::core::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, offset::*,
};
use crate::worker::EventLoop;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// Once the driver does nothing more, there is an end to what the device does. A queue has 1024 requests at most, and a
/// device answers at least one in each turn, unless what it writes asks for more.
const TURNS_MAX: u32 = 10_000;
/// How long the device may take for the last, good request.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Machine {
    target: &'static Target,
    pub transport: Arc<MmioTransport>,
    events: EventLoop,
    rings: Rings,
    host: Host,
}

impl Machine {
    pub fn new(target: &'static Target) -> Machine {
        let subject = (target.make)();
        let rings = Rings::new(subject.device.queue_sizes());
        let vm = FakeHypervisor::new(Vec::new()).create_vm();
        let transport = MmioTransport::new(
            vm.expect("a fake VM"),
            rings.ram.clone(),
            subject.device,
            (0, REGISTERS),
            (Irq(16), Arc::new(CountingLine::default())),
        );
        let transport = Arc::new(transport.expect("eventfds"));
        let mut events = EventLoop::new().expect("an epoll set");
        transport.attach(&mut events).expect("room in it");
        Machine {
            target,
            transport,
            events,
            rings,
            host: subject.host,
        }
    }

    fn write(&self, at: u64, value: u32) {
        self.transport.write(at, &value.to_le_bytes());
    }

    fn read(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(at, &mut word);
        u32::from_le_bytes(word)
    }

    #[cfg(test)]
    pub fn ram(&self) -> crate::mem::GuestRam {
        self.rings.ram.clone()
    }

    pub fn needs_reset(&self) -> bool {
        self.read(STATUS) & NEEDS_RESET != 0
    }

    /// Reset and features.
    fn negotiate(&self, features: u64) {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            self.write(DEVICE_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES_SEL, half);
            let wanted = (features | F_VERSION_1) >> (32 * half);
            self.write(DRIVER_FEATURES, self.read(DEVICE_FEATURES) & wanted as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(self.read(STATUS) & FEATURES_OK, 0, "features as offered");
    }

    fn set_up(&self, queue: usize) {
        let ring = &self.rings.queues[queue];
        self.write(QUEUE_SEL, queue as u32);
        self.write(QUEUE_SIZE, ring.size.into());
        let registers = [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW];
        for (low, table) in registers.into_iter().zip(ring.tables) {
            self.write(low, table as u32);
            self.write(low + 4, (table >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    fn say_ok(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn start(&mut self, features: u64, log: u8) {
        // Whatever the device still writes, it is to be over before the rings are emptied.
        self.write(STATUS, 0);
        self.rings.lay_out(log);
        self.negotiate(features);
        (0..self.rings.queues.len()).for_each(|queue| self.set_up(queue));
        self.say_ok();
    }

    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            // 1024 at most.
            Operation::Start { features, log } => self.start(*features, log % 11),
            Operation::StartAt {
                queue,
                size,
                tables,
            } => {
                let queue = self.rings.queue(*queue);
                let tables = tables.map(|place| self.rings.address(queue, place));
                self.rings.place(queue, *size, tables);
                self.negotiate(u64::MAX);
                self.set_up(queue);
                self.say_ok();
            }
            Operation::Reset => {
                self.write(STATUS, 0);
                assert_eq!(self.read(STATUS), 0, "a device resets at once");
            }
            Operation::Read { at, width } => {
                let mut data = [0xaa; 8];
                let (data, _) = data.split_at_mut(usize::from(width % 9));
                self.transport.read((*at).into(), data);
            }
            Operation::Write { at, width, value } => {
                let data = value.to_le_bytes();
                let (data, _) = data.split_at(usize::from(width % 9));
                self.transport.write((*at).into(), data);
            }
            Operation::Notify { queue } => self.write(QUEUE_NOTIFY, (*queue).into()),
            Operation::Turn => {
                self.turn(Duration::ZERO);
            }
            Operation::Host { bytes } => (self.host)(bytes),
            Operation::SaveAndRestore => {
                let saved = self.transport.save();
                let restored = self.transport.restore(&saved);
                restored.expect("what this device has just saved");
            }
            in_memory => self.rings.apply(in_memory),
        }
        self.check();
    }

    /// What holds at any time.
    fn check(&self) {
        assert_eq!(self.read(MAGIC_VALUE), MAGIC);
        let status = self.read(STATUS);
        if status & DRIVER_OK != 0 {
            assert_ne!(status & FEATURES_OK, 0, "status {status:#x}");
        }
        if status & NEEDS_RESET != 0 {
            assert!(self.transport.malformed() > 0);
        }
    }

    fn turn(&mut self, most: Duration) -> bool {
        self.events.turn(most).expect("an epoll set")
    }

    /// Lets the event loop run until there is nothing to do.
    pub fn settle(&mut self) {
        for _ in 0..TURNS_MAX {
            if !self.turn(Duration::ZERO) {
                return;
            }
        }
        panic!("{}: the event loop does not come to rest", self.target.name);
    }

    /// Starts the device as it should be, and sees that it answers a good request.
    pub fn probe(&mut self) {
        let name = self.target.name;
        let probe = (self.target.probe)();
        self.start(0, 6);
        assert!(!self.needs_reset(), "{name}: it was started rightly");
        let (head, places) = self
            .rings
            .request(probe.queue, &probe.readable, &probe.writable);
        self.write(QUEUE_NOTIFY, probe.queue as u32);
        (self.host)(&probe.host);
        let deadline = Instant::now() + PATIENCE;
        let (used, len) = loop {
            if let Some(used) = self.rings.used(probe.queue) {
                break used;
            }
            assert!(!self.needs_reset(), "{name}: the request was good");
            assert!(Instant::now() < deadline, "{name}: does not answer");
            self.turn(Duration::from_millis(100));
        };
        assert_eq!(used, u32::from(head), "{name}: there was no other request");
        let mut bytes = Vec::new();
        for (at, len) in places {
            let mut piece = vec![0; len as usize];
            let read = self.rings.ram.read_slice(&mut piece, GuestAddress(at));
            read.expect("the request's own buffer");
            bytes.append(&mut piece);
        }
        assert!(
            (probe.right)(len, &bytes),
            "{name}: answers with {len} bytes, {bytes:x?}"
        );
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.transport.stop();
    }
}
