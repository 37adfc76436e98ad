//! Lesson 10: a clock that ticks.
//!
//! Every local APIC has a timer: it counts down from a number that the guest writes, interrupts at zero and, in
//! periodic mode, begins again. Time itself is read from the time-stamp counter, which needs no exit at all.
//!
//! On the bus: the letters only. KVM emulates the local APIC in the host kernel, with a timer of the host kernel, and
//! while the guest sleeps in `hlt` its thread sleeps, too. Watch it with `top`: this guest uses no processor time.
//!
//! Manuals: SDM Vol. 3A 11.5.4 ("APIC Timer"), 11.8.5 (EOI); Vol. 3B 18.17 ("Time-Stamp Counter").
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/timer`.
#![no_std]
#![no_main]

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use guest::{apic, boot::StartInfo, exit, interrupt_handler, interrupts, print};

const TIMER_VECTOR: u8 = 0x40;
const TICKS: u64 = 10;
/// KVM and QEMU count nanoseconds: 20 ms. On bare metal it is the frequency of a crystal or bus.
const COUNT: u32 = 20_000_000;
/// The encoding of "divide by 1" (SDM Vol. 3A Figure 11-10).
const DIVIDE_BY_1: u32 = 0b1011;

static SEEN: AtomicU64 = AtomicU64::new(0);

interrupt_handler! {
    /// As little as possible: count, and tell the APIC that the next one may come.
    fn tick() {
        SEEN.fetch_add(1, Relaxed);
        apic::write(apic::EOI, 0);
    }
}

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    interrupts::mask_pics();
    interrupts::set_gate(TIMER_VECTOR, tick, interrupts::KERNEL);
    apic::enable();

    let mut last = now();
    apic::write(apic::TIMER_DIVIDE, DIVIDE_BY_1);
    apic::write(
        apic::LVT_TIMER,
        apic::TIMER_PERIODIC | u32::from(TIMER_VECTOR),
    );
    apic::write(apic::TIMER_INITIAL_COUNT, COUNT);

    for number in 1..=TICKS {
        // Another interrupt may wake us, and a slow host may let two ticks pass: sleep until there is one to show.
        while SEEN.load(Relaxed) < number {
            interrupts::wait();
        }
        let time = now();
        print!(
            "tick ",
            number,
            ", ",
            time.wrapping_sub(last),
            " cycles later\n"
        );
        if time <= last {
            print!("timer: time went backwards\n");
            exit::exit(1)
        }
        last = time;
    }
    apic::write(apic::TIMER_INITIAL_COUNT, 0);
    print!("timer: ten ticks, each later than the one before\n");
    exit::power_off(start)
}

fn now() -> u64 {
    // SAFETY: every x86-64 processor has `rdtsc`, and nobody has set CR4.TSD.
    unsafe { _rdtsc() }
}
