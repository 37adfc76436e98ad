//! A file that is complete or not there: written under another name beside its place, and moved there at the end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::contents::random;
use super::{Error, Result};

/// A file on its way. Unless it is completed, it goes away.
#[derive(Debug)]
pub(super) struct Partial {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    replace: bool,
    complete: bool,
}

impl Partial {
    /// Begins to write what will be `target`, which must not exist unless it may be replaced.
    ///
    /// # Errors
    /// When it exists, or its directory cannot be written.
    pub fn create(target: &Path, replace: bool) -> Result<Partial> {
        match target.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::writing(target)(error)),
            Ok(found) if !found.is_file() && !found.is_symlink() => {
                let path = target.to_owned();
                return Err(Error::NotReplaced { path });
            }
            Ok(_) if !replace => {
                let path = target.to_owned();
                return Err(Error::Exists { path });
            }
            Ok(_) => {}
        }
        let Some(name) = target.file_name() else {
            let path = target.to_owned();
            return Err(Error::NotReplaced { path });
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{:08x}", std::process::id(), random()));
        // A name may have 255 bytes, and this one is longer than the one it stands for.
        let temporary = if hidden.len() > 255 {
            let name = format!(".sarang.{}-{:08x}", std::process::id(), random());
            target.with_file_name(name)
        } else {
            target.with_file_name(hidden)
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(Error::writing(target))?;
        Ok(Partial {
            file,
            temporary,
            target: target.to_owned(),
            replace,
            complete: false,
        })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Device and inode numbers of the file, and of the one it will replace.
    pub fn identities(&self) -> Vec<(u64, u64)> {
        let found = [self.file.metadata(), self.target.metadata()];
        let found = found.into_iter().flatten();
        found.map(|found| (found.dev(), found.ino())).collect()
    }

    /// Moves the file to its place, when all of it is on the disk.
    ///
    /// # Errors
    /// When the disk is full after all, or something else has taken the place.
    pub fn complete(mut self) -> Result<()> {
        let target = self.target.clone();
        self.file.sync_all().map_err(Error::writing(&target))?;
        if self.replace {
            std::fs::rename(&self.temporary, &target).map_err(Error::writing(&target))?;
            self.complete = true;
            return Ok(());
        }
        match renameat_with(CWD, &self.temporary, CWD, &target, RenameFlags::NOREPLACE) {
            Ok(()) => {
                self.complete = true;
                Ok(())
            }
            // Not every file system can do that. The temporary name then goes when this is dropped.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                std::fs::hard_link(&self.temporary, &target).map_err(taken(&target))
            }
            Err(error) => Err(taken(&target)(error.into())),
        }
    }
}

fn taken(target: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = target.to_owned();
    |source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists { path },
        _ => Error::Write { path, source },
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.complete {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|e| name(e).to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_complete_or_not_at_all() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("out");
        drop(Partial::create(&target, false).unwrap());
        assert!(names(scratch.path()).is_empty());
        let partial = Partial::create(&target, false).unwrap();
        assert!(!target.exists());
        partial.complete().unwrap();
        assert_eq!(names(scratch.path()), ["out"]);
    }

    #[test]
    fn what_is_there_is_replaced_only_when_asked() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("out");
        let late = Partial::create(&target, false).unwrap();
        std::fs::write(&target, "precious").unwrap();
        assert!(matches!(
            Partial::create(&target, false),
            Err(Error::Exists { .. })
        ));
        assert!(matches!(late.complete(), Err(Error::Exists { .. })));
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
        Partial::create(&target, true).unwrap().complete().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"");
        assert_eq!(names(scratch.path()), ["out"]);
        for other in [scratch.path(), Path::new("/dev/null"), Path::new("/")] {
            let refused = Partial::create(other, true);
            assert!(matches!(refused, Err(Error::NotReplaced { .. })));
        }
    }

    #[test]
    fn the_longest_name_there_is_can_be_written() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("n".repeat(255));
        Partial::create(&target, false).unwrap().complete().unwrap();
        assert!(target.exists());
    }
}
