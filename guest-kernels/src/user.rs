//! User mode: privilege level 3, and the way there and back.
//!
//! There is no "go to user mode" instruction. The kernel pretends to return to it: it pushes the five words that an
//! interrupt from user mode would have pushed, and executes `iretq`. The way back is a real interrupt, `int 0x80`;
//! for it the processor takes a fresh stack pointer, RSP0, out of the task-state segment (SDM Vol. 3A 6.14.4, 8.7).
//! User mode may use a page only if the U bit is set for it at all four levels of the page tables.
//!
//! To a hypervisor with hardware below it, both modes are the same. One that runs where there is none must interpret
//! kernel mode, and can let user mode run at full speed: the lessons that need speed have their loops here.

use crate::interrupts::{self, set_gate};
use crate::paging;
use core::arch::{asm, global_asm};

/// The software interrupt that ends user mode. Linux had its system calls there before there was `syscall`.
const BACK: u8 = 0x80;
/// A KVM without hardware below it cannot execute `int n` for user mode, and answers with this exception: #UD. So
/// that one leads to the same place.
const INVALID_OPCODE: u8 = 6;

/// The task-state segment with a map of all 65536 ports behind it. A zero bit lets user mode use that port.
#[repr(C, packed)]
struct TaskState {
    reserved: u32,
    rsp: [u64; 3],
    unused: [u64; 9],
    unused_too: u16,
    map_offset: u16,
    map: [u8; 8192],
    end: u8,
}

static mut TSS: TaskState = TaskState {
    reserved: 0,
    rsp: [0; 3],
    unused: [0; 9],
    unused_too: 0,
    map_offset: 0,
    map: [0; 8192],
    end: 0,
};

unsafe extern "C" {
    static mut gdt_tss: [u64; 2];
    static user_gate_stack_top: u8;
    fn user_gate();
    fn user_enter(function: extern "C" fn(u64) -> u64, argument: u64) -> u64;
}

/// Prepares the TSS, the gate and the page of this image. To be called once, before [`call`].
pub fn enable() {
    let base = &raw const TSS as u64;
    let limit = (size_of::<TaskState>() - 1) as u64;
    const PRESENT_TSS: u64 = 0x89; // SDM Vol. 3A 8.2.3
    // SAFETY: nothing uses these before `ltr`.
    unsafe {
        TSS.rsp[0] = &raw const user_gate_stack_top as u64;
        TSS.map_offset = core::mem::offset_of!(TaskState, map) as u16;
        TSS.end = 0xff; // the processor reads one byte too far (SDM Vol. 1 19.5.2)
        gdt_tss[0] = limit & 0xffff
            | (base & 0xff_ffff) << 16
            | PRESENT_TSS << 40
            | (limit >> 16) << 48
            | (base >> 24) << 56;
        gdt_tss[1] = base >> 32;
        asm!("ltr {:x}", in(reg) 0x40_u16, options(nostack));
    }
    // SAFETY: `user_gate` has the form of a handler: entered by an interrupt, it never returns as a function.
    let gate =
        unsafe { core::mem::transmute::<unsafe extern "C" fn(), extern "C" fn()>(user_gate) };
    set_gate(BACK, gate, interrupts::USER);
    set_gate(INVALID_OPCODE, gate, interrupts::KERNEL);
    paging::identity_map_for_user(0, paging::LARGE_PAGE);
    paging::flush();
}

/// Calls a function in user mode, with interrupts off, and returns what it returned.
///
/// It may use this image, all ports, and what [`paging::identity_map_for_user`] maps.
pub fn call(function: extern "C" fn(u64) -> u64, argument: u64) -> u64 {
    // SAFETY: `enable` was called. The function keeps to the rules of a function call, the assembly to the rest.
    unsafe { user_enter(function, argument) }
}

global_asm!(
    r#"
    .section .text
    # user_enter(RDI: function, RSI: argument) -> RAX
user_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [kernel_rsp], rsp
    push 0x2b                       # SS
    push offset user_stack_top      # RSP
    push 2                          # RFLAGS: all clear but the bit that is always set
    push 0x33                       # CS
    push offset user_start          # RIP
    mov rax, rdi
    mov rdi, rsi
    iretq

    # Here CPL is 3.
user_start:
    call rax
    int 0x80

    # Here it is 0 again. Forget the interrupt, and return from user_enter.
user_gate:
    mov rsp, [kernel_rsp]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .section .bss.user, "aw", @nobits
    .balign 16
kernel_rsp:
    .skip 16
    .skip 4096
user_gate_stack_top:
    .skip 8192
user_stack_top:
"#
);
