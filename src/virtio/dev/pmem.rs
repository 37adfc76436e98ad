//! Persistent memory (virtio 1.3 §5.19): a file of the host in the guest's physical address space.
//!
//! To the guest it is memory like any other, except that it is still there after a reboot. A file system that knows
//! such memory (DAX) lets programs load from and store to the very pages of its files: no request, no copy, no cache
//! of the guest's own. The configuration space says where it lies. The one queue has the one kind of request that is
//! left: FLUSH, after which everything stored before it survives a power cut, as after `fsync` on the host's file.
//!
//! Flushes are collected: while the host is at work on one, further requests stay in the queue, and the next flush
//! answers all of them. So a guest has at most one system call under way, however many requests it makes.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Poll;

use crate::backend::pmem::File;
use crate::bus::{RestoreError, SavedState};
use crate::mem::GuestAddress;
use crate::virtio::queue::{Chain, VirtQueue};
use crate::virtio::{Activation, Malformed, VirtioDevice, copy_config};
use crate::worker::{Interest, Readiness};

/// The device type (§5.19.1).
const DEVICE_ID: u32 = 27;
const QUEUE_SIZE: u16 = 64;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (§5.19.6).
const REQ_TYPE_FLUSH: u32 = 0;
/// Bytes of a request, `type`, and of its answer, `ret`.
const REQUEST_LEN: u32 = 4;
/// What `ret` says (§5.19.7): 0, or -1 for any failure.
const RET_OK: i32 = 0;
const RET_FAILED: i32 = -1;

/// A persistent memory device.
pub struct Pmem {
    // Fixed configuration.
    name: String,
    /// Where the guest finds the memory.
    start: GuestAddress,

    // Runtime glue.
    file: File,
    queue: Option<VirtQueue>,
    /// The requests that wait for the flush under way. There is one unless this is empty.
    flushing: Vec<Chain>,
    /// A failure has been logged.
    warned: bool,
}

impl Pmem {
    /// The machine's `index`th, for a file that the machine has as memory at `start`.
    pub fn new(index: usize, file: File, start: GuestAddress) -> Pmem {
        Pmem {
            name: format!("PMEM{index}"),
            start,
            file,
            queue: None,
            flushing: Vec::new(),
            warned: false,
        }
    }

    /// Takes what the queue has, and starts one flush for all flushes among it.
    fn collect(&mut self) -> Result<(), Malformed> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return Ok(());
            };
            match kind(&chain, queue)? {
                REQ_TYPE_FLUSH => self.flushing.push(chain),
                _ => answer(queue, &chain, RET_FAILED)?,
            }
        }
        // With a flush under way, its end brings the device back here.
        if self.flushing.is_empty() {
            queue.call_again();
        }
        Ok(())
    }

    /// Answers the requests that waited for a flush.
    fn finish(&mut self, result: io::Result<()>) -> Result<(), Malformed> {
        let ret = match result {
            Ok(()) => RET_OK,
            Err(error) => {
                // One line, not one for each failure.
                if !std::mem::replace(&mut self.warned, true) {
                    log::warn!(
                        "{}: cannot flush {}: {error}; the guest is told of this and of all failures that follow",
                        self.name,
                        self.file.path().display()
                    );
                }
                RET_FAILED
            }
        };
        let chains = std::mem::take(&mut self.flushing);
        match &mut self.queue {
            Some(queue) => chains
                .iter()
                .try_for_each(|chain| answer(queue, chain, ret)),
            None => Ok(()),
        }
    }
}

/// Checks a request and says what it asks for.
fn kind(chain: &Chain, queue: &VirtQueue) -> Result<u32, Malformed> {
    if chain.writable_len() < REQUEST_LEN {
        return Err(Malformed::Request);
    }
    let kind = chain.reader(queue.ram()).array()?;
    Ok(u32::from_le_bytes(kind))
}

/// Hands a request back.
fn answer(queue: &mut VirtQueue, chain: &Chain, ret: i32) -> Result<(), Malformed> {
    chain
        .writer(queue.ram())
        .write_all(&ret.to_le_bytes())
        .map_err(|_| Malformed::Address)?;
    queue.push_used(chain.head(), REQUEST_LEN)
}

