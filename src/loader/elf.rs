//! ELF images (System V ABI, chapter 5): a list of segments, each with its place in the file and in memory.

use std::ops::Range;

use object::LittleEndian as Le;
use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};

use super::{Error, Kind, Loaded, write};
use crate::arch::x86_64::layout;
use crate::mem::{GuestAddress, GuestMemory, GuestRam};

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry point, 32 or 64 bits wide (Xen, public/elfnote.h).
const PVH_NOTE: elf::NoteType = elf::NoteType(18);
/// Linux links its kernel image here and above; with paging off the address means nothing.
const KERNEL_VIRTUAL: u64 = 0xffff_ffff_8000_0000;

/// Loads the segments of `image`.
pub(super) fn load(ram: &GuestRam, name: &str, image: &[u8]) -> Result<Loaded, Error> {
    // EI_CLASS: 1 is 32-bit, 2 is 64-bit.
    match image.get(4) {
        Some(2) => load_class::<FileHeader64<Le>>(ram, name, image),
        Some(1) => load_class::<FileHeader32<Le>>(ram, name, image),
        _ => Err(damaged(name, "its ELF header is cut short")),
    }
}

fn damaged(name: &str, why: impl Into<String>) -> Error {
    Error::Damaged {
        name: name.to_owned(),
        why: why.into(),
    }
}

fn load_class<H: FileHeader<Endian = Le>>(
    ram: &GuestRam,
    name: &str,
    image: &[u8],
) -> Result<Loaded, Error> {
    let header = H::parse(image).map_err(|_| damaged(name, "its ELF header is cut short"))?;
    let refuse = |why| {
        Err(Error::NotAKernel {
            name: name.to_owned(),
            why,
        })
    };
    if header.is_big_endian() {
        return refuse("it is an ELF for another machine");
    }
    let wide = header.is_class_64();
    match header.e_machine(Le) {
        elf::EM_X86_64 => {}
        elf::EM_386 if !wide => {}
        _ => return refuse("it is an ELF for another machine"),
    }
    if header.e_type(Le) != elf::ET_EXEC && header.e_type(Le) != elf::ET_DYN {
        return refuse("it is an ELF, but not an executable");
    }
    let headers = header
        .program_headers(Le, image)
        .map_err(|_| damaged(name, "its table of segments is cut short"))?;
    let mut taken: Vec<Range<u64>> = Vec::new();
    let mut virtual_entry = None;
    let entry: u64 = header.e_entry(Le).into();
    for segment in headers
        .iter()
        .filter(|segment| segment.p_type(Le) == elf::PT_LOAD)
    {
        let memory_len: u64 = segment.p_memsz(Le).into();
        if memory_len == 0 {
            continue;
        }
        let bytes = segment
            .data(Le, image)
            .map_err(|()| damaged(name, "a segment lies beyond the end of the file"))?;
        let range = place(
            ram,
            name,
            segment.p_paddr(Le).into(),
            bytes.len() as u64,
            memory_len,
        )?;
        if taken
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            return Err(damaged(name, "two of its segments overlap in memory"));
        }
        // RAM is fresh and so zero: what the segment has beyond its bytes needs no writing.
        write(ram, name, range.start, bytes)?;
        let base: u64 = segment.p_vaddr(Le).into();
        if let Some(offset) = entry
            .checked_sub(base)
            .filter(|offset| *offset < memory_len)
        {
            virtual_entry = range.start.checked_add(offset);
        }
        taken.push(range);
    }
    let (Some(start), Some(end)) = (
        taken.iter().map(|range| range.start).min(),
        taken.iter().map(|range| range.end).max(),
    ) else {
        return refuse("it is an ELF without segments to load");
    };
    let notes = Notes::of::<H>(headers, image);
    let (kind, rip) = match notes.pvh {
        Some(rip) if !notes.linux || !wide => (Kind::Pvh, rip),
        _ if !wide => return refuse("it is a 32-bit ELF without a PVH note"),
        _ if entry >= KERNEL_VIRTUAL => (Kind::Linux64, virtual_entry.unwrap_or(entry)),
        _ => (Kind::Linux64, entry),
    };
    if !taken.iter().any(|range| range.contains(&rip)) {
        return Err(damaged(
            name,
            format!("its entry point {rip:#x} lies in none of its segments"),
        ));
    }
    Ok(Loaded {
        kind,
        rip,
        taken: start..end,
        header: None,
    })
}

/// Checks where a segment goes.
fn place(
    ram: &GuestRam,
    name: &str,
    start: u64,
    file_len: u64,
    memory_len: u64,
) -> Result<Range<u64>, Error> {
    if file_len > memory_len {
        return Err(damaged(
            name,
            "a segment is longer in the file than in memory",
        ));
    }
    let end = start
        .checked_add(memory_len)
        .ok_or_else(|| damaged(name, "a segment leaves the address space"))?;
    if start < layout::HIGH_MEMORY {
        return Err(damaged(
            name,
            format!("a segment at {start:#x} lies below 1 MiB"),
        ));
    }
    let len = usize::try_from(memory_len).unwrap_or(usize::MAX);
    if !ram.check_range(GuestAddress(start), len) {
        return Err(Error::TooLarge {
            name: name.to_owned(),
            why: format!("a segment takes {} KiB at {start:#x}", memory_len >> 10),
        });
    }
    Ok(start..end)
}

/// What the notes of an image tell.
#[derive(Default)]
struct Notes {
    /// The PVH entry point.
    pvh: Option<u64>,
    /// The image says that it is Linux.
    linux: bool,
}

impl Notes {
    fn of<H: FileHeader<Endian = Le>>(headers: &[H::ProgramHeader], image: &[u8]) -> Notes {
        let mut found = Notes::default();
        for header in headers {
            let Ok(Some(mut notes)) = header.notes(Le, image) else {
                continue;
            };
            // A note that does not parse ends the list: nothing after it can be trusted.
            while let Ok(Some(note)) = notes.next() {
                match note.name() {
                    b"Linux" => found.linux = true,
                    b"Xen" if note.n_type(Le) == PVH_NOTE => {
                        let bytes = note.desc().iter().take(8).rev();
                        found.pvh =
                            Some(bytes.fold(0, |value, byte| value << 8 | u64::from(*byte)));
                    }
                    _ => {}
                }
            }
        }
        found
    }
}
