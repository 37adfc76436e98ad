//! Interrupts: the table of handlers, and the two instructions that open and close the door.
//!
//! The IDT has 256 gates of 16 bytes, one for each vector (SDM Vol. 3A 6.14.1). Vectors 0 to 31 are the processor's
//! own exceptions; the rest are for devices and for `int n`. On delivery the processor aligns RSP to 16 bytes, pushes
//! SS, RSP, RFLAGS, CS and RIP, clears IF and jumps; `iretq` takes the five words back (6.14.2).
//!
//! A hypervisor delivers an interrupt by asking for this at VM entry (SDM Vol. 3C 27.6). If the guest has IF = 0, it
//! asks for an exit at the moment when the guest opens the door instead.

use crate::port::outb;
use core::arch::asm;

static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];

/// A gate that only the kernel may call with `int n`.
pub const KERNEL: u64 = 0;
/// A gate that user mode may call, too.
pub const USER: u64 = 3;

/// Lets a vector go to a handler made by [`interrupt_handler!`], and puts the table into use.
pub fn set_gate(vector: u8, handler: extern "C" fn(), privilege: u64) {
    const PRESENT: u64 = 1 << 15;
    const INTERRUPT_GATE: u64 = 0xe << 8;
    const KERNEL_CODE: u64 = 0x10;
    let offset = handler as *const () as u64;
    let attributes = PRESENT | privilege << 13 | INTERRUPT_GATE;
    let gate = [
        offset & 0xffff | KERNEL_CODE << 16 | attributes << 32 | (offset >> 16 & 0xffff) << 48,
        offset >> 32,
    ];
    // SAFETY: only the first processor writes gates, before anything uses them.
    unsafe {
        (&raw mut IDT)
            .cast::<[u64; 2]>()
            .add(vector.into())
            .write(gate)
    };
    load((size_of::<[[u64; 2]; 256]>() - 1) as u16);
}

/// Puts a table without any gates into use: from now on every exception ends in a triple fault.
pub fn use_no_gates() {
    load(0);
}

fn load(limit: u16) {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let pointer = Pointer(limit, &raw const IDT as u64);
    // SAFETY: the table is static.
    unsafe {
        asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack, preserves_flags))
    };
}

/// Makes an interrupt handler of a function body: saves the registers that a function may change, and ends with
/// `iretq` instead of `ret`. Not for the exceptions that push an error code.
#[macro_export]
macro_rules! interrupt_handler {
    ($(#[$doc:meta])* fn $name:ident() $body:block) => {
        $(#[$doc])*
        #[unsafe(naked)]
        extern "C" fn $name() {
            extern "C" fn body() $body
            core::arch::naked_asm!(
                "push rax", "push rcx", "push rdx", "push rsi", "push rdi",
                "push r8", "push r9", "push r10", "push r11",
                "cld",
                "call {body}", // 5 + 9 words lie on the stack: RSP is a multiple of 16, as the ABI demands
                "pop r11", "pop r10", "pop r9", "pop r8",
                "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
                "iretq",
                body = sym body,
            )
        }
    };
}

/// Sleeps until an interrupt has been handled. Interrupts are off before and after, so that nothing can come between
/// looking at what a handler has left and going to sleep: `sti` takes effect only after the instruction behind it.
pub fn wait() {
    // SAFETY: handlers keep to the rules of a function call.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
}

/// Masks the two 8259 interrupt controllers of the PC, which are awake after reset (8259A datasheet, OCW1).
pub fn mask_pics() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}
