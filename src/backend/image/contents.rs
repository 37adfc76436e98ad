//! What is in a file: not the bytes themselves, but where they are.
//!
//! An uncompressed tar already holds the contents of its files in one piece each, so they are read from there when the
//! image is written. What comes out of a decompressor has no such place; it goes into a *spool*, a file without a name
//! beside the image, which the kernel frees whatever becomes of this process. Runs of zeros are left out, so a file full
//! of nothing costs nothing.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Error, Result};

/// Contents are kept in multiples of this many bytes, and holes are no smaller. A multiple of ext4's blocks.
pub(super) const CHUNK: u64 = 64 << 10;
/// A file with more pieces than this is written without holes, because ext4 could not describe them well.
const PIECES_MAX: usize = 50_000;
/// The largest file of ext4 with blocks of 4096 bytes, less one block.
pub(super) const FILE_MAX: u64 = (1 << 44) - 4096;
/// How often the room on the disk is looked at, in bytes written.
const LOOK_EVERY: u64 = 16 << 20;
/// The room that is left for others: a twentieth of the disk, but no more than this many bytes.
const ROOM_FOR_OTHERS: u64 = 1 << 30;

/// Where the bytes of a file are.
#[derive(Clone, Debug)]
enum Origin {
    Memory(Arc<Vec<u8>>),
    File(Arc<File>),
    /// Opened when it is needed, and only if it is still the same file.
    Path {
        path: PathBuf,
        device: u64,
        inode: u64,
    },
}

/// A part of a file that is not a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it is in the file, in bytes. A multiple of 4096.
    pub at: u64,
    /// Where its bytes begin in their origin.
    pub offset: u64,
    /// Bytes. A multiple of 4096, except at the end of the file.
    pub len: u64,
}

/// The contents of a file.
#[derive(Clone, Debug)]
pub(super) struct Contents {
    size: u64,
    origin: Origin,
    /// In order, without overlaps.
    pieces: Vec<Piece>,
}

impl From<Vec<u8>> for Contents {
    fn from(bytes: Vec<u8>) -> Contents {
        Contents::whole(bytes.len() as u64, 0, Origin::Memory(Arc::new(bytes)))
    }
}

impl Contents {
    fn whole(size: u64, offset: u64, origin: Origin) -> Contents {
        let piece = Piece {
            at: 0,
            offset,
            len: size,
        };
        Contents {
            size,
            origin,
            pieces: if size == 0 { Vec::new() } else { vec![piece] },
        }
    }

    /// `size` bytes of an open file from `offset` on.
    pub fn part_of(file: &Arc<File>, offset: u64, size: u64) -> Contents {
        Contents::whole(size, offset, Origin::File(file.clone()))
    }

    /// The parts `data` (first byte and length, in order) of the file at `path`, which has the given device and inode
    /// numbers. Between them it has holes.
    pub fn at_path(
        path: PathBuf,
        (device, inode): (u64, u64),
        size: u64,
        data: &[(u64, u64)],
    ) -> Contents {
        let mut pieces: Vec<Piece> = Vec::new();
        for (first, len) in data {
            let before = pieces.last().map_or(0, |last| last.at + last.len);
            let start = (first / CHUNK * CHUNK).max(before);
            let end = first.saturating_add(*len).div_ceil(CHUNK);
            let end = end.saturating_mul(CHUNK).min(size);
            if start < end {
                pieces.push(Piece {
                    at: start,
                    offset: start,
                    len: end - start,
                });
            }
        }
        Contents {
            size,
            origin: Origin::Path {
                path,
                device,
                inode,
            },
            pieces,
        }
    }

    /// Bytes that the file has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that it takes without its holes.
    pub fn stored(&self) -> u64 {
        if self.is_sparse() {
            self.pieces.iter().map(|piece| piece.len).sum()
        } else {
            self.size
        }
    }

    /// Whether it is written with its holes.
    pub fn is_sparse(&self) -> bool {
        self.pieces.len() <= PIECES_MAX
            && self.pieces.iter().map(|piece| piece.len).sum::<u64>() < self.size
    }

