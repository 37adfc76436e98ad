//! What a kernel image says about its version and its modules.

use memchr::memmem;

use crate::loader;

/// Offset of the setup header's field `kernel_version`, and of the header's magic number (boot protocol, "The
/// Real-Mode Kernel Header"). The field is an offset behind the boot sector.
const KERNEL_VERSION: usize = 0x20e;
const MAGIC: usize = 0x202;
const SECTOR: usize = 512;
/// How the message begins that a kernel prints first.
const BANNER: &[u8] = b"Linux version ";
/// Longer than any version is.
const MOST: usize = 128;

/// The version of a kernel as `uname -r` prints it, from a bzImage or an ELF `vmlinux`.
pub fn kernel_version(image: &[u8]) -> Option<String> {
    if image.get(MAGIC..MAGIC + 4) == Some(b"HdrS") {
        let offset = image.get(KERNEL_VERSION..)?.first_chunk::<2>()?;
        let at = usize::from(u16::from_le_bytes(*offset));
        return (at != 0).then(|| word(image.get(at + SECTOR..)?)).flatten();
    }
    if !image.starts_with(b"\x7fELF") {
        return None;
    }
    // The same words are in a format string, where no number follows.
    memmem::find_iter(image, BANNER).find_map(|at| word(image.get(at + BANNER.len()..)?))
}

/// The first word of `bytes`, if it can be a version.
fn word(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.get(..MOST).unwrap_or(bytes);
    let end = bytes
        .iter()
        .position(|byte| byte.is_ascii_whitespace() || *byte == 0)?;
    let word = std::str::from_utf8(bytes.get(..end)?).ok()?;
    let is_version = word.starts_with(|c: char| c.is_ascii_digit())
        && word
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "+-._~".contains(c));
    is_version.then(|| word.to_owned())
}

/// Whether a kernel of this version can load modules at all. One that can has the *vermagic* of its modules inside: the
/// version, and words about how it was built.
pub fn takes_modules(image: &[u8], version: &str) -> bool {
    let unpacked = loader::unpack(image);
    let image = unpacked.as_deref().unwrap_or(image);
    let version = format!("{version} ");
    memmem::find_iter(image, &version).any(|at| {
        let rest = image.get(at + version.len()..).unwrap_or_default();
        [&b"SMP "[..], b"preempt", b"mod_unload ", b"modversions "]
            .iter()
            .any(|word| rest.starts_with(word))
    })
}
