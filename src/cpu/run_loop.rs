//! The heart of a hypervisor: enter the guest, see why it came back, answer, enter again.

use crate::bus::{Action, Bus};
use crate::hv::{self, InternalError, Registers, Vcpu, VmExit};
use crate::trace::{Origin, Space};

use super::gate::Gate;

/// Why a vCPU will not run again.
#[derive(Debug)]
pub enum VcpuEnd {
    /// A device asked for something that ends the run.
    Action(Action),
    /// A fault while handling a fault while handling a fault (SDM Vol. 3A 6.15, double fault).
    TripleFault,
    /// KVM could not go on.
    Crash(Box<CrashSite>),
    /// The machine is being stopped.
    Stopped,
    /// A call to KVM failed.
    Failed(hv::Error),
}

/// Where and how a vCPU got stuck.
#[derive(Debug)]
pub struct CrashSite {
    /// What KVM reported: an internal error, or a phrase for something rarer.
    pub cause: CrashCause,
    /// The registers at that moment, if they can still be read.
    pub registers: Option<Registers>,
    /// Guest physical address of the instruction.
    pub instruction_at: Option<u64>,
}

/// What made KVM give up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashCause {
    InternalError(InternalError),
    /// The CPU refused the guest's state, with its reason code.
    FailEntry(u64),
    /// An exit that this VMM does not serve, by KVM's number.
    UnknownExit(u32),
}

/// `KVM_SYSTEM_EVENT_*`: what a guest can ask of KVM itself.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;
const SYSTEM_EVENT_CRASH: u32 = 3;

/// What one exit leads to.
enum Next {
    Enter,
    /// Pass the gate first.
    Gate,
    End(VcpuEnd),
    /// End with a report, which takes the vCPU to write.
    Report(CrashCause),
}

/// Runs one vCPU until something ends the run.
pub(super) fn run(vcpu: &mut dyn Vcpu, index: u32, bus: &Bus, gate: &Gate) -> VcpuEnd {
    vcpu.report_rip(bus.is_traced());
    if !gate.pass() {
        return VcpuEnd::Stopped;
    }
    loop {
        let next = match vcpu.run() {
            Ok(exit) => answer(
                exit.reason,
                Origin {
                    vcpu: index,
                    rip: exit.rip,
                },
                bus,
            ),
            Err(error) => return VcpuEnd::Failed(error),
        };
        match next {
            Next::Enter => {}
            Next::Gate if gate.pass() => {}
            Next::Gate => return VcpuEnd::Stopped,
            Next::End(end) => return end,
            Next::Report(cause) => return VcpuEnd::Crash(Box::new(report(vcpu, cause))),
        }
    }
}

fn answer(exit: VmExit<'_>, origin: Origin, bus: &Bus) -> Next {
    let action = match exit {
        VmExit::IoIn { port, size, data } => {
            for value in data.chunks_mut(size.max(1)) {
                bus.read(origin, Space::Io, port.into(), value);
            }
            Action::Continue
        }
        VmExit::IoOut { port, size, data } => data
            .chunks(size.max(1))
            .map(|value| bus.write(origin, Space::Io, port.into(), value))
            .find(|action| *action != Action::Continue)
            .unwrap_or(Action::Continue),
        VmExit::MmioRead { address, data } => {
            bus.read(origin, Space::Mmio, address, data);
            Action::Continue
        }
        VmExit::MmioWrite { address, data } => bus.write(origin, Space::Mmio, address, data),
        VmExit::Interrupted => {
            bus.note(origin, "interrupted");
            return Next::Gate;
        }
        VmExit::Hlt => {
            bus.note(origin, "hlt");
            Action::Continue
        }
        VmExit::Shutdown => {
            bus.note(origin, "shutdown");
            return Next::End(VcpuEnd::TripleFault);
        }
        VmExit::SystemEvent { kind } => {
            bus.note(origin, "system_event");
            match kind {
                SYSTEM_EVENT_SHUTDOWN => Action::PowerOff,
                SYSTEM_EVENT_RESET => Action::Reset,
                SYSTEM_EVENT_CRASH => Action::Panic,
                _ => Action::Continue,
            }
        }
        VmExit::InternalError(error) => {
            bus.note(origin, "internal_error");
            return Next::Report(CrashCause::InternalError(error));
        }
        VmExit::FailEntry { reason } => {
            bus.note(origin, "fail_entry");
            return Next::Report(CrashCause::FailEntry(reason));
        }
        VmExit::Other(number) => {
            bus.note(origin, "unknown");
            return Next::Report(CrashCause::UnknownExit(number));
        }
    };
    match action {
        Action::Continue => Next::Enter,
        action => Next::End(VcpuEnd::Action(action)),
    }
}

fn report(vcpu: &dyn Vcpu, cause: CrashCause) -> CrashSite {
    let registers = vcpu.registers().ok();
    let instruction_at = registers.as_ref().and_then(|registers| {
        vcpu.translate(
            registers
                .special
                .cs
                .base
                .wrapping_add(registers.general.rip),
        )
    });
    CrashSite {
        cause,
        registers,
        instruction_at,
    }
}