    /// The parts that are not holes.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Opens it for reading from the beginning.
    ///
    /// # Errors
    /// When the file has gone or become another.
    pub fn open(&self) -> Result<Reader<'_>> {
        let file = match &self.origin {
            Origin::Memory(_) => None,
            Origin::File(file) => Some(file.clone()),
            Origin::Path {
                path,
                device,
                inode,
            } => {
                let file = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                    .open(path)
                    .map_err(Error::reading(path))?;
                let found = file.metadata().map_err(Error::reading(path))?;
                if (found.dev(), found.ino()) != (*device, *inode) {
                    return Err(Error::Changed { path: path.clone() });
                }
                Some(Arc::new(file))
            }
        };
        Ok(Reader {
            contents: self,
            file,
            at: 0,
            next: 0,
            holes: !self.is_sparse(),
        })
    }

    /// The first `limit` bytes.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read(&self, limit: u64) -> Result<Vec<u8>> {
        let mut reader = self.open()?;
        reader.holes = true;
        let mut bytes = Vec::new();
        let read = reader.take(limit).read_to_end(&mut bytes);
        read.map_err(Error::reading(
            self.path().unwrap_or(Path::new("the spool")),
        ))?;
        Ok(bytes)
    }

    /// The file of the host that it is, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.origin {
            Origin::Path { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// Reads the contents of a file.
pub(super) struct Reader<'a> {
    contents: &'a Contents,
    file: Option<Arc<File>>,
    /// Where in the file this is.
    at: u64,
    /// The next piece.
    next: usize,
    /// Whether holes are read too, as zeros, or passed over.
    holes: bool,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bounded =
            |len: u64| usize::try_from(len).map_or(buffer.len(), |len| len.min(buffer.len()));
        let Some(piece) = self.contents.pieces.get(self.next) else {
            let zeros = bounded(self.contents.size - self.at);
            if !self.holes {
                return Ok(0);
            }
            buffer[..zeros].fill(0);
            self.at += zeros as u64;
            return Ok(zeros);
        };
        if self.at < piece.at {
            if !self.holes {
                self.at = piece.at;
                return self.read(buffer);
            }
            let zeros = bounded(piece.at - self.at);
            buffer[..zeros].fill(0);
            self.at += zeros as u64;
            return Ok(zeros);
        }
        let within = self.at - piece.at;
        let want = bounded(piece.len - within);
        let buffer = &mut buffer[..want];
        let read = match (&self.file, &self.contents.origin) {
            (Some(file), _) => file.read_at(buffer, piece.offset + within)?,
            (None, Origin::Memory(bytes)) => {
                let start = usize::try_from(piece.offset + within).unwrap_or(usize::MAX);
                (&mut bytes.get(start..).unwrap_or_default()).read(buffer)?
            }
            (None, _) => 0,
        };
        self.at += read as u64;
        if self.at == piece.at + piece.len {
            self.next += 1;
        }
        Ok(read)
    }
}

/// A file without a name, for what has been unpacked.
#[derive(Debug)]
pub(super) struct Spool {
    file: Arc<File>,
    directory: PathBuf,
    /// What is unpacked, for the sentence when the disk is full.
    source: PathBuf,
    end: u64,
    looked: u64,
}

impl Spool {
    /// Makes one in `directory`, for what comes out of `source`.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub fn new(directory: &Path, source: &Path) -> Result<Spool> {
        let file = nameless(directory).map_err(Error::writing(directory))?;
        Ok(Spool {
            file: Arc::new(file),
            directory: directory.to_owned(),
            source: source.to_owned(),
            end: 0,
            looked: 0,
        })
    }

    /// Begins a file of `size` bytes.
    pub fn begin(&mut self, size: u64) -> Filler<'_> {
        Filler {
            spool: self,
            size,
            pieces: Vec::new(),
            chunk: Vec::new(),
            at: 0,
        }
    }

    /// Takes all of `bytes`, however many there are.
    ///
    /// # Errors
    /// When they cannot be read or the disk is full.
    pub fn take(
        &mut self,
        mut bytes: impl Read,
        mut each: impl FnMut(u64) -> Result<()>,
    ) -> Result<(Arc<File>, u64)> {
        let start = self.end;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = match bytes.read(&mut buffer) {
                Ok(0) => return Ok((self.file.clone(), self.end - start)),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Error::Archive {
                        path: self.source.clone(),
                        why: format!("it does not unpack ({error})"),
                    });
                }
            };
            self.append(&buffer[..read])?;
            each(self.end - start)?;
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.looked == 0 || self.end - self.looked >= LOOK_EVERY {
            self.look(bytes.len() as u64)?;
            self.looked = self.end.max(1);
        }
        match self.file.write_all_at(bytes, self.end) {
            Ok(()) => {
                self.end += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(self.full(0)),
            Err(source) => Err(Error::Write {
                path: self.directory.clone(),
                source,
            }),
        }
    }

    /// Leaves some room for others.
    fn look(&self, more: u64) -> Result<()> {
        // A file system that does not say how full it is, says so when it is.
        let Ok(stat) = rustix::fs::fstatvfs(&*self.file) else {
            return Ok(());
        };
        let all = stat.f_blocks.saturating_mul(stat.f_frsize);
        let left = stat.f_bavail.saturating_mul(stat.f_frsize);
        if left < (all / 20).min(ROOM_FOR_OTHERS).saturating_add(more) {
            return Err(self.full(left));
        }
        Ok(())
    }

    fn full(&self, left: u64) -> Error {
        Error::DiskFull {
            path: self.source.clone(),
            directory: self.directory.clone(),
            left,
        }
    }
}

