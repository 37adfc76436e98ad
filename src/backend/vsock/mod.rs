//! The host's ends of a guest's vsock connections: unix sockets in one directory.
//!
//! A vsock connection leads from a port of the guest to a port of the host. Here a port of the host is a unix socket in
//! the guest's [`Directory`], by a convention that other VMMs share:
//!
//! * The guest connects to port 52 of the host: this process connects to `DIR/vsock_52`, where some program listens.
//! * A program of the host connects to `DIR/vsock`, writes `CONNECT 52\n` (see [`Greeting`]) and reads `OK PORT\n` as
//!   soon as the guest has accepted at its port 52. From then on it has a stream of bytes to there.
//!
//! [`Host`] makes and watches the sockets, [`Stream`] moves the bytes of one connection. All sockets, which come and go,
//! are in one epoll set, which is *edge-triggered*: each change of a socket is told once, and whoever reads or writes
//! remembers that it can until it cannot. So a socket that has to wait for the guest costs nothing meanwhile.

mod directory;
mod greeting;
mod stream;

pub use directory::{Directory, Place};
pub use greeting::{Greeting, GreetingError};
pub use stream::{Received, Stream};

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Programs that may wait to be accepted; the kernel may allow less (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;
/// Changes that are told at once; the others are told the next time.
const EVENTS_AT_ONCE: usize = 64;
/// Open files that this process should be allowed, for 1024 connections and all else. Many systems begin with 1024.
const OPEN_FILES: u64 = 4096;
/// The token of the listening socket.
const LISTENER: u64 = u64::MAX;

/// Why there is no vsock. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--vsock path={}: there is no such directory; make it with `mkdir {}`", dir.display(), dir.display())]
    Missing { dir: PathBuf },
    #[error("--vsock path={}: this is not a directory; give one for the guest's sockets", dir.display())]
    NotADirectory { dir: PathBuf },
    #[error("--vsock: cannot make a socket in the directory {}: {source}; give another with path=DIR", dir.display())]
    Refused { dir: PathBuf, source: io::Error },
    #[error(
        "--vsock: the path of the directory {} has {} bytes, but may have {most}, since a unix socket has a short path; \
         give a shorter one with path=DIR",
        dir.display(), dir.as_os_str().len()
    )]
    TooLong { dir: PathBuf, most: usize },
    #[error("--vsock: another VM uses the directory {}; give each VM one of its own with path=DIR", dir.display())]
    InUse { dir: PathBuf },
    #[error("--vsock: {} is there already and is not a socket; remove it or give another directory with path=DIR", path.display())]
    NotASocket { path: PathBuf },
    #[error("--vsock: {} is there already and is not yours alone; give a directory with path=DIR", dir.display())]
    NotYours { dir: PathBuf },
    #[error("--vsock: the host gives no {what}: {source}")]
    Host {
        what: &'static str,
        source: io::Error,
    },
}

/// What has changed on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which stream; `None` is the listening socket, which has somebody to accept.
    pub token: Option<u64>,
    /// There may be bytes to receive, or the end of them.
    pub readable: bool,
    /// There may be room to send.
    pub writable: bool,
    /// Nothing more can be sent by either side.
    pub hung_up: bool,
}

/// The sockets of one guest. Dropping it removes the listening socket from the file system.
pub struct Host {
    epoll: Arc<OwnedFd>,
    listener: OwnedFd,
    directory: Directory,
}

impl Host {
    /// Listens in a directory.
    ///
    /// # Errors
    /// One sentence about the directory, or the host that gives no descriptor.
    pub fn open(place: &Place) -> Result<Host, Error> {
        let directory = Directory::open(place)?;
        let host = |what| {
            move |errno: Errno| Error::Host {
                what,
                source: errno.into(),
            }
        };
        allow_open_files();
        let listener = unix_socket().map_err(host("socket"))?;
        let path = directory.socket();
        SocketAddrUnix::new(&path)
            .and_then(|address| bind(&listener, &address))
            .and_then(|()| listen(&listener, BACKLOG))
            .map_err(|errno| directory.refused(errno))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("epoll set"))?;
        watch(&epoll, &listener, LISTENER).map_err(host("watch on a socket"))?;
        Ok(Host {
            epoll: Arc::new(epoll),
            listener,
            directory,
        })
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The descriptor that is readable when [`Host::changes`] has something to tell.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.epoll)
    }

    /// What has changed since this was asked last, or part of it. Streams that have been dropped are not in it.
    pub fn changes(&self) -> Vec<Change> {
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Fails only when interrupted, and then what there is to tell is told the next time.
        let _ = epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        );
        let change = |event: &epoll::Event| {
            // `Event` is a packed structure: its fields are copied out, not borrowed.
            let (data, flags) = (event.data, event.flags);
            let broken = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
            Change {
                token: Some(data.u64()).filter(|token| *token != LISTENER),
                readable: flags.intersects(epoll::EventFlags::IN | broken),
                writable: flags.intersects(epoll::EventFlags::OUT | broken),
                hung_up: flags.contains(epoll::EventFlags::HUP),
            }
        };
        events.iter().map(change).collect()
    }

    /// Accepts the next program that has connected to `DIR/vsock`, as the stream `token`. `None` when nobody waits.
    ///
    /// # Errors
    /// When the host has no descriptors left. The program goes on waiting.
    pub fn accept(&self, token: u64) -> io::Result<Option<Stream>> {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    watch(&self.epoll, &socket, token)?;
                    return Ok(Some(Stream::new(socket)));
                }
                Err(Errno::AGAIN) => return Ok(None),
                // It has gone again.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Connects to the program that listens at port `port` of the host, as the stream `token`. It need not have accepted
    /// yet.
    ///
    /// # Errors
    /// When nobody listens there, or more wait for him than he wanted, or the host has no descriptors left.
    pub fn connect(&self, port: u32, token: u64) -> io::Result<Stream> {
        let address = SocketAddrUnix::new(self.directory.port(port))?;
        let socket = unix_socket()?;
        connect(&socket, &address)?;
        watch(&self.epoll, &socket, token)?;
        Ok(Stream::new(socket))
    }
}

/// A socket that makes nobody wait.
fn unix_socket() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

fn watch(epoll: &OwnedFd, socket: impl AsFd, token: u64) -> Result<(), Errno> {
    epoll::add(
        epoll,
        socket,
        epoll::EventData::new_u64(token),
        epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET,
    )
}

/// Raises this process's limit of open files as far as it may and as connections need. Where it may not, connections
/// beyond the limit fail, each for itself.
fn allow_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(wanted),
                maximum,
            },
        );
    }
}

#[cfg(test)]
mod tests;
