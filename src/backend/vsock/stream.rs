//! One connection's unix socket.
//!
//! Bytes move between the socket and guest memory directly, as many as the other side takes or has. What the guest sent
//! and the socket has no room for is kept here; how much that can be is for the device to bound, by the credit that it
//! gives the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use crate::backend::net::Piece;
use crate::backend::net::memory;
use crate::mem::{Bytes, GuestRam};

/// Memory of an empty buffer that is kept for the next use, in bytes.
const KEPT: usize = 4 << 10;

/// The peer has closed the connection, or it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// What came of an attempt to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, at least 1.
    Bytes(u32),
    /// Nothing now; the next change will be told.
    Nothing,
    /// Nothing any more.
    End,
}

/// A connected socket. Dropping it closes the connection.
pub struct Stream {
    socket: OwnedFd,
    /// What the guest sent and the socket had no room for.
    unsent: VecDeque<u8>,
    /// The peer takes nothing any more.
    broken: bool,
}

impl Stream {
    /// Over a socket that does not block.
    pub(super) fn new(socket: OwnedFd) -> Stream {
        Stream {
            socket,
            unsent: VecDeque::new(),
            broken: false,
        }
    }

    /// Receives the next byte alone; `None` when there is none now.
    ///
    /// # Errors
    /// When there will be none any more.
    pub fn receive_byte(&self) -> Result<Option<u8>, Gone> {
        let mut byte = [0];
        loop {
            match rustix::io::read(&self.socket, &mut byte) {
                Ok(1) => return Ok(Some(byte[0])),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                _ => return Err(Gone),
            }
        }
    }

