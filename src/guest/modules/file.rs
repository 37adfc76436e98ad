//! One module's file: its name, its bytes, and what it says it needs.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use object::elf::FileHeader64;
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, SectionIndex};

use super::cache::Cache;
use super::{Error, Module};

/// No module is larger than this once it is unpacked.
const MOST: u64 = 256 << 20;

type Unpack = fn(&[u8]) -> io::Result<Vec<u8>>;

/// How modules are packed, by the ends of their files' names.
const PACKINGS: [(&str, Unpack); 4] = [
    (".ko", |bytes| Ok(bytes.to_vec())),
    (".ko.xz", |bytes| {
        bounded(lzma_rust2::XzReader::new(bytes, true))
    }),
    (".ko.zst", |bytes| {
        let decoder = ruzstd::decoding::StreamingDecoder::new(bytes);
        bounded(decoder.map_err(io::Error::other)?)
    }),
    (".ko.gz", |bytes| {
        bounded(flate2::read::MultiGzDecoder::new(bytes))
    }),
];

fn bounded(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The name of the module in the file at `path`, if that is one: `virtio-rng.ko.xz` has `virtio_rng`.
pub(super) fn name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = PACKINGS
        .iter()
        .find_map(|(end, _)| file.strip_suffix(end))?;
    Some(normal(stem))
}

/// A module's name as the kernel has it.
pub(super) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads the module at `path`.
pub(super) fn read(path: &Path, cache: &Cache) -> Result<Module, Error> {
    let text = path.to_string_lossy();
    let damaged = |why: String| Error::Damaged {
        path: path.to_owned(),
        why,
    };
    let packing = PACKINGS.iter().find(|(end, _)| text.ends_with(end));
    let (Some((end, unpack)), Some(name)) = (packing, name(&text)) else {
        return Err(damaged("its name does not end in .ko".into()));
    };
    let packed = fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    let bytes = if *end == ".ko" {
        packed
    } else if let Some(bytes) = cache.get(&name, &packed) {
        bytes
    } else {
        let bytes = unpack(&packed).map_err(|error| damaged(error.to_string()))?;
        cache.put(&name, &packed, &bytes);
        bytes
    };
    if !bytes.starts_with(b"\x7fELF") {
        return Err(damaged("it is not an ELF file".into()));
    }
    Ok(Module { name, bytes })
}

/// The names of the modules that `module` says it needs.
pub(super) fn depends(module: &Module) -> Vec<String> {
    let text = modinfo(&module.bytes).unwrap_or_default();
    let values = text
        .split(|byte| *byte == 0)
        .filter_map(|record| std::str::from_utf8(record).ok()?.strip_prefix("depends="));
    values
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect()
}

/// The section `.modinfo`: strings that end in a zero byte each.
fn modinfo(bytes: &[u8]) -> Option<&[u8]> {
    let header = FileHeader64::<Endianness>::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, bytes).ok()?;
    let (_, section): (SectionIndex, _) = sections.section_by_name(endian, b".modinfo")?;
    section.data(endian, bytes).ok()
}
