//! Lesson 19: a disk, and how fast it is.
//!
//! A request to a virtio disk is three pieces of memory: a header that says what to do from which sector on, the data,
//! and a byte into which the device writes how it went (§5.2.6). Each piece has a descriptor; a chain of three is one
//! request. The driver here has up to 32 requests under way. It does not sleep until an interrupt: it looks at the used
//! ring again and again, hands each request that is done over anew, for another place on the disk, and notifies the
//! device only if the device asks for it (§2.7.10). So it shows what a disk can do, and nearly nothing of what
//! interrupts cost.
//!
//! The loop runs in user mode, where it is fast on every KVM (see `src/user.rs`). Its memory and the device's registers
//! are mapped for user mode too: a driver needs no privileges, just a way to its device.
//!
//! What it does is said on the kernel command line:
//!
//! | word | |
//! | --- | --- |
//! | `do=check` | writes all of the disk, flushes, and reads it back: each 8 bytes hold the complement of their offset. This is what it does unless told otherwise |
//! | `do=read`, `do=write` | block after block from the beginning, and from there again after the last |
//! | `do=random` | reads blocks in random order |
//! | `size=4096` | bytes in a block: 512 to 131072, in whole sectors of 512 |
//! | `depth=1` | requests under way at once, 1 to 32 |
//! | `requests=1000` | how many in all |
//!
//! The last three are for the timing of a host that watches the serial port: between the lines `block: begin` and
//! `block: end` there are only these requests. `benches/block.rs` of sarang does that.
//!
//! On the bus: the register accesses with which the driver starts, all named in the trace, and then only the letters.
//! KVM turns notifications into events for the VMM, and there are no interrupts.
//!
//! Manuals: virtio 1.3 §5.2 (block device), §2.7 (split queues), §3.1.1 (how a driver starts), §4.2 (registers).
//!
//! Run: `truncate -s 64M disk.img`, and
//! `sarang run -k target/x86_64-unknown-linux-gnu/release/block --disk disk.img -p 'do=random depth=32'`
#![no_std]
#![no_main]

use core::hint::spin_loop;
use guest::virtio::{
    CONFIG, DEVICE_ID, Descriptor, Driver, F_EVENT_IDX, F_VERSION_1, NEXT, QUEUE_NOTIFY, Queue,
    WRITE, Window,
};
use guest::{boot::StartInfo, exit, paging, print, user};

/// Where devices' registers may be, and how far apart: on sarang's board, and on QEMU's microvm.
const WINDOWS: [(u64, u64, u64); 2] = [(0xd000_0000, 0x1000, 32), (0xfeb0_0000, 0x200, 24)];

/// The block device's type, and a feature of it: there is a cache to flush.
const BLOCK: u32 = 2;
const F_FLUSH: u64 = 1 << 9;

/// Types of requests, §5.2.6.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// The status byte: 0 is success, and 1 is this.
const IO_ERROR: u8 = 1;
/// What stands there until the device has answered.
const NO_STATUS: u8 = 0xff;

const SECTOR: u64 = 512;
/// A serial number.
const ID_BYTES: usize = 20;

const DEPTH_MAX: u64 = 32;
/// The requests have four descriptors each, and use three at most.
const SIZE: usize = 4 * DEPTH_MAX as usize;

/// Memory that nobody uses, for data: 32 pieces of 128 KiB.
const DATA: u64 = 4 << 20;
const BYTES_MAX: u64 = 128 << 10;

/// How a request begins.
#[derive(Clone, Copy)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: all zeroes are a queue with nothing in it.
static mut QUEUE: Queue<SIZE> = unsafe { core::mem::zeroed() };
static mut HEADERS: [Header; DEPTH_MAX as usize] = [Header {
    kind: 0,
    reserved: 0,
    sector: 0,
}; DEPTH_MAX as usize];
static mut STATUSES: [u8; DEPTH_MAX as usize] = [0; DEPTH_MAX as usize];

/// A disk that has been started.
struct Disk {
    window: Window,
    queue: Driver<SIZE>,
    /// In sectors.
    capacity: u64,
}

/// A number of requests of one kind, for the loop in user mode.
struct Work<'a> {
    disk: &'a mut Disk,
    kind: u32,
    /// In each request.
    bytes: u64,
    depth: u64,
    requests: u64,
    /// How many of them have been started.
    started: u64,
    /// The block on the disk where the first one begins.
    first: u64,
    random: bool,
    /// Fill what is written with the pattern, and look for it in what is read.
    pattern: bool,
}

/// What [`run`] returns: how it went. Others are the status byte of a request that failed.
const SUCCESS: u64 = 0;
const DIFFERENT: u64 = 256;