    /// Receives into pieces of guest memory, which have room for at least one byte.
    pub fn receive(&self, ram: &GuestRam, pieces: &[Piece]) -> Received {
        loop {
            match memory::read(self.socket.as_fd(), ram, pieces, &mut []) {
                Ok(0) => return Received::End,
                Ok(count) => return Received::Bytes(u32::try_from(count).unwrap_or(u32::MAX)),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Received::Nothing,
                    // A peer that closes without having read everything shows as an error, after all that it sent.
                    _ => return Received::End,
                },
            }
        }
    }

    /// Sends what lies in pieces of guest memory, or keeps it until there is room. The result is how many bytes have been
    /// sent, these or earlier ones. A peer that takes nothing any more counts as taking everything.
    pub fn send(&mut self, ram: &GuestRam, pieces: &[Piece]) -> u32 {
        let mut sent = 0_usize;
        if self.unsent.is_empty() {
            sent = self.write(&[], ram, pieces);
        }
        let mut skip = sent;
        for &(address, len) in pieces {
            let mut bytes = vec![0; len as usize];
            if self.broken || skip >= bytes.len() {
                skip = skip.saturating_sub(bytes.len());
                continue;
            }
            // The pieces lie in RAM, as those of every request do.
            let _ = ram.read_slice(&mut bytes, address);
            self.unsent.extend(bytes.get(skip..).unwrap_or_default());
            skip = 0;
        }
        if self.broken {
            sent = pieces.iter().map(|(_, len)| *len as usize).sum();
        }
        u32::try_from(sent).unwrap_or(u32::MAX)
    }

    /// Sends what was kept, as much as there is room for. The result is how many bytes have been sent.
    pub fn flush(&mut self) -> u32 {
        let before = self.unsent.len();
        let mut unsent = std::mem::take(&mut self.unsent);
        while !unsent.is_empty() && !self.broken {
            let (first, _) = unsent.as_slices();
            let sent = self.write(first, &GuestRam::new(), &[]);
            if sent == 0 {
                break;
            }
            unsent.drain(..sent);
        }
        if self.broken {
            unsent.clear();
        }
        if unsent.is_empty() && unsent.capacity() > KEPT {
            unsent = VecDeque::new();
        }
        self.unsent = unsent;
        u32::try_from(before.saturating_sub(self.unsent.len())).unwrap_or(u32::MAX)
    }

    /// Sends a few bytes of ours, all of them or none.
    ///
    /// # Errors
    /// When the peer does not take them now.
    pub fn say(&mut self, text: &str) -> Result<(), Gone> {
        match self.write(text.as_bytes(), &GuestRam::new(), &[]) {
            sent if sent == text.len() => Ok(()),
            _ => Err(Gone),
        }
    }

    /// One attempt to send `bytes` and the pieces. 0 when there is no room, or the peer takes nothing any more.
    fn write(&mut self, bytes: &[u8], ram: &GuestRam, pieces: &[Piece]) -> usize {
        loop {
            match memory::send(self.socket.as_fd(), bytes, ram, pieces, 0) {
                Ok(sent) => return sent,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return 0,
                    _ => {
                        self.broken = true;
                        return 0;
                    }
                },
            }
        }
    }

    /// Bytes that wait for room.
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Whether the peer takes nothing any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The peer has hung up: what waits will not be sent.
    pub fn hang_up(&mut self) -> u32 {
        self.broken = true;
        self.flush()
    }

    /// The peer will read the end after what has been sent.
    pub fn end_sending(&self) {
        // Fails only when the connection is gone already.
        let _ = shutdown(&self.socket, Shutdown::Write);
    }

    /// The peer can send nothing any more.
    pub fn end_receiving(&self) {
        let _ = shutdown(&self.socket, Shutdown::Read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{self, GuestAddress};
    use crate::worker::children;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Stream, UnixStream, GuestRam) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ram = mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap();
        (Stream::new(ours.into()), theirs, ram)
    }

    #[test]
    fn what_the_socket_has_no_room_for_is_kept_in_order_and_sent_later() {
        let (mut stream, mut theirs, ram) = pair();
        let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        ram.write_slice(&bytes, GuestAddress(0)).unwrap();
        let pieces = [
            (GuestAddress(0), 1),
            (GuestAddress(1), 499_999),
            (GuestAddress(500_000), 10),
            (GuestAddress(500_010), (1 << 20) - 500_010),
        ];
        let mut sent = stream.send(&ram, &pieces) as usize;
        assert!(sent > 0 && sent < 1 << 20);
        assert_eq!(sent + stream.unsent(), 1 << 20);
        ram.write_slice(b"more", GuestAddress(0)).unwrap();
        assert_eq!(
            stream.send(&ram, &[(GuestAddress(0), 4)]),
            0,
            "no overtaking"
        );
        let mut got = vec![0; (1 << 20) + 4];
        let mut done = 0;
        while done < got.len() {
            done += theirs.read(&mut got[done..]).unwrap();
            sent += stream.flush() as usize;
        }
        assert_eq!((sent, stream.unsent()), (got.len(), 0));
        assert!(got[..1 << 20] == bytes && got.ends_with(b"more"));
    }

    #[test]
    fn a_peer_that_has_gone_takes_everything_and_keeps_nothing() {
        let _closing = children::none();
        let (mut stream, theirs, ram) = pair();
        let pieces = [(GuestAddress(0), 2 << 20)];
        let sent = stream.send(&ram, &pieces);
        assert!(sent < 2 << 20);
        drop(theirs);
        assert_eq!(stream.flush(), (2 << 20) - sent);
        assert_eq!((stream.unsent(), stream.is_broken()), (0, true));
        assert_eq!(stream.send(&ram, &pieces), 2 << 20);
        assert_eq!((stream.unsent(), stream.say("hello")), (0, Err(Gone)));
        assert_eq!(stream.receive(&ram, &pieces), Received::End);
    }

    #[test]
    fn all_that_was_sent_is_received_before_the_end() {
        let _closing = children::none();
        let (stream, mut theirs, ram) = pair();
        let pieces = [(GuestAddress(10), 3), (GuestAddress(20), 3)];
        assert_eq!(stream.receive(&ram, &pieces), Received::Nothing);
        theirs.write_all(b"12345678").unwrap();
        drop(theirs);
        assert_eq!(stream.receive(&ram, &pieces), Received::Bytes(6));
        assert_eq!(stream.receive_byte(), Ok(Some(b'7')));
        assert_eq!(stream.receive(&ram, &pieces), Received::Bytes(1));
        assert_eq!(stream.receive(&ram, &pieces), Received::End);
        let mut bytes = [0; 3];
        ram.read_slice(&mut bytes, GuestAddress(20)).unwrap();
        assert_eq!(&bytes, b"456");
    }

    #[test]
    fn each_direction_ends_by_itself() {
        let (mut stream, mut theirs, ram) = pair();
        stream.say("last").unwrap();
        stream.end_sending();
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last");
        theirs.write_all(b"still").unwrap();
        assert_eq!(
            stream.receive(&ram, &[(GuestAddress(0), 64)]),
            Received::Bytes(5)
        );
        stream.end_receiving();
        assert!(theirs.write_all(b"no more").is_err());
    }
}