impl VirtioDevice for Pmem {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// `start` and `size`, both 64 bits wide (§5.19.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = [self.start.0.to_le_bytes(), self.file.size().to_le_bytes()];
        copy_config(fields.into_iter().flatten(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queues.into_iter().next().flatten();
    }

    fn process(&mut self, _queue: usize) -> Result<(), Malformed> {
        if self.flushing.is_empty() {
            let collected = self.collect();
            // Those before a malformed request were good.
            if !self.flushing.is_empty()
                && let Poll::Ready(result) = self.file.flush()
            {
                let finished = self.finish(result);
                if let Some(queue) = &self.queue {
                    queue.call_again();
                }
                finished?;
            }
            collected?;
        }
        match &mut self.queue {
            Some(queue) => queue.notify(),
            None => Ok(()),
        }
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![self.file.event()]
    }

    fn interests(&self) -> Vec<Interest> {
        vec![match self.queue {
            Some(_) => Interest::READ,
            None => Interest::NONE,
        }]
    }

    fn ready(&mut self, _source: usize, _: Readiness) -> Result<(), Malformed> {
        if let Some(result) = self.file.flushed() {
            self.finish(result)?;
        }
        // What came in meanwhile.
        self.process(0)
    }

    fn reset(&mut self) {
        self.file.drain();
        self.flushing.clear();
        self.queue = None;
    }

    fn save(&self) -> SavedState {
        let Pmem {
            name: _,
            start: _,
            file: _,
            queue: _,
            flushing: _,
            warned: _,
        } = self;
        SavedState::of(&())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.to(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::pmem::Options;
    use crate::mem::Bytes;
    use crate::virtio::driver::{Driver, Used};
    use rustix::event::{PollFd, PollFlags, poll};

    const FLUSH: [u8; 4] = [0; 4];
    const FAILED: [u8; 4] = [0xff; 4];
    /// A descriptor's flag: the device writes.
    const WRITE: u16 = 2;

    /// A device on a file of 4 MiB, which is gone by name.
    fn device() -> Pmem {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        scratch.as_file().set_len(4 << 20).unwrap();
        let file = File::open(&Options {
            path: scratch.path().to_owned(),
            read_only: false,
        });
        Pmem::new(0, file.unwrap(), GuestAddress(5 << 30))
    }

    /// Waits for the end of the flush under way, as the event loop does.
    fn wait(device: &Pmem) {
        let event = device.file.event();
        poll(&mut [PollFd::new(&event, PollFlags::IN)], None).unwrap();
    }

    fn finish(device: &mut Pmem) {
        if !device.flushing.is_empty() {
            wait(device);
            device.ready(0, Readiness::default()).unwrap();
        }
    }

    #[test]
    fn the_configuration_says_where_the_memory_lies() {
        let device = device();
        let mut config = [0; 20];
        device.read_config(0, &mut config);
        assert_eq!(config[..8], (5_u64 << 30).to_le_bytes());
        assert_eq!(config[8..16], (4_u64 << 20).to_le_bytes());
        assert_eq!(config[16..], [0; 4], "there is no more");
        let mut half = [0; 4];
        device.read_config(12, &mut half);
        device.read_config(u64::MAX, &mut half);
        assert_eq!(half, [0; 4]);
    }

    #[test]
    fn a_flush_is_answered_when_the_host_has_flushed() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        let (request, ret) = (GuestAddress(0x10_0000), GuestAddress(0x10_1000));
        driver.ram.write_slice(&FLUSH, request).unwrap();
        driver.ram.write_slice(&FAILED, ret).unwrap();
        let head = driver.send_raw(0, &[(request.0, 4, 0), (ret.0, 4, WRITE)]);
        device.process(0).unwrap();
        finish(&mut device);
        assert_eq!(driver.used(0), Some(Used { head, len: 4 }));
        assert_eq!(driver.ram.read_obj::<u32>(ret).unwrap(), 0);
        assert_eq!(driver.line.edges(), 1);
    }

    #[test]
    fn requests_that_come_in_during_a_flush_share_the_next_one() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        // A host may be so fast that a flush has ended as soon as it was asked for, but not always.
        for tries in 0.. {
            assert!(tries < 10_000, "no flush takes any time here");
            driver.send(0, &[&FLUSH], &[4]);
            device.process(0).unwrap();
            if driver.used(0).is_none() {
                break;
            }
        }
        let before = driver.line.edges();
        for _ in 0..20 {
            driver.send(0, &[&FLUSH], &[4]);
            device.process(0).unwrap();
        }
        assert_eq!(device.flushing.len(), 1);
        finish(&mut device);
        assert!(driver.used(0).is_some());
        if !device.flushing.is_empty() {
            assert_eq!((driver.used(0), device.flushing.len()), (None, 20));
            finish(&mut device);
        }
        assert_eq!(std::iter::from_fn(|| driver.used(0)).count(), 20);
        assert!(driver.line.edges() - before <= 2);
    }

    #[test]
    fn buffers_may_be_in_pieces_and_longer_than_needed() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        let head = driver.send(0, &[&[0], &[0, 0, 0, 9]], &[1, 2, 9]);
        device.process(0).unwrap();
        finish(&mut device);
        assert_eq!(driver.used(0), Some(Used { head, len: 4 }));
    }

