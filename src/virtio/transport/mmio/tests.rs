//! The transport as drivers of all intentions see it: real registers, queues in RAM, an event loop that turns by hand.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::registers::*;
use super::*;
use crate::hv::Hypervisor;
use crate::hv::fake::{FakeHypervisor, Transcript};
use crate::mem::{self, Bytes};
use crate::virtio::dev::rng::Rng;
use crate::virtio::{Malformed, driver};
use crate::worker::{EventLoop, Interest, Readiness};

const RAM: u64 = 4 << 20;
const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const DATA: u64 = 0x10_0000;
const SIZE: u16 = 16;
const LIVE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const PLACE: Place = Place {
    number: 3,
    address: 0xd000_3000,
    irq: Irq(6),
    shared: false,
};

/// A device on its transport, and its driver.
struct Bench {
    device: Arc<Mmio>,
    events: EventLoop,
    ram: GuestRam,
    transcript: Arc<Transcript>,
    sent: u16,
}

impl Bench {
    fn new(device: impl VirtioDevice + 'static) -> Bench {
        let ram = mem::allocate(&[(GuestAddress(0), RAM)]).unwrap();
        Bench::with_ram(device, ram)
    }

    fn with_ram(device: impl VirtioDevice + 'static, ram: GuestRam) -> Bench {
        let host = FakeHypervisor::new(Vec::new());
        let vm = host.create_vm().unwrap();
        let mut events = EventLoop::new().unwrap();
        let device = Mmio::new(Box::new(device), PLACE, &vm, &ram, events.handle()).unwrap();
        device.attach(&mut events).unwrap();
        Bench {
            device,
            events,
            ram,
            transcript: host.transcript(),
            sent: 0,
        }
    }

    fn rng() -> Bench {
        Bench::new(Rng::new().unwrap())
    }

    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Serves what waits on the event loop.
    fn turn(&mut self) {
        self.events
            .after(Duration::ZERO, Box::new(|events| events.stop()));
        self.events.run().unwrap();
    }

