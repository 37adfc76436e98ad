//! Bytes of an archive in their order: from a part of a file, or out of a decompressor, with or without a digest.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

/// Bytes that are passed over at once where they have to be read for that.
const SKIPPED_AT_ONCE: u64 = 1 << 20;

/// Something that is read from its beginning to its end, and can pass over a part.
pub(super) trait Input: Read {
    /// Passes over `len` bytes, or a part of them if that takes long. The result is how many.
    ///
    /// # Errors
    /// When there are not that many, or they cannot be read.
    fn skip(&mut self, len: u64) -> io::Result<u64>;
}

/// A part of a file.
#[derive(Clone, Debug)]
pub(super) struct Range {
    pub file: Arc<File>,
    /// Where it begins in the file; moves on as it is read.
    pub offset: u64,
    /// Bytes left.
    pub len: u64,
}

impl Read for Range {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.len).map_or(buffer.len(), |len| len.min(buffer.len()));
        let read = self.file.read_at(&mut buffer[..want], self.offset)?;
        self.offset += read as u64;
        self.len -= read as u64;
        Ok(read)
    }
}

impl Input for Range {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        self.len = self
            .len
            .checked_sub(len)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.offset += len;
        Ok(len)
    }
}

/// Bytes that can only be passed over by reading them.
pub(super) struct Sequential<R>(pub R);

impl<R: Read> Read for Sequential<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Input for Sequential<R> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let len = len.min(SKIPPED_AT_ONCE);
        let skipped = io::copy(&mut (&mut self.0).take(len), &mut io::sink())?;
        if skipped < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(len)
    }
}

/// Computes the SHA-256 digest of what is read through it.
pub(super) struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Hashed<R> {
    pub fn new(inner: R) -> Hashed<R> {
        Hashed {
            inner,
            hash: Sha256::new(),
        }
    }

    /// The digest of what has been read.
    pub fn digest(self) -> String {
        hex(&self.hash.finalize())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

/// The SHA-256 digest of `bytes` as an image names it: `sha256:` and 64 hexadecimal digits.
pub(super) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().fold("sha256:".to_owned(), |text, byte| {
        format!("{text}{byte:02x}")
    })
}
