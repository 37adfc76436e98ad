//! A hypervisor that replays a script, so that board, devices and command line can be tested anywhere.
//!
//! The script is a list of exits. Each call of [`Vcpu::run`] gives the next one; what the devices
//! answered to reads is kept in a transcript. When the script is over, the vCPU sleeps until it is kicked,
//! as a CPU in `hlt` does.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{CpuId, kvm_fpu, kvm_lapic_state};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Exit, Hypervisor, InternalError, Kick, MemoryOwner, MemorySlot, Registers, Result, Vcpu, Vm,
    VmExit,
};

/// One scripted exit.
#[derive(Clone, Debug)]
pub enum Step {
    /// `in`: a port and the width in bytes.
    In(u16, usize),
    /// `out`: a port and the bytes.
    Out(u16, Vec<u8>),
    /// A read of this many bytes at a guest physical address.
    Read(u64, usize),
    /// A write.
    Write(u64, Vec<u8>),
    Hlt,
    Shutdown,
    SystemEvent(u32),
    InternalError(InternalError),
    FailEntry(u64),
    Other(u32),
}

/// What the scripted guests of one machine saw and were given.
#[derive(Default)]
pub struct Transcript {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    answers: Vec<Vec<u8>>,
    memory: Vec<MemorySlot>,
    registers: Vec<(u32, Registers)>,
    interrupts: Vec<u32>,
}

impl Transcript {
    /// What each `In` and `Read` step got, in order.
    pub fn answers(&self) -> Vec<Vec<u8>> {
        self.lock().answers.clone()
    }

    /// The RAM that the machine was given.
    pub fn memory(&self) -> Vec<MemorySlot> {
        self.lock().memory.clone()
    }

    /// The registers that each vCPU was started with.
    pub fn registers(&self) -> Vec<(u32, Registers)> {
        self.lock().registers.clone()
    }

    /// The GSIs that have a line.
    pub fn interrupts(&self) -> Vec<u32> {
        self.lock().interrupts.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fake host. The script runs on vCPU 0; other vCPUs sleep.
pub struct FakeHypervisor {
    script: Vec<Step>,
    transcript: Arc<Transcript>,
}

impl FakeHypervisor {
    /// A host whose every machine plays `script`.
    pub fn new(script: Vec<Step>) -> FakeHypervisor {
        FakeHypervisor {
            script,
            transcript: Arc::default(),
        }
    }

    /// The record of what happens.
    pub fn transcript(&self) -> Arc<Transcript> {
        Arc::clone(&self.transcript)
    }
}

impl Hypervisor for FakeHypervisor {
    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        let (script, transcript) = (self.script.clone(), Arc::clone(&self.transcript));
        Ok(Arc::new(FakeVm { script, transcript }))
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        CpuId::new(0).map_err(|_| super::Error::Unavailable("no CPUID".to_owned()))
    }
}

struct FakeVm {
    script: Vec<Step>,
    transcript: Arc<Transcript>,
}

impl Vm for FakeVm {
    unsafe fn add_memory(&self, slot: MemorySlot, _owner: MemoryOwner) -> Result<()> {
        self.transcript.lock().memory.push(slot);
        Ok(())
    }

    fn create_interrupt_controllers(&self) -> Result<()> {
        Ok(())
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let script = if index == 0 {
            self.script.clone().into()
        } else {
            VecDeque::new()
        };
        Ok(Box::new(FakeVcpu {
            index,
            script,
            current: None,
            buffer: Vec::new(),
            registers: Registers::default(),
            report_rip: false,
            transcript: Arc::clone(&self.transcript),
            kick: Arc::default(),
        }))
    }

    fn register_ioeventfd(&self, _: BorrowedFd<'_>, _: u64, _: u32) -> Result<()> {
        // A scripted guest's notifications arrive as exits.
        Ok(())
    }

    fn register_irqfd(&self, _event: &EventFd, gsi: u32) -> Result<()> {
        self.transcript.lock().interrupts.push(gsi);
        Ok(())
    }
}

#[derive(Default)]
struct FakeKick {
    requested: Mutex<bool>,
    changed: Condvar,
}

impl FakeKick {
    fn take(&self) -> bool {
        std::mem::take(
            &mut self
                .requested
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    fn wait(&self) {
        let guard = self
            .requested
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut guard = self
            .changed
            .wait_while(guard, |requested| !*requested)
            .unwrap_or_else(PoisonError::into_inner);
        *guard = false;
    }
}

impl Kick for FakeKick {
    fn request_exit(&self) {
        *self
            .requested
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

struct FakeVcpu {
    index: u32,
    script: VecDeque<Step>,
    current: Option<Step>,
    buffer: Vec<u8>,
    registers: Registers,
    report_rip: bool,
    transcript: Arc<Transcript>,
    kick: Arc<FakeKick>,
}

impl Vcpu for FakeVcpu {
    fn set_cpuid(&mut self, _cpuid: &CpuId) -> Result<()> {
        Ok(())
    }

    fn set_msrs(&mut self, _msrs: &[(u32, u64)]) -> Result<()> {
        Ok(())
    }

    fn set_fpu(&mut self, _fpu: &kvm_fpu) -> Result<()> {
        Ok(())
    }

    fn lapic(&self) -> Result<kvm_lapic_state> {
        Ok(kvm_lapic_state::default())
    }

    fn set_lapic(&mut self, _lapic: &kvm_lapic_state) -> Result<()> {
        Ok(())
    }

    fn registers(&self) -> Result<Registers> {
        Ok(self.registers.clone())
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        self.registers = registers.clone();
        self.transcript
            .lock()
            .registers
            .push((self.index, registers.clone()));
        Ok(())
    }

    fn report_rip(&mut self, on: bool) {
        self.report_rip = on;
    }

    fn translate(&self, virtual_address: u64) -> Option<u64> {
        Some(virtual_address)
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        if let Some(Step::In(..) | Step::Read(..)) = self.current.take() {
            self.transcript
                .lock()
                .answers
                .push(std::mem::take(&mut self.buffer));
        }
        let rip = self.report_rip.then_some(self.registers.general.rip);
        if self.kick.take() {
            return Ok(Exit {
                rip,
                reason: VmExit::Interrupted,
            });
        }
        self.current = self.script.pop_front();
        let reason = match &self.current {
            Some(Step::In(port, size)) => {
                self.buffer = vec![0; *size];
                VmExit::IoIn {
                    port: *port,
                    size: *size,
                    data: &mut self.buffer,
                }
            }
            Some(Step::Out(port, data)) => VmExit::IoOut {
                port: *port,
                size: data.len(),
                data,
            },
            Some(Step::Read(address, size)) => {
                self.buffer = vec![0; *size];
                VmExit::MmioRead {
                    address: *address,
                    data: &mut self.buffer,
                }
            }
            Some(Step::Write(address, data)) => VmExit::MmioWrite {
                address: *address,
                data,
            },
            Some(Step::Hlt) => VmExit::Hlt,
            Some(Step::Shutdown) => VmExit::Shutdown,
            Some(Step::SystemEvent(kind)) => VmExit::SystemEvent { kind: *kind },
            Some(Step::InternalError(error)) => VmExit::InternalError(error.clone()),
            Some(Step::FailEntry(reason)) => VmExit::FailEntry { reason: *reason },
            Some(Step::Other(number)) => VmExit::Other(*number),
            None => {
                self.kick.wait();
                VmExit::Interrupted
            }
        };
        Ok(Exit { rip, reason })
    }

    fn kick_handle(&self) -> Result<Arc<dyn Kick>> {
        Ok(Arc::clone(&self.kick) as Arc<dyn Kick>)
    }
}
