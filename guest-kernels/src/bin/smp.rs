//! Lesson 11: waking the other processors.
//!
//! After reset only one processor runs, the bootstrap processor. The others wait until it sends them two messages
//! through its local APIC: INIT, and a start-up IPI with a page number. They begin there in 16-bit real mode, as in
//! 1978, and climb to long mode on their own: the page needs to be below 1 MiB, and needs a piece of 16-bit code.
//!
//! To a VMM a processor is a thread. All threads are there from the start; those of the others block inside
//! `KVM_RUN`, until the in-kernel APIC has seen both messages. They share memory as threads do, so counting needs
//! `lock add`: the prefix makes reading, adding and writing back one step for all of them.
//!
//! On the bus: the letters; the trace shows which vCPU sent them.
//!
//! Manuals: SDM Vol. 3A 9.4 ("Multiple-Processor (MP) Initialization"), 11.6 ("Issuing Interprocessor Interrupts"),
//! 9.1 ("Locked Atomic Operations"), 10.9 ("Mode Switching"); ACPI 6.5 §5.2.12.2 (processors in the MADT).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/smp --cpus 4`.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use guest::boot::{AP_ENTRY, AP_STACK, StartInfo};
use guest::{acpi, apic, exit, mem, print};

/// Where the 16-bit code goes. It is RAM, and none of the loader's tables are there.
const TRAMPOLINE: u64 = 0x8_0000;
const STACK: usize = 2048;

static RUNNING: AtomicU64 = AtomicU64::new(1);

#[repr(align(16))]
struct Stacks(#[expect(dead_code)] [[u8; STACK]; 256]);
static mut STACKS: Stacks = Stacks([[0; STACK]; 256]);

global_asm!(
    r#"
    .section .rodata
    .code16
    .global trampoline, trampoline_end
trampoline:                             # CS is TRAMPOLINE >> 4, IP is 0
    cli
    mov ax, cs
    mov ds, ax
    lgdtd [gdt_pointer_offset]
    mov eax, cr0
    and eax, 0x9fffffff                 # CD and NW: after INIT the caches are off
    or eax, 1                           # PE: protected mode
    mov cr0, eax
    .byte 0x66, 0xea                    # jmp 0x08:ap_start32, with a 32-bit offset; it is in boot.rs
    .long ap_start32
    .word 0x08
trampoline_gdt:
    .word 0x4f
    .long gdt
    .set gdt_pointer_offset, trampoline_gdt - trampoline
trampoline_end:
    .code64
"#
);

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    let code = &raw const trampoline;
    let bytes = &raw const trampoline_end as usize - code as usize;
    // SAFETY: boot.rs mapped the first 2 MiB.
    unsafe { mem::memcpy(TRAMPOLINE as *mut u8, code, bytes) };
    AP_ENTRY.store(other_main as *const () as u64, SeqCst);
    apic::enable();

    let me = apic::read(apic::ID) >> 24;
    // Kind 0 is a processor; bit 0 of its flags says that it may be used.
    let processors = || {
        acpi::madt_entries(start).filter(|entry| entry.kind == 0 && entry.read::<u32>(4) & 1 != 0)
    };
    for id in processors()
        .map(|entry| u32::from(entry.read::<u8>(3)))
        .filter(|id| *id != me)
    {
        let before = RUNNING.load(SeqCst);
        AP_STACK.store(
            &raw const STACKS as u64 + (id as u64 + 1) * STACK as u64,
            SeqCst,
        );
        apic::send(id, apic::ICR_INIT);
        // One after the other, as they share AP_STACK and the serial port. A start-up IPI that comes too early is
        // lost, and one that comes too late is ignored: repeat it. (Hardware wants 10 ms after INIT.)
        while RUNNING.load(SeqCst) == before {
            apic::send(id, apic::ICR_STARTUP | (TRAMPOLINE >> 12) as u32);
            (0..1000).for_each(|_| core::hint::spin_loop());
        }
    }

    print!(
        "smp: ",
        RUNNING.load(SeqCst),
        " of ",
        processors().count() as u64,
        " processors are running\n"
    );
    exit::power_off(start)
}

/// The first function of every other processor.
extern "C" fn other_main() -> ! {
    print!(
        "processor with APIC id ",
        u64::from(apic::read(apic::ID) >> 24),
        " is here\n"
    );
    RUNNING.fetch_add(1, SeqCst);
    exit::halt()
}
