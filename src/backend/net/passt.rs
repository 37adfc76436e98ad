//! passt: the guest's network as ordinary sockets of the host (passt(1), <https://passt.top>).
//!
//! passt is a program of its own. It answers the guest's ARP, DHCP and neighbour discovery with the host's own addresses,
//! and turns each TCP connection, UDP flow and ping of the guest into a socket of the host, and back. It therefore needs
//! no privileges, no bridge and no NAT rules. It gets one end of a pair of connected sockets (`--fd`, in passt since
//! November 2022) and ends by itself when ours is closed, however this process ends. See [`super::stream`] for
//! how frames travel on it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::stream::{BadLength, Incoming, LENGTH_LEN, Outgoing};
use super::{Error, HEADER_LEN, NetBackend, Piece, Sent, memory};
use crate::mem::{Bytes, GuestAddress, GuestRam};

/// If passt cannot do what it is asked to, such as to listen on a port, it ends within this time. It takes about a
/// fifth of it to start.
const START_GRACE: Duration = Duration::from_millis(60);
/// What passt said last is what matters; so many lines are shown.
const LAST_LINES: usize = 3;
/// At most this much of what passt says is read, in bytes.
const LOG_MAX: usize = 64 << 10;

/// A TCP port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// 1 to 65535.
    pub host: u16,
    /// 1 to 65535.
    pub guest: u16,
}

/// A running passt. Dropping it ends it.
pub struct Passt {
    socket: Arc<OwnedFd>,
    incoming: Incoming,
    outgoing: Outgoing,
    process: Option<Process>,
}

struct Process {
    child: Child,
    /// What it prints goes to memory, and is looked at only if it ends.
    log: File,
    started: Instant,
}

impl Passt {
    /// Starts passt.
    ///
    /// # Errors
    /// When it is not installed or the host has no processes or descriptors left. That passt itself cannot do what it
    /// should comes out in [`Passt::settle`].
    pub fn start(forwards: &[Forward]) -> Result<Passt, Error> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::StartPasst)?;
        let log = File::from(
            memfd_create("passt", MemfdFlags::CLOEXEC)
                .map_err(|errno| Error::StartPasst(errno.into()))?,
        );
        let mut command = Command::new("passt");
        command
            .args(["--foreground", "--quiet", "--one-off", "--fd"])
            .arg(theirs.as_raw_fd().to_string());
        for Forward { host, guest } in forwards {
            command.arg("--tcp-ports").arg(format!("{host}:{guest}"));
        }
        let inherited = theirs.as_raw_fd();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.try_clone().map_err(Error::StartPasst)?)
            // Ctrl-C at the terminal is for the guest or for us, not for its network.
            .process_group(0);
        // SAFETY: between fork and exec the closure does nothing but one fcntl(2) on a descriptor that stays open.
        unsafe {
            command.pre_exec(move || {
                let fd = std::os::fd::BorrowedFd::borrow_raw(inherited);
                Ok(fcntl_setfd(fd, FdFlags::empty())?)
            });
        }
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NoPasst,
            _ => Error::StartPasst(error),
        })?;
        let mut passt = Passt::over(ours)?;
        passt.process = Some(Process {
            child,
            log,
            started: Instant::now(),
        });
        Ok(passt)
    }

    /// Frames over a connected stream socket, whoever is at its other end.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn over(socket: UnixStream) -> Result<Passt, Error> {
        socket.set_nonblocking(true).map_err(Error::StartPasst)?;
        Ok(Passt {
            socket: Arc::new(socket.into()),
            incoming: Incoming::new(),
            outgoing: Outgoing::default(),
            process: None,
        })
    }

    /// Waits until it is plain that passt could start: a few hundredths of a second after [`Passt::start`], or not at all
    /// if they have passed already. So it is best called after other work.
    ///
    /// # Errors
    /// When passt has ended, with what it said.
    pub fn settle(&mut self) -> Result<(), Error> {
        let Some(process) = &self.process else {
            return Ok(());
        };
        loop {
            let left = START_GRACE.saturating_sub(process.started.elapsed());
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            // Nothing but a hang-up, which is reported to those who ask for nothing too.
            let mut fds = [PollFd::new(&*self.socket, PollFlags::empty())];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(()),
                Err(Errno::INTR) => {}
                _ => return Err(Error::PasstNotStarted(self.last_words())),
            }
        }
    }

    /// What is to be said when the socket is closed at the other end.
    fn ended(&mut self) -> Error {
        Error::PasstEnded(self.last_words())
    }

    /// What passt said before it ended, for which this waits.
    fn last_words(&mut self) -> String {
        let said = self.process.as_mut().and_then(|process| {
            // It has closed its socket, so it is ending anyway.
            let _ = process.child.kill();
            let _ = process.child.wait();
            last_lines(&process.log)
        });
        said.unwrap_or_else(|| "it did not say why".to_owned())
    }

    /// Gives a frame, with a header that says nothing, to the guest.
    fn scatter(
        frame: &[u8],
        ram: &GuestRam,
        pieces: &[Piece],
        mut spill: &mut [u8],
    ) -> Option<usize> {
        let header = [0; HEADER_LEN];
        let mut pieces = pieces.iter().copied();
        let mut piece = pieces.next();
        for mut bytes in [&header, frame] {
            while !bytes.is_empty() {
                let Some((address, len)) = piece else {
                    let (now, _) = bytes.split_at(bytes.len().min(spill.len()));
                    let (to, rest) = std::mem::take(&mut spill).split_at_mut(now.len());
                    to.copy_from_slice(now);
                    spill = rest;
                    break;
                };
                let (now, rest) = bytes.split_at(bytes.len().min(len as usize));
                ram.write_slice(now, address).ok()?;
                bytes = rest;
                let done = u32::try_from(now.len()).unwrap_or(len);
                piece = match len.saturating_sub(done) {
                    0 => pieces.next(),
                    left => Some((GuestAddress(address.0.checked_add(done.into())?), left)),
                };
            }
        }
        frame.len().checked_add(HEADER_LEN)
    }
}

