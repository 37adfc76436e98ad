//! Unpacks the compressed kernel inside a bzImage.
//!
//! The kernel's build appends to the compressed data four bytes with the unpacked size, little-endian (gzip's own
//! trailer is the same thing). Decoders take these for the start of another stream, so they are cut off first; and they
//! bound what is unpacked, so that no image can make the VMM allocate more than the guest has memory.

use std::io::{self, Read};

use super::Error;

/// What came of a payload.
pub(super) enum Unpacked {
    Image(Vec<u8>),
    /// A compression that only the kernel's own unpacker knows.
    Unsupported(&'static str),
}

/// The first bytes of each compression that Linux can be built with.
const GZIP: &[u8] = &[0x1f, 0x8b];
const BZIP2: &[u8] = b"BZh";
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const LZMA: &[u8] = &[0x5d, 0, 0];
const LZO: &[u8] = &[0x89, b'L', b'Z', b'O'];

/// Unpacks `packed`, which belongs to the image called `name`, for a guest with `ram_bytes` of memory.
pub(super) fn unpack(name: &str, packed: &[u8], ram_bytes: u64) -> Result<Unpacked, Error> {
    let damaged = |why: String| Error::Damaged {
        name: name.to_owned(),
        why,
    };
    for (magic, why) in [
        (LZMA, "sarang does not unpack lzma"),
        (LZO, "sarang does not unpack lzo"),
    ] {
        if packed.starts_with(magic) {
            return Ok(Unpacked::Unsupported(why));
        }
    }
    let known = [GZIP, BZIP2, XZ, LZ4_LEGACY, ZSTD];
    if !known.iter().any(|magic| packed.starts_with(magic)) {
        return Ok(Unpacked::Unsupported("its compression is not known"));
    }
    let (data, size) = packed
        .split_last_chunk::<4>()
        .ok_or_else(|| damaged("its payload is cut short".into()))?;
    let size = u32::from_le_bytes(*size);
    if u64::from(size) > ram_bytes {
        return Err(Error::TooLarge {
            name: name.to_owned(),
            why: format!("it claims to unpack to {} MiB", size >> 20),
        });
    }
    let size = size as usize;
    let image = if packed.starts_with(GZIP) {
        // The size is gzip's own trailer, without which the stream is not whole.
        read_bounded(flate2::read::GzDecoder::new(packed), size)
    } else if packed.starts_with(BZIP2) {
        read_bounded(bzip2::read::BzDecoder::new(data), size)
    } else if packed.starts_with(XZ) {
        read_bounded(lzma_rust2::XzReader::new(data, false), size)
    } else if packed.starts_with(ZSTD) {
        ruzstd::decoding::StreamingDecoder::new(data)
            .map_err(io::Error::other)
            .and_then(|decoder| read_bounded(decoder, size))
    } else {
        unpack_lz4(data, size)
    };
    let image = image.map_err(|error| damaged(format!("its payload does not unpack ({error})")))?;
    if image.len() == size {
        Ok(Unpacked::Image(image))
    } else {
        Err(damaged(format!(
            "its payload unpacks to {} bytes instead of {size}",
            image.len()
        )))
    }
}

/// Reads at most `size` bytes and one more, by which a stream that is too long shows.
fn read_bounded(reader: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut image = Vec::with_capacity(size.saturating_add(1));
    reader
        .take((size as u64).saturating_add(1))
        .read_to_end(&mut image)?;
    Ok(image)
}

/// LZ4's legacy frame: after the magic number, blocks of 8 MiB, each behind its compressed size (LZ4 Frame Format,
/// "Legacy frame").
fn unpack_lz4(data: &[u8], size: usize) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let cut = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let mut rest = data.get(LZ4_LEGACY.len()..).ok_or_else(cut)?;
    let mut image = vec![0; size];
    let mut filled = 0_usize;
    while !rest.is_empty() {
        let (len, tail) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let len = u32::from_le_bytes(*len) as usize;
        let block = tail.get(..len).ok_or_else(cut)?;
        let end = filled.saturating_add(BLOCK).min(size);
        let room = image.get_mut(filled..end).ok_or_else(cut)?;
        filled += lz4_flex::block::decompress_into(block, room).map_err(io::Error::other)?;
        rest = tail.get(len..).unwrap_or_default();
    }
    image.truncate(filled);
    Ok(image)
}
