//! A shared directory (virtio 1.3 §5.11): `mount -t virtiofs TAG /mnt` in the guest.
//!
//! The driver is a file system of the guest's kernel. Its requests are FUSE messages: the readable part of a chain is the
//! request, the writable part has room for the answer (§5.11.6.1). Queue 0 (*hiprio*) is for those that must not wait
//! behind others, such as FORGET; all others go to the request queue. Which of several shares this is, the driver
//! knows by the tag in the configuration space.
//!
//! What a message means is the business of [`crate::backend::share`]. The device copies it out of guest memory, once, and
//! copies the answer back when it is there; so a reset need not wait for the host.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::backend::share::{
    ANSWER_HEADER_LEN, Completion, HEADER_LEN, MESSAGE_MAX, Share, is_answered,
};
use crate::bus::{RestoreError, SavedState};
use crate::mem::GuestRam;
use crate::virtio::queue::{Chain, VirtQueue};
use crate::virtio::{Activation, Malformed, VirtioDevice, copy_config};
use crate::worker::{Interest, Readiness};

/// The device type (§5.11.1).
const DEVICE_ID: u32 = 26;
/// Bytes of a tag (§5.11.4).
pub const TAG_LEN: usize = 36;
/// Queues for requests, beside hiprio. All would lead to the same threads.
const REQUEST_QUEUES: u32 = 1;
/// Descriptors of hiprio and of the request queue. Linux makes requests no longer than the queue, and one with the most data
/// has 256 pages.
const QUEUE_SIZES: [u16; 1 + REQUEST_QUEUES as usize] = [64, 512];
/// So many requests of each queue are taken at once; it bounds the memory that their bytes take. One more waits in its queue.
const RUNNING_MAX: u16 = 32;

/// A virtio-fs device.
pub struct Fs {
    // Fixed configuration.
    name: String,
    tag: [u8; TAG_LEN],

    // Runtime glue.
    share: Share,
    active: Option<Active>,
    // Volatile state: none that could be saved, see `save`.
}

/// What there is between `activate` and `reset`.
struct Active {
    ram: GuestRam,
    queues: Vec<Option<VirtQueue>>,
    /// By queue, how many requests the share is at work on.
    running: Vec<u16>,
    /// By token: the queue and the request.
    pending: BTreeMap<u64, (usize, Chain)>,
    next_token: u64,
}

impl Fs {
    /// The machine's `index`th, which the guest mounts by `tag`: UTF-8, cut off after 36 bytes.
    pub fn new(index: u32, tag: &str, share: Share) -> Fs {
        let mut bytes = [0; TAG_LEN];
        for (to, from) in bytes.iter_mut().zip(tag.bytes()) {
            *to = from;
        }
        Fs {
            name: format!("FS{index}"),
            tag: bytes,
            share,
            active: None,
        }
    }

    /// Starts the requests of one queue, as many as may be under way.
    fn start_all(&mut self, index: usize) -> Result<(), Malformed> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let (Some(Some(queue)), Some(running)) =
            (active.queues.get_mut(index), active.running.get_mut(index))
        else {
            return Ok(());
        };
        // One that waits for a completion need not be told of more requests.
        while *running < RUNNING_MAX {
            let Some(chain) = queue.pop()? else {
                return Ok(());
            };
            let message = message(&chain, &active.ram)?;
            let token = active.next_token;
            active.next_token = token.wrapping_add(1);
            *running = running.saturating_add(1);
            self.share.submit(token, message, chain.writable_len());
            active.pending.insert(token, (index, chain));
        }
        Ok(())
    }

    /// Hands a request back with its answer. The result is its queue.
    fn finish(&mut self, completion: &Completion) -> Result<Option<usize>, Malformed> {
        let Some(active) = &mut self.active else {
            return Ok(None);
        };
        let Some((index, chain)) = active.pending.remove(&completion.token) else {
            return Ok(None);
        };
        if let Some(running) = active.running.get_mut(index) {
            *running = running.saturating_sub(1);
        }
        let Some(Some(queue)) = active.queues.get_mut(index) else {
            return Ok(None);
        };
        let mut writer = chain.writer(&active.ram);
        writer
            .write_all(&completion.answer)
            .map_err(|_| Malformed::Request)?;
        queue.push_used(chain.head(), writer.written())?;
        Ok(Some(index))
    }
}

/// Copies a request out of guest memory.
fn message(chain: &Chain, ram: &GuestRam) -> Result<Vec<u8>, Malformed> {
    let len = chain.readable_len();
    if !(HEADER_LEN..=MESSAGE_MAX).contains(&len) {
        return Err(Malformed::Request);
    }
    let mut message = vec![0; len as usize];
    let mut reader = chain.reader(ram);
    reader
        .read_exact(&mut message)
        .map_err(|_| Malformed::Request)?;
    // Length, opcode, … (`struct fuse_in_header`).
    let kind = message
        .get(4..8)
        .and_then(|kind| Some(u32::from_le_bytes(kind.try_into().ok()?)));
    if kind.is_some_and(is_answered) && chain.writable_len() < ANSWER_HEADER_LEN {
        return Err(Malformed::Request);
    }
    Ok(message)
}

impl VirtioDevice for Fs {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `tag` and `num_request_queues` (§5.11.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.tag.into_iter().chain(REQUEST_QUEUES.to_le_bytes());
        copy_config(space, offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(Active {
            running: vec![0; activation.queues.len()],
            ram: activation.ram,
            queues: activation.queues,
            pending: BTreeMap::new(),
            next_token: 0,
        });
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        // Those that have been started are answered when they are done.
        self.start_all(queue)
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![self.share.event()]
    }

    fn interests(&self) -> Vec<Interest> {
        vec![match self.active {
            Some(_) => Interest::READ,
            None => Interest::NONE,
        }]
    }

    fn ready(&mut self, _source: usize, _: Readiness) -> Result<(), Malformed> {
        let mut touched = BTreeSet::new();
        for completion in self.share.completed() {
            touched.extend(self.finish(&completion)?);
        }
        for index in touched {
            if let Some(active) = &mut self.active
                && let Some(Some(queue)) = active.queues.get_mut(index)
            {
                queue.notify()?;
            }
            // There is room for more now.
            self.start_all(index)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.share.reset();
    }

    /// Nothing: what a mounted guest knows are numbers that stand for descriptors of this process, which cannot be carried
    /// over. A guest that is restored finds its mount dead (ENOTCONN) and has to mount again.
    fn save(&self) -> SavedState {
        let Fs {
            name: _,
            tag: _,
            share: _,
            active: _,
        } = self;
        SavedState::of(&())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.to(&self.name)
    }
}

#[cfg(test)]
mod tests;
