//! The state of a machine before its first instruction: where memory lies, what is in it, and what the vCPUs' registers say.

use super::{Error, Spec};
use crate::arch::x86_64::cpuid::{self, Topology};
use crate::arch::x86_64::{layout, msr, paging, registers};
use crate::backend::pmem;
use crate::board::Board;
use crate::hv::{self, Hypervisor, Registers, Vcpu};
use crate::loader::{self, Entry};
use crate::mem::{Bytes, GuestAddress, GuestRam};

/// Where each of the files lies in guest physical memory.
pub(super) fn place(
    hypervisor: &dyn Hypervisor,
    ram_bytes: u64,
    files: &[pmem::File],
) -> Result<Vec<GuestAddress>, Error> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let sizes: Vec<u64> = files.iter().map(pmem::File::size).collect();
    let bits = cpuid::physical_address_bits(&hypervisor.supported_cpuid()?);
    let limit = 1_u64.checked_shl(bits).unwrap_or(u64::MAX);
    let ranges = layout::persistent_ranges(ram_bytes, &sizes).unwrap_or_default();
    let end = ranges.last().map_or(u64::MAX, |range| range.end);
    if end > limit {
        return Err(Error::TooHigh { end, bits });
    }
    Ok(ranges
        .into_iter()
        .map(|range| GuestAddress(range.start))
        .collect())
}

/// Puts everything into RAM that must be there before the first instruction.
pub(super) fn fill(ram: &GuestRam, spec: &Spec, board: &Board) -> Result<Entry, Error> {
    let acpi = board.acpi_tables(spec.cpus)?;
    for (address, bytes) in [
        (layout::GDT, registers::gdt()),
        (
            layout::PAGE_TABLES,
            paging::identity_map(layout::PAGE_TABLES),
        ),
        (layout::ACPI_TABLES.start, acpi),
        (layout::RESET_VECTOR, layout::RESET_CODE.to_vec()),
    ] {
        ram.write_slice(&bytes, GuestAddress(address))
            .map_err(|_| Error::NoLowMemory)?;
    }
    let initrds: Vec<(&str, &[u8])> = spec
        .initrds
        .iter()
        .map(|image| (image.name.as_str(), image.bytes.as_slice()))
        .collect();
    let state = loader::load(
        ram,
        &loader::Request {
            kernel: &spec.kernel.bytes,
            kernel_name: &spec.kernel.name,
            initrds: &initrds,
            command_line: &spec.command_line,
            ram_bytes: spec.ram_bytes,
            rsdp: layout::ACPI_TABLES.start,
        },
    )?;
    for warning in &state.warnings {
        log::warn!("{warning}");
    }
    Ok(state.entry)
}

/// Makes the vCPUs: the first one at the entry, the others waiting for INIT and SIPI.
pub(super) fn make_vcpus(
    hypervisor: &dyn Hypervisor,
    vm: &dyn hv::Vm,
    count: u32,
    entry: Entry,
) -> Result<Vec<Box<dyn Vcpu>>, Error> {
    let supported = hypervisor.supported_cpuid()?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let mut vcpu = vm.create_vcpu(index)?;
        vcpu.set_cpuid(&cpuid::for_vcpu(&supported, Topology { index, count }))?;
        vcpu.set_msrs(msr::AT_ENTRY)?;
        vcpu.set_fpu(&registers::fpu())?;
        let mut lapic = vcpu.lapic()?;
        registers::connect_lint(&mut lapic);
        vcpu.set_lapic(&lapic)?;
        if index == 0 {
            let reset = vcpu.registers()?.special;
            let (general, special) = match entry {
                Entry::Linux64 { rip, boot_params } => registers::linux64(reset, rip, boot_params),
                Entry::Pvh { rip, start_info } => registers::pvh(reset, rip, start_info),
            };
            vcpu.set_registers(&Registers { general, special })?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