    /// As far as FEATURES_OK.
    fn negotiate(&self) {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.write(DRIVER_FEATURES_SEL, 1);
        self.write(DRIVER_FEATURES, 1);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&self, size: u32, desc: u64, avail: u64, used: u64) {
        self.write(QUEUE_SEL, 0);
        self.write(QUEUE_SIZE, size);
        for (register, address) in [
            (QUEUE_DESC_LOW, desc),
            (QUEUE_DRIVER_LOW, avail),
            (QUEUE_DEVICE_LOW, used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// A driver's whole probe, with empty rings.
    fn bring_up(&mut self) {
        for ring in [AVAIL, USED] {
            let empty = [0; 0x100];
            self.ram.write_slice(&empty, GuestAddress(ring)).unwrap();
        }
        self.sent = 0;
        self.negotiate();
        self.set_up_queue(SIZE.into(), DESC, AVAIL, USED);
        self.write(STATUS, LIVE);
        assert_eq!(self.read(STATUS), LIVE);
    }

    /// Makes one buffer available and notifies.
    fn send(&mut self, len: u32, flags: u16) {
        let (ram, slot) = (&self.ram, self.sent % SIZE);
        let at = DESC + u64::from(slot) * 16;
        ram.write_obj(DATA, GuestAddress(at)).unwrap();
        ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        ram.write_obj(u32::from(flags), GuestAddress(at + 12))
            .unwrap();
        let head = GuestAddress(AVAIL + 4 + u64::from(slot) * 2);
        ram.write_obj(slot, head).unwrap();
        self.sent = self.sent.wrapping_add(1);
        ram.write_obj(self.sent, GuestAddress(AVAIL + 2)).unwrap();
        self.write(QUEUE_NOTIFY, 0);
    }

    fn used(&self) -> u16 {
        self.ram.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn assert_serves(&mut self) {
        let before = self.used();
        self.send(32, driver::WRITE);
        self.turn();
        assert_eq!(self.used(), before.wrapping_add(1));
    }
}

/// What happened to a [`Probe`].
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Calls {
    activate: u32,
    process: u32,
    ready: u32,
    reset: u32,
    written: Vec<u8>,
}

/// A device that does nothing and tells everything. Its source is always ready, and it always wants it.
struct Probe {
    source: Arc<OwnedFd>,
    calls: Arc<Mutex<Calls>>,
    verdict: Result<(), Malformed>,
}

impl Probe {
    fn new(verdict: Result<(), Malformed>) -> (Probe, Arc<Mutex<Calls>>) {
        let calls = Arc::<Mutex<Calls>>::default();
        let source = Arc::new(eventfd(1, EventfdFlags::NONBLOCK).unwrap());
        let probe = Probe {
            source,
            calls: Arc::clone(&calls),
            verdict,
        };
        (probe, calls)
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap()
    }
}

impl VirtioDevice for Probe {
    fn name(&self) -> &str {
        "PROBE"
    }

    fn device_id(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..8).zip(data) {
            *byte = 0x10 + at as u8;
        }
    }

    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.calls().written.extend(data);
    }

    fn activate(&mut self, _activation: Activation) {
        self.calls().activate += 1;
    }

    fn process(&mut self, _queue: usize) -> Result<(), Malformed> {
        self.calls().process += 1;
        match self.verdict {
            Ok(()) => Ok(()),
            Err(_) => Err(Malformed::Request),
        }
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![Arc::clone(&self.source)]
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::READ]
    }

    fn ready(&mut self, _source: usize, _readiness: Readiness) -> Result<(), Malformed> {
        self.calls().ready += 1;
        Ok(())
    }

    fn reset(&mut self) {
        self.calls().reset += 1;
    }

    fn save(&self) -> SavedState {
        SavedState::of(&())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.to("PROBE")
    }
}

#[test]
fn a_driver_gets_entropy_and_an_interrupt_for_its_notification() {
    let mut bench = Bench::rng();
    bench.bring_up();
    assert_eq!(bench.read(INTERRUPT_STATUS), 0);
    bench.send(4096, driver::WRITE);
    bench.turn();
    assert_eq!(bench.used(), 1);
    assert_eq!(
        bench.ram.read_obj::<u32>(GuestAddress(USED + 8)).unwrap(),
        4096
    );
    assert_eq!(bench.read(INTERRUPT_STATUS), 1);
    bench.write(INTERRUPT_ACK, 1);
    assert_eq!(bench.read(INTERRUPT_STATUS), 0);
}

#[test]
fn after_the_first_notification_kvm_posts_the_event_by_itself() {
    let mut bench = Bench::rng();
    bench.write(QUEUE_NOTIFY, 0);
    bench.turn();
    bench.bring_up();
    bench.turn();
    assert_eq!(
        bench.transcript.notifications(),
        [],
        "not before it is used"
    );
    bench.assert_serves();
    bench.assert_serves();
    assert_eq!(bench.transcript.notifications(), [(0xd000_3050, 0)]);
    assert_eq!(bench.transcript.interrupts(), [6]);
}

#[test]
fn requests_that_were_made_before_the_device_was_live_are_not_forgotten() {
    let mut bench = Bench::rng();
    bench.negotiate();
    bench.set_up_queue(SIZE.into(), DESC, AVAIL, USED);
    bench.send(8, driver::WRITE);
    bench.turn();
    assert_eq!(bench.used(), 0);
    bench.write(STATUS, LIVE);
    bench.turn();
    assert_eq!(bench.used(), 1);
}

#[test]
fn a_queue_that_is_not_valid_makes_the_device_ask_for_a_reset() {
    let cases: &[(&str, u32, u64, u64, u64, bool)] = &[
        ("as it should be", 16, DESC, AVAIL, USED, true),
        (
            "up to the last byte of RAM",
            64,
            DESC,
            AVAIL,
            RAM - 520,
            true,
        ),
        ("a size of none", 0, DESC, AVAIL, USED, false),
        (
            "a size that is no power of two",
            12,
            DESC,
            AVAIL,
            USED,
            false,
        ),
        ("a size past the largest", 128, DESC, AVAIL, USED, false),
        ("a size past 16 bits", 0x1_0010, DESC, AVAIL, USED, false),
        ("descriptors not aligned", 16, DESC + 8, AVAIL, USED, false),
        (
            "available ring not aligned",
            16,
            DESC,
            AVAIL + 1,
            USED,
            false,
        ),
        ("used ring not aligned", 16, DESC, AVAIL, USED + 2, false),
        ("descriptors past RAM", 16, RAM - 0xf0, AVAIL, USED, false),
        ("available ring past RAM", 16, DESC, RAM, USED, false),
        ("used ring past RAM", 64, DESC, AVAIL, RAM - 516, false),
        ("in the hole", 16, 0xd000_0000, AVAIL, USED, false),
        ("at the end of all addresses", 16, !0xf, AVAIL, USED, false),
    ];
    for &(what, size, desc, avail, used, valid) in cases {
        let mut bench = Bench::rng();
        bench.negotiate();
        bench.set_up_queue(size, desc, avail, used);
        bench.write(STATUS, LIVE);
        let (status, interrupt) = if valid {
            (LIVE, 0)
        } else {
            (LIVE | DEVICE_NEEDS_RESET, INTERRUPT_CONFIG)
        };
        assert_eq!(bench.read(STATUS), status, "{what}");
        assert_eq!(bench.read(INTERRUPT_STATUS), interrupt, "{what}");
        bench.bring_up();
        bench.assert_serves();
    }
}

#[test]
fn a_device_whose_driver_broke_the_rules_is_left_alone_until_it_is_reset() {
    let (probe, calls) = Probe::new(Err(Malformed::Request));
    let mut bench = Bench::new(probe);
    bench.bring_up();
    bench.turn();
    assert_eq!(bench.read(STATUS), LIVE | DEVICE_NEEDS_RESET);
    assert_eq!(bench.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
    assert_eq!(bench.device.malformed(), 1);
    for _ in 0..3 {
        bench.write(QUEUE_NOTIFY, 1);
        bench.write(CONFIG, 7);
        bench.write(STATUS, LIVE);
        bench.turn();
    }
    let expected = Calls {
        activate: 1,
        process: 1,
        ..Calls::default()
    };
    assert_eq!(*calls.lock().unwrap(), expected);
    bench.write(STATUS, 0);
    assert_eq!((bench.read(STATUS), bench.read(INTERRUPT_STATUS)), (0, 0));
    assert_eq!(calls.lock().unwrap().reset, 1);
    bench.bring_up();
    assert_eq!(calls.lock().unwrap().activate, 2);
}

#[test]
fn the_loop_waits_for_a_devices_sources_only_while_it_is_live() {
    let (probe, calls) = Probe::new(Ok(()));
    let mut bench = Bench::new(probe);
    bench.turn();
    assert_eq!(calls.lock().unwrap().ready, 0);
    bench.bring_up();
    bench.turn();
    bench.turn();
    assert!(calls.lock().unwrap().ready > 0);
    assert_eq!(calls.lock().unwrap().process, 2, "each queue once");
    bench.write(STATUS, 0);
    bench.turn();
    let before = calls.lock().unwrap().clone();
    bench.turn();
    bench.turn();
    assert_eq!(*calls.lock().unwrap(), before);
    assert_eq!((before.activate, before.reset), (1, 1));
}

#[test]
fn a_device_is_reset_once_for_each_activation_and_when_the_machine_stops() {
    let (probe, calls) = Probe::new(Ok(()));
    let mut bench = Bench::new(probe);
    bench.write(STATUS, 0);
    assert_eq!(calls.lock().unwrap().reset, 0);
    bench.bring_up();
    bench.write(STATUS, 0);
    bench.write(STATUS, 0);
    assert_eq!(calls.lock().unwrap().reset, 1);
    bench.bring_up();
    bench.device.stop();
    bench.device.stop();
    assert_eq!(calls.lock().unwrap().reset, 2);
}

#[test]
fn a_device_goes_with_its_loop_even_while_a_task_waits() {
    let (probe, calls) = Probe::new(Ok(()));
    let mut bench = Bench::new(probe);
    bench.bring_up();
    drop(bench);
    assert_eq!(Arc::strong_count(&calls), 1);
}

#[test]
fn configuration_space_has_fields_of_one_to_eight_bytes_and_zeroes_behind_them() {
    let (probe, calls) = Probe::new(Ok(()));
    let bench = Bench::new(probe);
    for (offset, expected) in [
        (0, &[0x10][..]),
        (2, &[0x12, 0x13]),
        (4, &[0x14, 0x15, 0x16, 0x17]),
        (0, &[0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17]),
        (6, &[0x16, 0x17, 0, 0]),
        (0xef8, &[0; 8]),
        (0, &[0; 3]),
    ] {
        let mut data = vec![0xaa; expected.len()];
        bench.device.read(CONFIG + offset, &mut data);
        assert_eq!(data, expected, "{} at {offset}", expected.len());
    }
    bench.device.write(CONFIG, &[1, 2]);
    bench.device.write(CONFIG, &[3, 4, 5]);
    assert_eq!(calls.lock().unwrap().written, [1, 2]);
}

#[test]
fn a_register_is_32_bits_wide_and_nothing_else() {
    let bench = Bench::rng();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfe, 4), (3, 1)] {
        let mut data = vec![0xaa; len];
        bench.device.read(offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{len} at {offset}");
    }
    bench.device.write(STATUS, &[1]);
    bench.device.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    bench.device.write(STATUS + 2, &[1, 0, 0, 0]);
    assert_eq!(bench.read(STATUS), 0);
    assert_eq!(bench.read(MAGIC_VALUE), MAGIC);
}

#[test]
fn the_generation_changes_with_the_configuration() {
    let bench = Bench::rng();
    let before = bench.read(CONFIG_GENERATION);
    bench.device.interrupt.raise(INTERRUPT_CONFIG);
    assert_ne!(bench.read(CONFIG_GENERATION), before);
}

#[test]
fn a_live_device_goes_on_where_it_was_saved() {
    let mut before = Bench::rng();
    before.bring_up();
    before.assert_serves();
    before.assert_serves();
    before.send(8, driver::WRITE);
    let saved = before.device.save();

    let mut after = Bench::with_ram(Rng::new().unwrap(), before.ram.clone());
    after.sent = before.sent;
    after.device.restore(&saved).unwrap();
    assert_eq!(
        (after.read(STATUS), after.read(INTERRUPT_STATUS)),
        (LIVE, 1)
    );
    assert_eq!(after.used(), 2);
    after.turn();
    assert_eq!(after.used(), 3, "the request that was not notified in time");
    after.assert_serves();
}

#[test]
fn a_device_that_negotiates_or_is_stuck_is_saved_as_it_is() {
    let stuck = |bench: &mut Bench| {
        bench.bring_up();
        bench.send(8, 0);
        bench.turn();
        assert_eq!(bench.read(STATUS), LIVE | DEVICE_NEEDS_RESET);
    };
    let negotiating = |bench: &mut Bench| bench.negotiate();
    let scenes: [&dyn Fn(&mut Bench); 2] = [&stuck, &negotiating];
    for scene in scenes {
        let mut before = Bench::rng();
        scene(&mut before);
        let mut after = Bench::rng();
        after.device.restore(&before.device.save()).unwrap();
        assert_eq!(after.device.save(), before.device.save());
        after.turn();
        assert_eq!(after.read(STATUS), before.read(STATUS));
        after.bring_up();
        after.assert_serves();
    }
}

#[test]
fn the_state_of_another_device_is_refused() {
    let (probe, _) = Probe::new(Ok(()));
    let other = Bench::new(probe);
    let mut bench = Bench::rng();
    assert!(bench.device.restore(&other.device.save()).is_err());
    assert!(bench.device.restore(&SavedState::of(&1_u8)).is_err());
    bench.bring_up();
    bench.assert_serves();
}

#[test]
fn acpi_calls_a_shared_interrupt_shared_and_edge_triggered() {
    for (shared, flags) in [(false, 0b0011), (true, 0b1011)] {
        let host = FakeHypervisor::new(Vec::new());
        let ram = mem::allocate(&[(GuestAddress(0), RAM)]).unwrap();
        let events = EventLoop::new().unwrap();
        let rng = Box::new(Rng::new().unwrap());
        let place = Place { shared, ..PLACE };
        let vm = host.create_vm().unwrap();
        let device = Mmio::new(rng, place, &vm, &ram, events.handle()).unwrap();
        let mut code = Vec::new();
        device.to_aml_bytes(&mut code);
        let has = |bytes: &[u8]| code.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(b"V003") && has(b"LNRO0005"));
        // Extended interrupt descriptor, ACPI 6.5 §6.4.3.6; fixed memory, §6.4.3.4.
        assert!(has(&[0x89, 6, 0, flags, 1, 6, 0, 0, 0]));
        assert!(has(&[0x86, 9, 0, 1, 0, 0x30, 0, 0xd0, 0, 0x10, 0, 0]));
    }
}

