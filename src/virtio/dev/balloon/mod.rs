//! Balloon (virtio 1.3 §5.5): memory that a guest does not need goes back to the host.
//!
//! A guest never gives memory back by itself: what its kernel frees stays in its free lists, and the host knows nothing
//! of them. The balloon is a driver in the guest that helps in two ways.
//!
//! * *Inflating*: the device names a target, the driver takes that many pages from its own kernel and tells their numbers.
//!   Nobody in the guest uses them from then on, so the host can have them. To deflate, the driver just uses pages of the
//!   balloon again, and the host gives fresh ones. With `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` the driver may do so by itself
//!   rather than let processes die.
//! * *Free page reporting*: the driver tells of free ranges in passing, mostly of 2 or 4 MiB, without taking them away from
//!   its kernel. The host gives fresh pages when the guest uses them again.
//!
//! The third use is to ask how the guest fares: the driver puts a buffer with *statistics* on a queue, which the device
//! keeps until it wants newer ones, and hands back to get them (§5.5.6.3).
//!
//! Which queue is which depends on the features (§5.5.2): Linux numbers those that it uses without gaps, so the queue of
//! reports is the third or the fourth, as there are statistics or not.
//!
//! A page given back reads as zeroes. `VIRTIO_BALLOON_F_PAGE_POISON` would have the device keep other patterns in reported
//! pages; it is not offered, and a driver whose kernel depends on such a pattern does not report.

mod handle;

pub use handle::{Handle, Report, Statistics};

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bus::{RestoreError, SavedState};
use crate::mem::{self, GuestAddress, GuestRam};
use crate::virtio::dev::timer;
use crate::virtio::queue::VirtQueue;
use crate::virtio::{Activation, Interrupt, Malformed, VirtioDevice, copy_config};
use crate::worker::{Interest, Readiness};
use handle::Shared;

const DEVICE_ID: u32 = 5;

