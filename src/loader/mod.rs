//! Gets a kernel and its initial RAM disks into guest memory, and says where to begin.
//!
//! Three forms of kernels exist. An ELF `vmlinux` is loaded segment by segment and entered by the 64-bit Linux boot
//! protocol. Any ELF with a PVH note is entered by the PVH boot ABI. A `bzImage` is what distributions ship: a
//! compressed `vmlinux` behind a small program that unpacks it. That program takes a guest most of its boot time, so
//! the payload is unpacked here, on the host, and the `vmlinux` inside is loaded as if it had come alone.
//!
//! Images come from anywhere, so every number in them is checked before it is used.

mod boot_params;
mod bzimage;
mod elf;
mod payload;

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::path::Path;

use crate::arch::x86_64::layout;
use crate::mem::{Bytes, GuestAddress, GuestRam};

/// Where the first vCPU begins, and where it finds what the loader has to tell. Guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux boot protocol.
    Linux64 { rip: u64, boot_params: u64 },
    /// PVH direct boot ABI.
    Pvh { rip: u64, start_info: u64 },
}

/// A loaded guest.
#[derive(Clone, Debug)]
pub struct InitState {
    pub entry: Entry,
    /// What a person should know about how it was loaded, a sentence each.
    pub warnings: Vec<String>,
}

/// What to load.
pub struct Request<'a> {
    /// The bytes of the image, and how messages call it.
    pub kernel: &'a [u8],
    pub kernel_name: &'a str,
    /// Name and bytes of each initial RAM disk; they are concatenated, each padded to 4 bytes.
    pub initrds: &'a [(&'a str, &'a [u8])],
    pub command_line: &'a str,
    /// RAM of the machine, in bytes.
    pub ram_bytes: u64,
    /// Guest physical address of the ACPI root pointer.
    pub rsdp: u64,
}

/// Why an image was refused: a sentence that names it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {name}: {source}")]
    Read { name: String, source: io::Error },
    #[error("there is no file {0}")]
    Missing(String),
    #[error("{0} is a directory, not an image")]
    Directory(String),
    #[error("{0} is empty")]
    Empty(String),
    #[error("{name} is not a kernel: {why}; name an ELF vmlinux or a bzImage with --kernel")]
    NotAKernel { name: String, why: &'static str },
    #[error("{name} is damaged: {why}; get a fresh copy of it")]
    Damaged { name: String, why: String },
    #[error("{name} does not fit into the guest: {why}; give it more memory with --mem")]
    TooLarge { name: String, why: String },
    #[error(
        "the command line has {0} bytes, but a kernel takes {max} at most; shorten what --append adds",
        max = layout::COMMAND_LINE_MAX - 1
    )]
    CommandLineTooLong(usize),
    #[error("the command line has a control character in it; see what --append adds")]
    CommandLineControl,
}

/// Reads an image file.
///
/// # Errors
/// When it does not exist, is a directory, is empty, or cannot be read.
pub fn read_image(path: &Path) -> Result<Vec<u8>, Error> {
    let name = path.display().to_string();
    match std::fs::read(path) {
        Ok(bytes) if bytes.is_empty() => Err(Error::Empty(name)),
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Missing(name)),
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => Err(Error::Directory(name)),
        Err(source) => Err(Error::Read { name, source }),
    }
}

/// The ELF image inside a bzImage; `None` when `image` is none, or of a form that only a guest can unpack.
pub fn unpack(image: &[u8]) -> Option<Vec<u8>> {
    let header = bzimage::Header::find(image)?;
    let packed = header.payload(image)?;
    match payload::unpack("", packed, UNPACKED_MOST) {
        Ok(payload::Unpacked::Image(image)) => Some(image),
        _ => None,
    }
}

/// Most bytes that [`unpack`] makes of an image.
const UNPACKED_MOST: u64 = 1 << 30;