/// Marsaglia's xorshift64: every run sees the same storm.
struct Storm(u64);

impl Storm {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.next() as usize % choices.len()]
    }
}

/// A register and a value: sometimes what a driver would write, mostly not.
fn gust(storm: &mut Storm) -> (u64, u32) {
    let any = storm.next() as u32;
    match storm.next() % 10 {
        0 => (STATUS, storm.pick(&[0, 1, 3, 11, 15, 0x40, 0x80, any])),
        1 => (DRIVER_FEATURES, storm.pick(&[0, 1, 1 << 29, any])),
        2 => (DRIVER_FEATURES_SEL, storm.pick(&[0, 1, any])),
        3 => (QUEUE_READY, any & 1),
        4 => (QUEUE_SIZE, storm.pick(&[1, 16, 64, any])),
        5 => (QUEUE_NOTIFY, storm.pick(&[0, 0, 1, any])),
        6 => (
            storm.pick(&[QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW]),
            storm.pick(&[DESC as u32, AVAIL as u32, USED as u32, RAM as u32 - 16, any]),
        ),
        7 => (
            storm.pick(&[QUEUE_DESC_HIGH, QUEUE_DRIVER_HIGH, QUEUE_DEVICE_HIGH]),
            storm.pick(&[0, 0, 0, any]),
        ),
        8 => (QUEUE_SEL, storm.pick(&[0, 0, 1, any])),
        _ => (u64::from(any % 0x1000), any),
    }
}

