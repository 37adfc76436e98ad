//! Lesson 15: a guest that talks faster than anyone reads.
//!
//! Behind the serial port is a terminal or a pipe, and it can be full. A VMM that writes to it and waits stops the
//! vCPU; one that keeps all bytes grows without end; one that drops them lies. The register that was made for this is
//! LSR: as long as THRE is clear, the guest waits on its own, and a polite guest like this one loses nothing.
//! The numbers at the line starts show whether anything is missing.
//!
//! On the bus: `in` LSR and `out` THR, without end. Compare the rate with `speed`.
//!
//! Manuals: PC16550D datasheet §8.3 (LSR, bit 5).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/flood | less`, or with `--timeout 5s`.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, print};

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    for line in 0_u64.. {
        print!(line, " the quick brown fox jumps over the lazy dog\n");
    }
    unreachable!()
}
