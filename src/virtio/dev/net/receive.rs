//! The receive queue: frames from the host into the driver's buffers (virtio 1.3 §5.1.6.3, §5.1.6.4).
//!
//! The driver posts empty buffers; a frame goes into the first, and with MRG_RXBUF into as many as it needs, the header's
//! `num_buffers` saying how many those are. How long the next frame is is not known before it is read, so it is read
//! straight into as many buffers as the last one took, and what does not fit goes to a spill area.
//!
//! Frames are taken from the host only while the driver has buffers for them; meanwhile they wait in the host's queue,
//! and the host drops what does not fit there, as a wire does.

use std::collections::VecDeque;
use std::io::Write;

use super::{Counters, Failure};
use crate::backend::net::{FRAME_MAX, FRAME_MIN, NetBackend, PIECES_MAX, Piece};
use crate::mem::{Bytes, GuestRam};
use crate::virtio::Malformed;
use crate::virtio::dev::throttle::Throttle;
use crate::virtio::queue::{Chain, VirtQueue};

/// Frames taken in one turn of the event loop, so that a flood leaves other devices their turns.
const FRAMES_PER_TURN: u32 = 64;
/// The longest frame of an ordinary Ethernet, with its header, in bytes.
const ORDINARY: usize = 12 + 1514;
/// Where `num_buffers` lies in the header, after flags, gso_type, hdr_len, gso_size, csum_start and csum_offset.
const NUM_BUFFERS: u32 = 10;
const HEADER: u32 = 12;

/// What the driver agreed to.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// MRG_RXBUF: a frame may take several buffers.
    pub(super) merge: bool,
    /// GUEST_CSUM: the header's flags may speak of checksums.
    pub(super) checksum: bool,
}

/// The receive queue of one pair.
pub(super) struct Receive {
    pub(super) queue: VirtQueue,
    manner: Manner,
    /// There are not enough buffers, and the driver has been asked to notify when there are more.
    starved: bool,
    /// The rate limit has been reached, and its timer will go off.
    limited: bool,
    /// A frame that needs more buffers than there are.
    waiting: Vec<u8>,
    /// How long the next frame probably is: as long as the last.
    expected: usize,
    spill: Box<[u8]>,
}

/// Buffers that have been taken from the queue and not been filled yet, in order.
#[derive(Default)]
struct Posted {
    chains: VecDeque<Chain>,
    pieces: usize,
    room: usize,
}

enum Next {
    /// Delivered, or dropped and counted.
    Done,
    /// The host has no frame.
    Nothing,
    NoBuffers,
    /// No frame may be taken yet.
    Limited,
}

impl Receive {
    pub(super) fn new(queue: VirtQueue, manner: Manner) -> Receive {
        Receive {
            queue,
            manner,
            starved: false,
            limited: false,
            waiting: Vec::new(),
            expected: ORDINARY,
            // One byte more than the longest frame, so that a longer one shows.
            spill: vec![0; FRAME_MAX + 1].into_boxed_slice(),
        }
    }

    /// Whether a frame could be taken from the host.
    pub(super) fn wants_frames(&self) -> bool {
        !self.starved && !self.limited
    }

    /// Takes what frames there are.
    pub(super) fn run(
        &mut self,
        backend: &mut dyn NetBackend,
        pair: u16,
        counters: &mut Counters,
        mut throttle: Option<&mut Throttle>,
    ) -> Result<(), Failure> {
        let ram = self.queue.ram().clone();
        let mut posted = Posted::default();
        self.queue.disable_notification()?;
        let result = self.turn(&ram, &mut posted, backend, pair, counters, &mut throttle);
        for _ in posted.chains {
            self.queue.unpop();
        }
        self.queue.notify()?;
        result
    }

    fn turn(
        &mut self,
        ram: &GuestRam,
        posted: &mut Posted,
        backend: &mut dyn NetBackend,
        pair: u16,
        counters: &mut Counters,
        throttle: &mut Option<&mut Throttle>,
    ) -> Result<(), Failure> {
        let mut frames = 0_u32;
        self.starved = false;
        self.limited = false;
        // What waits in this process does not make the descriptor ready, so it is not left for another turn.
        while frames < FRAMES_PER_TURN || backend.has_received(pair) || !self.waiting.is_empty() {
            frames = frames.saturating_add(1);
            match self.next(ram, posted, backend, pair, counters, throttle)? {
                Next::Done => {}
                Next::Nothing => break,
                Next::Limited => {
                    self.limited = true;
                    break;
                }
                Next::NoBuffers => {
                    if !self.queue.enable_notification()? {
                        self.starved = true;
                        break;
                    }
                    self.queue.disable_notification()?;
                }
            }
        }
        Ok(())
    }