impl Disk {
    /// §3.1.1, and §5.2.4 for the capacity.
    fn find() -> Option<Disk> {
        let window = WINDOWS.into_iter().find_map(|(base, stride, count)| {
            paging::identity_map_for_user(base, stride * count);
            let windows = (0..count).map(|number| Window(base + number * stride));
            windows
                .take_while(|window| window.is_virtio())
                .find(|window| window.read(DEVICE_ID) == BLOCK)
        })?;
        let features = window.start(F_VERSION_1 | F_EVENT_IDX | F_FLUSH)?;
        if !window.set_queue(0, &raw mut QUEUE) {
            return None;
        }
        // SAFETY: this is its only driver.
        let mut queue = unsafe { Driver::new(&raw mut QUEUE, features & F_EVENT_IDX != 0) };
        queue.want_no_interrupts();
        window.driver_ok();
        Some(Disk {
            window,
            queue,
            capacity: u64::from(window.read(CONFIG)) | u64::from(window.read(CONFIG + 4)) << 32,
        })
    }

    /// Writes a request into slot number `slot`, and hands it over.
    fn request(&mut self, slot: u64, kind: u32, sector: u64, bytes: u64) {
        let header = Header {
            kind,
            reserved: 0,
            sector,
        };
        let first = 4 * slot as u16;
        let (place, status) = places(slot);
        // SAFETY: both places are in this image, and the device does not have them.
        unsafe {
            place.write_volatile(header);
            status.write_volatile(NO_STATUS);
        }
        let data_flags = if kind == OUT { NEXT } else { NEXT | WRITE };
        let pieces = [
            (place as u64, size_of::<Header>() as u64, NEXT),
            (data(slot), bytes, data_flags),
            (status as u64, 1, WRITE),
        ];
        for (number, (address, len, flags)) in (first..).zip(pieces) {
            let descriptor = Descriptor {
                address,
                len: len as u32,
                flags,
                // There is no data in a flush, and no descriptor may be empty.
                next: if bytes == 0 { first + 2 } else { number + 1 },
            };
            self.queue.set_descriptor(number, descriptor);
        }
        self.queue.push(first);
    }
}

fn data(slot: u64) -> u64 {
    DATA + slot * BYTES_MAX
}

/// Where a slot's header and status are.
fn places(slot: u64) -> (*mut Header, *mut u8) {
    let slot = (slot % DEPTH_MAX) as usize;
    (
        (&raw mut HEADERS).cast::<Header>().wrapping_add(slot),
        (&raw mut STATUSES).cast::<u8>().wrapping_add(slot),
    )
}

impl Work<'_> {
    /// Does it in user mode.
    fn done(mut self) -> u64 {
        user::call(run, &raw mut self as u64)
    }

    /// Has a slot start the next request, if there is one.
    fn start(&mut self, slot: u64) {
        if self.started == self.requests {
            return;
        }
        let blocks = (self.disk.capacity * SECTOR / self.bytes.max(SECTOR)).max(1);
        let block = match self.random {
            true => random_below(self.started, blocks),
            // Only the test past the end starts there.
            false if self.first >= blocks => self.first,
            false => self.started % blocks,
        };
        self.started += 1;
        let sector = block * self.bytes / SECTOR;
        if self.pattern && self.kind == OUT {
            each_word(slot, sector, self.bytes, |word, value| {
                // SAFETY: the slot's memory, which the device does not have.
                unsafe { word.write_volatile(value) };
            });
        }
        self.disk.request(slot, self.kind, sector, self.bytes);
    }

    /// Looks at a slot's answer.
    fn end(&mut self, slot: u64) -> u64 {
        let (header, status) = places(slot);
        // SAFETY: the device has given both back.
        let (header, status) = unsafe { (header.read_volatile(), status.read_volatile()) };
        let mut result = status.into();
        if self.pattern && self.kind == IN && status == 0 {
            each_word(slot, header.sector, self.bytes, |word, value| {
                // SAFETY: the slot's memory.
                if unsafe { word.read_volatile() } != value {
                    result = DIFFERENT;
                }
            });
        }
        result
    }
}

