//! A directory of the host that a guest can mount: the host's side of a virtio-fs device.
//!
//! The guest's kernel speaks the FUSE protocol over the device's queues, which was made for file systems that live in a
//! process; this is one. The device model hands each request over as a message of bytes with a token, and gets an
//! answer of bytes back, of which a descriptor tells the event loop.
//!
//! * `wire` has the protocol's bytes, `server` and its neighbours what each request does on the host, and why a
//!   guest stays inside the directory.
//! * `session` has what a guest holds: files that it knows and files that it has open. `descriptor` limits them.
//! * `caller` gives what a guest creates to the right user, `pool` has the threads.
//!
//! The guest caches names and attributes for a second, and content for as long as size and time of a file stay the same. So
//! it sees what the host changes within a second, and many small files are still read at memory speed.

mod attributes;
mod caller;
mod descriptor;
mod directories;
mod error;
mod files;
mod names;
mod pool;
mod server;
mod session;
mod wire;

pub use descriptor::Budget;
pub use error::Error;
pub use pool::Completion;
pub use server::is_answered;
pub use wire::{ANSWER_HEADER_LEN, HEADER_LEN, MESSAGE_MAX};

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, fstatfs, openat};
use rustix::io::Errno;

use caller::Host;
use descriptor::Descriptor;
use pool::Pool;
use server::{Server, status};
use session::{Node, Session};

/// Which directory to share, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    /// Whether the guest may change nothing in it.
    pub read_only: bool,
    /// Of which the guest's descriptors are taken.
    pub budget: Budget,
}

/// A shared directory.
pub struct Share {
    session: Arc<Session>,
    pool: Pool,
}

impl Share {
    /// Opens the directory, and starts the threads that serve it. It stays the same one when its path comes to lead elsewhere.
    ///
    /// # Errors
    /// When there is no such directory, it may not be read, or no thread can be started.
    pub fn open(options: &Options) -> Result<Share, Error> {
        let path = &options.path;
        let refused = |error| refusal(path.clone(), error);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, path, flags, Mode::empty()).map_err(refused)?;
        if fstatfs(&root).map_err(refused)?.f_type == PROC_SUPER_MAGIC {
            return Err(Error::Processes { path: path.clone() });
        }
        let stat = status(root.as_fd()).map_err(refused)?;
        let root = Node::new(Descriptor::free(root), &stat);
        let server = Server {
            read_only: options.read_only,
            host: Host::current(),
            umask: umask(),
        };
        Ok(Share {
            session: Arc::new(Session::new(Arc::new(root), options.budget.clone())),
            pool: Pool::start(&server).map_err(|source| Error::Host {
                path: path.clone(),
                source,
            })?,
        })
    }

    /// Readable when requests are done, for the event loop to watch.
    pub fn event(&self) -> Arc<OwnedFd> {
        self.pool.event()
    }

    /// Starts a request: a message of at most [`MESSAGE_MAX`] bytes, whose answer may have `room` bytes. Its end is told by
    /// [`Share::completed`].
    pub fn submit(&self, token: u64, message: Vec<u8>, room: u32) {
        self.pool.submit(token, &self.session, message, room);
    }

    /// The requests that are done since the last call. To be called when [`Share::event`] is readable.
    pub fn completed(&self) -> Vec<Completion> {
        self.pool.completed()
    }

    /// Forgets the guest: what it knows and has open, and its requests. Those that a thread is at work on may still change
    /// files; nobody hears of them any more.
    pub fn reset(&mut self) {
        let fresh = Arc::new(self.session.fresh());
        let old = std::mem::replace(&mut self.session, fresh);
        self.pool.reset(old);
    }
}

/// Makes a sentence of what open(2) says.
fn refusal(path: PathBuf, error: Errno) -> Error {
    match error {
        Errno::NOENT => Error::Missing { path },
        Errno::NOTDIR => Error::NotADirectory { path },
        Errno::ACCESS | Errno::PERM => Error::Permission { path },
        error => Error::Host {
            path,
            source: error.into(),
        },
    }
}

/// The umask of this process, which can only be read so without being changed (proc_pid_status(5)).
fn umask() -> Mode {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))
        .and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok());
    Mode::from_raw_mode(mask.unwrap_or(0) & 0o777)
}
