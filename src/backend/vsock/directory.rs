//! The directory of a guest's vsock sockets.
//!
//! Whoever gives one keeps it; only the listening socket in it is ours, and goes with us. A fresh one is for one run. A
//! process that was killed leaves its socket behind, at which nobody listens any more; the next one in the same directory
//! replaces it. That no other live process does the same is certain by a lock on the directory (flock(2)), which the
//! kernel gives up when a process ends, however it ends.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, connect};

use super::{Error, unix_socket};

/// The socket on which this process listens.
const SOCKET: &str = "vsock";
/// The longest name that a socket in the directory can have.
const LONGEST: usize = "/vsock_4294967295".len();
/// Bytes of the longest path of a unix socket (unix(7): 108 with the zero at its end).
const PATH_MAX: usize = 107;

/// Which directory is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// One that is there already, and stays.
    Given(PathBuf),
    /// One that is made for this user alone, and removed in the end.
    Fresh(PathBuf),
}

impl Place {
    /// A fresh directory for the machine `name`: below `$XDG_RUNTIME_DIR`, or else `/tmp`, and called by the name and this
    /// process's id.
    pub fn for_machine(name: &str) -> Place {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        Place::fresh_below(runtime, name)
    }

    fn fresh_below(runtime: Option<PathBuf>, name: &str) -> Place {
        let parent = runtime
            .filter(|dir| dir.is_absolute() && dir.is_dir())
            .unwrap_or_else(|| PathBuf::from("/tmp"));
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        };
        let name: String = name.chars().map(plain).collect();
        Place::Fresh(parent.join(format!("sarang-{name}-{}", std::process::id())))
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        match self {
            Place::Given(dir) | Place::Fresh(dir) => dir,
        }
    }
}

/// A directory that is ours to listen in. Dropping it removes the listening socket, and a fresh directory altogether.
#[derive(Debug)]
pub struct Directory {
    dir: PathBuf,
    fresh: bool,
    /// Whose lock keeps others out.
    lock: Option<File>,
}

impl Directory {
    pub(super) fn open(place: &Place) -> Result<Directory, Error> {
        let dir = place.path().to_owned();
        let most = PATH_MAX - LONGEST;
        if dir.as_os_str().len() > most {
            return Err(Error::TooLong { dir, most });
        }
        let fresh = matches!(place, Place::Fresh(_));
        if fresh {
            make(&dir)?;
        }
        let lock = lock(&dir)?;
        remove_stale(&dir)?;
        Ok(Directory { dir, fresh, lock })
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The path of the listening socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// The path of the socket where a program of the host listens for the guest.
    pub fn port(&self, port: u32) -> PathBuf {
        self.dir.join(format!("{SOCKET}_{port}"))
    }

    pub(super) fn refused(&self, errno: Errno) -> Error {
        Error::Refused {
            dir: self.dir.clone(),
            source: errno.into(),
        }
    }

    /// Removes the directory with the sockets that programs have made in it.
    fn remove(&self) {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for entry in entries {
            if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                let _ = fs::remove_file(entry.path());
            }
        }
        if let Err(error) = fs::remove_dir(&self.dir) {
            log::warn!(
                "cannot remove the directory {}: {error}",
                self.dir.display()
            );
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What cannot be removed stays, and is replaced by the next who comes.
        let _ = fs::remove_file(self.socket());
        if self.fresh {
            self.remove();
        }
        if let Some(lock) = &self.lock {
            // Closing does the same, unless a child process holds a copy just before its exec.
            let _ = flock(lock, FlockOperation::Unlock);
        }
    }
}

/// Makes a fresh directory, or takes one that an earlier process of the same id left behind.
fn make(dir: &Path) -> Result<(), Error> {
    let refused = |source| Error::Refused {
        dir: dir.to_owned(),
        source,
    };
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = fs::symlink_metadata(dir).map_err(refused)?;
            let ours = there.is_dir()
                && there.uid() == rustix::process::geteuid().as_raw()
                && there.mode() & 0o077 == 0;
            if ours {
                Ok(())
            } else {
                Err(Error::NotYours {
                    dir: dir.to_owned(),
                })
            }
        }
        made => made.map_err(refused),
    }
}

