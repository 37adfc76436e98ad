//! The real hypervisor: Linux KVM, reached through `/dev/kvm` (Documentation/virt/kvm/api.rst).

mod vcpu;

use std::ffi::CString;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Error, Hypervisor, MemoryOwner, MemorySlot, Result, Vcpu, Vm};
use crate::arch::x86_64::layout;

/// A feature of KVM that sarang cannot do without.
pub struct Capability {
    pub cap: Cap,
    /// KVM's name of it.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
}

/// Everything that is checked before the first machine is made.
pub const CAPABILITIES: &[Capability] = &[
    Capability {
        cap: Cap::UserMemory,
        name: "KVM_CAP_USER_MEMORY",
        purpose: "guest RAM",
    },
    Capability {
        cap: Cap::Irqchip,
        name: "KVM_CAP_IRQCHIP",
        purpose: "interrupt controllers",
    },
    Capability {
        cap: Cap::Pit2,
        name: "KVM_CAP_PIT2",
        purpose: "the interval timer",
    },
    Capability {
        cap: Cap::Irqfd,
        name: "KVM_CAP_IRQFD",
        purpose: "device interrupts",
    },
    Capability {
        cap: Cap::Ioeventfd,
        name: "KVM_CAP_IOEVENTFD",
        purpose: "notifications of virtio devices",
    },
    Capability {
        cap: Cap::ExtCpuid,
        name: "KVM_CAP_EXT_CPUID",
        purpose: "the guest's CPUID",
    },
    Capability {
        cap: Cap::SetTssAddr,
        name: "KVM_CAP_SET_TSS_ADDR",
        purpose: "real-mode code",
    },
    Capability {
        cap: Cap::ImmediateExit,
        name: "KVM_CAP_IMMEDIATE_EXIT",
        purpose: "pausing and stopping vCPUs",
    },
    Capability {
        cap: Cap::MpState,
        name: "KVM_CAP_MP_STATE",
        purpose: "starting further vCPUs",
    },
];

/// An open `/dev/kvm`.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens the device at `path`, checks the API version and [`CAPABILITIES`].
    ///
    /// # Errors
    /// One sentence for a person that names what is wrong with the device and what to do.
    pub fn open(path: &Path) -> Result<Kvm> {
        let shown = path.display();
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::Unavailable(format!("{shown} is not a path")))?;
        let fd = kvm_ioctls::Kvm::new_with_path(&name).map_err(|error| {
            let error = io::Error::from(error);
            Error::Unavailable(match error.kind() {
                io::ErrorKind::NotFound => format!(
                    "there is no {shown}: enable virtualization in the firmware and load the module \
                     kvm_intel or kvm_amd, or run inside scripts/kvm-anywhere"
                ),
                io::ErrorKind::PermissionDenied => format!(
                    "no permission to open {shown}: add yourself to its group (`sudo usermod -aG kvm \
                     $USER`, then log in again)"
                ),
                _ => format!("cannot open {shown}: {error}"),
            })
        })?;
        let version = fd.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(Error::Unavailable(format!(
                "{shown} is not a KVM that sarang can use: its API version is {version}, not \
                 {KVM_API_VERSION}"
            )));
        }
        let missing = missing(|cap| fd.check_extension(cap));
        if missing.is_empty() {
            return Ok(Kvm { fd });
        }
        Err(Error::Unavailable(format!(
            "this host's KVM lacks {}: a newer kernel has it",
            missing.join(", ")
        )))
    }

    /// Whether the host's KVM has `cap`.
    pub fn has(&self, cap: Cap) -> bool {
        self.fd.check_extension(cap)
    }

    /// How many vCPUs one machine can have at most.
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }
}

/// The required capabilities that `has` denies, each with its purpose.
fn missing(has: impl Fn(Cap) -> bool) -> Vec<String> {
    CAPABILITIES
        .iter()
        .filter(|capability| !has(capability.cap))
        .map(|capability| format!("{} (for {})", capability.name, capability.purpose))
        .collect()
}

impl Hypervisor for Kvm {
    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        let vm = self
            .fd
            .create_vm()
            .map_err(|error| Error::new("create a machine", error))?;
        // Both must be set before the first vCPU exists. Intel CPUs without unrestricted guest need them.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(|error| Error::new("place its identity map page", error))?;
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(|error| Error::new("place its task state segment", error))?;
        let sync_registers = self.fd.check_extension(Cap::SyncRegs);
        Ok(Arc::new(KvmVm {
            fd: vm,
            owners: Owners::default(),
            sync_registers,
        }))
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| Error::new("list the CPU's features", error))
    }
}

/// The owners of a machine's memory, shared with its vCPUs.
type Owners = Arc<Mutex<Vec<MemoryOwner>>>;

struct KvmVm {
    fd: VmFd,
    owners: Owners,
    sync_registers: bool,
}

impl Vm for KvmVm {
    unsafe fn add_memory(&self, slot: MemorySlot, owner: MemoryOwner) -> Result<()> {
        // Held before the guest can reach the memory, so that no failure leaves it without an owner.
        self.owners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(owner);
        let region = kvm_userspace_memory_region {
            slot: slot.index,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.guest,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        // SAFETY: the range is mapped while its owner is held, and this machine and all its vCPUs, without which
        // the guest cannot run, hold it.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(|error| Error::new("map guest memory", error))
    }

    fn create_interrupt_controllers(&self) -> Result<()> {
        self.fd
            .create_irq_chip()
            .map_err(|error| Error::new("create interrupt controllers", error))?;
        // The speaker's port 0x61 gates PIT channel 2, so it is emulated along with the PIT.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd
            .create_pit2(pit)
            .map_err(|error| Error::new("create an interval timer", error))
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(|error| Error::new("create a vCPU", error))?;
        Ok(Box::new(vcpu::KvmVcpu::new(
            fd,
            self.sync_registers,
            Arc::clone(&self.owners),
        )))
    }

    fn register_ioeventfd(&self, event: BorrowedFd<'_>, address: u64, value: u32) -> Result<()> {
        // SAFETY: the descriptor is open while it is borrowed, and `ManuallyDrop` leaves closing it to its owner.
        let event = ManuallyDrop::new(unsafe { EventFd::from_raw_fd(event.as_raw_fd()) });
        self.fd
            .register_ioevent(&event, &IoEventAddress::Mmio(address), value)
            .map_err(|error| Error::new("wire a notification", error))
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|error| Error::new("wire an interrupt line", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &str) -> String {
        match Kvm::open(Path::new(path)) {
            Err(Error::Unavailable(text)) => text,
            Err(other) => other.to_string(),
            Ok(_) => panic!("{path} was accepted"),
        }
    }

    #[test]
    fn a_host_without_kvm_is_told_what_to_load() {
        let text = refusal("/nonexistent/kvm");
        assert!(text.starts_with("there is no /nonexistent/kvm") && text.contains("kvm_intel"));
    }

    #[test]
    fn a_file_that_is_not_kvm_is_refused() {
        assert!(
            refusal("/dev/null").starts_with("/dev/null is not a KVM"),
            "{}",
            refusal("/dev/null")
        );
    }

    #[test]
    fn a_missing_capability_is_named_with_its_purpose() {
        assert_eq!(
            missing(|cap| cap as u32 != Cap::Irqfd as u32),
            ["KVM_CAP_IRQFD (for device interrupts)"]
        );
        assert!(missing(|_| true).is_empty());
    }
}
