//! ACPI: how an operating system learns what machine it is on.
//!
//! A root pointer (RSDP) leads to a list of tables (XSDT), and that to the rest: the FADT says how to sleep and
//! reset, the MADT lists interrupt controllers and processors, and the DSDT holds byte code that describes the
//! devices (ACPI 6.5 §5.2). Each device writes its own part of the DSDT; this room only puts tables in order.

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::xsdt::XSDT;

use crate::arch::x86_64::layout;

const OEM_ID: [u8; 6] = *b"SARANG";
const OEM_TABLE_ID: [u8; 8] = *b"SARANGVM";
const OEM_REVISION: u32 = 1;

/// Offsets in the FADT (ACPI 6.5 table 5.9), and its length in revision 6.5.
mod fadt {
    pub const LEN: u32 = 276;
    pub const BOOT_ARCHITECTURE: usize = 109;
    pub const FLAGS: usize = 112;
    pub const RESET_REGISTER: usize = 116;
    pub const RESET_VALUE: usize = 128;
    pub const MINOR_VERSION: usize = 131;
    pub const X_DSDT: usize = 140;
    pub const SLEEP_CONTROL: usize = 244;
    pub const SLEEP_STATUS: usize = 256;

    /// No VGA to be probed for; that there is no 8042 is said by *not* setting bit 1.
    pub const NO_VGA: u16 = 1 << 2;
    /// `wbinvd` works; the power and sleep buttons are not fixed hardware.
    pub const WBINVD: u32 = 1 << 0;
    pub const POWER_BUTTON: u32 = 1 << 4;
    pub const SLEEP_BUTTON: u32 = 1 << 5;
    pub const RESET_SUPPORTED: u32 = 1 << 10;
    pub const HARDWARE_REDUCED: u32 = 1 << 20;
}

/// What the tables shall say.
pub struct Description<'a> {
    /// Number of processors; their APIC ids count from 0.
    pub cpus: u32,
    /// The devices, each of which describes itself.
    pub devices: &'a [&'a dyn Aml],
    /// I/O ports of the power registers.
    pub sleep_control: u16,
    pub sleep_status: u16,
    pub reset: u16,
    /// What to write to the reset register.
    pub reset_value: u8,
    /// Guest physical addresses of the interrupt controllers.
    pub io_apic: u32,
    pub local_apic: u32,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the ACPI tables take {0} bytes, more than fit below 1 MiB")]
    TooLong(usize),
}

/// The tables as they lie from `address` on, a multiple of 16, the root pointer first.
///
/// # Errors
/// When they do not fit into [`layout::ACPI_TABLES`].
pub fn tables(address: u64, description: &Description<'_>) -> Result<Vec<u8>, Error> {
    let mut memory = vec![0; Rsdp::len().next_multiple_of(16)];
    let place = |memory: &mut Vec<u8>, table: &dyn Aml| -> u64 {
        memory.resize(memory.len().next_multiple_of(16), 0);
        let at = address + memory.len() as u64;
        table.to_aml_bytes(memory);
        at
    };
    let dsdt = place(&mut memory, &dsdt(description));
    let fadt = place(&mut memory, &fadt_table(description, dsdt));
    let madt = place(&mut memory, &madt(description));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&mut memory, &xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
    for (byte, value) in memory.iter_mut().zip(root) {
        *byte = value;
    }
    let room = layout::ACPI_TABLES.end.saturating_sub(address);
    if memory.len() as u64 > room {
        Err(Error::TooLong(memory.len()))
    } else {
        Ok(memory)
    }
}