/// Removes a listening socket that a process left behind.
fn remove_stale(dir: &Path) -> Result<(), Error> {
    let path = dir.join(SOCKET);
    let Ok(there) = fs::symlink_metadata(&path) else {
        return Ok(());
    };
    if !there.file_type().is_socket() {
        return Err(Error::NotASocket { path });
    }
    let answer = SocketAddrUnix::new(&path).and_then(|address| connect(unix_socket()?, &address));
    let dir = dir.to_owned();
    if answer != Err(Errno::CONNREFUSED) {
        return Err(Error::InUse { dir });
    }
    fs::remove_file(&path).map_err(|source| Error::Refused { dir, source })
}

/// Locks a directory for this process.
fn lock(dir: &Path) -> Result<Option<File>, Error> {
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(dir);
    let dir = dir.to_owned();
    let file = match opened {
        Ok(file) => file,
        Err(source) => {
            return Err(match source.kind() {
                io::ErrorKind::NotFound => Error::Missing { dir },
                io::ErrorKind::NotADirectory => Error::NotADirectory { dir },
                _ => Error::Refused { dir, source },
            });
        }
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Err(Error::InUse { dir }),
        // Not every file system has locks. The socket itself says well enough whether somebody listens.
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::children;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    fn error(dir: &Path) -> String {
        Directory::open(&Place::Given(dir.to_owned()))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_fresh_directory_is_for_its_user_alone_and_goes_with_all_its_sockets() {
        let scratch = tempfile::tempdir().unwrap();
        let place = Place::fresh_below(Some(scratch.path().to_owned()), "a/b c");
        let expected = format!("sarang-a_b_c-{}", std::process::id());
        assert_eq!(place.path(), scratch.path().join(expected));
        let directory = Directory::open(&place).unwrap();
        let mode = fs::metadata(directory.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let _listeners = [
            UnixListener::bind(directory.socket()).unwrap(),
            UnixListener::bind(directory.port(52)).unwrap(),
        ];
        drop(directory);
        assert!(!place.path().exists());
    }

    #[test]
    fn without_a_runtime_directory_a_fresh_one_is_in_tmp() {
        for runtime in [None, Some("relative"), Some("/no/such/directory")] {
            let place = Place::fresh_below(runtime.map(PathBuf::from), "vm");
            assert_eq!(
                place.path().parent(),
                Some(Path::new("/tmp")),
                "{runtime:?}"
            );
        }
    }

    #[test]
    fn a_fresh_directory_that_somebody_else_has_made_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let place = Place::fresh_below(Some(scratch.path().to_owned()), "vm");
        fs::create_dir(place.path()).unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let text = Directory::open(&place).unwrap_err().to_string();
        assert!(text.contains("not yours alone"), "{text}");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(Directory::open(&place).is_ok(), "left behind by us");
    }

    #[test]
    fn a_given_directory_stays_with_what_is_not_ours() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::open(&Place::Given(scratch.path().to_owned())).unwrap();
        let _listeners = [
            UnixListener::bind(directory.socket()).unwrap(),
            UnixListener::bind(directory.port(52)).unwrap(),
        ];
        let (socket, port) = (directory.socket(), directory.port(52));
        drop(directory);
        assert_eq!((socket.exists(), port.exists()), (false, true));
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
        let _closing = children::none();
        let scratch = tempfile::tempdir().unwrap();
        let place = Place::Given(scratch.path().to_owned());
        let path = scratch.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(error(scratch.path()).contains("another VM uses the directory"));
        assert!(path.exists());
        drop(listener);
        let directory = Directory::open(&place).unwrap();
        assert!(!path.exists());
        let text = error(scratch.path());
        assert!(text.contains("another VM uses the directory"), "{text}");
        drop(directory);
        assert!(Directory::open(&place).is_ok());
    }

    #[test]
    fn what_is_no_place_for_sockets_is_refused_with_a_sentence() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        fs::write(&file, "").unwrap();
        let taken = scratch.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("vsock"), "precious").unwrap();
        for (dir, words) in [
            (scratch.path().join("missing"), "no such directory; make it"),
            (file, "this is not a directory"),
            (taken.clone(), "is there already and is not a socket"),
            (scratch.path().join("x".repeat(100)), "may have 90"),
        ] {
            let text = error(&dir);
            assert!(text.contains(words), "{text}");
        }
        assert_eq!(fs::read(taken.join("vsock")).unwrap(), b"precious");
    }
}
