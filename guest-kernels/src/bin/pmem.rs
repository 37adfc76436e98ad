//! Lesson 19: memory that survives.
//!
//! A disk is read and written by requests, and each costs a copy. Persistent memory is just there: loads and stores
//! reach a file of the host, through the same page tables as RAM. The device, virtio-pmem, has two jobs. It says
//! where the memory lies, which neither the memory map nor ACPI do; and it takes one kind of request, "make what I
//! stored last".
//!
//! The first and the last eight bytes of the file must say [`FIRST`] and [`LAST`]. The lesson writes eight bytes at
//! [`PLACE`], looks whether they are there, and has them flushed. On a file that is given read-only they are not
//! there: the store ended in the VMM, as if at an address with no memory, and was dropped.
//!
//! On the bus: the registers of a virtio driver (lesson 18), and nothing for the memory itself; read-only, one
//! `mmio write` above 4 GiB. With the word `wait` on the kernel command line, the lesson waits for a byte on the serial
//! port before it touches the memory.
//!
//! Manuals: virtio 1.3 §5.19 (persistent memory), §4.2 (registers in memory), §2.7 (split queues); SDM Vol. 3A 4.5.
//!
//! Run: `truncate -s 4M f; printf persists | dd of=f conv=notrunc; printf 'the end.' | dd of=f conv=notrunc bs=8
//! seek=524287`, then `sarang run --pmem f -k target/x86_64-unknown-linux-gnu/release/pmem`, and look for `was here`
//! in `f`.
#![no_std]
#![no_main]

use core::mem::offset_of;
use guest::uart::{self, Hex, MCR, MCR_DTR, MCR_RTS};
use guest::{
    acpi, apic, boot::StartInfo, exit, interrupt_handler, interrupts, paging, port, print,
};

/// Where sarang's virtio devices are, and the pin of the I/O APIC that the first of them is wired to.
const DEVICES: u64 = 0xd000_0000;
const FIRST_PIN: u32 = 16;
/// This many are looked at, each on the pin after the one before; a window is a page.
const COUNT: u64 = 8;
const WINDOW: u64 = 0x1000;
/// Any vector from 32 on would do.
const VECTOR: u8 = 0x2b;

/// Registers, §4.2.2.
const MAGIC_VALUE: u64 = 0x000;
const DEVICE_ID: u64 = 0x008;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
/// The configuration space: `start` and `size`, §5.19.4.
const CONFIG_START: u64 = 0x100;
const CONFIG_SIZE: u64 = 0x108;

/// Bits of `Status`, §2.1.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// "virt", and the type of persistent memory.
const MAGIC: u32 = 0x7472_6976;
const PMEM: u32 = 27;
/// Bit 0 of the second half: VIRTIO_F_VERSION_1.
const VERSION_1: u32 = 1;
/// Flags of a descriptor: another follows; the device writes into this buffer.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The one request, §5.19.6.
const REQ_TYPE_FLUSH: u32 = 0;

/// What the file begins and ends with, and what the lesson writes at which offset.
const FIRST: u64 = u64::from_le_bytes(*b"persists");
const LAST: u64 = u64::from_le_bytes(*b"the end.");
const HERE: u64 = u64::from_le_bytes(*b"was here");
const PLACE: u64 = 0x1000;

/// Exit statuses.
const NO_DEVICE: u8 = 1;
const OTHER_BYTES: u8 = 2;
const READ_ONLY: u8 = 3;
const NOT_FLUSHED: u8 = 4;

const SIZE: usize = 2;

/// §2.7.5: one buffer.
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// The tables of a queue that is used once, and what its one request points to.
#[repr(C, align(16))]
struct Queue {
    descriptors: [Descriptor; SIZE],
    /// §2.7.6: flags, index, and the numbers of descriptors.
    available: [u16; 2 + SIZE],
    /// §2.7.8: flags and index, then number and length of what the device hands back.
    used: (u16, u16, [[u32; 2]; SIZE]),
    request: u32,
    ret: u32,
}

// SAFETY: all zeroes are a queue with nothing in it.
static mut QUEUE: Queue = unsafe { core::mem::zeroed() };
/// The device's registers.
static mut DEVICE: u64 = 0;

