//! A directory of the host that a guest can mount: the host's side of a virtio-fs device.
//!
//! The guest's kernel speaks the FUSE protocol over the device's queues, which was made for file systems that live in a
//! process; this is one. The device model hands each request over as a message of bytes with a token, and gets an
//! answer of bytes back, of which a descriptor tells the event loop.
//!
//! * `wire` has the protocol's bytes, `server` and its neighbours what each request does on the host, and why a
//!   guest stays inside the directory.
//! * `session` has what a guest holds: files that it knows (`node`, `nodes`) and files that it has open. `descriptor` limits
//!   how many descriptors that takes.
//! * `hidden` has what of the directory is not there for the guest, `secrets` what of a whole host should not be.
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
mod hidden;
mod names;
mod node;
mod nodes;
pub mod opcode;
mod pool;
mod secrets;
mod server;
mod session;
mod walk;
mod wire;

pub use descriptor::Budget;
pub use error::Error;
pub use pool::Completion;
pub use secrets::secrets;
pub use server::is_answered;
pub use wire::{ANSWER_HEADER_LEN, HEADER_LEN, MESSAGE_MAX};

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, fstatfs, openat};
use rustix::io::Errno;

use caller::Host;
use descriptor::Descriptor;
use hidden::Hidden;
use node::{Node, status};
use pool::Pool;
use server::Server;
use session::Session;

/// Which directory to share, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    /// Whether the guest may change nothing in it.
    pub read_only: bool,
    /// What the guest does not see of it: absolute paths of the host. They may lead out of the directory, or nowhere yet; what
    /// is made there later is hidden as well.
    pub hidden: Vec<PathBuf>,
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
        let hidden = Arc::new(Hidden::new(&options.hidden, root.id));
        let server = Server {
            read_only: options.read_only,
            hidden: Arc::clone(&hidden),
            host: Host::current(),
            umask: umask(),
        };
        Ok(Share {
            session: Session::new(Arc::new(root), hidden, options.budget.clone()),
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
        let fresh = self.session.fresh();
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

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::fs::FileType;
    use rustix::time::Timespec;

    use super::*;

    /// A message with a body of numbers.
    fn message(opcode: u32, body: &[u64]) -> Vec<u8> {
        let len = HEADER_LEN + 8 * body.len() as u32;
        let mut message = Vec::new();
        message.extend(len.to_le_bytes());
        message.extend(opcode.to_le_bytes());
        message.extend(5_u64.to_le_bytes());
        message.extend(wire::ROOT.to_le_bytes());
        message.extend([0; 16]);
        message.extend(body.iter().flat_map(|number| number.to_le_bytes()));
        message
    }

    fn wait(share: &Share) -> Vec<Completion> {
        let event = share.event();
        let timeout = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&event, PollFlags::IN)];
        assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "lost request");
        share.completed()
    }

    #[test]
    fn a_request_that_is_stuck_holds_up_neither_others_nor_a_reset() {
        let scratch = tempfile::tempdir().unwrap();
        let mut share = Share::open(&Options {
            path: scratch.path().into(),
            read_only: false,
            hidden: Vec::new(),
            budget: Budget::new(10),
        })
        .unwrap();
        let init = message(opcode::INIT, &[7 | 31 << 32, 0]);
        share.submit(0, init.clone(), 4096);
        assert_eq!(wait(&share).len(), 1);
        // A thread that reads this directory waits for the lock that is held here.
        let old = Arc::clone(&share.session);
        let fd = rustix::io::dup(old.root()).unwrap();
        let handle = old.keep(wire::ROOT, fd, FileType::Directory).unwrap();
        let directory = old.handle(handle, wire::ROOT, FileType::Directory).unwrap();
        let stuck = session::lock(&directory.listing);
        share.submit(1, message(opcode::READDIR, &[handle, 0, 4096, 0, 0]), 4096);
        for token in 2..10 {
            share.submit(token, message(opcode::GETATTR, &[0, 0]), 4096);
            assert_eq!(wait(&share)[0].token, token);
        }
        share.reset();
        share.submit(20, init, 4096);
        assert_eq!(wait(&share)[0].token, 20);
        drop(stuck);
        // Its answer comes to nobody, and what it held is closed: then this is the last to know of the old session.
        drop(directory);
        while Arc::strong_count(&old) > 1 {
            std::thread::yield_now();
        }
        assert_eq!(share.completed(), []);
        drop(old);
        assert_eq!(share.session.budget().left(), 10);
    }

    #[test]
    fn of_two_shares_the_one_that_holds_more_gives_up() {
        let budget = Budget::new(10);
        let scratch = tempfile::tempdir().unwrap();
        let shares = [(); 2].map(|()| {
            Share::open(&Options {
                path: scratch.path().into(),
                read_only: false,
                hidden: Vec::new(),
                budget: budget.clone(),
            })
            .unwrap()
        });
        let [first, second] = shares.each_ref().map(|share| &share.session);
        for (session, number, expected) in [
            (first, 8, [8, 0]),
            (second, 2, [8, 2]),
            (second, 4, [6, 4]),
            (first, 9, [6, 4]),
            // Where both hold as much, it is the older one.
            (second, 9, [4, 6]),
        ] {
            for number in 0..number {
                let name = std::ffi::CString::new(number.to_string()).unwrap();
                std::fs::write(scratch.path().join(name.to_str().unwrap()), "").unwrap();
                let root = session.root();
                let (fd, stat) = session.look(root.as_fd(), root.id, &name).unwrap();
                let place = nodes::Place::new(wire::ROOT, &name);
                session.remember(fd, &stat, place).unwrap();
            }
            assert_eq!([first.spare(), second.spare()], expected);
        }
    }

    #[test]
    fn the_budget_is_what_the_host_allows_less_a_reserve() {
        let budget = Budget::of_process();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        let all = usize::try_from(limit.maximum.unwrap_or(u64::MAX)).unwrap();
        assert!(budget.left() < all && budget.left() >= all.min(1 << 20) / 2);
    }
}
