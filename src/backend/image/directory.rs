//! A directory of the host as a tree.
//!
//! What an unprivileged user has unpacked or built belongs to that user, though the guest should find it owned by root.
//! So, unless root reads it, the caller's own files become root's; all other owners and all modes stay as they are.
//! Other file systems that are mounted inside the directory are left out, which makes `/` itself usable: of `/proc` and
//! `/sys` a guest wants only the empty directories.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, lgetxattr, llistxattr, seek};

use super::contents::{Contents, FILE_MAX};
use super::entries::bounded;
use super::tree::{Attributes, Id, Kind, ROOT, Tree};
use super::{Error, Progress, Result, Watch};

/// The most bytes that the names of a file's extended attributes, or the value of one, take (`XATTR_LIST_MAX`,
/// `XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 64 << 10;

/// Reads a directory.
pub(super) struct Reading<'a, 'w> {
    /// Whose files become root's.
    pub caller: Option<(u32, u32)>,
    /// Device and inode numbers of files that are no part of it.
    pub except: Vec<(u64, u64)>,
    pub watch: &'a mut Watch<'w>,
}

/// The user and group whose files become root's: nobody's, if this process is root.
pub(super) fn caller() -> Option<(u32, u32)> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    (!user.is_root()).then(|| (user.as_raw(), group.as_raw()))
}

impl Reading<'_, '_> {
    /// The tree below `root`.
    ///
    /// # Errors
    /// When a part of it cannot be read, or has no place in a file system image.
    pub fn all(&mut self, root: &Path) -> Result<Tree> {
        let mut tree = Tree::new();
        let mut links: HashMap<(u64, u64), Id> = HashMap::new();
        let top = std::fs::metadata(root).map_err(Error::reading(root))?;
        let attributes = self.attributes(root, &top)?;
        let refused = |path: &Path| {
            let (path, entry) = (root.to_owned(), path.display().to_string());
            move |why| Error::Entry { path, entry, why }
        };
        tree.put(b"/", attributes, Kind::directory())
            .map_err(refused(root))?;
        let mut open: Vec<(PathBuf, Id)> = vec![(root.to_owned(), ROOT)];
        while let Some((directory, id)) = open.pop() {
            for entry in std::fs::read_dir(&directory).map_err(Error::reading(&directory))? {
                let name = entry.map_err(Error::reading(&directory))?.file_name();
                let path = directory.join(&name);
                let found = std::fs::symlink_metadata(&path).map_err(Error::reading(&path))?;
                let identity = (found.dev(), found.ino());
                if self.except.contains(&identity) {
                    continue;
                }
                self.tell(tree.len() as u64)?;
                let kind = kind(&path, &found)?;
                let mounted = found.is_dir() && found.dev() != top.dev();
                if mounted {
                    log::warn!(
                        "{} is left out but for the directory itself: another file system is mounted there",
                        path.display()
                    );
                }
                let several = found.nlink() > 1 && !found.is_dir();
                if several && let Some(there) = links.get(&identity) {
                    tree.link_in(id, name.as_bytes(), *there)
                        .map_err(refused(&path))?;
                    continue;
                }
                let attributes = self.attributes(&path, &found)?;
                let made = tree.put_in(id, name.as_bytes(), attributes, kind);
                let made = made.map_err(refused(&path))?;
                if several {
                    links.insert(identity, made);
                }
                if found.is_dir() && !mounted {
                    open.push((path, made));
                }
            }
        }
        Ok(tree)
    }

