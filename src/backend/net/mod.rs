//! The network, as a network card's other side: where Ethernet frames go to and come from.
//!
//! A backend moves whole frames between guest RAM and the host, each behind a *virtio-net header* of 12 bytes
//! (`struct virtio_net_hdr_v1`, virtio 1.3 §5.1.6), which says what the frame still lacks: a checksum to be filled in,
//! or a cut into segments that fit the wire. There are two:
//!
//! * [`Tap`]: a network interface of the host whose wire ends in this process. The host routes or bridges it; the
//!   header goes to the host's stack as it is, so checksums and segments are left to whoever needs them.
//! * [`Passt`]: a process beside ours that takes the frames apart and makes ordinary sockets of what they say. It needs
//!   no privileges and no set-up.
//!
//! Frames go from a socket or tap straight to guest memory and back by scattered reads and writes. No call waits.

pub(in crate::backend) mod memory;
mod passt;
mod stream;
mod tap;

#[cfg(test)]
pub(crate) mod namespace;

pub use passt::{Forward, Passt};
pub use tap::{NAME_MAX, QUEUES_MAX, Tap, check_name};

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::mem::{GuestAddress, GuestRam};

/// Bytes of the virtio-net header before each frame (virtio 1.3 §5.1.6: all fields, since VERSION_1 is negotiated).
pub const HEADER_LEN: usize = 12;
/// The longest frame with its header, in bytes: an IP packet of 65535 bytes behind the longest Ethernet header with a
/// VLAN tag does not exceed it.
pub const FRAME_MAX: usize = HEADER_LEN + 65_550;
/// The shortest frame with its header, in bytes: an Ethernet header with nothing behind it.
pub const FRAME_MIN: usize = HEADER_LEN + 14;
/// The most pieces of guest memory that one frame may lie in.
pub const PIECES_MAX: usize = 1000;

/// A range of guest RAM, inside one region: address and length in bytes.
pub type Piece = (GuestAddress, u32);

/// Why there is no network, or no network any more. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot open /dev/net/tun for --net tap={name}: {source}; load it with `modprobe tun`, and see that your user \
         may read and write it"
    )]
    NoTun { name: String, source: io::Error },
    #[error("--net tap=: {0}")]
    TapName(String),
    #[error(
        "no permission to use --net tap={name}: create it beforehand with `ip tuntap add {name} mode tap user $USER`"
    )]
    TapPermission { name: String },
    #[error("--net tap={name}: another process has this tap open; choose another name")]
    TapBusy { name: String },
    #[error("--net tap={name}: {name} is not a tap device; choose the name of one, or a new name")]
    NotATap { name: String },
    #[error(
        "--net tap={name}: this tap was made for one queue; leave queues= out, or create it with `ip tuntap add {name} \
         mode tap multi_queue user $USER`"
    )]
    OneQueueTap { name: String },
    #[error("--net tap={name}: cannot {what}: {source}")]
    Tap {
        name: String,
        what: &'static str,
        source: io::Error,
    },
    #[error("--net tap={name}: the tap device has been deleted")]
    TapGone { name: String },
    #[error(
        "--net user needs passt: install it (`apt install passt`, `dnf install passt`), or use --net tap=NAME"
    )]
    NoPasst,
    #[error("cannot start passt for --net user: {0}")]
    StartPasst(io::Error),
    #[error(
        "--net user: passt could not start: {0}; see that the host has a network and that each hostfwd= port is free"
    )]
    PasstNotStarted(String),
    #[error("passt, which --net user relies on, ended: {0}")]
    PasstEnded(String),
    #[error("passt, which --net user relies on, sent a frame of {0} bytes, which no frame has")]
    PasstFrame(u32),
}

/// What became of a frame that was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Whole,
    /// There is no room: try again when the backend's descriptor is ready for writing.
    NoRoom,
    /// The host refuses this frame: its header makes no sense, or the interface is down.
    Refused,
}

/// Work that the guest's driver is ready to take over from the host's stack, or the host from the driver's: what in a
/// network card is called offload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are only partly computed. All others need this one.
    pub checksum: bool,
    /// TCP segmentation over IPv4: packets longer than the MTU.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// UDP fragmentation over IPv4.
    pub ufo: bool,
}

/// The host's side of a network card with one or more pairs of queues.
pub trait NetBackend: Send {
    /// How many pairs of queues there are, at least 1. Each has a descriptor of its own.
    fn pairs(&self) -> u16 {
        1
    }

    /// What the backend can do with frames that it sends and receives.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    /// The guest's driver takes frames like these from now on.
    ///
    /// # Errors
    /// When the host refuses.
    fn accept_offloads(&mut self, offloads: Offloads) -> Result<(), Error> {
        let _ = offloads;
        Ok(())
    }

    /// Frames go through the first `pairs` pairs of queues only.
    ///
    /// # Errors
    /// When the host refuses.
    fn use_pairs(&mut self, pairs: u16) -> Result<(), Error> {
        let _ = pairs;
        Ok(())
    }

    /// The descriptors to wait on, one for each pair.
    fn descriptors(&self) -> Vec<Arc<OwnedFd>>;

    /// Receives one frame with its header into `pieces` and, where they end, into `spill`. The result is its length in
    /// bytes, header included; `None` when no frame waits. A frame that is longer than both is cut off; it is longer
    /// than [`FRAME_MAX`] if `spill` is.
    ///
    /// # Errors
    /// When there will be no more frames.
    fn receive(
        &mut self,
        pair: u16,
        ram: &GuestRam,
        pieces: &[Piece],
        spill: &mut [u8],
    ) -> Result<Option<usize>, Error>;

    /// Sends one frame with its header, [`FRAME_MIN`] to [`FRAME_MAX`] bytes in at most [`PIECES_MAX`] pieces.
    ///
    /// # Errors
    /// When no more frames can be sent.
    fn send(&mut self, pair: u16, ram: &GuestRam, pieces: &[Piece]) -> Result<Sent, Error>;

    /// Whether frames that were received with another wait in this process. They do not make the descriptor ready.
    fn has_received(&self, pair: u16) -> bool {
        let _ = pair;
        false
    }

    /// Whether part of a frame that counts as sent still waits in this process, so that [`NetBackend::flush`] should be
    /// called when the descriptor is ready for writing.
    fn has_unsent(&self, pair: u16) -> bool {
        let _ = pair;
        false
    }

    /// Sends what is left of a frame.
    ///
    /// # Errors
    /// When no more frames can be sent.
    fn flush(&mut self, pair: u16) -> Result<(), Error> {
        let _ = pair;
        Ok(())
    }
}
