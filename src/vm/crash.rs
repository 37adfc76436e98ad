//! The report on a vCPU that KVM could not bring forward.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use crate::cpu::{CrashCause, CrashSite};
use crate::hv::Registers;
use crate::mem::{Bytes, GuestAddress, GuestRam};

/// An instruction has at most 15 bytes (SDM Vol. 2A 2.3.11).
const INSTRUCTION_MAX: usize = 15;

/// Says which instruction, where, on which vCPU, with which registers, and why.
pub(super) fn report(vcpu: u32, site: &CrashSite, ram: &GuestRam) -> String {
    let mut text = match &site.cause {
        CrashCause::InternalError(error) => {
            let kind = match error.suberror {
                1 => "it cannot emulate an instruction".to_owned(),
                3 => "an exception came up while it delivered another event".to_owned(),
                other => format!("internal error {other}"),
            };
            format!("KVM could not go on with vCPU {vcpu}: {kind}")
        }
        CrashCause::FailEntry(reason) => {
            format!("the CPU refused to enter vCPU {vcpu}: bad guest state (reason {reason:#x})")
        }
        CrashCause::UnknownExit(number) => {
            format!("KVM ended vCPU {vcpu} for a reason that sarang does not serve ({number})")
        }
    };
    if let Some(registers) = &site.registers {
        let bytes = instruction_bytes(site, ram);
        let rip = registers.general.rip;
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n  at {rip:#018x}: {}",
            disassemble(registers, &bytes)
        );
        let _ = write!(text, "\n{}", dump(registers));
    }
    text.push_str(
        "\n  A KVM without hardware behind it stops at instructions that its emulator lacks; `sarang doctor` \
         tells whether this is one.",
    );
    text
}

/// The bytes that KVM passed along, or else those in guest memory.
fn instruction_bytes(site: &CrashSite, ram: &GuestRam) -> Vec<u8> {
    if let CrashCause::InternalError(error) = &site.cause
        && !error.instruction.is_empty()
    {
        return error.instruction.clone();
    }
    let mut bytes = [0; INSTRUCTION_MAX];
    let read = site
        .instruction_at
        .and_then(|at| ram.read(&mut bytes, GuestAddress(at)).ok());
    bytes.into_iter().take(read.unwrap_or(0)).collect()
}

fn disassemble(registers: &Registers, bytes: &[u8]) -> String {
    let segment = &registers.special.cs;
    let bits = match (segment.l, segment.db) {
        (0, 0) => 16,
        (0, _) => 32,
        _ => 64,
    };
    let mut decoder = Decoder::with_ip(bits, bytes, registers.general.rip, DecoderOptions::NONE);
    if !decoder.can_decode() {
        return "an instruction that cannot be read".to_owned();
    }
    let instruction = decoder.decode();
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    let hex: Vec<String> = bytes
        .iter()
        .take(instruction.len())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{text}  ({})", hex.join(" "))
}

fn dump(registers: &Registers) -> String {
    let (general, special) = (&registers.general, &registers.special);
    let lines = [
        [
            ("rax", general.rax),
            ("rbx", general.rbx),
            ("rcx", general.rcx),
            ("rdx", general.rdx),
        ],
        [
            ("rsi", general.rsi),
            ("rdi", general.rdi),
            ("rsp", general.rsp),
            ("rbp", general.rbp),
        ],
        [
            ("r8 ", general.r8),
            ("r9 ", general.r9),
            ("r10", general.r10),
            ("r11", general.r11),
        ],
        [
            ("r12", general.r12),
            ("r13", general.r13),
            ("r14", general.r14),
            ("r15", general.r15),
        ],
        [
            ("cr0", special.cr0),
            ("cr2", special.cr2),
            ("cr3", special.cr3),
            ("cr4", special.cr4),
        ],
        [
            ("rfl", general.rflags),
            ("efr", special.efer),
            ("cs ", special.cs.selector.into()),
            ("ss ", special.ss.selector.into()),
        ],
    ];
    let line = |registers: &[(&str, u64); 4]| {
        registers
            .iter()
            .map(|(name, value)| format!("{name} {value:016x}"))
            .collect::<Vec<_>>()
            .join("  ")
    };
    lines
        .iter()
        .map(|registers| format!("  {}", line(registers)))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::InternalError;
    use crate::mem;

    #[test]
    fn the_report_names_the_instruction_and_where_it_is() {
        let ram = mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap();
        ram.write_slice(&[0x66, 0x0f, 0xef, 0xc0], GuestAddress(0x1000))
            .unwrap();
        let mut registers = Registers::default();
        registers.general.rip = 0xffff_ffff_8100_1000;
        registers.special.cs.l = 1;
        let site = CrashSite {
            cause: CrashCause::InternalError(InternalError {
                suberror: 1,
                ..Default::default()
            }),
            registers: Some(registers),
            instruction_at: Some(0x1000),
        };
        let text = report(2, &site, &ram);
        assert!(text.contains("vCPU 2"), "{text}");
        assert!(
            text.contains("0xffffffff81001000: pxor xmm0,xmm0  (66 0f ef c0)"),
            "{text}"
        );
        assert!(text.contains("sarang doctor"), "{text}");
    }
}