    fn next(
        &mut self,
        ram: &GuestRam,
        posted: &mut Posted,
        backend: &mut dyn NetBackend,
        pair: u16,
        counters: &mut Counters,
        throttle: &mut Option<&mut Throttle>,
    ) -> Result<Next, Failure> {
        if self.waiting.is_empty() {
            if throttle
                .as_mut()
                .is_some_and(|throttle| !throttle.is_open())
            {
                return Ok(Next::Limited);
            }
            posted.gather(&mut self.queue, self.expected, self.manner.merge)?;
            if posted.chains.is_empty() {
                return Ok(Next::NoBuffers);
            }
            let pieces = posted.pieces();
            let Some(len) = backend.receive(pair, ram, &pieces, &mut self.spill)? else {
                return Ok(Next::Nothing);
            };
            if let Some(throttle) = throttle {
                throttle.charge(len.saturating_sub(HEADER as usize) as u64);
            }
            self.expected = len.max(ORDINARY);
            if !(FRAME_MIN..=FRAME_MAX).contains(&len) || (len > posted.room && !self.manner.merge)
            {
                counters.receive_dropped = counters.receive_dropped.saturating_add(1);
                return Ok(Next::Done);
            }
            if len <= posted.room {
                self.hand_over(ram, posted, len)?;
                counters.received = counters.received.saturating_add(1);
                return Ok(Next::Done);
            }
            self.set_aside(ram, &pieces, len)?;
        }
        let len = self.waiting.len();
        posted.gather(&mut self.queue, len, self.manner.merge)?;
        if len <= posted.room {
            posted.write(ram, &self.waiting)?;
            self.waiting.clear();
            self.hand_over(ram, posted, len)?;
            counters.received = counters.received.saturating_add(1);
            return Ok(Next::Done);
        }
        if posted.pieces >= usize::from(self.queue.size()) {
            // All that the driver can post is not enough.
            self.waiting.clear();
            counters.receive_dropped = counters.receive_dropped.saturating_add(1);
            return Ok(Next::Done);
        }
        Ok(Next::NoBuffers)
    }

    /// Makes `waiting` of a frame that lies in `pieces` and the spill area.
    fn set_aside(&mut self, ram: &GuestRam, pieces: &[Piece], len: usize) -> Result<(), Malformed> {
        for &(address, len) in pieces {
            let mut bytes = vec![0; len as usize];
            ram.read_slice(&mut bytes, address)
                .map_err(|_| Malformed::Address)?;
            self.waiting.append(&mut bytes);
        }
        let spilled = len.saturating_sub(self.waiting.len());
        self.waiting
            .extend_from_slice(self.spill.get(..spilled).unwrap_or_default());
        Ok(())
    }

    /// Gives the driver the buffers that now hold a frame of `len` bytes.
    fn hand_over(
        &mut self,
        ram: &GuestRam,
        posted: &mut Posted,
        len: usize,
    ) -> Result<(), Malformed> {
        let mut left = u32::try_from(len).unwrap_or(u32::MAX);
        let mut used = Vec::new();
        let mut first = None;
        while left > 0 {
            let chain = posted.take().ok_or(Malformed::Request)?;
            let here = left.min(chain.writable_len());
            left = left.saturating_sub(here);
            used.push((chain.head(), here));
            first = first.or(Some(chain));
        }
        if let Some(chain) = first {
            let buffers = u16::try_from(used.len()).unwrap_or(u16::MAX);
            let mut writer = chain.writer(ram);
            writer.take_buffers(NUM_BUFFERS);
            writer
                .write_all(&buffers.to_le_bytes())
                .map_err(|_| Malformed::Request)?;
            if !self.manner.checksum {
                // "If GUEST_CSUM was not negotiated, the device MUST set flags to zero" (§5.1.6.4.1).
                chain
                    .writer(ram)
                    .write_all(&[0])
                    .map_err(|_| Malformed::Request)?;
            }
        }
        self.queue.push_used_together(&used)
    }
}

impl Posted {
    /// Takes buffers from the queue until there is room for `want` bytes, or no buffer; without `merge`, one buffer.
    fn gather(&mut self, queue: &mut VirtQueue, want: usize, merge: bool) -> Result<(), Malformed> {
        let size = usize::from(queue.size());
        while self.chains.is_empty() || (merge && self.room < want) {
            if self.pieces.saturating_add(size) > PIECES_MAX {
                break;
            }
            let Some(chain) = queue.pop()? else {
                break;
            };
            let pieces = chain.writable().len();
            if pieces > size {
                return Err(Malformed::Chain);
            }
            if chain.writable_len() < HEADER {
                return Err(Malformed::Request);
            }
            self.pieces = self.pieces.saturating_add(pieces);
            self.room = self.room.saturating_add(chain.writable_len() as usize);
            self.chains.push_back(chain);
        }
        Ok(())
    }

    fn pieces(&self) -> Vec<Piece> {
        self.chains
            .iter()
            .flat_map(Chain::writable)
            .map(|buffer| (buffer.address, buffer.len))
            .collect()
    }

    fn take(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_front()?;
        self.pieces = self.pieces.saturating_sub(chain.writable().len());
        self.room = self.room.saturating_sub(chain.writable_len() as usize);
        Some(chain)
    }

    fn write(&self, ram: &GuestRam, mut bytes: &[u8]) -> Result<(), Malformed> {
        for chain in &self.chains {
            let (now, rest) = bytes.split_at(bytes.len().min(chain.writable_len() as usize));
            chain
                .writer(ram)
                .write_all(now)
                .map_err(|_| Malformed::Address)?;
            bytes = rest;
        }
        Ok(())
    }
}
