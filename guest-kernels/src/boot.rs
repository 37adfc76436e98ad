//! From the loader's jump to Rust: PVH entry in 32-bit protected mode, then 64-bit long mode.
//!
//! A PVH kernel is an ELF file with a note that says "enter me *here*, with paging off" (Xen's "x86/HVM direct boot
//! ABI"; the note is `XEN_ELFNOTE_PHYS32_ENTRY`). The loader copies the segments, sets flat 32-bit segments,
//! CR0.PE = 1, puts the physical address of a [`StartInfo`] into EBX and jumps. No firmware, no real mode.
//!
//! The four steps to long mode are those of SDM Vol. 3A 10.8.5 ("Initializing IA-32e Mode"): page tables into CR3,
//! CR4.PAE = 1, IA32_EFER.LME = 1, CR0.PG = 1. Then a far jump loads a code segment whose L bit is set.
//!
//! Everything that is constant is data, and the tables are three stores, so the way from the entry to
//! Rust takes 24 instructions. This matters where each of them is interpreted.

use core::arch::global_asm;
use core::sync::atomic::AtomicU64;

/// What the loader tells the kernel: `struct hvm_start_info` of the PVH boot ABI, version 1.
#[repr(C)]
pub struct StartInfo {
    /// [`START_INFO_MAGIC`].
    pub magic: u32,
    /// 1 and up: `memmap` is valid.
    pub version: u32,
    /// `SIF_*` bits; of no use outside Xen.
    pub flags: u32,
    /// How many modules (initial RAM disks) there are.
    pub module_count: u32,
    /// Guest-physical address of the list of modules.
    pub modules: u64,
    /// Guest-physical address of the NUL-terminated command line, or 0.
    pub command_line: u64,
    /// Guest-physical address of ACPI's root pointer (RSDP), or 0.
    pub rsdp: u64,
    /// Guest-physical address of the memory map.
    pub memory_map: u64,
    /// How many entries the memory map has.
    pub memory_map_entries: u32,
    reserved: u32,
}

/// The value of [`StartInfo::magic`]: "xEn3" with its top bit set.
pub const START_INFO_MAGIC: u32 = 0x336e_c578;

/// One line of the memory map: `struct hvm_memmap_table_entry`.
#[repr(C)]
pub struct MemoryRange {
    /// Guest-physical address of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The types of an E820 map: 1 is RAM, 2 is reserved, 3 is ACPI's, …
    pub kind: u32,
    reserved: u32,
}

/// The value of [`MemoryRange::kind`] for memory that the kernel may use as it likes.
pub const RAM: u32 = 1;

impl StartInfo {
    /// The memory map that the loader passed.
    pub fn memory_map(&self) -> &'static [MemoryRange] {
        let count = self.memory_map_entries as usize;
        if self.version == 0 || count == 0 {
            return &[];
        }
        crate::paging::identity_map(self.memory_map, (count * size_of::<MemoryRange>()) as u64);
        // SAFETY: the boot ABI puts that many entries there, the line above maps them, nobody changes them.
        unsafe { core::slice::from_raw_parts(self.memory_map as *const MemoryRange, count) }
    }

    /// The value of the first `key=value` on the command line. `key` has the `=` at its end.
    pub fn option(&self, key: &str) -> Option<&'static [u8]> {
        let mut words = self.command_line().split(|byte| *byte == b' ');
        words.find_map(|word| word.strip_prefix(key.as_bytes()))
    }

    /// The same, as a decimal number; `None` also when it is not one.
    pub fn number(&self, key: &str) -> Option<u64> {
        let digits = self.option(key)?;
        digits.iter().try_fold(0_u64, |number, digit| {
            let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
            number.checked_mul(10)?.checked_add(digit.into())
        })
    }

    /// The command line without its NUL.
    fn command_line(&self) -> &'static [u8] {
        const MOST: usize = 4096;
        if self.command_line == 0 {
            return &[];
        }
        crate::paging::identity_map(self.command_line, MOST as u64);
        // SAFETY: the boot ABI puts bytes there that end with a NUL, and the line above maps more than there will be.
        let bytes = unsafe { core::slice::from_raw_parts(self.command_line as *const u8, MOST) };
        bytes.split(|byte| *byte == 0).next().unwrap_or(bytes)
    }
}

