//! A device behind its registers, driven as a guest would: by writes to the window, with the event loop at work.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::core::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, offset::*};
use super::*;
use crate::hv::Hypervisor;
use crate::hv::fake::FakeHypervisor;
use crate::irq::CountingLine;
use crate::mem::{self as memory, Bytes, GuestAddress};
use crate::virtio::dev::rng::Rng;
use crate::virtio::{F_VERSION_1, INTERRUPT_USED};

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x10_0000;
/// Memory ends here, and goes on there.
const RAM: u64 = 4 << 20;
const HIGH: u64 = 4 << 30;

struct Machine {
    transport: Arc<MmioTransport>,
    ram: GuestRam,
    line: Arc<CountingLine>,
    handle: crate::worker::Handle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Machine {
    fn new() -> Machine {
        Machine::with(Rng::new(0))
    }

    fn with(device: impl VirtioDevice + 'static) -> Machine {
        let host = FakeHypervisor::new(Vec::new());
        let vm = host.create_vm().unwrap();
        let ram = memory::allocate(&[(GuestAddress(0), RAM), (GuestAddress(HIGH), RAM)]).unwrap();
        let line = Arc::new(CountingLine::default());
        let transport = MmioTransport::new(
            vm,
            ram.clone(),
            Box::new(device),
            (0, 0xd000_0000),
            (Irq(16), Arc::clone(&line) as _),
        )
        .unwrap();
        let transport = Arc::new(transport);
        let mut events = EventLoop::new().unwrap();
        transport.attach(&mut events).unwrap();
        let handle = events.handle();
        let thread = Some(std::thread::spawn(move || events.run().unwrap()));
        Machine {
            transport,
            ram,
            line,
            handle,
            thread,
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

    /// Negotiates without features and sets up queue 0 with 8 descriptors, its used ring at `used`.
    fn start(&self, used: u64) {
        self.start_with(0, used);
    }

    fn start_with(&self, features: u64, used: u64) {
        self.negotiate(features);
        self.start_queue(8, [TABLE, AVAIL, used]);
    }

    /// As far as FEATURES_OK.
    fn negotiate(&self, features: u64) {
        self.write(STATUS, 0);
        let mut status = ACKNOWLEDGE | DRIVER;
        self.write(STATUS, status);
        self.write(DRIVER_FEATURES_SEL, 0);
        self.write(DRIVER_FEATURES, features as u32);
        self.write(DRIVER_FEATURES_SEL, 1);
        self.write(DRIVER_FEATURES, (F_VERSION_1 >> 32) as u32);
        status |= FEATURES_OK;
        self.write(STATUS, status);
    }

    /// Sets up queue 0 with descriptor table, available and used ring, and says DRIVER_OK.
    fn start_queue(&self, size: u32, tables: [u64; 3]) {
        self.write(QUEUE_SEL, 0);
        self.write(QUEUE_SIZE, size);
        let registers = [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW];
        for (low, table) in registers.into_iter().zip(tables) {
            self.write(low, table as u32);
            self.write(low + 4, (table >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.write(STATUS, status);
    }

    /// Makes one buffer for random bytes available, the `index`th request, and notifies.
    fn request(&self, index: u16, address: u64) {
        self.ram.write_obj(address, GuestAddress(TABLE)).unwrap();
        self.ram.write_obj(64_u32, GuestAddress(TABLE + 8)).unwrap();
        self.ram.write_obj(2_u16, GuestAddress(TABLE + 12)).unwrap();
        let slot = AVAIL + 4 + u64::from(index % 8) * 2;
        self.ram.write_obj(0_u16, GuestAddress(slot)).unwrap();
        self.ram
            .write_obj(index.wrapping_add(1), GuestAddress(AVAIL + 2))
            .unwrap();
        self.write(QUEUE_NOTIFY, 0);
    }

    fn used(&self) -> u16 {
        self.ram.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn clear_rings(&self) {
        for ring in [AVAIL, USED] {
            self.ram.write_slice(&[0; 64], GuestAddress(ring)).unwrap();
        }
    }

    fn wait_until(&self, what: &str, done: impl Fn(&Machine) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_notification_is_answered_with_a_used_buffer_and_an_interrupt() {
    let machine = Machine::new();
    machine.start(USED);
    machine.request(0, DATA);
    machine.wait_until("used", |machine| machine.used() == 1);
    machine.wait_until("interrupt", |machine| machine.line.edges() == 1);
    assert_eq!(machine.read(INTERRUPT_STATUS), INTERRUPT_USED);
    machine.write(INTERRUPT_ACK, INTERRUPT_USED);
    assert_eq!(machine.read(INTERRUPT_STATUS), 0);
    let mut bytes = [0; 64];
    machine
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    assert_ne!(bytes, [0; 64]);
}

#[test]
fn a_driver_that_counts_by_indices_is_asked_for_each_next_notification() {
    let machine = Machine::new();
    machine.start_with(F_EVENT_IDX, USED);
    // `avail_event` is the word after the used ring's 8 elements, `used_event` the one after the available ring's.
    let avail_event = GuestAddress(USED + 4 + 8 * 8);
    for index in 0..20 {
        let expected = index;
        machine.wait_until("asked", |machine| {
            machine.ram.read_obj::<u16>(avail_event).unwrap() == expected
        });
        let used_event = GuestAddress(AVAIL + 4 + 8 * 2);
        machine.ram.write_obj(index, used_event).unwrap();
        machine.request(index, DATA);
        machine.wait_until("used", |machine| machine.used() == index + 1);
        machine.wait_until("interrupt", |machine| {
            machine.line.edges() == u64::from(index) + 1
        });
    }
}

#[test]
fn requests_made_before_driver_ok_are_served_after_it() {
    let machine = Machine::new();
    machine.request(0, DATA);
    assert_eq!(machine.used(), 0);
    machine.start(USED);
    machine.wait_until("used", |machine| machine.used() == 1);
}

#[test]
fn a_broken_request_asks_for_a_reset_and_the_device_works_again_after_it() {
    let machine = Machine::new();
    machine.start(USED);
    machine.request(0, 0xd000_0000);
    machine.wait_until("needs reset", |machine| {
        machine.read(STATUS) & NEEDS_RESET != 0
    });
    assert_eq!(machine.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
    machine.request(1, DATA);
    assert_eq!(machine.transport.malformed(), 1);
    machine.clear_rings();
    machine.start(USED);
    assert_eq!(machine.read(STATUS) & NEEDS_RESET, 0);
    machine.request(0, DATA);
    machine.wait_until("used", |machine| machine.used() == 1);
}

#[test]
fn a_queue_is_taken_only_if_its_tables_are_aligned_and_lie_wholly_in_memory() {
    let ends = |bytes| RAM - bytes;
    let cases: &[(&str, u32, [u64; 3], bool)] = &[
        ("as it should be", 8, [TABLE, AVAIL, USED], true),
        ("up to the last byte", 64, [ends(1024), AVAIL, USED], true),
        ("the used ring, too", 8, [TABLE, AVAIL, ends(72)], true),
        (
            "descriptors not aligned",
            8,
            [TABLE + 8, AVAIL, USED],
            false,
        ),
        ("available not aligned", 8, [TABLE, AVAIL + 1, USED], false),
        ("used not aligned", 8, [TABLE, AVAIL, USED + 2], false),
        (
            "descriptors past memory",
            64,
            [ends(1008), AVAIL, USED],
            false,
        ),
        ("available past memory", 8, [TABLE, ends(20), USED], false),
        ("used past memory", 8, [TABLE, AVAIL, ends(68)], false),
        ("in the hole", 8, [TABLE, AVAIL, 0xd000_0000], false),
        (
            "from nowhere into memory",
            64,
            [HIGH - 16, AVAIL, USED],
            false,
        ),
        ("past all addresses", 8, [TABLE, AVAIL, u64::MAX - 3], false),
    ];
    for (what, size, tables, taken) in cases {
        let machine = Machine::new();
        machine.negotiate(0);
        machine.start_queue(*size, *tables);
        let refused = machine.read(STATUS) & NEEDS_RESET != 0;
        assert_eq!(refused, !taken, "{what}");
        machine.start(USED);
        machine.request(0, DATA);
        machine.wait_until(what, |machine| machine.used() == 1);
    }
}

#[test]
fn an_interrupt_handler_never_waits_for_a_device_that_is_at_work() {
    let machine = Machine::new();
    let at_work = machine.transport.lock();
    let transport = Arc::clone(&machine.transport);
    let (done, seen) = std::sync::mpsc::channel();
    let vcpu = std::thread::spawn(move || {
        let mut status = [0xaa; 4];
        transport.read(INTERRUPT_STATUS, &mut status);
        transport.write(INTERRUPT_ACK, &status);
        transport.write(QUEUE_NOTIFY, &[0; 4]);
        done.send(status).unwrap();
    });
    assert_eq!(seen.recv_timeout(Duration::from_secs(20)), Ok([0; 4]));
    drop(at_work);
    vcpu.join().unwrap();
}

/// A device that waits for its source when its one byte of configuration says so, and then takes that back.
struct Knob {
    source: Arc<OwnedFd>,
    wanted: u8,
    ready: Arc<AtomicU32>,
}

impl VirtioDevice for Knob {
    fn name(&self) -> &str {
        "KNOB"
    }

    fn device_id(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if let (0, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.wanted;
        }
    }

    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.wanted = data[0];
    }

    fn activate(&mut self, _activation: Activation) {}

    fn process(&mut self, _queue: usize) -> Result<(), Malformed> {
        Ok(())
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![Arc::clone(&self.source)]
    }

    fn interests(&self) -> Vec<Interest> {
        let interests = [Interest::NONE, Interest::READ];
        vec![interests[usize::from(self.wanted)]]
    }

    fn ready(&mut self, _source: usize, _readiness: Interest) -> Result<(), Malformed> {
        self.wanted = 0;
        self.ready.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        SavedState::of(&())
    }

    fn restore(&mut self, _state: &SavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[test]
fn a_write_to_the_configuration_changes_what_the_event_loop_waits_for() {
    let ready = Arc::<AtomicU32>::default();
    let machine = Machine::with(Knob {
        source: Arc::new(eventfd(1, EventfdFlags::NONBLOCK).unwrap()),
        wanted: 0,
        ready: Arc::clone(&ready),
    });
    machine.start(USED);
    for round in 1..5 {
        machine.transport.write(CONFIG, &[1]);
        machine.wait_until("ready", |_| ready.load(Ordering::SeqCst) == round);
        assert_eq!(machine.read(CONFIG), 0);
    }
}

#[test]
fn configuration_is_accessed_in_the_widths_of_its_fields() {
    let machine = Machine::with(Knob {
        source: Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()),
        wanted: 0,
        ready: Arc::default(),
    });
    for (data, read) in [
        (&[1][..], 1),
        (&[0, 0], 0),
        (&[1, 0, 0], 0),
        (&[1, 0, 0, 0], 1),
        (&[0; 8], 0),
    ] {
        machine.transport.write(CONFIG, data);
        assert_eq!(machine.read(CONFIG), read, "{data:?}");
    }
    let mut odd = [0xaa; 3];
    machine.transport.read(CONFIG, &mut odd);
    assert_eq!(odd, [0; 3]);
}

#[test]
fn only_aligned_words_reach_the_registers() {
    let machine = Machine::new();
    machine.transport.write(STATUS, &[1]);
    machine.transport.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    machine.transport.write(STATUS + 1, &[1, 0, 0, 0]);
    assert_eq!(machine.read(STATUS), 0);
    let mut data = [0xaa; 8];
    machine.transport.read(MAGIC_VALUE, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let machine = Machine::new();
    machine.start(USED);
    machine.request(0, DATA);
    machine.wait_until("used", |machine| machine.used() == 1);
    machine.wait_until("interrupt", |machine| machine.line.edges() == 1);
    let saved = machine.transport.save();
    machine.write(STATUS, 0);
    machine.transport.restore(&saved).unwrap();
    assert_eq!(machine.read(STATUS), 15);
    machine.request(1, DATA);
    machine.wait_until("the second", |machine| machine.used() == 2);
    assert!(machine.transport.restore(&SavedState::of(&())).is_err());
}

/// Marsaglia's xorshift: the same sequence on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn no_sequence_of_accesses_brings_the_device_down() {
    let machine = Machine::new();
    let mut random = Random(0x5eed);
    for _ in 0..200 {
        if random.below(2) == 0 {
            machine.start(USED);
        }
        for _ in 0..100 {
            // Mostly registers and small values, which get further than noise does.
            let at = match random.below(8) {
                0 => random.below(WINDOW),
                _ => random.below(0x40) * 4,
            };
            let value = match random.below(4) {
                0 => random.below(1 << 32),
                1 => 1 << random.below(32),
                _ => random.below(16),
            };
            let len = [1, 2, 4, 4, 4, 4, 8][random.below(7) as usize];
            let mut data = value.to_le_bytes();
            match random.below(3) {
                0 => machine.transport.read(at, &mut data[..len]),
                _ => drop(machine.transport.write(at, &data[..len])),
            }
        }
    }
    machine.write(STATUS, 0);
    machine.clear_rings();
    machine.start(USED);
    machine.request(0, DATA);
    machine.wait_until("used", |machine| machine.used() == 1);
}
