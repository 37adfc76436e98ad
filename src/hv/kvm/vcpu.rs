//! One KVM vCPU: the `KVM_RUN` ioctl and the page of memory that it shares with the kernel.
//!
//! Each vCPU's file descriptor can be mapped; the mapping starts with `struct kvm_run`. The kernel
//! writes there why the guest stopped, and reads from there what the VMM answers.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    CpuId, KVM_EXIT_IO, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, Msrs, kvm_fpu, kvm_lapic_state,
    kvm_msr_entry, kvm_run,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use super::Owners;
use crate::hv::{Error, Exit, InternalError, Kick, Registers, Result, Vcpu, VmExit};

pub(super) struct KvmVcpu {
    fd: VcpuFd,
    /// Dropped after `fd`: while the guest can run, its memory stays mapped.
    _owners: Owners,
    /// `struct kvm_run`, mapped for as long as `fd` lives.
    run: *mut kvm_run,
    sync_registers: bool,
    report_rip: bool,
}

// SAFETY: `run` points into the mapping that `fd` owns, and moves between threads along with it.
unsafe impl Send for KvmVcpu {}

impl KvmVcpu {
    pub(super) fn new(mut fd: VcpuFd, sync_registers: bool, owners: Owners) -> KvmVcpu {
        let run: *mut kvm_run = fd.get_kvm_run();
        KvmVcpu {
            fd,
            _owners: owners,
            run,
            sync_registers,
            report_rip: false,
        }
    }

    fn rip(&self) -> Option<u64> {
        if !self.report_rip {
            None
        } else if self.sync_registers {
            // SAFETY: the mapping lives as long as `self.fd`; the kernel filled in `regs` on the way out
            // because `kvm_valid_regs` asked for it, and writes nothing while we are outside KVM_RUN.
            Some(unsafe { (*self.run).s.regs.regs.rip })
        } else {
            self.fd.get_regs().ok().map(|regs| regs.rip)
        }
    }
}

impl Vcpu for KvmVcpu {
    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<()> {
        self.fd
            .set_cpuid2(cpuid)
            .map_err(|error| Error::new("set a vCPU's CPUID", error))
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<()> {
        for &(index, data) in msrs {
            // One by one: KVM stops at the first register it does not know.
            let entry = kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let list = Msrs::from_entries(&[entry])
                .map_err(|_| Error::new("set a register", io::Error::from(io::ErrorKind::Other)))?;
            let set = self
                .fd
                .set_msrs(&list)
                .map_err(|error| Error::new("set a model-specific register", error))?;
            if set == 0 {
                log::debug!("KVM does not know MSR {index:#x}");
            }
        }
        Ok(())
    }

    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<()> {
        self.fd
            .set_fpu(fpu)
            .map_err(|error| Error::new("set a vCPU's FPU", error))
    }

    fn lapic(&self) -> Result<kvm_lapic_state> {
        self.fd
            .get_lapic()
            .map_err(|error| Error::new("read a local APIC", error))
    }

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<()> {
        self.fd
            .set_lapic(lapic)
            .map_err(|error| Error::new("set a local APIC", error))
    }

    fn registers(&self) -> Result<Registers> {
        let read = |error| Error::new("read a vCPU's registers", error);
        Ok(Registers {
            general: self.fd.get_regs().map_err(read)?,
            special: self.fd.get_sregs().map_err(read)?,
        })
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        let write = |error| Error::new("set a vCPU's registers", error);
        self.fd.set_sregs(&registers.special).map_err(write)?;
        self.fd.set_regs(&registers.general).map_err(write)
    }

    fn report_rip(&mut self, on: bool) {
        self.report_rip = on;
        if self.sync_registers {
            match on {
                true => self.fd.set_sync_valid_reg(SyncReg::Register),
                false => self.fd.clear_sync_valid_reg(SyncReg::Register),
            }
        }
    }

    fn translate(&self, virtual_address: u64) -> Option<u64> {
        let translation = self.fd.translate_gva(virtual_address).ok()?;
        (translation.valid != 0).then_some(translation.physical_address)
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        match self.fd.run() {
            Ok(VcpuExit::Intr) => return Ok(self.interrupted()),
            Ok(_) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(self.interrupted());
            }
            Err(error) => return Err(Error::new("run a vCPU", error)),
        }
        let rip = self.rip();
        // SAFETY: the mapping lives as long as `self.fd`, which the result borrows; outside KVM_RUN nobody
        // else touches it, but for `immediate_exit`, which kick handles access atomically.
        let run = unsafe { &mut *self.run };
        Ok(Exit {
            rip,
            reason: decode(run),
        })
    }