fn read(register: u64) -> u32 {
    // SAFETY: `kernel_main` maps all windows; DEVICE does not change once interrupts are possible.
    unsafe { ((DEVICE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as above.
    unsafe { ((DEVICE + register) as *mut u32).write_volatile(value) }
}

fn read_64(register: u64) -> u64 {
    u64::from(read(register)) | u64::from(read(register + 4)) << 32
}

interrupt_handler! {
    /// The device used a buffer; which one is in memory.
    fn buffer_used() {
        write(INTERRUPT_ACK, read(INTERRUPT_STATUS));
        apic::write(apic::EOI, 0);
    }
}

/// Looks for the device; the result is its pin.
fn find() -> Option<u32> {
    for index in 0..COUNT {
        // SAFETY: nothing else runs.
        unsafe { DEVICE = DEVICES + index * WINDOW };
        if read(MAGIC_VALUE) == MAGIC && read(DEVICE_ID) == PMEM {
            return Some(FIRST_PIN + index as u32);
        }
    }
    None
}

/// §3.1.1, as in lesson 18.
fn start_device() -> bool {
    write(STATUS, 0);
    write(STATUS, ACKNOWLEDGE | DRIVER);
    write(DRIVER_FEATURES_SEL, 1);
    write(DRIVER_FEATURES, VERSION_1);
    write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if read(STATUS) & FEATURES_OK == 0 {
        return false;
    }
    write(QUEUE_SEL, 0);
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

/// Has all stores so far made to last, and sleeps until they do. The result is what the device says: 0 if it went
/// well.
fn flush() -> u32 {
    let four = size_of::<u32>() as u32;
    // SAFETY: the device looks at the request only after the index has moved, and writes only `ret` and `used`.
    unsafe {
        (&raw mut QUEUE.request).write_volatile(REQ_TYPE_FLUSH);
        (&raw mut QUEUE.ret).write_volatile(u32::MAX);
        (&raw mut QUEUE.descriptors[0]).write_volatile(Descriptor {
            address: &raw const QUEUE.request as u64,
            len: four,
            flags: NEXT,
            next: 1,
        });
        (&raw mut QUEUE.descriptors[1]).write_volatile(Descriptor {
            address: &raw const QUEUE.ret as u64,
            len: four,
            flags: WRITE,
            next: 0,
        });
        (&raw mut QUEUE.available[1]).write_volatile(1);
        write(QUEUE_NOTIFY, 0);
        while (&raw const QUEUE.used.1).read_volatile() != 1 {
            interrupts::wait();
        }
        (&raw const QUEUE.ret).read_volatile()
    }
}

/// Whether the command line has the word `wait`.
fn must_wait(start: &StartInfo) -> bool {
    if start.command_line == 0 {
        return false;
    }
    let mut word = 0_u64;
    for at in start.command_line.. {
        // SAFETY: the loader puts the command line, with a NUL at its end, into the first 2 MiB, which are mapped.
        let byte = unsafe { (at as *const u8).read() };
        if byte == 0 || byte == b' ' {
            if word == u64::from(u32::from_be_bytes(*b"wait")) {
                return true;
            }
            word = 0;
            if byte == 0 {
                break;
            }
        } else {
            word = word << 8 | u64::from(byte);
        }
    }
    false
}

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    let io_apic = acpi::madt_entries(start)
        .into_iter()
        .find(|entry| entry.kind == 1)
        .map_or(0, |entry| entry.read::<u32>(4).into());
    paging::identity_map(DEVICES, COUNT * WINDOW);
    let Some(pin) = find() else {
        print!("pmem: there is no such device\n");
        exit::exit(NO_DEVICE)
    };
    interrupts::mask_pics();
    interrupts::set_gate(VECTOR, buffer_used, interrupts::KERNEL);
    apic::enable();
    apic::route(io_apic, pin, VECTOR);
    let (memory, size) = (read_64(CONFIG_START), read_64(CONFIG_SIZE));
    print!("pmem: ", size, " bytes at ", Hex(memory), "\n");
    if !start_device() || !paging::identity_map(memory, size) {
        exit::exit(NO_DEVICE)
    }
    if must_wait(start) {
        print!("pmem: waiting\n");
        port::outb(MCR, MCR_DTR | MCR_RTS);
        while uart::get().is_none() {}
    }

    let at = |offset: u64| (memory + offset) as *mut u64;
    // SAFETY: all of the memory is mapped, and nothing else is there.
    let (first, last) = unsafe { (at(0).read_volatile(), at(size - 8).read_volatile()) };
    if (first, last) != (FIRST, LAST) {
        print!("pmem: it holds ", Hex(first), " and ", Hex(last), "\n");
        exit::exit(OTHER_BYTES)
    }
    // SAFETY: as above.
    let here = unsafe {
        at(PLACE).write_volatile(HERE);
        at(PLACE).read_volatile()
    };
    if here != HERE {
        print!("pmem: it cannot be written\n");
        exit::exit(READ_ONLY)
    }
    if flush() != 0 {
        print!("pmem: it cannot be flushed\n");
        exit::exit(NOT_FLUSHED)
    }
    print!("pmem: written and flushed\n");
    exit::power_off(start)
}
