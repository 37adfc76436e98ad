//! The hypervisor interface: what the rest of the house asks of KVM, and what KVM answers.
//!
//! KVM has three kinds of file descriptors, and so there are three traits: the system
//! ([`Hypervisor`]), one machine ([`Vm`]) and one virtual CPU ([`Vcpu`]). [`Vcpu::run`] enters guest
//! mode and comes back with an [`Exit`]: the reason why the CPU could not go on by itself.
//!
//! Two backends stand behind the traits: [`kvm`], and [`fake`], which replays a script of exits so that
//! everything above can be tested on a host that has no `/dev/kvm`.

pub mod fake;
pub mod kvm;

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_sregs};
use vmm_sys_util::eventfd::EventFd;

/// Why the hypervisor could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened; the text says why and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// A system call failed.
    #[error("KVM could not {what}: {source}")]
    Call {
        what: &'static str,
        source: io::Error,
    },
}

impl Error {
    /// The failure of `what`, a phrase that completes "KVM could not …".
    pub fn new(what: &'static str, source: impl Into<io::Error>) -> Error {
        Error::Call {
            what,
            source: source.into(),
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// The host's hypervisor.
pub trait Hypervisor: Send + Sync {
    /// Makes a machine with nothing in it: no RAM, no interrupt controllers, no vCPUs.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;

    /// The CPUID leaves that guests on this host can have.
    fn supported_cpuid(&self) -> Result<CpuId>;
}

/// A range of guest RAM, for [`Vm::add_memory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    pub index: u32,
    /// Guest physical address, a multiple of 4 KiB.
    pub guest: u64,
    /// Address in this process.
    pub host: u64,
    /// Length in bytes, a multiple of 4 KiB.
    pub len: u64,
    /// A write of the guest is an exit, as where there is no RAM.
    pub read_only: bool,
}

/// Keeps host memory mapped for as long as it is held.
pub type MemoryOwner = Arc<dyn Any + Send + Sync>;

/// One machine.
pub trait Vm: Send + Sync {
    /// Gives the guest a range of RAM. The machine and each of its vCPUs hold `owner` for as long as they exist.
    ///
    /// # Safety
    /// The host range must stay mapped while `owner` is held, and must be accessed only in ways that allow for the
    /// guest changing it at any time.
    unsafe fn add_memory(&self, slot: MemorySlot, owner: MemoryOwner) -> Result<()>;

    /// Puts in-kernel interrupt controllers and the interval timer into the machine: IOAPIC, PICs, PIT, and a local
    /// APIC for each vCPU to come. Best called after [`add_memory`](Vm::add_memory), which is quick only as long as no
    /// device has been put on KVM's own buses: it waits until no vCPU can still see the memory or the devices of before
    /// (SRCU), and that takes a timer tick, up to 4 ms.
    fn create_interrupt_controllers(&self) -> Result<()>;

    /// Makes a vCPU; `index` is also its APIC id. The interrupt controllers must be there.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>>;

    /// Makes each guest write of the 4-byte `value` to the guest physical `address` add one to `event`, an eventfd,
    /// without an exit.
    fn register_ioeventfd(&self, event: BorrowedFd<'_>, address: u64, value: u32) -> Result<()>;

    /// Makes each write to `event` an edge on interrupt `gsi`.
    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;
}

/// The registers that software sets before a vCPU first runs.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    pub general: kvm_regs,
    pub special: kvm_sregs,
}

/// One virtual CPU. It is run by the thread that owns it.
pub trait Vcpu: Send {
    /// Sets the CPUID leaves that the guest sees.
    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<()>;

    /// Sets model-specific registers: index and value. A register that KVM does not know is skipped.
    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<()>;

    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<()>;

    fn lapic(&self) -> Result<kvm_lapic_state>;

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<()>;

    fn registers(&self) -> Result<Registers>;

    fn set_registers(&mut self, registers: &Registers) -> Result<()>;

    /// Whether [`Exit::rip`] shall be filled in. Off at first.
    fn report_rip(&mut self, on: bool);

    /// Translates an address of the guest's current page tables to a physical one.
    fn translate(&self, virtual_address: u64) -> Option<u64>;

    /// Enters the guest until it exits. What the guest reads is stored into the exit's buffer and takes
    /// effect on the next call.
    fn run(&mut self) -> Result<Exit<'_>>;

    /// A handle by which other threads end [`run`](Vcpu::run) early.
    fn kick_handle(&self) -> Result<Arc<dyn Kick>>;
}

/// Ends a vCPU's stay in the guest.
pub trait Kick: Send + Sync {
    /// Makes the current or next [`Vcpu::run`] return [`VmExit::Interrupted`]. For a vCPU that is in
    /// guest mode right now, the thread also needs a signal, which is the caller's part.
    fn request_exit(&self);
}

/// An exit and where it happened.
#[derive(Debug)]
pub struct Exit<'a> {
    /// The guest's instruction pointer, when [`Vcpu::report_rip`] asked for it.
    pub rip: Option<u64>,
    pub reason: VmExit<'a>,
}

/// Why a vCPU left the guest, with KVM's names (`KVM_EXIT_*`, Documentation/virt/kvm/api.rst §5).
#[derive(Debug)]
pub enum VmExit<'a> {
    /// The guest reads a port; `data` is one or, for `rep ins`, several values of `size` bytes.
    IoIn {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    /// The guest writes a port, as above.
    IoOut {
        port: u16,
        size: usize,
        data: &'a [u8],
    },
    /// The guest reads 1 to 8 bytes at a guest physical address with no RAM.
    MmioRead { address: u64, data: &'a mut [u8] },
    /// The guest writes there.
    MmioWrite { address: u64, data: &'a [u8] },
    /// `hlt` with nobody to wake the vCPU; with in-kernel APICs only a scripted guest gives this.
    Hlt,
    /// A triple fault.
    Shutdown,
    /// The guest asked KVM for a shutdown, reset or crash report (`KVM_SYSTEM_EVENT_*`).
    SystemEvent { kind: u32 },
    /// KVM cannot go on.
    InternalError(InternalError),
    /// The CPU refused to enter the guest (`hardware_entry_failure_reason`).
    FailEntry { reason: u64 },
    /// A signal or a kick.
    Interrupted,
    /// A reason that this VMM never asks for, by number.
    Other(u32),
}

/// What KVM says when it gives up on a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`; 1 is a failed emulation.
    pub suberror: u32,
    /// The bytes at the instruction pointer, at most 15, when KVM passes them along.
    pub instruction: Vec<u8>,
}
