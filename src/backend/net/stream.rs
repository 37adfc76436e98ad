//! Frames on a byte stream: how passt, like others before it, carries Ethernet over a unix socket.
//!
//! Before each frame go 4 bytes with its length, big-endian; a virtio-net header there is not (passt(1), and the
//! `stream` network of QEMU). A stream keeps no boundaries: one read may end in the middle of a length, and one write
//! may take half a frame. [`Incoming`] collects bytes until a frame is whole; [`Outgoing`] keeps what a write left over.
//! Both are plain state, and know no socket.

use super::{FRAME_MAX, FRAME_MIN, HEADER_LEN};

/// Bytes of the length before each frame.
pub(super) const LENGTH_LEN: usize = 4;
/// Room for more than one of the longest frames, so that a read brings many short ones.
const CAPACITY: usize = 128 << 10;
/// The shortest and the longest frame, in bytes.
const SHORTEST: usize = FRAME_MIN - HEADER_LEN;
const LONGEST: usize = FRAME_MAX - HEADER_LEN;

/// Bytes that came in and are not a frame yet, or several.
#[derive(Debug)]
pub(super) struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// A length that no frame has: the stream makes no sense any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadLength(pub(super) u32);

impl Incoming {
    pub(super) fn new() -> Incoming {
        Incoming {
            bytes: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// Where the next bytes go. Never empty once [`Incoming::frame`] has given `None`.
    pub(super) fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end.saturating_sub(self.start));
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// `count` bytes have been put there.
    pub(super) fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.bytes.len());
    }

    /// Whether a frame is whole.
    pub(super) fn has_frame(&self) -> bool {
        !matches!(self.look(), Ok(None))
    }

    /// Takes the next frame if it is whole.
    pub(super) fn frame(&mut self) -> Result<Option<&[u8]>, BadLength> {
        let Some((from, to)) = self.look()? else {
            return Ok(None);
        };
        self.start = to;
        Ok(self.bytes.get(from..to))
    }

    /// Where the next frame lies if it is whole.
    fn look(&self) -> Result<Option<(usize, usize)>, BadLength> {
        let bytes = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_LEN>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        let len = length as usize;
        if !(SHORTEST..=LONGEST).contains(&len) {
            return Err(BadLength(length));
        }
        let from = self.start.saturating_add(LENGTH_LEN);
        Ok((rest.len() >= len).then(|| (from, from.saturating_add(len))))
    }
}

/// What is left of a frame that the socket took only in part.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    done: usize,
}

impl Outgoing {
    /// The bytes that must go before any others.
    pub(super) fn rest(&self) -> &[u8] {
        self.bytes.get(self.done..).unwrap_or_default()
    }

    /// The socket took `count` of them.
    pub(super) fn sent(&mut self, count: usize) {
        self.done = self.done.saturating_add(count);
        if self.rest().is_empty() {
            self.bytes.clear();
            self.done = 0;
        }
    }

    /// Keeps a frame, its length before it, of which the socket took `sent` bytes. Only when nothing is kept.
    pub(super) fn keep(&mut self, frame: Vec<u8>, sent: usize) {
        self.bytes = frame;
        self.done = 0;
        self.sent(sent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn framed(frame: &[u8]) -> Vec<u8> {
        let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
        bytes.extend(frame);
        bytes
    }

    /// All frames that come out when `bytes` go through a socket in pieces of `step`.
    fn through_a_socket(bytes: &[u8], step: usize) -> Vec<Vec<u8>> {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut incoming = Incoming::new();
        let mut frames = Vec::new();
        for piece in bytes.chunks(step) {
            theirs.write_all(piece).unwrap();
            let count = ours.read(incoming.room()).unwrap();
            incoming.filled(count);
            while let Some(frame) = incoming.frame().unwrap() {
                frames.push(frame.to_vec());
            }
        }
        frames
    }

    #[test]
    fn frames_come_out_whole_however_the_stream_is_cut() {
        let frames: Vec<Vec<u8>> = [14, 60, 1514, 15, 9000, 14, 200]
            .iter()
            .map(|len| (0..*len).map(|i: usize| (i * 7 + len) as u8).collect())
            .collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        for step in [1, 2, 3, 5, 13, 64, 1517, 1518, 1519, 65_536] {
            assert_eq!(through_a_socket(&bytes, step), frames, "in steps of {step}");
        }
    }

    #[test]
    fn the_longest_frame_fits_and_a_longer_one_is_told_by_its_length() {
        let longest = framed(&vec![5; LONGEST]);
        assert_eq!(through_a_socket(&longest, 40_000), [vec![5; LONGEST]]);
        for bad in [0, 13, LONGEST as u32 + 1, u32::MAX] {
            let mut incoming = Incoming::new();
            incoming.room()[..4].copy_from_slice(&bad.to_be_bytes());
            incoming.filled(3);
            assert!(!incoming.has_frame());
            incoming.filled(1);
            assert!(incoming.has_frame(), "so that somebody looks");
            assert_eq!(incoming.frame(), Err(BadLength(bad)));
        }
    }

    #[test]
    fn there_is_always_room_when_no_frame_is_whole() {
        let mut incoming = Incoming::new();
        let stream: Vec<u8> = framed(&vec![1; LONGEST]).repeat(6);
        let mut stream = stream.as_slice();
        let mut frames = 0;
        while !stream.is_empty() {
            let room = incoming.room();
            assert!(!room.is_empty());
            let count = room.len().min(stream.len()).min(100_001);
            room[..count].copy_from_slice(&stream[..count]);
            incoming.filled(count);
            stream = &stream[count..];
            while incoming.frame().unwrap().is_some() {
                frames += 1;
            }
        }
        assert_eq!(frames, 6);
    }

    #[test]
    fn what_a_write_left_over_goes_out_first_and_once() {
        let mut outgoing = Outgoing::default();
        assert!(outgoing.rest().is_empty());
        outgoing.keep(b"abcdef".to_vec(), 2);
        assert_eq!(outgoing.rest(), b"cdef");
        outgoing.sent(3);
        assert_eq!(outgoing.rest(), b"f");
        outgoing.sent(1);
        assert!(outgoing.rest().is_empty());
        outgoing.keep(b"xy".to_vec(), 2);
        assert!(outgoing.rest().is_empty());
    }
}
