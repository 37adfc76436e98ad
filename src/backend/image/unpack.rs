//! One tar, or one layer of an image, onto a tree.
//!
//! In a layer, a name with `.wh.` before it is a *whiteout*: it hides what lower layers have under that name, and
//! `.wh..wh..opq` hides all that they have in its directory (OCI image specification, layer.md, "Whiteouts"). Other
//! names with `.wh..wh.` belong to the storage driver that wrote them, and mean nothing elsewhere.

use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::contents::{Contents, FILE_MAX, Spool};
use super::entries::{Entries, Entry, Type};
use super::stream::Input;
use super::tree::{Kind, Tree};
use super::{Error, Progress, Result, Watch};

/// How many bytes of a file are moved at once.
const BUFFER: usize = 256 << 10;

/// What a tar is unpacked to.
pub(super) struct Unpack<'a, 'w> {
    pub tree: &'a mut Tree,
    pub spool: &'a mut Spool,
    /// The most bytes that the contents of all files may take.
    pub limit: Option<u64>,
    /// The file that is unpacked, for its errors.
    pub path: &'a Path,
    pub watch: &'a mut Watch<'w>,
}

/// What is being unpacked, for a person who waits.
pub(super) struct Part<'a> {
    pub what: &'a str,
    /// Bytes that it has, as far as known.
    pub total: u64,
    /// Whether it is a layer, which may hide what is below it.
    pub layer: bool,
    /// Where the archive lies uncompressed, and at which byte it begins there.
    pub backing: Option<(Arc<File>, u64)>,
}

impl Unpack<'_, '_> {
    /// Adds all entries to the tree.
    ///
    /// # Errors
    /// One sentence about what is wrong with the archive, or with the disk.
    pub fn all<R: Input>(&mut self, part: &Part<'_>, entries: &mut Entries<R>) -> Result<()> {
        let path = self.path;
        let damaged = |error: io::Error| Error::Archive {
            path: path.to_owned(),
            why: error.to_string(),
        };
        while let Some(entry) = entries.next().map_err(damaged)? {
            self.tell(part, entries.position())?;
            if part.layer && self.whiteout(&entry)? {
                continue;
            }
            self.entry(part, entry, entries)?;
            while entries.pass().map_err(damaged)? {
                self.tell(part, entries.position())?;
            }
            if let Some(limit) = self.limit
                && self.tree.bytes() > limit
            {
                return Err(Error::Bounded {
                    path: path.to_owned(),
                    size: limit,
                });
            }
        }
        Ok(())
    }