    fn kick_handle(&self) -> Result<Arc<dyn Kick>> {
        let len = std::mem::size_of::<kvm_run>();
        // SAFETY: a new shared mapping of the vCPU's first page at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                self.fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page.cast::<kvm_run>()) {
            Some(run) if page != libc::MAP_FAILED => Ok(Arc::new(KvmKick { run })),
            _ => Err(Error::new("map a vCPU", io::Error::last_os_error())),
        }
    }
}

impl KvmVcpu {
    /// Takes note of a kick, and lets the next run enter the guest again.
    fn interrupted(&mut self) -> Exit<'_> {
        self.fd.set_kvm_immediate_exit(0);
        Exit {
            rip: self.rip(),
            reason: VmExit::Interrupted,
        }
    }
}

/// Turns what the kernel wrote into an exit.
fn decode(run: &mut kvm_run) -> VmExit<'_> {
    use kvm_bindings as kvm;
    let base: *mut kvm_run = run;
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: `io` is the member of the union that this reason makes valid.
            let io = unsafe { run.__bindgen_anon_1.io };
            let size = usize::from(io.size.max(1));
            let len = size * io.count as usize;
            // SAFETY: the kernel promises `len` bytes at that offset of the same mapping, in its second page.
            let data = unsafe {
                std::slice::from_raw_parts_mut(base.cast::<u8>().add(io.data_offset as usize), len)
            };
            if u32::from(io.direction) == kvm::KVM_EXIT_IO_IN {
                VmExit::IoIn {
                    port: io.port,
                    size,
                    data,
                }
            } else {
                VmExit::IoOut {
                    port: io.port,
                    size,
                    data,
                }
            }
        }
        kvm::KVM_EXIT_MMIO => {
            // SAFETY: `mmio` is the member of the union that this reason makes valid.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            let (address, data) = (mmio.phys_addr, &mut mmio.data[..len]);
            if mmio.is_write != 0 {
                VmExit::MmioWrite { address, data }
            } else {
                VmExit::MmioRead { address, data }
            }
        }
        kvm::KVM_EXIT_HLT => VmExit::Hlt,
        kvm::KVM_EXIT_SHUTDOWN => VmExit::Shutdown,
        kvm::KVM_EXIT_INTR => VmExit::Interrupted,
        kvm::KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: `system_event` is the member of the union that this reason makes valid.
            VmExit::SystemEvent {
                kind: unsafe { run.__bindgen_anon_1.system_event.type_ },
            }
        }
        kvm::KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: `fail_entry` is the member of the union that this reason makes valid.
            let fail = unsafe { run.__bindgen_anon_1.fail_entry };
            VmExit::FailEntry {
                reason: fail.hardware_entry_failure_reason,
            }
        }
        kvm::KVM_EXIT_INTERNAL_ERROR => VmExit::InternalError(internal_error(run)),
        other => VmExit::Other(other),
    }
}

fn internal_error(run: &kvm_run) -> InternalError {
    // SAFETY: both members overlay the same plain integers, which this reason makes valid; the flags are
    // looked at only when `ndata` says that the kernel wrote them.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    let mut error = InternalError {
        suberror: failure.suberror,
        instruction: Vec::new(),
    };
    let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if failure.suberror == KVM_INTERNAL_ERROR_EMULATION
        && failure.ndata >= 3
        && failure.flags & flag != 0
    {
        // SAFETY: the flag says that these bytes are valid.
        let (size, bytes) = unsafe {
            let details = failure.__bindgen_anon_1.__bindgen_anon_1;
            (details.insn_size, details.insn_bytes)
        };
        error.instruction = bytes.into_iter().take(usize::from(size)).collect();
    }
    error
}

/// A second mapping of `struct kvm_run`, of which only `immediate_exit` is used. It keeps the kernel's
/// page alive even after the vCPU is gone.
struct KvmKick {
    run: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to this value alone, and its one byte is accessed atomically.
unsafe impl Send for KvmKick {}
// SAFETY: as above.
unsafe impl Sync for KvmKick {}

impl Kick for KvmKick {
    fn request_exit(&self) {
        // SAFETY: the mapping lives until drop, and the field is one byte at a valid address.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) };
        flag.store(1, Ordering::SeqCst);
    }
}

impl Drop for KvmKick {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `kick_handle` with this length, and nobody else has it.
        unsafe { libc::munmap(self.run.as_ptr().cast(), std::mem::size_of::<kvm_run>()) };
    }
}
