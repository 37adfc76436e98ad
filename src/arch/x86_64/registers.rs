//! How the first vCPU looks when a kernel is entered.
//!
//! Two agreements exist. The **64-bit Linux boot protocol** (Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol") enters with paging on and RSI at the boot parameters. The **PVH direct boot ABI** enters in
//! 32-bit protected mode, paging off, with EBX at the start info.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use super::layout;

/// CR0: protected mode.
const CR0_PE: u64 = 1 << 0;
/// CR0: 387 protocol, always set on today's CPUs.
const CR0_ET: u64 = 1 << 4;
/// CR0: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension, which long mode requires.
const CR4_PAE: u64 = 1 << 5;
/// IA32_EFER: long mode enabled, and active (SDM Vol. 3A 2.2.1).
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: bit 1 is always set; the interrupt flag is clear.
const RFLAGS: u64 = 1 << 1;

/// Selector of the code segment, `__BOOT_CS` of the Linux boot protocol.
const CODE: u16 = 0x10;
/// Selector of the data segments, `__BOOT_DS`.
const DATA: u16 = 0x18;
/// Selector of the task state segment.
const TASK: u16 = 0x20;

/// A flat 4 GiB code segment, 64-bit or 32-bit: type 11 is execute/read, accessed (SDM Vol. 3A 3.4.5.1).
fn code(long: bool) -> kvm_segment {
    kvm_segment {
        selector: CODE,
        type_: 11,
        l: long.into(),
        db: (!long).into(),
        ..flat()
    }
}

/// A flat 4 GiB data segment: type 3 is read/write, accessed.
fn data() -> kvm_segment {
    kvm_segment {
        selector: DATA,
        type_: 3,
        db: 1,
        ..flat()
    }
}

fn flat() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// A busy task state segment (type 11 of the system types); VM entry requires one.
fn task() -> kvm_segment {
    kvm_segment {
        selector: TASK,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

/// A segment as its 8 bytes in a descriptor table (SDM Vol. 3A figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let bit = |value: u8, at: u32| u64::from(value & 1) << at;
    let (base, unscaled) = (segment.base, u64::from(segment.limit));
    let limit = if segment.g == 1 {
        unscaled >> 12
    } else {
        unscaled
    };
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 0xf) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (base >> 24 & 0xff) << 56
}

/// The descriptor table at [`layout::GDT`] that the 64-bit entry's segments come from.
pub fn gdt() -> Vec<u8> {
    let table = [
        0,
        0,
        descriptor(&code(true)),
        descriptor(&data()),
        descriptor(&task()),
        0,
    ];
    table
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect()
}

fn set_segments(special: &mut kvm_sregs, long: bool) {
    special.cs = code(long);
    for segment in [
        &mut special.ds,
        &mut special.es,
        &mut special.fs,
        &mut special.gs,
        &mut special.ss,
    ] {
        *segment = data();
    }
    special.tr = task();
    special.ldt = kvm_segment {
        type_: 2,
        unusable: 1,
        ..Default::default()
    };
    special.gdt = kvm_dtable {
        base: layout::GDT,
        limit: 6 * 8 - 1,
        ..Default::default()
    };
    special.idt = kvm_dtable {
        base: layout::IDT,
        limit: 0,
        ..Default::default()
    };
}

/// Registers for the 64-bit Linux entry at `rip`, with the zero page at `boot_params`. `special` is what
/// the vCPU was reset to: the local APIC's base stays.
pub fn linux64(mut special: kvm_sregs, rip: u64, boot_params: u64) -> (kvm_regs, kvm_sregs) {
    set_segments(&mut special, true);
    special.cr3 = layout::PAGE_TABLES;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LME | EFER_LMA;
    special.cr0 = CR0_PE | CR0_ET | CR0_PG;
    let stack = layout::BOOT_STACK;
    let general = kvm_regs {
        rip,
        rsi: boot_params,
        rsp: stack,
        rbp: stack,
        rflags: RFLAGS,
        ..Default::default()
    };
    (general, special)
}

/// Registers for a PVH entry at `rip`, with the start info at `start_info`.
pub fn pvh(mut special: kvm_sregs, rip: u64, start_info: u64) -> (kvm_regs, kvm_sregs) {
    set_segments(&mut special, false);
    special.cr0 = CR0_PE | CR0_ET;
    special.cr4 = 0;
    special.efer = 0;
    (
        kvm_regs {
            rip,
            rbx: start_info,
            rflags: RFLAGS,
            ..Default::default()
        },
        special,
    )
}

/// The FPU after `fninit`, and the power-on MXCSR (SDM Vol. 1 8.1.5 and 10.2.3).
pub fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Local vector table entries of the local APIC (SDM Vol. 3A 11.5.1): byte offsets, delivery mode.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const EXTINT: u32 = 0b111;
const NMI: u32 = 0b100;

/// Connects the local APIC's pins as a PC does: LINT0 to the 8259 PIC, LINT1 to NMI.
pub fn connect_lint(lapic: &mut kvm_lapic_state) {
    for (offset, mode) in [(LVT_LINT0, EXTINT), (LVT_LINT1, NMI)] {
        let value = mode << 8;
        for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
            *register = byte as i8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_bits_of_the_manual() {
        assert_eq!(descriptor(&code(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(gdt().len(), 48);
    }

    #[test]
    fn a_linux_kernel_is_entered_in_long_mode_with_its_parameters_in_rsi() {
        let (general, special) = linux64(kvm_sregs::default(), 0x100_0000, layout::BOOT_PARAMS);
        assert_eq!(
            (general.rip, general.rsi),
            (0x100_0000, layout::BOOT_PARAMS)
        );
        assert_eq!(special.efer & (EFER_LME | EFER_LMA), EFER_LME | EFER_LMA);
        assert_eq!((special.cs.l, special.cs.db), (1, 0));
        assert_eq!(general.rflags & 1 << 9, 0, "interrupts are off");
    }

    #[test]
    fn a_pvh_kernel_is_entered_in_protected_mode_without_paging() {
        let (general, special) = pvh(kvm_sregs::default(), 0x10_0000, layout::PVH_START_INFO);
        assert_eq!(general.rbx, layout::PVH_START_INFO);
        assert_eq!(special.cr0, CR0_PE | CR0_ET);
        assert_eq!((special.cs.l, special.cs.db), (0, 1));
    }

    #[test]
    fn the_apic_pins_are_connected_as_on_a_pc() {
        let mut lapic = kvm_lapic_state::default();
        connect_lint(&mut lapic);
        assert_eq!((lapic.regs[0x351], lapic.regs[0x361]), (7, 4));
    }
}
