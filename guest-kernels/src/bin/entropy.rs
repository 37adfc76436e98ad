//! Lesson 18: a device made for virtual machines.
//!
//! A serial port costs an exit for each byte. A virtio device is driven by a *queue* in memory instead: three tables by
//! which the guest hands over whole buffers, and the device hands them back. Registers are only for finding the device
//! and agreeing on features; after that, one write tells the device of any number of requests, and one interrupt tells
//! the guest of any number of answers. This lesson asks the entropy device, the simplest of all, for random bytes.
//!
//! The first page of the MMIO hole is where sarang puts its first device; a kernel with an AML interpreter would read
//! that in the DSDT (`LNRO0005`), together with the interrupt.
//!
//! On the bus: some thirty register accesses while the driver starts, and two in each interrupt, all with names in the
//! trace. The notifications are not there: KVM turns a write to `QueueNotify` into an event for the VMM (an *ioeventfd*),
//! and the guest runs on at once.
//!
//! Manuals: virtio 1.3 §3.1.1 (how a driver starts), §4.2 (registers in memory), §2.7 (split queues), §5.4 (entropy).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/entropy --trace exits.txt`
#![no_std]
#![no_main]

use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use guest::uart::Hex;
use guest::{acpi, apic, boot::StartInfo, exit, interrupt_handler, interrupts, paging, print};

/// The device's registers, and the pin of the I/O APIC that it is wired to.
const DEVICE: u64 = 0xd000_0000;
const PIN: u32 = 16;
/// Any vector from 32 on would do.
const VECTOR: u8 = 0x2a;

/// Registers, §4.2.2.
const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;

/// Bits of `Status`, §2.1.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// "virt", and the entropy device's type.
const MAGIC: u32 = 0x7472_6976;
const ENTROPY: u32 = 4;
/// Bit 0 of the second half: VIRTIO_F_VERSION_1.
const VERSION_1: u32 = 1;

const SIZE: usize = 4;
const REQUESTS: u16 = 4;
/// A descriptor's flag: the device writes into this buffer.
const WRITE: u16 = 2;

/// §2.7.5: one buffer.
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// §2.7.6: what the driver hands over.
#[repr(C, align(2))]
struct Available {
    flags: u16,
    index: u16,
    ring: [u16; SIZE],
}

/// §2.7.8: what the device hands back, number and length.
#[repr(C, align(4))]
struct Used {
    flags: u16,
    index: u16,
    ring: [[u32; 2]; SIZE],
}

#[repr(C, align(16))]
struct Queue {
    descriptors: [Descriptor; SIZE],
    available: Available,
    used: Used,
}

// SAFETY: all zeroes are a queue with nothing in it.
static mut QUEUE: Queue = unsafe { core::mem::zeroed() };
static mut BUFFER: u64 = 0;
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

fn read(register: u64) -> u32 {
    // SAFETY: mapped by `kernel_main`.
    unsafe { ((DEVICE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: mapped by `kernel_main`.
    unsafe { ((DEVICE + register) as *mut u32).write_volatile(value) }
}

interrupt_handler! {
    /// The device used a buffer; which one is in memory.
    fn buffer_used() {
        write(INTERRUPT_ACK, read(INTERRUPT_STATUS));
        INTERRUPTS.store(INTERRUPTS.load(Relaxed) + 1, Relaxed);
        apic::write(apic::EOI, 0);
    }
}

/// §3.1.1: the device is found, agreed with, given a queue and started.
fn start_device() -> bool {
    if read(MAGIC_VALUE) != MAGIC || read(VERSION) != 2 || read(DEVICE_ID) != ENTROPY {
        return false;
    }
    write(STATUS, 0);
    write(STATUS, ACKNOWLEDGE);
    write(STATUS, ACKNOWLEDGE | DRIVER);
    write(DRIVER_FEATURES_SEL, 1);
    write(DRIVER_FEATURES, VERSION_1);
    write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if read(STATUS) & FEATURES_OK == 0 {
        return false;
    }
    write(QUEUE_SEL, 0);
    if read(QUEUE_READY) != 0 || read(QUEUE_SIZE_MAX) < SIZE as u32 {
        return false;
    }
    write(QUEUE_SIZE, SIZE as u32);
    let queue = &raw const QUEUE as u64;
    for (register, table) in [
        (QUEUE_DESC, offset_of!(Queue, descriptors)),
        (QUEUE_DRIVER, offset_of!(Queue, available)),
        (QUEUE_DEVICE, offset_of!(Queue, used)),
    ] {
        let address = queue + table as u64;
        write(register, address as u32);
        write(register + 4, (address >> 32) as u32);
    }
    write(QUEUE_READY, 1);
    write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    true
}

/// Has the device fill [`BUFFER`], and sleeps until it has.
fn request(number: u16) -> u64 {
    let slot = number as usize % SIZE;
    let descriptor = Descriptor {
        address: &raw const BUFFER as u64,
        len: size_of::<u64>() as u32,
        flags: WRITE,
        next: 0,
    };
    // SAFETY: the device looks at the descriptor only after the index has moved, and writes only into the buffer.
    unsafe {
        (&raw mut QUEUE.descriptors[slot]).write_volatile(descriptor);
        (&raw mut QUEUE.available.ring[slot]).write_volatile(slot as u16);
        (&raw mut QUEUE.available.index).write_volatile(number + 1);
        write(QUEUE_NOTIFY, 0);
        while (&raw const QUEUE.used.index).read_volatile() != number + 1 {
            interrupts::wait();
        }
        (&raw const BUFFER).read_volatile()
    }
}

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    let io_apic = acpi::madt_entries(start)
        .into_iter()
        .find(|entry| entry.kind == 1)
        .map_or(0, |entry| entry.read::<u32>(4).into());
    interrupts::mask_pics();
    interrupts::set_gate(VECTOR, buffer_used, interrupts::KERNEL);
    apic::enable();
    apic::route(io_apic, PIN, VECTOR);
    paging::identity_map(DEVICE, 4096);

    if !start_device() {
        print!("entropy: there is no such device\n");
        exit::exit(1)
    }
    let mut last = 0;
    for number in 0..REQUESTS {
        let random = request(number);
        print!("entropy: ", Hex(random), "\n");
        if random == last {
            print!("entropy: that is not random\n");
            exit::exit(1)
        }
        last = random;
    }
    let interrupts: u64 = INTERRUPTS.load(Relaxed).into();
    print!(
        "entropy: ",
        u64::from(REQUESTS),
        " requests, ",
        interrupts,
        " interrupts\n"
    );
    exit::power_off(start)
}