/// `VIRTIO_BALLOON_F_STATS_VQ` (§5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` (§5.5.3).
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING` (§5.5.3).
const F_PAGE_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The third queue, when there are statistics.
const STATISTICS: usize = 2;
const QUEUE_SIZES: [u16; 4] = [128; 4];

/// A page of a balloon (§5.5.6), whatever the guest's own pages are.
const PAGE: u64 = 4096;
/// At most this many pages are taken at a time, and from one request, whatever a driver packs into it: each may cost the host
/// a system call. Linux has 256 in a request.
const PAGES_MOST: usize = 16 << 10;
/// A statistic: a tag of 16 bits, a value of 64 (§5.5.6.3).
const STATISTIC: usize = 10;
/// More statistics than any driver has; the rest of a longer buffer is not read.
const STATISTICS_MOST: usize = 64;

/// `num_pages`, the target, in the configuration space (§5.5.4).
const NUM_PAGES: usize = 0;
/// `actual`, what the driver has reached.
const ACTUAL: usize = 4;
const CONFIG_LEN: usize = 8;

/// The balloon of a machine.
pub struct Balloon {
    // Fixed configuration.
    name: String,

    // Runtime glue.
    shared: Arc<Shared>,
    /// Ticks when newer statistics are due.
    clock: Option<Arc<OwnedFd>>,
    queues: Vec<Option<VirtQueue>>,
    ram: Option<GuestRam>,
    interrupt: Option<Arc<Interrupt>>,
    features: u64,

    // Volatile state; the target and the size are with `shared`.
    /// The buffer of statistics that the driver gets back when newer ones are wanted.
    kept: Option<u16>,
}

impl Balloon {
    /// A balloon that is to take `target` bytes from the guest, and asks for statistics this often, or else never.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new(target: u64, statistics: Option<Duration>) -> std::io::Result<Balloon> {
        let clock = statistics.map(timer::every).transpose()?;
        Ok(Balloon {
            name: "BALLOON0".to_owned(),
            shared: Arc::new(Shared::new(target)?),
            clock: clock.map(Arc::new),
            queues: Vec::new(),
            ram: None,
            interrupt: None,
            features: 0,
            kept: None,
        })
    }

    /// Reaches the balloon from other threads.
    pub fn handle(&self) -> Handle {
        Handle::of(&self.shared)
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Takes the driver's pages away, in runs of neighbours.
    fn inflate(&mut self) -> Result<(), Malformed> {
        let (Some(Some(queue)), Some(ram)) = (self.queues.get_mut(INFLATE), &self.ram) else {
            return Ok(());
        };
        let mut pages = 0;
        while pages < PAGES_MOST {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            let mut reader = chain.reader(queue.ram());
            let mut run = Run::default();
            let mut taken = 0;
            while taken < PAGES_MOST
                && let Ok(page) = reader.array()
            {
                run.add(u32::from_le_bytes(page), |start, len| {
                    give_back(ram, start, len)
                });
                taken += 1;
            }
            run.end(|start, len| give_back(ram, start, len));
            queue.push_used(chain.head(), 0)?;
            pages += taken.max(1);
        }
        queue.call_again();
        queue.notify()
    }

    /// The driver uses pages again; the host gives them when they are touched.
    fn deflate(&mut self) -> Result<(), Malformed> {
        let Some(Some(queue)) = self.queues.get_mut(DEFLATE) else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            queue.push_used(chain.head(), 0)?;
        }
        queue.call_again();
        queue.notify()
    }

    /// Reads the driver's statistics, and keeps their buffer.
    fn take_statistics(&mut self) -> Result<(), Malformed> {
        let Some(Some(queue)) = self.queues.get_mut(STATISTICS) else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            let mut reader = chain.reader(queue.ram());
            let mut statistics = Statistics::default();
            for _ in 0..STATISTICS_MOST {
                let Ok(statistic) = reader.array::<STATISTIC>() else {
                    break;
                };
                statistics.set(statistic);
            }
            self.shared.set_statistics(statistics);
            // One buffer is all that a driver has here (§5.5.6.3); one that gives more gets the first back.
            if let Some(head) = self.kept.replace(chain.head()) {
                queue.push_used(head, 0)?;
            }
        }
        queue.call_again();
        queue.notify()
    }

    /// Asks the driver for newer statistics.
    fn ask(&mut self) -> Result<(), Malformed> {
        if let Some(Some(queue)) = self.queues.get_mut(STATISTICS)
            && let Some(head) = self.kept.take()
        {
            queue.push_used(head, 0)?;
            queue.notify()?;
        }
        Ok(())
    }

    /// Takes the free ranges that the driver tells of.
    fn report(&mut self, number: usize) -> Result<(), Malformed> {
        let (Some(Some(queue)), Some(ram)) = (self.queues.get_mut(number), &self.ram) else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            for range in chain.writable() {
                give_back(ram, range.address.0, range.len.into());
            }
            queue.push_used(chain.head(), 0)?;
        }
        queue.call_again();
        queue.notify()
    }

    /// The configuration space as it stands.
    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let (num_pages, actual) = config.split_at_mut(ACTUAL - NUM_PAGES);
        num_pages.copy_from_slice(&self.shared.target_pages().to_le_bytes());
        actual.copy_from_slice(&self.shared.actual_pages().to_le_bytes());
        config
    }
}

/// A run of neighbouring pages.
#[derive(Default)]
struct Run {
    first: u64,
    pages: u64,
}

impl Run {
    /// Makes the run longer, or ends it and begins another one.
    fn add(&mut self, page: u32, end: impl FnOnce(u64, u64)) {
        let page = u64::from(page);
        if page == self.first + self.pages && self.pages > 0 {
            self.pages += 1;
            return;
        }
        let run = std::mem::replace(
            self,
            Run {
                first: page,
                pages: 1,
            },
        );
        run.end(end);
    }

    fn end(self, end: impl FnOnce(u64, u64)) {
        if self.pages > 0 {
            end(self.first * PAGE, self.pages * PAGE);
        }
    }
}

/// What is not RAM has nothing to give back; and a host that keeps a page does the guest no harm.
fn give_back(ram: &GuestRam, start: u64, len: u64) {
    if let Err(error) = mem::discard(ram, GuestAddress(start), len) {
        log::warn!("the host does not take the guest's memory back: {error}");
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(ACTUAL), Ok(actual)) = (usize::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.shared.set_actual_pages(u32::from_le_bytes(actual));
        }
    }

    fn activate(&mut self, activation: Activation) {
        // A driver starts with an empty balloon. After a reset it still has what the last one left in it, for the report: a
        // guest that powers off resets its devices first.
        self.shared.set_actual_pages(0);
        self.queues = activation.queues;
        self.ram = Some(activation.ram);
        self.interrupt = Some(activation.interrupt);
        self.features = activation.features;
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        let statistics = self.has(F_STATS_VQ);
        let reports = if statistics {
            STATISTICS + 1
        } else {
            STATISTICS
        };
        match queue {
            INFLATE => self.inflate(),
            DEFLATE => self.deflate(),
            STATISTICS if statistics => self.take_statistics(),
            _ if queue == reports && self.has(F_PAGE_REPORTING) => self.report(queue),
            _ => Ok(()),
        }
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        let mut sources = vec![self.shared.event()];
        sources.extend(self.clock.clone());
        sources
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::READ; 2]
    }

    fn ready(&mut self, source: usize, _readiness: Readiness) -> Result<(), Malformed> {
        match (source, &self.clock) {
            (0, _) => {
                self.shared.acknowledge();
                if let Some(interrupt) = &self.interrupt {
                    interrupt.config_changed();
                }
                Ok(())
            }
            (_, Some(clock)) => {
                timer::acknowledge(clock);
                self.ask()
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.queues.clear();
        (self.ram, self.interrupt, self.kept) = (None, None, None);
        self.features = 0;
    }

    fn save(&self) -> SavedState {
        let Balloon {
            name: _,
            shared,
            clock: _,
            queues: _,
            ram: _,
            interrupt: _,
            features: _,
            kept,
        } = self;
        SavedState::of(&(shared.target_pages(), shared.actual_pages(), *kept))
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let (target, actual, kept): (u32, u32, Option<u16>) = state.to(&self.name)?;
        self.shared.set_target_pages(target);
        self.shared.set_actual_pages(actual);
        self.kept = kept;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
