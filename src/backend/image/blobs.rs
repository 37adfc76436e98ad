//! The files of an image, by name: in a directory, or in an archive that is not compressed.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::entries::{Entries, Type};
use super::stream::{Range, digest};
use super::{Error, Result};

/// A manifest, index or configuration has no more bytes than this.
const DOCUMENT_MAX: u64 = 8 << 20;
/// Files in an archive of images.
const FILES_MAX: usize = 100_000;

/// Where the files of an image are.
pub(super) enum Blobs {
    Directory(PathBuf),
    Archive {
        path: PathBuf,
        file: Arc<File>,
        files: HashMap<Vec<u8>, Place>,
    },
}

/// What an archive has under a name.
pub(super) enum Place {
    At {
        offset: u64,
        len: u64,
    },
    /// Old versions of docker link a layer that occurs twice.
    Link(Vec<u8>),
}

impl Blobs {
    /// The files of the archive in `whole`, which came from the file at `path`.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn of_archive(path: &Path, whole: &Range) -> Result<Blobs> {
        let damaged = |why: String| Error::Archive {
            path: path.to_owned(),
            why,
        };
        let mut files = HashMap::new();
        let mut entries = Entries::new(whole.clone());
        while let Some(entry) = entries.next().map_err(|error| damaged(error.to_string()))? {
            let place = match entry.kind {
                Type::File if entry.map.is_none() => Place::At {
                    offset: whole.offset + entry.offset,
                    len: entry.size,
                },
                Type::Symlink => Place::Link(entry.link),
                _ => continue,
            };
            if files.len() >= FILES_MAX {
                return Err(damaged(format!("it holds more than {FILES_MAX} files")));
            }
            files.insert(clean(&entry.path), place);
        }
        Ok(Blobs::Archive {
            path: path.to_owned(),
            file: whole.file.clone(),
            files,
        })
    }

    /// The file or directory that the image is.
    pub fn path(&self) -> &Path {
        match self {
            Blobs::Directory(path) | Blobs::Archive { path, .. } => path,
        }
    }

    /// A sentence about the image.
    pub fn wrong(&self, why: impl Into<String>) -> Error {
        Error::Image {
            path: self.path().to_owned(),
            why: why.into(),
        }
    }

    /// Opens the file `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(&self, name: &str) -> Result<Range> {
        let missing = || self.wrong(format!("it lacks {name}"));
        match self {
            Blobs::Directory(path) => {
                let path = path.join(name);
                let opened = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&path);
                let file = opened.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => missing(),
                    _ => Error::reading(&path)(error),
                })?;
                let found = file.metadata().map_err(Error::reading(&path))?;
                if !found.is_file() {
                    return Err(self.wrong(format!("{name} is not a file")));
                }
                Ok(Range {
                    file: Arc::new(file),
                    offset: 0,
                    len: found.len(),
                })
            }
            Blobs::Archive { file, files, .. } => {
                let mut name = clean(name.as_bytes());
                // A link leads to a file, not to another link.
                for _ in 0..2 {
                    match files.get(&name) {
                        Some(Place::At { offset, len }) => {
                            return Ok(Range {
                                file: file.clone(),
                                offset: *offset,
                                len: *len,
                            });
                        }
                        Some(Place::Link(target)) => {
                            let parent = name.iter().rposition(|byte| *byte == b'/');
                            let parent = &name[..parent.map_or(0, |at| at + 1)];
                            name = clean(&[parent, target].concat());
                        }
                        None => break,
                    }
                }
                Err(missing())
            }
        }
    }

    /// All of a small file.
    ///
    /// # Errors
    /// When it is not there or not small.
    pub fn document(&self, name: &str) -> Result<Vec<u8>> {
        let mut range = self.open(name)?;
        if range.len > DOCUMENT_MAX {
            return Err(self.wrong(format!("its {name} has {} bytes", range.len)));
        }
        let mut bytes = Vec::new();
        let read = range.read_to_end(&mut bytes);
        read.map_err(Error::reading(self.path()))?;
        Ok(bytes)
    }

    /// The file with a digest, `sha256:` and 64 digits, and what it must have in it for that.
    ///
    /// # Errors
    /// When it is not there, not small, or does not have that digest.
    pub fn verified(&self, wanted: &str, size: Option<u64>) -> Result<Vec<u8>> {
        let bytes = self.document(&blob_name(wanted))?;
        let what = "a document of it";
        self.check_size(what, size, bytes.len() as u64)?;
        self.check(what, wanted, &digest(&bytes))?;
        Ok(bytes)
    }

    /// Compares the size of a blob.
    pub fn check_size(&self, what: &str, wanted: Option<u64>, found: u64) -> Result<()> {
        match wanted {
            Some(wanted) if wanted != found => Err(self.wrong(format!(
                "{what} should have {wanted} bytes but has {found}; fetch it again"
            ))),
            _ => Ok(()),
        }
    }

    /// Compares the digest of a blob.
    pub fn check(&self, what: &str, expected: &str, found: &str) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        Err(Error::Digest {
            path: self.path().to_owned(),
            what: what.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        })
    }
}

/// Where a layout keeps the blob with a digest (OCI image specification, image-layout.md, "Blobs").
pub(super) fn blob_name(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

/// A path without `.`, `..` and empty names.
pub(super) fn clean(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}
