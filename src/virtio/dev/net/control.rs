//! The control queue: what the driver asks of the card besides frames (virtio 1.3 §5.1.6.5).
//!
//! A request is a class, a command and its data to be read, and one byte to be written: OK or ERR. The one command that
//! this card offers says how many pairs of queues the driver uses (§5.1.6.5.6).

use std::io::Write;

use crate::mem::GuestRam;
use crate::virtio::Malformed;
use crate::virtio::queue::Chain;

const VIRTIO_NET_OK: u8 = 0;
const VIRTIO_NET_ERR: u8 = 1;

const VIRTIO_NET_CTRL_MQ: u8 = 4;
const VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: u8 = 0;

/// The number of pairs that a request sets; `None` when it is another request or makes no sense.
pub(super) fn pairs(ram: &GuestRam, chain: &Chain) -> Option<u16> {
    let [class, command, low, high] = chain.reader(ram).array().ok()?;
    let known = (class, command) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    known.then(|| u16::from_le_bytes([low, high]))
}

/// Answers a request; the result is how many bytes were written.
///
/// # Errors
/// When there is no place for the answer.
pub(super) fn answer(ram: &GuestRam, chain: &Chain, done: bool) -> Result<u32, Malformed> {
    let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let mut writer = chain.writer(ram);
    writer.write_all(&[ack]).map_err(|_| Malformed::Request)?;
    Ok(writer.written())
}