/// In user mode: starts as many requests as may be under way, and another for each that ends.
extern "C" fn run(work: u64) -> u64 {
    // SAFETY: `Work::done` passed a reference, and waits for us.
    let work = unsafe { &mut *(work as *mut Work<'_>) };
    let (mut ended, mut result) = (0, SUCCESS);
    (0..work.depth).for_each(|slot| work.start(slot));
    while ended < work.requests {
        if work.disk.queue.publish() {
            work.disk.window.write(QUEUE_NOTIFY, 0);
        }
        while let Some((head, _)) = work.disk.queue.pop() {
            let slot = u64::from(head / 4);
            ended += 1;
            result = match result {
                SUCCESS => work.end(slot),
                failure => failure,
            };
            work.start(slot);
        }
        spin_loop();
    }
    result
}

/// The `n`th of numbers below `limit` that look random: `n` is mixed up (Steele, Lea, Flood, "Fast Splittable
/// Pseudorandom Number Generators", 2014), and the upper half of a product is below the factor.
fn random_below(n: u64, limit: u64) -> u64 {
    let mut mixed = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    ((u128::from(mixed) * u128::from(limit)) >> 64) as u64
}

/// The words of a slot's data, and what they should hold when they lie on the disk from `sector` on.
fn each_word(slot: u64, sector: u64, bytes: u64, mut visit: impl FnMut(*mut u64, u64)) {
    for offset in (0..bytes).step_by(8) {
        visit(
            (data(slot) + offset) as *mut u64,
            !(sector * SECTOR + offset),
        );
    }
}

/// `do=check`
fn check(disk: &mut Disk) {
    let bytes = disk.capacity * SECTOR;
    let mut all = |what: &str, kind, block: u64, depth, random| {
        let requests = if random { 4096 } else { bytes / block };
        let work = Work {
            disk,
            kind,
            bytes: block,
            depth,
            requests,
            started: 0,
            first: 0,
            random,
            pattern: true,
        };
        expect(work.done(), SUCCESS, what);
    };
    all("writing", OUT, BYTES_MAX, 8, false);
    all("reading in order", IN, BYTES_MAX, 8, false);
    all("reading sectors at random", IN, SECTOR, DEPTH_MAX, true);
    all("writing single sectors", OUT, SECTOR, DEPTH_MAX, true);
    all("reading one after the other", IN, 4096, 1, false);

    let mut one = |what: &str, kind, bytes, first, expected: u64| {
        let work = Work {
            disk,
            kind,
            bytes,
            depth: 1,
            requests: 1,
            started: 0,
            first,
            random: false,
            pattern: false,
        };
        expect(work.done(), expected, what);
    };
    one("flushing", FLUSH, 0, 0, SUCCESS);
    let end = bytes / SECTOR;
    one("reading past the end", IN, SECTOR, end, IO_ERROR.into());
    one(
        "asking for the serial number",
        GET_ID,
        ID_BYTES as u64,
        0,
        SUCCESS,
    );
    // SAFETY: the first slot's memory, which holds the answer.
    let id = unsafe { core::slice::from_raw_parts(data(0) as *const u8, ID_BYTES) };
    print!("block: serial number ");
    let text = id.iter().take_while(|byte| **byte != 0);
    text.for_each(|byte| guest::uart::put(*byte));
    print!(
        "\nblock: ",
        bytes >> 10,
        " KiB, every byte holds what was written\n"
    );
}

/// `do=read`, `do=write`, `do=random`
fn time(start: &StartInfo, disk: &mut Disk, kind: u32, random: bool) {
    let work = Work {
        disk,
        kind,
        bytes: (start.number("size=").unwrap_or(4096) / SECTOR * SECTOR).clamp(SECTOR, BYTES_MAX),
        depth: start.number("depth=").unwrap_or(1).clamp(1, DEPTH_MAX),
        requests: start.number("requests=").unwrap_or(1000),
        started: 0,
        first: 0,
        random,
        pattern: false,
    };
    print!("block: begin\n");
    let result = work.done();
    print!("block: end\n");
    expect(result, SUCCESS, "the measured requests");
}

/// Ends the run if something did not go as it should.
fn expect(result: u64, expected: u64, what: &str) {
    if result == expected {
        return;
    }
    print!("block: ", what, ": ");
    match result {
        DIFFERENT => print!("not what was written\n"),
        status => print!("status ", status, "\n"),
    }
    exit::exit(1)
}

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    user::enable();
    paging::identity_map_for_user(DATA, DEPTH_MAX * BYTES_MAX);
    let Some(mut disk) = Disk::find() else {
        print!("block: there is no disk\n");
        exit::exit(1)
    };
    match start.option("do=").unwrap_or(b"check") {
        b"check" => check(&mut disk),
        b"read" => time(start, &mut disk, IN, false),
        b"write" => time(start, &mut disk, OUT, false),
        b"random" => time(start, &mut disk, IN, true),
        _ => {
            print!("block: do=check, do=read, do=write or do=random\n");
            exit::exit(1)
        }
    }
    exit::exit(0)
}