fn fadt_table(description: &Description<'_>, dsdt: u64) -> Sdt {
    let port = GenericAddress::io_port_address::<u8>;
    let flags = fadt::WBINVD
        | fadt::POWER_BUTTON
        | fadt::SLEEP_BUTTON
        | fadt::RESET_SUPPORTED
        | fadt::HARDWARE_REDUCED;
    let mut table = Sdt::new(*b"FACP", fadt::LEN, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.write_u16(fadt::BOOT_ARCHITECTURE, fadt::NO_VGA);
    table.write_u32(fadt::FLAGS, flags);
    table.write(fadt::RESET_REGISTER, port(description.reset));
    table.write_u8(fadt::RESET_VALUE, description.reset_value);
    table.write_u8(fadt::MINOR_VERSION, 5);
    table.write_u64(fadt::X_DSDT, dsdt);
    table.write(fadt::SLEEP_CONTROL, port(description.sleep_control));
    table.write(fadt::SLEEP_STATUS, port(description.sleep_status));
    table.update_checksum();
    table
}

fn madt(description: &Description<'_>) -> MADT {
    let address = LocalInterruptController::Address(description.local_apic);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for cpu in (0..=254_u8).take(description.cpus as usize) {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, description.io_apic, 0));
    table
}

/// A processor object of the DSDT, which gives the MADT's entry of the same number a name.
struct Processor(u8);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            Path::new(&format!("C{:03X}", self.0)),
            vec![
                &aml::Name::new(Path::new("_HID"), &"ACPI0007"),
                &aml::Name::new(Path::new("_UID"), &self.0),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn dsdt(description: &Description<'_>) -> Sdt {
    let processors: Vec<Processor> = (0..=254_u8)
        .take(description.cpus as usize)
        .map(Processor)
        .collect();
    let mut children: Vec<&dyn Aml> = description.devices.to_vec();
    children.extend(processors.iter().map(|processor| processor as &dyn Aml));
    let mut code = Vec::new();
    aml::Scope::new(Path::new("\\_SB_"), children).to_aml_bytes(&mut code);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&code);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = layout::ACPI_TABLES.start;

    fn description(cpus: u32) -> Description<'static> {
        Description {
            cpus,
            devices: &[],
            sleep_control: 0x600,
            sleep_status: 0x601,
            reset: 0x602,
            reset_value: 1,
            io_apic: 0xfec0_0000,
            local_apic: 0xfee0_0000,
        }
    }

    fn number<const N: usize>(memory: &[u8], at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&memory[at..at + N]);
        u64::from_le_bytes(bytes)
    }

    /// A table as a guest finds it, its checksum verified.
    fn table(memory: &[u8], address: u64) -> &[u8] {
        let at = (address - BASE) as usize;
        let table = &memory[at..at + number::<4>(memory, at + 4) as usize];
        assert_eq!(
            table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        table
    }

    #[test]
    fn a_guest_can_walk_from_the_root_pointer_to_every_table() {
        for cpus in [1, 4, 64] {
            let memory = tables(BASE, &description(cpus)).unwrap();
            assert_eq!(&memory[..8], b"RSD PTR ");
            assert_eq!(
                memory[..20]
                    .iter()
                    .fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
                0
            );
            let xsdt = table(&memory, number::<8>(&memory, 24));
            let entries: Vec<&[u8]> = xsdt[36..]
                .chunks(8)
                .map(|entry| table(&memory, number::<8>(entry, 0)))
                .collect();
            let names: Vec<&[u8]> = entries.iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC"]);
            let dsdt = table(&memory, number::<8>(entries[0], fadt::X_DSDT));
            assert_eq!(&dsdt[..4], b"DSDT");
            // One entry of 8 bytes a processor, one of 12 for the IOAPIC.
            assert_eq!(entries[1].len(), 44 + 8 * cpus as usize + 12);
        }
    }

    #[test]
    fn the_power_registers_are_ports_of_one_byte() {
        let fadt = fadt_table(&description(1), BASE);
        for (at, port) in [
            (fadt::RESET_REGISTER, 0x602),
            (fadt::SLEEP_CONTROL, 0x600),
            (fadt::SLEEP_STATUS, 0x601),
        ] {
            let register = &fadt.as_slice()[at..at + 12];
            assert_eq!(register[..4], [1, 8, 0, 1]);
            assert_eq!(number::<8>(register, 4), port);
        }
        let flags = number::<4>(fadt.as_slice(), fadt::FLAGS) as u32;
        assert_eq!(flags & fadt::HARDWARE_REDUCED, fadt::HARDWARE_REDUCED);
    }
}