    #[test]
    fn unknown_requests_fail_at_once_and_others_go_on() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        let unknown = driver.send(0, &[&[1, 0, 0, 0]], &[4]);
        let flush = driver.send(0, &[&FLUSH], &[4]);
        let large = driver.send(0, &[&[0, 0, 0, 0x80]], &[4]);
        device.process(0).unwrap();
        for head in [unknown, large] {
            assert_eq!(driver.used(0), Some(Used { head, len: 4 }));
            assert_eq!(driver.written(0, head), FAILED);
        }
        finish(&mut device);
        assert_eq!(driver.used(0).unwrap().head, flush);
        assert_eq!(driver.written(0, flush), [0; 4]);
    }

    #[test]
    fn requests_without_a_header_or_a_place_for_the_answer_are_malformed() {
        for (readable, writable) in [
            (&[0_u8; 3][..], &[4_u32][..]),
            (&[], &[4]),
            (&FLUSH, &[]),
            (&FLUSH, &[3]),
        ] {
            let mut device = device();
            let mut driver = Driver::start(&mut device, 0);
            let pieces: Vec<&[u8]> = Some(readable)
                .filter(|r| !r.is_empty())
                .into_iter()
                .collect();
            driver.send(0, &[&FLUSH], &[4]);
            driver.send(0, &pieces, writable);
            assert_eq!(device.process(0), Err(Malformed::Request));
            // What came before it is answered, if the device is asked at all.
            finish(&mut device);
            assert!(driver.used(0).is_some());
        }
    }

    #[test]
    fn an_answer_cannot_be_sent_to_the_memory_itself() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        driver.send_raw(0, &[(0x10_0000, 4, 0), (5 << 30, 4, WRITE)]);
        assert_eq!(device.process(0), Err(Malformed::Address));
    }

    #[test]
    fn a_queue_full_of_flushes_is_one_flush_time_and_again() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        for round in 1..4 {
            for _ in 0..QUEUE_SIZE {
                driver.send(0, &[&FLUSH], &[4]);
            }
            device.process(0).unwrap();
            finish(&mut device);
            assert_eq!(std::iter::from_fn(|| driver.used(0)).count(), 64);
            assert_eq!(driver.line.edges(), round);
        }
    }

    #[test]
    fn a_reset_waits_for_the_flush_under_way_and_forgets_it() {
        let mut device = device();
        let mut driver = Driver::start(&mut device, 0);
        driver.send(0, &[&FLUSH], &[4]);
        device.process(0).unwrap();
        device.reset();
        assert_eq!(driver.used(0), None);
        assert_eq!(device.interests(), [Interest::NONE]);
        let mut driver = Driver::start(&mut device, 0);
        let head = driver.send(0, &[&FLUSH], &[4]);
        device.process(0).unwrap();
        finish(&mut device);
        assert_eq!(driver.used(0).unwrap().head, head);
        assert_eq!(driver.used(0), None);
    }
}
