//! What other threads see of a balloon: its target, its size, and how the guest fares.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

use super::PAGE;

/// Between the device and its handles.
pub(super) struct Shared {
    /// Pages that the guest is to give up.
    target: AtomicU32,
    /// Pages that it has given up, as it says.
    actual: AtomicU32,
    statistics: Mutex<Option<Statistics>>,
    /// The target has changed.
    event: Arc<OwnedFd>,
}

impl Shared {
    pub fn new(target: u64) -> io::Result<Shared> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Shared {
            target: AtomicU32::new(pages(target)),
            actual: AtomicU32::new(0),
            statistics: Mutex::new(None),
            event: Arc::new(event),
        })
    }

    pub fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    pub fn acknowledge(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    pub fn target_pages(&self) -> u32 {
        self.target.load(Ordering::Acquire)
    }

    pub fn set_target_pages(&self, pages: u32) {
        self.target.store(pages, Ordering::Release);
    }

    pub fn actual_pages(&self) -> u32 {
        self.actual.load(Ordering::Acquire)
    }

    pub fn set_actual_pages(&self, pages: u32) {
        self.actual.store(pages, Ordering::Release);
    }

    pub fn set_statistics(&self, statistics: Statistics) {
        *self
            .statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(statistics);
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

/// Reaches a balloon from any thread.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    pub(super) fn of(shared: &Arc<Shared>) -> Handle {
        Handle(Arc::clone(shared))
    }

    /// Asks the guest to give up this many bytes altogether, in whole pages of 4 KiB. How long that takes is up to the
    /// guest, which may also give up less.
    pub fn set_target(&self, bytes: u64) {
        self.0.set_target_pages(pages(bytes));
        // Fails only when the counter is at its maximum, and then the device has been woken already.
        let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
    }

    /// How the balloon stands.
    pub fn report(&self) -> Report {
        let mib = |pages: u32| (u64::from(pages) * PAGE) >> 20;
        let statistics = self.0.statistics.lock();
        Report {
            target_mib: mib(self.0.target_pages()),
            actual_mib: mib(self.0.actual_pages()),
            stats: *statistics.unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// How a balloon stands, as the guest tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// MiB that the guest is to give up.
    pub target_mib: u64,
    /// MiB that it has given up.
    pub actual_mib: u64,
    /// The last statistics, if there have been any.
    pub stats: Option<Statistics>,
}

/// What the guest says of its memory (§5.5.6.4): amounts in bytes, and events since it booted. A driver leaves out what
/// its kernel does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Brought in from swap.
    pub swap_in: Option<u64>,
    /// Written out to swap.
    pub swap_out: Option<u64>,
    /// Page faults that read from a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free_memory: Option<u64>,
    /// All that the kernel manages.
    pub total_memory: Option<u64>,
    /// What could be had without swapping: free, or easily freed.
    pub available_memory: Option<u64>,
    /// In caches of files.
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub hugetlb_failures: Option<u64>,
}

impl Statistics {
    /// Takes one statistic; those of an unknown tag are left out.
    pub(super) fn set(&mut self, statistic: [u8; super::STATISTIC]) {
        let [t0, t1, value @ ..] = statistic;
        let value = Some(u64::from_le_bytes(value));
        match u16::from_le_bytes([t0, t1]) {
            0 => self.swap_in = value,
            1 => self.swap_out = value,
            2 => self.major_faults = value,
            3 => self.minor_faults = value,
            4 => self.free_memory = value,
            5 => self.total_memory = value,
            6 => self.available_memory = value,
            7 => self.disk_caches = value,
            8 => self.hugetlb_allocations = value,
            9 => self.hugetlb_failures = value,
            _ => {}
        }
    }
}