/// A kernel that lies in guest memory.
struct Loaded {
    kind: Kind,
    rip: u64,
    /// All memory that the kernel takes before it manages memory itself.
    taken: Range<u64>,
    /// The setup header of a bzImage, to be handed on.
    header: Option<bzimage::Header>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Linux64,
    Pvh,
}

/// Loads everything that `request` names into `ram`.
///
/// # Errors
/// When the image is no kernel, is damaged, or does not fit.
pub fn load(ram: &GuestRam, request: &Request<'_>) -> Result<InitState, Error> {
    write_command_line(ram, request.command_line)?;
    let mut warnings = Vec::new();
    let loaded = if request.kernel.starts_with(b"\x7fELF") {
        elf::load(ram, request.kernel_name, request.kernel)?
    } else if let Some(header) = bzimage::Header::find(request.kernel) {
        bzimage::load(ram, request, header, &mut warnings)?
    } else {
        return Err(Error::NotAKernel {
            name: request.kernel_name.to_owned(),
            why: "it is neither an ELF file nor a bzImage",
        });
    };
    let initrd = place_initrds(ram, request, &loaded)?;
    let entry = match loaded.kind {
        Kind::Linux64 => {
            boot_params::write_zero_page(ram, request, loaded.header.as_ref(), &initrd)?;
            Entry::Linux64 {
                rip: loaded.rip,
                boot_params: layout::BOOT_PARAMS,
            }
        }
        Kind::Pvh => {
            boot_params::write_start_info(ram, request, &initrd)?;
            Entry::Pvh {
                rip: loaded.rip,
                start_info: layout::PVH_START_INFO,
            }
        }
    };
    Ok(InitState { entry, warnings })
}

fn write_command_line(ram: &GuestRam, line: &str) -> Result<(), Error> {
    if line.len() >= layout::COMMAND_LINE_MAX {
        return Err(Error::CommandLineTooLong(line.len()));
    }
    if line.chars().any(char::is_control) {
        return Err(Error::CommandLineControl);
    }
    let bytes = [line.as_bytes(), &[0]].concat();
    write(ram, "the command line", layout::COMMAND_LINE, &bytes)
}

/// Writes to guest memory; `name` is what does not fit.
fn write(ram: &GuestRam, name: &str, address: u64, bytes: &[u8]) -> Result<(), Error> {
    ram.write_slice(bytes, GuestAddress(address))
        .map_err(|_| Error::TooLarge {
            name: name.to_owned(),
            why: format!(
                "there is no memory for {} bytes at {address:#x}",
                bytes.len()
            ),
        })
}

/// Puts the initial RAM disks as high as the kernel can reach, and returns where they lie.
fn place_initrds(
    ram: &GuestRam,
    request: &Request<'_>,
    loaded: &Loaded,
) -> Result<Range<u64>, Error> {
    const PAGE: u64 = 4096;
    let padded = |bytes: &[u8]| (bytes.len() as u64).next_multiple_of(4);
    let len: u64 = request.initrds.iter().map(|(_, bytes)| padded(bytes)).sum();
    if len == 0 {
        return Ok(0..0);
    }
    let reach = loaded
        .header
        .as_ref()
        .map_or(u64::from(u32::MAX), bzimage::Header::initrd_reach);
    let top = request
        .ram_bytes
        .min(layout::HOLE.start)
        .min(reach.saturating_add(1));
    let start = top.checked_sub(len).map(|start| start / PAGE * PAGE);
    let Some(start) = start.filter(|start| *start >= loaded.taken.end) else {
        let room = top.saturating_sub(loaded.taken.end);
        return Err(Error::TooLarge {
            name: match request.initrds {
                [(name, _)] => (*name).to_owned(),
                several => format!("the sum of {} initrds", several.len()),
            },
            why: format!(
                "it takes {} KiB, and the kernel leaves {} KiB",
                len >> 10,
                room >> 10
            ),
        });
    };
    let mut at = start;
    for (name, bytes) in request.initrds {
        write(ram, name, at, bytes)?;
        at += padded(bytes);
    }
    Ok(start..start + len)
}
