//! What the loader tells the kernel: memory map, command line, RAM disk, ACPI root pointer.
//!
//! Linux takes it as `boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst); PVH kernels take
//! `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h).

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::{Error, Request, bzimage, write};
use crate::arch::x86_64::layout::{self, MemoryKind, MemoryMapEntry};
use crate::mem::GuestRam;

/// The setup header in the zero page lies where it lies in a bzImage.
const HEADER_OFFSET: u64 = 0x1f1;
/// `type_of_loader` of a loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// `loadflags`: the protected-mode code lies at 1 MiB and above.
const LOADED_HIGH: u8 = 1;
/// `hvm_start_info.magic`.
const START_INFO_MAGIC: u32 = 0x336e_c578;

fn e820_kind(entry: &MemoryMapEntry) -> u32 {
    match entry.kind {
        MemoryKind::Ram => 1,
        MemoryKind::Reserved => 2,
    }
}

/// Writes the zero page at [`layout::BOOT_PARAMS`].
pub(super) fn write_zero_page(
    ram: &GuestRam,
    request: &Request<'_>,
    header: Option<&bzimage::Header>,
    initrd: &Range<u64>,
) -> Result<(), Error> {
    // A bzImage's own header first; what the loader must fill in is then written over it.
    if let Some(header) = header {
        write(
            ram,
            "boot_params",
            layout::BOOT_PARAMS + HEADER_OFFSET,
            header.bytes(),
        )?;
    }
    let mut params: boot_params =
        crate::mem::Bytes::read_obj(ram, crate::mem::GuestAddress(layout::BOOT_PARAMS)).map_err(
            |_| Error::TooLarge {
                name: "boot_params".to_owned(),
                why: "there is no memory below 1 MiB".to_owned(),
            },
        )?;
    let len = initrd.end - initrd.start;
    let (low, high) = (|value: u64| value as u32, |value: u64| (value >> 32) as u32);
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    if header.is_none() {
        params.hdr.version = 0x20c;
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE);
    params.hdr.cmdline_size = layout::COMMAND_LINE_MAX as u32 - 1;
    params.hdr.ramdisk_image = low(initrd.start);
    params.hdr.ramdisk_size = low(len);
    params.ext_ramdisk_image = high(initrd.start);
    params.ext_ramdisk_size = high(len);
    params.acpi_rsdp_addr = request.rsdp;
    let map = layout::memory_map(request.ram_bytes);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            type_: e820_kind(entry),
        };
    }
    params.e820_entries = map.len() as u8;
    crate::mem::Bytes::write_obj(ram, params, crate::mem::GuestAddress(layout::BOOT_PARAMS))
        .map_err(|_| Error::TooLarge {
            name: "boot_params".to_owned(),
            why: "there is no memory below 1 MiB".to_owned(),
        })
}

/// Writes the start info at [`layout::PVH_START_INFO`], its module list and memory map behind it.
pub(super) fn write_start_info(
    ram: &GuestRam,
    request: &Request<'_>,
    initrd: &Range<u64>,
) -> Result<(), Error> {
    let modules = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    let memory_map = modules + size_of::<hvm_modlist_entry>() as u64;
    let map = layout::memory_map(request.ram_bytes);
    let has_initrd = !initrd.is_empty();
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: has_initrd.into(),
        modlist_paddr: if has_initrd { modules } else { 0 },
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: request.rsdp,
        memmap_paddr: memory_map,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let module = hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        ..Default::default()
    };
    let mut bytes = as_bytes(&info);
    bytes.extend(as_bytes(&module));
    for entry in &map {
        bytes.extend(as_bytes(&hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: e820_kind(entry),
            ..Default::default()
        }));
    }
    write(ram, "the PVH start info", layout::PVH_START_INFO, &bytes)
}

fn as_bytes<T: vm_memory::ByteValued>(value: &T) -> Vec<u8> {
    value.as_slice().to_vec()
}
