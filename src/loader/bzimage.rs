//! bzImage: the form in which distributions ship Linux (Documentation/arch/x86/boot.rst).
//!
//! The file begins with a boot sector and real-mode code, in which lies the *setup header*. Behind it follows the
//! protected-mode code: a small unpacker with the compressed kernel inside. The header says where that payload
//! is, relative to the protected-mode code.

use super::{Error, Kind, Loaded, Request, elf, payload, write};
use crate::mem::{GuestAddress, GuestMemory, GuestRam};

/// Offsets in the file, from the boot protocol's table "The Real-Mode Kernel Header".
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const INITRD_ADDR_MAX: usize = 0x22c;
const XLOADFLAGS: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// The header ends at the latest here, where the boot sector's jump leads past it.
const HEADER_END: usize = 0x290;
/// The first version with a payload offset is 2.08, with pref_address 2.10, with 64-bit entry 2.12.
const OLDEST: u16 = 0x208;
const SECTOR: usize = 512;
/// `XLF_KERNEL_64`: there is a 64-bit entry point, at this offset in the protected-mode code.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// The setup header, as bytes from [`SETUP_SECTS`] to at most [`HEADER_END`].
pub(super) struct Header {
    bytes: Vec<u8>,
}

impl Header {
    /// The header of `image`, if it has one that is new enough.
    pub(super) fn find(image: &[u8]) -> Option<Header> {
        if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
            return None;
        }
        let header = Header {
            bytes: image.get(SETUP_SECTS..HEADER_END)?.to_vec(),
        };
        (header.number::<2>(VERSION) >= u64::from(OLDEST)).then_some(header)
    }

    /// The header's bytes, for `boot_params`.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The highest address that an initial RAM disk may take.
    pub(super) fn initrd_reach(&self) -> u64 {
        self.number::<4>(INITRD_ADDR_MAX)
    }

    /// The protected-mode code of `image`, whose header this is.
    fn code<'a>(&self, image: &'a [u8]) -> Option<&'a [u8]> {
        // Zero means four, for kernels older than anyone remembers.
        let setup = match self.number::<1>(SETUP_SECTS) {
            0 => 4,
            sectors => sectors as usize,
        };
        let code = image.get((setup + 1) * SECTOR..)?;
        (!code.is_empty()).then_some(code)
    }

    /// The compressed kernel in `image`, whose header this is.
    pub(super) fn payload<'a>(&self, image: &'a [u8]) -> Option<&'a [u8]> {
        let offset = self.number::<4>(PAYLOAD_OFFSET) as usize;
        let len = self.number::<4>(PAYLOAD_LENGTH) as usize;
        let packed = self.code(image)?.get(offset..offset.checked_add(len)?)?;
        (!packed.is_empty()).then_some(packed)
    }

    /// `N` bytes at a file offset as a number; what the header does not reach is zero.
    fn number<const N: usize>(&self, offset: usize) -> u64 {
        let bytes = self
            .bytes
            .iter()
            .skip(offset.saturating_sub(SETUP_SECTS))
            .take(N);
        bytes
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

/// Loads a bzImage, unpacked here if its payload allows.
pub(super) fn load(
    ram: &GuestRam,
    request: &Request<'_>,
    header: Header,
    warnings: &mut Vec<String>,
) -> Result<Loaded, Error> {
    let name = request.kernel_name;
    let damaged = |why: &str| Error::Damaged {
        name: name.to_owned(),
        why: why.to_owned(),
    };
    let code = header
        .code(request.kernel)
        .ok_or_else(|| damaged("it ends before its protected-mode code"))?;
    let packed = header
        .payload(request.kernel)
        .ok_or_else(|| damaged("its payload lies beyond the end of the file"))?;
    let reason = match payload::unpack(name, packed, request.ram_bytes)? {
        payload::Unpacked::Image(image) if image.starts_with(b"\x7fELF") => {
            let loaded = elf::load(ram, name, &image)?;
            // It came out of a bzImage, so it is Linux, whatever its notes say.
            let rip = if loaded.kind == Kind::Linux64 {
                loaded.rip
            } else {
                loaded.taken.start
            };
            return Ok(Loaded {
                kind: Kind::Linux64,
                rip,
                header: Some(header),
                ..loaded
            });
        }
        payload::Unpacked::Image(_) => "its payload is not an ELF image",
        payload::Unpacked::Unsupported(format) => format,
    };
    warnings.push(format!(
        "{name} unpacks itself in the guest, which takes longer: {reason}"
    ));
    load_unpacker(ram, name, code, header)
}

/// Loads the protected-mode code as it is; the guest unpacks the kernel.
fn load_unpacker(ram: &GuestRam, name: &str, code: &[u8], header: Header) -> Result<Loaded, Error> {
    if header.number::<2>(XLOADFLAGS) as u16 & XLF_KERNEL_64 == 0 {
        return Err(Error::NotAKernel {
            name: name.to_owned(),
            why: "it is a bzImage without a 64-bit entry point",
        });
    }
    let start = header.number::<8>(PREF_ADDRESS);
    let len = header.number::<4>(INIT_SIZE).max(code.len() as u64);
    let fits = usize::try_from(len).is_ok_and(|len| ram.check_range(GuestAddress(start), len));
    if !fits {
        return Err(Error::TooLarge {
            name: name.to_owned(),
            why: format!("it takes {} KiB at {start:#x}", len >> 10),
        });
    }
    write(ram, name, start, code)?;
    let rip = start.saturating_add(ENTRY_64);
    Ok(Loaded {
        kind: Kind::Linux64,
        rip,
        taken: start..start.saturating_add(len),
        header: Some(header),
    })
}