/// The guest-physical addresses of the first byte of this image and of the first byte behind it.
pub fn image() -> (u64, u64) {
    unsafe extern "C" {
        static image_start: u8;
        static image_end: u8;
    }
    (&raw const image_start as u64, &raw const image_end as u64)
}

// The note by which a PVH loader recognises the kernel.
global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4                 # bytes in the owner's name, with its NUL
    .long 8                 # bytes in the descriptor
    .long 18                # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start         # the descriptor: a physical address
"#
);

global_asm!(
    r#"
    # Steps into long mode and goes on at `\target` there. Uses EAX, ECX and EDX. Page tables must be ready.
    .macro enter_long_mode target
    mov eax, offset pml4
    mov cr3, eax
    mov eax, 1 << 5                 # CR4.PAE
    mov cr4, eax
    mov ecx, 0xc0000080             # IA32_EFER
    rdmsr
    or eax, 1 << 8                  # .LME
    wrmsr
    mov eax, cr0
    or eax, 1 << 31                 # CR0.PG; LMA becomes 1 here
    mov cr0, eax
    ljmp 0x10, offset \target       # until now, compatibility mode: CS has no L bit yet
    .endm

    .section .text.boot, "ax"
    .code32
    .global pvh_start
pvh_start:
    mov dword ptr [pml4], offset first_pdpt + 7     # 7: present, writable, user may pass
    mov dword ptr [first_pdpt], offset first_pd + 7
    mov dword ptr [first_pd], 0x83                  # bytes 0 to 2 MiB: present, writable, a 2 MiB page
    lgdt [gdt_pointer]
    enter_long_mode start64
    .code64
start64:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset stack_top
    cld
    mov edi, ebx                    # the address of StartInfo, as the first argument
    call rust_start
    ud2

    # Where the lesson smp.rs sends the other processors, with flat 32-bit segments.
    .code32
    .global ap_start32
ap_start32:
    enter_long_mode ap_start64
    .code64
ap_start64:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, [AP_STACK]
    cld
    call [AP_ENTRY]
    ud2

    # The segments, numbered as in Linux. In long mode base and limit are ignored; what counts is the type,
    # the privilege level (DPL) and, for code, the L bit (SDM Vol. 3A 3.4.5, 5.2.1).
    .section .data
    .balign 8
    .global gdt, gdt_tss, gdt_pointer
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 0x08 kernel code, 32 bits
    .quad 0x00af9b000000ffff        # 0x10 kernel code, 64 bits
    .quad 0x00cf93000000ffff        # 0x18 kernel data
    .quad 0x00cffb000000ffff        # 0x20 user code, 32 bits
    .quad 0x00cff3000000ffff        # 0x28 user data: selector 0x2b with privilege level 3
    .quad 0x00affb000000ffff        # 0x30 user code, 64 bits: selector 0x33
    .quad 0
gdt_tss:
    .quad 0, 0                      # 0x40 task-state segment, two slots, filled in by user.rs
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .section .bss.stack, "aw", @nobits
    .balign 16
    .skip 16384
stack_top:
"#
);

/// Where the next processor finds the end of its stack; a multiple of 16.
#[unsafe(no_mangle)]
pub static AP_STACK: AtomicU64 = AtomicU64::new(0);

/// The address of the function in which it begins: `extern "C" fn() -> !`.
#[unsafe(no_mangle)]
pub static AP_ENTRY: AtomicU64 = AtomicU64::new(0);

unsafe extern "Rust" {
    /// The lesson. `#[unsafe(no_mangle)]` gives the function in `src/bin/` this name.
    safe fn kernel_main(start: &'static StartInfo) -> !;
}

#[unsafe(no_mangle)]
extern "C" fn rust_start(start: u64) -> ! {
    crate::paging::identity_map(start, size_of::<StartInfo>() as u64);
    // SAFETY: the boot ABI says that EBX held the address of a StartInfo, and it is mapped now.
    kernel_main(unsafe { &*(start as *const StartInfo) })
}