/// A file in `directory` that nobody can see, and that goes when it is closed.
fn nameless(directory: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let unnamed = options
        .clone()
        .custom_flags(libc::O_TMPFILE)
        .open(directory);
    if let Ok(file) = unnamed {
        return Ok(file);
    }
    // Not every file system can do that; then it has a name for a moment.
    let name = format!(".sarang-{}-{}", std::process::id(), random());
    let path = directory.join(name);
    let file = options.create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// A number that no other process has.
pub(super) fn random() -> u32 {
    let mut bytes = [0; 4];
    // Without it, the process's number must do.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u32::from_ne_bytes(bytes)
}

/// Collects the contents of one file in the spool.
pub(super) struct Filler<'a> {
    spool: &'a mut Spool,
    size: u64,
    pieces: Vec<Piece>,
    /// What has come of the chunk that is not complete.
    chunk: Vec<u8>,
    /// Where the next byte goes.
    at: u64,
}

impl Filler<'_> {
    /// Adds bytes.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = CHUNK as usize - self.chunk.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.chunk.extend_from_slice(now);
            self.at += now.len() as u64;
            bytes = later;
            if self.chunk.len() == CHUNK as usize {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Adds `len` zeros.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn hole(&mut self, len: u64) -> Result<()> {
        let edge = (CHUNK - self.chunk.len() as u64) % CHUNK;
        let first = edge.min(len);
        self.data(&vec![0; first as usize])?;
        let rest = len - first;
        self.at += rest - rest % CHUNK;
        self.data(&vec![0; (rest % CHUNK) as usize])
    }

    /// Puts away the current chunk, unless it is all zeros.
    fn flush(&mut self) -> Result<()> {
        let len = self.chunk.len() as u64;
        if self.chunk.iter().any(|byte| *byte != 0) {
            let at = self.at - len;
            let offset = self.spool.end;
            self.spool.append(&self.chunk)?;
            match self.pieces.last_mut() {
                Some(last) if last.at + last.len == at && last.offset + last.len == offset => {
                    last.len += len;
                }
                _ => self.pieces.push(Piece { at, offset, len }),
            }
        }
        self.chunk.clear();
        Ok(())
    }

    /// The contents, when all has been added.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn finish(mut self) -> Result<Contents> {
        self.flush()?;
        Ok(Contents {
            size: self.size,
            origin: Origin::File(self.spool.file.clone()),
            pieces: self.pieces,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool() -> Spool {
        Spool::new(&std::env::temp_dir(), Path::new("source")).unwrap()
    }

    fn all(contents: &Contents) -> Vec<u8> {
        contents.read(u64::MAX).unwrap()
    }

    #[test]
    fn what_is_filled_in_comes_out_again_and_zeros_take_no_room() {
        let mut spool = spool();
        let text: Vec<u8> = (1..=100_000_u32).map(|n| n as u8 | 1).collect();
        let mut filler = spool.begin(3 * CHUNK + 500_007);
        filler.hole(7).unwrap();
        filler.data(&text).unwrap();
        filler.hole(3 * CHUNK + 300_000).unwrap();
        filler.data(&text).unwrap();
        let contents = filler.finish().unwrap();
        let mut expected = vec![0; 7];
        expected.extend(&text);
        expected.resize(expected.len() + 3 * CHUNK as usize + 300_000, 0);
        expected.extend(&text);
        assert_eq!(contents.size(), expected.len() as u64);
        assert!(contents.is_sparse() && contents.stored() < 400_000);
        assert!(contents.pieces().iter().all(|piece| piece.at % CHUNK == 0));
        assert!(all(&contents) == expected);
        // A second file does not disturb the first.
        let mut filler = spool.begin(5);
        filler.data(b"after").unwrap();
        assert_eq!(all(&filler.finish().unwrap()), b"after");
        assert!(all(&contents) == expected);
    }

    #[test]
    fn a_file_of_zeros_has_no_pieces() {
        let mut spool = spool();
        let mut filler = spool.begin(1 << 40);
        filler.hole(1 << 40).unwrap();
        let contents = filler.finish().unwrap();
        assert_eq!((contents.size(), contents.stored()), (1 << 40, 0));
        assert_eq!(contents.read(10).unwrap(), [0; 10]);
        assert_eq!(all(&Contents::from(Vec::new())), b"");
    }

    #[test]
    fn a_file_that_has_become_another_is_not_read() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("file");
        std::fs::write(&path, "old").unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        let identity = (meta.dev(), meta.ino());
        let contents = Contents::at_path(path.clone(), identity, 3, &[(0, 3)]);
        assert_eq!(all(&contents), b"old");
        let wrong = Contents::at_path(path, (identity.0, identity.1 + 1), 3, &[(0, 3)]);
        assert!(matches!(wrong.read(3), Err(Error::Changed { .. })));
    }

    #[test]
    fn the_parts_of_a_sparse_file_are_widened_to_chunks_without_overlapping() {
        let data = [
            (1, 10),
            (CHUNK - 1, 1),
            (3 * CHUNK + 5, CHUNK),
            (5 * CHUNK, 9),
        ];
        let contents = Contents::at_path("x".into(), (0, 0), 5 * CHUNK + 9, &data);
        let parts: Vec<_> = contents.pieces().iter().map(|p| (p.at, p.len)).collect();
        assert_eq!(parts, [(0, CHUNK), (3 * CHUNK, 2 * CHUNK), (5 * CHUNK, 9)]);
    }
}
