//! The host's file descriptors at the end of the console's wire, and how to use them without waiting.
//!
//! `O_NONBLOCK` belongs to the open file *description*, which our standard output shares with the
//! shell that started us and with everything else it started. Setting it there breaks them. So a
//! terminal or a pipe is opened anew through `/proc/self/fd`, which makes a description of our own; a
//! socket cannot be, and is written with `MSG_DONTWAIT`; a regular file must not be (its offset is
//! shared for a reason) and never waits. What is left (a terminal that belongs to another user, say)
//! is asked with poll(2) and given at most `PIPE_BUF` bytes.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};

use super::Error;
use crate::backend::port::Size;

/// What poll(2) says a pipe takes without blocking (pipe(7)).
pub const PIPE_BUF: usize = 4096;

/// How to write without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// The description is ours and non-blocking, or of a kind that never waits.
    Plain,
    /// A socket: each call says that it does not want to wait.
    Socket,
    /// Shared and blocking: ask first, and write little.
    AskFirst,
}

/// Where output goes.
#[derive(Clone, Debug)]
pub struct Sink {
    fd: Arc<OwnedFd>,
    manner: Manner,
}

impl Sink {
    /// The descriptor, for the event loop to watch.
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Writes some of `bytes`, at most `PIPE_BUF` where it might wait for more, without waiting.
    ///
    /// # Errors
    /// `EAGAIN` when it would wait, and what `write(2)` says.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.manner {
            Manner::Plain => rustix::io::write(&self.fd, bytes),
            Manner::Socket => send(self.fd.as_fd(), bytes),
            Manner::AskFirst => {
                let now = Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                let mut fds = [PollFd::new(&*self.fd, PollFlags::OUT)];
                let bytes = bytes.get(..PIPE_BUF).unwrap_or(bytes);
                match poll(&mut fds, Some(&now))? {
                    0 => Err(Errno::AGAIN),
                    _ => rustix::io::write(&self.fd, bytes),
                }
            }
        }
    }

    /// Output to a descriptor, whose description others may be using too.
    ///
    /// # Errors
    /// When it cannot be examined.
    pub fn of(shared: OwnedFd) -> std::io::Result<Sink> {
        Ok(output(shared)?)
    }

    fn own(fd: OwnedFd) -> Sink {
        Sink {
            fd: Arc::new(fd),
            manner: Manner::Plain,
        }
    }
}

fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the pointer and the length are those of a live slice, and `fd` is open.
    let sent = unsafe {
        libc::send(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(sent)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Standard output; `None` when it is closed.
pub fn standard_output() -> Option<Sink> {
    output(rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).ok()?).ok()
}

/// Standard error; `None` when it is closed.
pub fn standard_error() -> Option<Sink> {
    output(rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 3).ok()?).ok()
}

/// Output to `shared`, whose description others may be using too.
pub fn output(shared: OwnedFd) -> Result<Sink, Errno> {
    let kind = FileType::from_raw_mode(fstat(&shared)?.st_mode);
    if let Some(own) = reopen(&shared, kind, OFlags::WRONLY) {
        return Ok(Sink::own(own));
    }
    let manner = match kind {
        FileType::RegularFile => Manner::Plain,
        FileType::Socket => Manner::Socket,
        _ => Manner::AskFirst,
    };
    Ok(Sink {
        fd: Arc::new(shared),
        manner,
    })
}

/// Standard input; `None` when it is closed, or when it is a terminal that another job is using.
/// Reading from a descriptor that is ready does not wait.
pub fn standard_input() -> Option<OwnedFd> {
    let shared = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).ok()?;
    // Reading from the terminal would stop a background job with SIGTTIN.
    if rustix::termios::tcgetpgrp(&shared).is_ok_and(|group| group != rustix::process::getpgrp()) {
        log::info!("the console takes no input: sarang runs in the background");
        return None;
    }
    input(shared).ok()
}

/// Input from `shared`, whose description others may be using too.
pub fn input(shared: OwnedFd) -> Result<OwnedFd, Errno> {
    let kind = FileType::from_raw_mode(fstat(&shared)?.st_mode);
    Ok(reopen(&shared, kind, OFlags::RDONLY).unwrap_or(shared))
}

/// The same file in a non-blocking description of our own, where there is such a thing.
fn reopen(shared: &OwnedFd, kind: FileType, access: OFlags) -> Option<OwnedFd> {
    let terminal = rustix::termios::isatty(shared);
    // Opening the master of a pseudo-terminal anew makes another pseudo-terminal.
    let master = terminal && ptsname(shared, Vec::new()).is_ok();
    if master || !(terminal || kind == FileType::Fifo) {
        return None;
    }
    rustix::fs::open(
        format!("/proc/self/fd/{}", shared.as_raw_fd()),
        access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .ok()
}

/// The terminal that output goes to.
#[derive(Clone, Debug)]
pub struct Display(Arc<OwnedFd>);

impl Display {
    pub(super) fn new(fd: Arc<OwnedFd>) -> Display {
        Display(fd)
    }

    /// Its size as things stand; 0 by 0 when it does not say.
    pub fn size(&self) -> Size {
        rustix::termios::tcgetwinsize(&self.0)
            .map(|size| Size {
                columns: size.ws_col,
                rows: size.ws_row,
            })
            .unwrap_or_default()
    }
}

/// A file, created or emptied.
pub fn file(path: &Path) -> Result<Sink, Error> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map(|file| Sink::own(file.into()))
        .map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })
}

/// A pseudo-terminal (pty(7)): whoever opens `path` talks to the guest.
#[derive(Debug)]
pub struct Pty {
    /// Our end.
    pub sink: Sink,
    /// The other end, kept open by us: as long as anyone has it open, our end does not hang up, and
    /// what we write waits in the kernel for a reader to come.
    pub peer: OwnedFd,
    /// Where the other end is opened.
    pub path: PathBuf,
}

/// Makes a pseudo-terminal in raw mode.
pub fn pty() -> Result<Pty, Error> {
    let make = || -> Result<Pty, Errno> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        // This description is ours alone.
        rustix::io::ioctl_fionbio(&master, true)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = ptsname(&master, Vec::new())?;
        let peer = ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )?;
        let mut modes = rustix::termios::tcgetattr(&peer)?;
        modes.make_raw();
        rustix::termios::tcsetattr(&peer, rustix::termios::OptionalActions::Now, &modes)?;
        Ok(Pty {
            sink: Sink::own(master),
            peer,
            path: PathBuf::from(path.to_string_lossy().into_owned()),
        })
    };
    make().map_err(|errno| Error::Pty(errno.into()))
}
