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

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use guest::uart::Hex;
use guest::virtio::{
    DEVICE_ID, Descriptor, Driver, F_VERSION_1, INTERRUPT_ACK, INTERRUPT_STATUS, QUEUE_NOTIFY,
    Queue, WRITE, Window,
};
use guest::{acpi, apic, boot::StartInfo, exit, interrupt_handler, interrupts, paging, print};

/// The device's registers, and the pin of the I/O APIC that it is wired to.
const DEVICE: Window = Window(0xd000_0000);
const PIN: u32 = 16;
/// Any vector from 32 on would do.
const VECTOR: u8 = 0x2a;

/// The entropy device's type.
const ENTROPY: u32 = 4;

const SIZE: usize = 4;
const REQUESTS: u16 = 4;

// SAFETY: all zeroes are a queue with nothing in it.
static mut QUEUE: Queue<SIZE> = unsafe { core::mem::zeroed() };
static mut BUFFER: u64 = 0;
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

interrupt_handler! {
    /// The device used a buffer; which one is in memory.
    fn buffer_used() {
        DEVICE.write(INTERRUPT_ACK, DEVICE.read(INTERRUPT_STATUS));
        INTERRUPTS.store(INTERRUPTS.load(Relaxed) + 1, Relaxed);
        apic::write(apic::EOI, 0);
    }
}

/// §3.1.1: the device is found, agreed with, given a queue and started.
fn start_device() -> bool {
    if !DEVICE.is_virtio() || DEVICE.read(DEVICE_ID) != ENTROPY {
        return false;
    }
    let agreed = DEVICE.start(F_VERSION_1).is_some() && DEVICE.set_queue(0, &raw mut QUEUE);
    if agreed {
        DEVICE.driver_ok();
    }
    agreed
}

/// Has the device fill [`BUFFER`], and sleeps until it has.
fn request(queue: &mut Driver<SIZE>, number: u16) -> u64 {
    let slot = number % SIZE as u16;
    queue.set_descriptor(
        slot,
        Descriptor {
            address: &raw const BUFFER as u64,
            len: size_of::<u64>() as u32,
            flags: WRITE,
            next: 0,
        },
    );
    queue.push(slot);
    if queue.publish() {
        DEVICE.write(QUEUE_NOTIFY, 0);
    }
    while queue.pop().is_none() {
        interrupts::wait();
    }
    // SAFETY: the device has given the buffer back.
    unsafe { (&raw const BUFFER).read_volatile() }
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
    paging::identity_map(DEVICE.0, 4096);

    if !start_device() {
        print!("entropy: there is no such device\n");
        exit::exit(1)
    }
    // SAFETY: this is its only driver.
    let mut queue = unsafe { Driver::new(&raw mut QUEUE, false) };
    let mut last = 0;
    for number in 0..REQUESTS {
        let random = request(&mut queue, number);
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