    /// Reads what is left of something whose digest is wanted.
    ///
    /// # Errors
    /// When it cannot be read, or the work is ended.
    pub fn drain(&mut self, part: &Part<'_>, mut rest: impl Read) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            self.tell(part, part.total)?;
            match rest.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::Archive {
                        path: self.path.to_owned(),
                        why: format!("it does not unpack ({error})"),
                    });
                }
            }
        }
    }

    fn tell(&mut self, part: &Part<'_>, done: u64) -> Result<()> {
        let progress = Progress {
            what: part.what,
            done,
            total: part.total,
        };
        match (self.watch)(&progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }

    /// Whether the entry is a whiteout, which is then done.
    fn whiteout(&mut self, entry: &Entry) -> Result<bool> {
        let end = entry.path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = entry.path.split_at(end.map_or(0, |at| at + 1));
        let Some(hidden) = name.strip_prefix(b".wh.") else {
            return Ok(false);
        };
        let done = if hidden == b".wh..opq" {
            self.tree.hide_all(parent)
        } else if hidden.starts_with(b".wh.") || hidden.is_empty() {
            Ok(())
        } else if hidden == b"." || hidden == b".." {
            Err("hides something that is not in its directory".to_owned())
        } else {
            self.tree.hide(&[parent, hidden].concat())
        };
        done.map_err(|why| self.refused(entry, why))?;
        Ok(true)
    }

    fn refused(&self, entry: &Entry, why: String) -> Error {
        let path = &entry.path[..entry.path.len().min(256)];
        Error::Entry {
            path: self.path.to_owned(),
            entry: path.escape_ascii().to_string(),
            why,
        }
    }

    fn entry<R: Input>(
        &mut self,
        part: &Part<'_>,
        mut entry: Entry,
        entries: &mut Entries<R>,
    ) -> Result<()> {
        let kind = match entry.kind {
            Type::HardLink => {
                let linked = self.tree.link(&entry.path, &entry.link);
                return linked.map_err(|why| self.refused(&entry, why));
            }
            Type::Symlink if entry.link.is_empty() || entry.link.len() > 4095 => {
                let why = "is a symbolic link to a path that is not 1 to 4095 bytes".to_owned();
                return Err(self.refused(&entry, why));
            }
            Type::Symlink => Kind::Symlink(std::mem::take(&mut entry.link)),
            Type::File => Kind::File(self.contents(part, &entry, entries)?),
            Type::Directory => Kind::directory(),
            // What the device numbers of Linux hold: 12 and 20 bits.
            Type::CharDevice { major, minor } | Type::BlockDevice { major, minor }
                if major > 0xfff || minor > 0xf_ffff =>
            {
                let why = format!("is a device with the impossible number {major}:{minor}");
                return Err(self.refused(&entry, why));
            }
            Type::CharDevice { major, minor } => Kind::CharDevice { major, minor },
            Type::BlockDevice { major, minor } => Kind::BlockDevice { major, minor },
            Type::Fifo => Kind::Fifo,
            Type::Unknown(kind) => {
                log::warn!(
                    "`{}` is left out: tar entries of type `{}` are not known",
                    entry.path.escape_ascii(),
                    kind.escape_ascii()
                );
                return Ok(());
            }
        };
        let put = self.tree.put(&entry.path, entry.attributes.clone(), kind);
        put.map_err(|why| self.refused(&entry, why))
    }

    fn contents<R: Input>(
        &mut self,
        part: &Part<'_>,
        entry: &Entry,
        entries: &mut Entries<R>,
    ) -> Result<Contents> {
        if entry.size > FILE_MAX {
            return Err(self.refused(
                entry,
                format!("has {} bytes, more than ext4 can hold", entry.size),
            ));
        }
        let stored = match &entry.map {
            None => entry.size,
            Some(map) => map.iter().map(|(_, len)| len).sum(),
        };
        if let Some(limit) = self.limit
            && stored > limit
        {
            return Err(Error::Bounded {
                path: self.path.to_owned(),
                size: limit,
            });
        }
        if let (Some((file, start)), None) = (&part.backing, &entry.map) {
            return Ok(Contents::part_of(file, start + entry.offset, entry.size));
        }
        let whole = [(0, entry.size)];
        let map = entry.map.as_deref().unwrap_or(&whole);
        let path = self.path;
        let mut filler = self.spool.begin(entry.size);
        let mut buffer = vec![0; BUFFER];
        let mut at = 0;
        for (start, len) in map {
            filler.hole(start - at)?;
            let mut left = *len;
            while left > 0 {
                let want = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
                let read = entries
                    .read(&mut buffer[..want])
                    .and_then(|read| match read {
                        0 => Err(io::ErrorKind::UnexpectedEof.into()),
                        read => Ok(read),
                    });
                let read = read.map_err(|error| Error::Archive {
                    path: path.to_owned(),
                    why: error.to_string(),
                })?;
                filler.data(&buffer[..read])?;
                left -= read as u64;
                let progress = Progress {
                    what: part.what,
                    done: entries.position(),
                    total: part.total,
                };
                if (self.watch)(&progress).is_break() {
                    return Err(Error::Interrupted);
                }
            }
            at = start + len;
        }
        filler.hole(entry.size - at)?;
        filler.finish()
    }
}
