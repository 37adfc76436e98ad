//! Compressed tars and layers, told apart by their first bytes.
//!
//! A compressed file may be several streams one after the other (`cat a.gz b.gz`), and image builders make use of it:
//! zstd layers in particular carry *skippable frames* (RFC 8878 §3.1.2) with an index of their contents. What a stream
//! may make the decoder allocate is bounded.

use std::io::{self, BufRead, BufReader, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// The most memory that an xz stream may ask for, in KiB. `xz -9` wants 64 MiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// How a tar or a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl Compression {
    /// What a file is compressed with that begins like this.
    pub(super) fn of(first: &[u8]) -> Compression {
        const MAGIC: &[(&[u8], Compression)] = &[
            (&[0x1f, 0x8b], Compression::Gzip),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            // A skippable frame of zstd.
            (&[0x50, 0x2a, 0x4d, 0x18], Compression::Zstd),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (b"BZh", Compression::Bzip2),
        ];
        MAGIC
            .iter()
            .find(|(magic, _)| first.starts_with(magic))
            .map_or(Compression::None, |(_, compression)| *compression)
    }

    /// The name of the program that makes it, or nothing.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Compression::None => None,
            Compression::Gzip => Some("gzip"),
            Compression::Zstd => Some("zstd"),
            Compression::Xz => Some("xz"),
            Compression::Bzip2 => Some("bzip2"),
        }
    }

    /// What `packed` holds, unpacked as it is read.
    pub(super) fn unpack<'a>(self, packed: impl Read + 'a) -> Box<dyn Read + 'a> {
        let packed = BufReader::with_capacity(64 << 10, packed);
        match self {
            Compression::None => Box::new(packed),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
            Compression::Zstd => Box::new(ZstdFrames {
                source: packed,
                decoder: FrameDecoder::new(),
            }),
            Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                packed,
                true,
                XZ_MEMORY_KIB,
            )),
            Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(packed)),
        }
    }
}

/// Frames of zstd, one after the other. The decoder bounds the window that a frame may ask for.
struct ZstdFrames<R> {
    source: BufReader<R>,
    decoder: FrameDecoder,
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(io::Error::other)?;
                continue;
            }
            if self.source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            match self.decoder.init(&mut self.source) {
                Ok(()) => {}
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut (&mut self.source).take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        Compression::of(packed)
            .unpack(packed)
            .read_to_end(&mut all)?;
        Ok(all)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::XzOptions::with_preset(1);
        let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn bzip2(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn several_streams_after_each_other_are_all_unpacked() {
        let text = b"the quick brown fox ".repeat(5000);
        for pack in [gzip, zstd, xz, bzip2] {
            let mut packed = pack(&text);
            packed.extend(pack(b"jumps"));
            let mut whole = text.clone();
            whole.extend(b"jumps");
            assert_eq!(unpacked(&packed).unwrap(), whole);
        }
        assert_eq!(unpacked(&text).unwrap(), text);
    }

    #[test]
    fn a_stream_that_is_cut_short_is_an_error() {
        let text: Vec<u8> = (0..100_000_u32).flat_map(|n| n.to_le_bytes()).collect();
        for pack in [gzip, zstd, xz, bzip2] {
            let packed = pack(&text);
            assert!(unpacked(&packed[..packed.len() / 2]).is_err());
        }
    }

    #[test]
    fn skippable_frames_of_zstd_are_skipped_wherever_they_are() {
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let packed = [&skippable[..], &zstd(b"one "), &skippable, &zstd(b"two")].concat();
        assert_eq!(unpacked(&packed).unwrap(), b"one two");
        assert!(unpacked(&skippable[..9]).is_err());
    }
}