    fn tell(&mut self, done: u64) -> Result<()> {
        let progress = Progress {
            what: "looking through the directory",
            done,
            total: 0,
        };
        match (self.watch)(&progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }

    fn attributes(&self, path: &Path, found: &Metadata) -> Result<Attributes> {
        let (mut uid, mut gid) = (found.uid(), found.gid());
        if let Some((caller_uid, caller_gid)) = self.caller {
            if uid == caller_uid {
                uid = 0;
            }
            if gid == caller_gid {
                gid = 0;
            }
        }
        Ok(Attributes {
            mode: (found.mode() & 0o7777) as u16,
            uid,
            gid,
            mtime: bounded((
                found.mtime(),
                u32::try_from(found.mtime_nsec()).unwrap_or(0),
            )),
            xattrs: xattrs(path).map_err(Error::reading(path))?,
        })
    }
}

fn kind(path: &Path, found: &Metadata) -> Result<Kind> {
    let kind = found.file_type();
    let (major, minor) = (
        rustix::fs::major(found.rdev()),
        rustix::fs::minor(found.rdev()),
    );
    Ok(if kind.is_dir() {
        Kind::directory()
    } else if kind.is_symlink() {
        let target = std::fs::read_link(path).map_err(Error::reading(path))?;
        Kind::Symlink(target.as_os_str().as_bytes().to_vec())
    } else if kind.is_char_device() {
        Kind::CharDevice { major, minor }
    } else if kind.is_block_device() {
        Kind::BlockDevice { major, minor }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else {
        let size = found.len();
        if size > FILE_MAX {
            return Err(Error::Entry {
                path: path.to_owned(),
                entry: path.display().to_string(),
                why: format!("has {size} bytes, more than ext4 can hold"),
            });
        }
        let sparse = found.blocks().saturating_mul(512) < size;
        // Opened now as well, so that a file nobody may read is told before anything is written.
        let file = open(path).map_err(Error::reading(path))?;
        let data = if sparse {
            data(&file, size).map_err(Error::reading(path))?
        } else {
            vec![(0, size)]
        };
        Kind::File(Contents::at_path(
            path.to_owned(),
            (found.dev(), found.ino()),
            size,
            &data,
        ))
    })
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// The parts of a file that are not holes: their first byte and length.
fn data(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => break,
            // A file system that does not tell.
            Err(rustix::io::Errno::INVAL) => return Ok(vec![(0, size)]),
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?.max(start + 1);
        parts.push((start, at - start));
    }
    Ok(parts)
}

/// The extended attributes that mean the same in a guest: the user's own, capabilities, access lists and, if this
/// process may see them, trusted ones. Labels of the host's security modules and overlays do not.
fn xattrs(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut names = vec![0; XATTR_MAX];
    let len = match llistxattr(path, &mut names[..]) {
        Ok(0) | Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) => return Ok(found),
        Ok(len) => len,
        Err(error) => return Err(error.into()),
    };
    for name in names[..len].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let Ok(text) = name.to_str() else {
            log::warn!(
                "{}: an extended attribute whose name is not UTF-8 is left out",
                path.display()
            );
            continue;
        };
        let kept = text.starts_with("user.")
            || text == "security.capability"
            || text.starts_with("system.posix_acl_")
            || (text.starts_with("trusted.") && !text.starts_with("trusted.overlay."));
        if !kept {
            continue;
        }
        let mut value = vec![0; XATTR_MAX];
        match lgetxattr(path, OsStr::from_bytes(name.to_bytes()), &mut value[..]) {
            Ok(len) => {
                value.truncate(len);
                found.insert(text.to_owned(), value);
            }
            // It has gone meanwhile, or may be listed but not read.
            Err(
                rustix::io::Errno::NODATA | rustix::io::Errno::PERM | rustix::io::Errno::ACCESS,
            ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(root: &Path, caller: Option<(u32, u32)>) -> Result<Tree> {
        let mut watch = |_: &Progress<'_>| ControlFlow::Continue(());
        let mut reading = Reading {
            caller,
            except: Vec::new(),
            watch: &mut watch,
        };
        reading.all(root)
    }

    #[test]
    fn the_callers_files_become_roots_and_hard_links_stay_one_file() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        std::fs::write(root.join("a"), "text").unwrap();
        std::fs::hard_link(root.join("a"), root.join("b")).unwrap();
        std::os::unix::fs::symlink("/nowhere", root.join("link")).unwrap();
        let own = std::fs::metadata(root).unwrap();
        for (caller, expected) in [
            (None, (own.uid(), own.gid())),
            (Some((own.uid(), own.gid())), (0, 0)),
            (Some((own.uid() + 1, own.gid() + 1)), (own.uid(), own.gid())),
        ] {
            let tree = read(root, caller).unwrap();
            let a = tree.find(b"a").unwrap().unwrap();
            assert_eq!(Some(a), tree.find(b"b").unwrap());
            assert_eq!((tree.len(), tree.bytes()), (3, 4));
            let attributes = &tree.node(a).attributes;
            assert_eq!((attributes.uid, attributes.gid), expected);
        }
    }

    #[test]
    fn the_holes_of_a_sparse_file_are_found() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(100 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"middle", 50 << 20).unwrap();
        let tree = read(scratch.path(), None).unwrap();
        assert!(tree.bytes() <= 64 << 10, "{}", tree.bytes());
        let id = tree.find(b"sparse").unwrap().unwrap();
        let Kind::File(contents) = &tree.node(id).kind else {
            panic!("a file");
        };
        assert_eq!(contents.size(), 100 << 20);
        let bytes = contents.read(u64::MAX).unwrap();
        assert_eq!(&bytes[50 << 20..][..7], b"middle\0");
    }
}