#[test]
fn whatever_a_guest_writes_the_device_works_again_after_a_reset() {
    let mut storm = Storm(0x5eed_cafe_f00d_d00d);
    let mut bench = Bench::rng();
    let mut live = 0;
    for _ in 0..300 {
        // Half the storms hit a device that is up.
        if storm.next() & 1 == 0 {
            bench.bring_up();
        }
        for _ in 0..storm.next() % 100 {
            let (offset, value) = gust(&mut storm);
            let len = storm.pick(&[4, 4, 4, 4, 4, 4, 1, 2, 3, 8]);
            let wide = u64::from(value) | storm.next() << 32;
            bench.device.write(offset, &wide.to_le_bytes()[..len]);
            let mut data = [0; 8];
            bench.device.read(offset, &mut data[..len]);
            let _ = bench.device.register(offset, Direction::Write);
            if storm.next().is_multiple_of(8) {
                // A descriptor's two halves, an available ring from its index on, and anywhere.
                let anywhere = storm.next() % 0x4_0000;
                let at = storm.pick(&[DESC, DESC + 8, AVAIL, AVAIL, USED, anywhere]);
                let garbage = storm.pick(&[0, DATA, 0x0001_0000_0001_0000, 0x2_0000_0100, wide]);
                bench.ram.write_obj(garbage, GuestAddress(at)).unwrap();
                bench.write(QUEUE_NOTIFY, 0);
            }
            if storm.next().is_multiple_of(16) {
                bench.turn();
                live += u32::from(bench.read(STATUS) == LIVE);
            }
        }
        let saved = bench.device.save();
        bench.device.restore(&saved).unwrap();
        bench.bring_up();
        bench.assert_serves();
    }
    assert!(
        live > 100,
        "the storm must also hit devices that work: {live}"
    );
    let broken = bench.device.malformed();
    assert!(broken > 100, "and break some of them: {broken}");
}