impl NetBackend for Passt {
    fn descriptors(&self) -> Vec<Arc<OwnedFd>> {
        vec![Arc::clone(&self.socket)]
    }

    fn receive(
        &mut self,
        _pair: u16,
        ram: &GuestRam,
        pieces: &[Piece],
        spill: &mut [u8],
    ) -> Result<Option<usize>, Error> {
        loop {
            match self.incoming.frame() {
                Ok(Some(frame)) => return Ok(Passt::scatter(frame, ram, pieces, spill)),
                Ok(None) => {}
                Err(BadLength(len)) => return Err(Error::PasstFrame(len)),
            }
            match rustix::io::read(&self.socket, self.incoming.room()) {
                Ok(0) => return Err(self.ended()),
                Ok(count) => self.incoming.filled(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(_) => return Err(self.ended()),
            }
        }
    }

    fn has_received(&self, _pair: u16) -> bool {
        self.incoming.has_frame()
    }

    fn send(&mut self, pair: u16, ram: &GuestRam, pieces: &[Piece]) -> Result<Sent, Error> {
        self.flush(pair)?;
        if self.has_unsent(pair) {
            return Ok(Sent::NoRoom);
        }
        let total: usize = pieces.iter().map(|(_, len)| *len as usize).sum();
        let len = total.saturating_sub(HEADER_LEN);
        let Ok(length) = u32::try_from(len).map(u32::to_be_bytes) else {
            return Ok(Sent::Refused);
        };
        let fd = self.socket.as_fd();
        let sent = match memory::send(fd, &length, ram, pieces, HEADER_LEN) {
            Ok(sent) => sent,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Sent::NoRoom),
                    io::ErrorKind::InvalidInput => Ok(Sent::Refused),
                    _ => Err(self.ended()),
                };
            }
        };
        if sent < len.saturating_add(LENGTH_LEN) {
            let mut frame = length.to_vec();
            let mut skip = HEADER_LEN;
            for &(address, len) in pieces {
                let here = skip.min(len as usize);
                skip = skip.saturating_sub(here);
                let mut bytes = vec![0; (len as usize).saturating_sub(here)];
                // The pieces lie in RAM: the kernel has just read from them.
                let _ = ram.read_slice(
                    &mut bytes,
                    GuestAddress(address.0.saturating_add(here as u64)),
                );
                frame.append(&mut bytes);
            }
            self.outgoing.keep(frame, sent);
        }
        Ok(Sent::Whole)
    }

    fn has_unsent(&self, _pair: u16) -> bool {
        !self.outgoing.rest().is_empty()
    }

    fn flush(&mut self, _pair: u16) -> Result<(), Error> {
        while !self.outgoing.rest().is_empty() {
            let fd = self.socket.as_fd();
            match memory::send(fd, self.outgoing.rest(), &GuestRam::new(), &[], 0) {
                Ok(sent) => self.outgoing.sent(sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(self.ended()),
            }
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of what passt printed, as one.
fn last_lines(log: &File) -> Option<String> {
    let len = log.metadata().ok()?.len();
    let mut bytes = vec![0; usize::try_from(len).ok()?.min(LOG_MAX)];
    let from = len.saturating_sub(bytes.len() as u64);
    log.read_exact_at(&mut bytes, from).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        // What it says where there is no system log.
        .filter(|line| !line.is_empty() && !line.starts_with("Failed to send"))
        .collect();
    let skipped = lines.len().saturating_sub(LAST_LINES);
    let last = lines.get(skipped..).unwrap_or_default();
    (!last.is_empty()).then(|| last.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem;
    use crate::worker::children;
    use std::io::{Read, Write};

    fn ram() -> GuestRam {
        mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    #[test]
    fn a_received_frame_fills_the_pieces_and_then_the_spill() {
        let _closing = children::none();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut passt = Passt::over(ours).unwrap();
        let ram = ram();
        let mut spill = [9; 32];
        let pieces = [(GuestAddress(0x100), 5), (GuestAddress(0x200), 9)];
        assert_eq!(passt.receive(0, &ram, &pieces, &mut spill).unwrap(), None);
        theirs.write_all(&[0, 0, 0, 16]).unwrap();
        assert_eq!(passt.receive(0, &ram, &pieces, &mut spill).unwrap(), None);
        theirs.write_all(b"0123456789abcdef\0\0\0\x0e").unwrap();
        theirs.write_all(&[7; 14]).unwrap();
        assert_eq!(
            passt.receive(0, &ram, &pieces, &mut spill).unwrap(),
            Some(28)
        );
        assert_eq!(&spill[..15], b"23456789abcdef\x09");
        let mut last = [1; 3];
        ram.read_slice(&mut last, GuestAddress(0x206)).unwrap();
        assert_eq!(&last, b"\x0001");
        assert!(passt.has_received(0));
        assert_eq!(passt.receive(0, &ram, &[], &mut spill).unwrap(), Some(26));
        assert!(!passt.has_received(0));
        assert_eq!(spill[25], 7);
        drop(theirs);
        assert!(matches!(
            passt.receive(0, &ram, &pieces, &mut spill),
            Err(Error::PasstEnded(_))
        ));
        assert!(passt.send(0, &ram, &[(GuestAddress(0), 60)]).is_err());
    }

    #[test]
    fn a_socket_that_is_full_takes_the_rest_of_a_frame_later_and_nothing_in_between() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut passt = Passt::over(ours).unwrap();
        let ram = ram();
        let mut sent = Vec::new();
        let mut number = 0_u8;
        loop {
            let frame: Vec<u8> = (0..30_000)
                .map(|i| (i as u8).wrapping_mul(number))
                .collect();
            ram.write_slice(&frame, GuestAddress(0x1000)).unwrap();
            let pieces = [
                (GuestAddress(0x900), 7),
                (GuestAddress(0xffb), 5),
                (GuestAddress(0x1000), 29_000),
                (GuestAddress(0x1000 + 29_000), 1000),
            ];
            match passt.send(0, &ram, &pieces).unwrap() {
                Sent::Whole => {
                    sent.extend_from_slice(&[&30_000_u32.to_be_bytes()[..], &frame].concat())
                }
                other => {
                    assert_eq!(other, Sent::NoRoom);
                    break;
                }
            }
            number += 1;
        }
        assert!(number > 1);
        let mut got = vec![0; sent.len()];
        let (mut done, mut flushed) = (0, false);
        while done < got.len() {
            done += theirs.read(&mut got[done..]).unwrap();
            passt.flush(0).unwrap();
            flushed |= !passt.has_unsent(0);
        }
        assert!(flushed && got == sent);
    }
}
