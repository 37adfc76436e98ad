//! Lesson 12: does every byte hold what is written to it?
//!
//! The loader says which ranges of guest-physical memory are RAM. To the host they are a piece of a process's address
//! space, empty until touched: the first write to a page makes the host find one and map it, while the guest waits.
//! Run this under `top` and see the VMM grow to the size of the guest.
//!
//! Each 8-byte word is filled with its own address, which no other word has, and only when all are filled are they
//! read back: two addresses that lead to the same memory would show. Then again with every bit turned round. What is
//! in use stays untouched: this image (code, stack, page tables), and what the loader passed.
//!
//! On the bus: only the letters. The loops run in user mode, which is fast on every KVM (see `src/user.rs`).
//!
//! Manuals: PVH boot ABI (`hvm_memmap_table_entry`); SDM Vol. 3A 4.5 ("4-Level Paging"), Vol. 3C 29.3 ("The Extended
//! Page Table Mechanism").
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/memory --mem 6G`.
#![no_std]
#![no_main]

use guest::boot::{self, MemoryRange, RAM, StartInfo};
use guest::{exit, paging, print, uart::Hex, user};

const PAGE: u64 = 4096;

/// One pass over one range, for the functions in user mode. It lies on the stack, which they can read.
struct Pass {
    range: (u64, u64),
    /// What is in use: first byte, and the first byte behind it.
    taken: [(u64, u64); 3],
    /// Turned round in each word.
    invert: u64,
}

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    let ranges = || start.memory_map().iter().filter(|range| range.kind == RAM);
    let map = start.memory_map();
    let info = start as *const StartInfo as u64;
    let taken = [
        boot::image(),
        (info, info + size_of::<StartInfo>() as u64),
        (start.memory_map, start.memory_map + size_of_val(map) as u64),
    ];

    user::enable();
    let mut total = 0;
    for range in ranges() {
        print!(
            "RAM from ",
            Hex(range.start),
            " to ",
            Hex(range.start + range.bytes),
            "\n"
        );
        total += range.bytes;
        if !paging::identity_map_for_user(range.start, range.bytes) {
            print!("memory: more RAM than this lesson has page tables for\n");
            exit::exit(1)
        }
    }

    for invert in [0, u64::MAX] {
        let pass_over = |range: &MemoryRange, function| {
            let pass = Pass {
                range: (range.start, range.start + range.bytes),
                taken,
                invert,
            };
            user::call(function, &raw const pass as u64)
        };
        for range in ranges() {
            pass_over(range, fill);
        }
        for range in ranges() {
            let different = pass_over(range, check);
            if different != 0 {
                print!(
                    "memory: ",
                    different,
                    " words from ",
                    Hex(range.start),
                    " on are not what was written\n"
                );
                exit::exit(1)
            }
        }
    }
    // Rounded up: in the first MiB, something is always missing for the firmware.
    print!(
        "memory: ",
        total.div_ceil(1 << 20),
        " MiB of RAM, every byte holds what was written\n"
    );
    exit::power_off(start)
}

/// In user mode: fills the words of a range.
extern "C" fn fill(pass: u64) -> u64 {
    // SAFETY: `each_word` hands out mapped RAM that nobody uses.
    each_word(pass, |word, value| unsafe { word.write_volatile(value) });
    0
}

/// In user mode: counts the words of a range that do not hold what `fill` wrote.
extern "C" fn check(pass: u64) -> u64 {
    let mut different = 0;
    each_word(pass, |word, value| {
        // SAFETY: as above.
        let found = unsafe { word.read_volatile() };
        different += u64::from(found != value);
    });
    different
}

fn each_word(pass: u64, mut visit: impl FnMut(*mut u64, u64)) {
    // SAFETY: `kernel_main` passed a reference, and waits for us.
    let pass = unsafe { &*(pass as *const Pass) };
    let (mut at, end) = pass.range;
    while at < end {
        let next = ((at | (PAGE - 1)) + 1).min(end);
        if !pass
            .taken
            .iter()
            .any(|(first, last)| at < *last && *first < next)
        {
            while at < next {
                visit(at as *mut u64, at ^ pass.invert);
                at += 8;
            }
        }
        at = next;
    }
}
