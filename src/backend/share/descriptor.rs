//! How many descriptors a guest may hold open.
//!
//! A process has a limited number of descriptors. All shares of a machine draw on one budget that leaves some for the rest of the
//! process, so that a guest that wants more does not stop its console and disks.
//!
//! What a guest has open takes a descriptor for as long as it is open; when there are no more, open(2) fails with ENFILE.
//! What it merely knows of takes one as long as nobody needs it more: when the budget is spent, the share that holds
//! the most of these gives one up.

use std::cmp::Reverse;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::session::{Session, lock};

/// Never more than this many, whatever the host allows: each costs some memory too.
const MOST: u64 = 1 << 20;
/// Descriptors left to the rest of the process, or half of all if there are fewer. Those that a request holds only while it
/// is served are among them: a few for each thread.
const RESERVE: u64 = 512;
/// How often something is given up for one descriptor, which another thread may be faster to take.
const ATTEMPTS: usize = 16;

/// Descriptors that guests may still take. Clones draw on the same budget.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    left: AtomicUsize,
    /// Who can give some up.
    holders: Mutex<Vec<Weak<Session>>>,
}

impl Budget {
    /// A budget of so many descriptors.
    pub fn new(descriptors: usize) -> Budget {
        Budget(Arc::new(Shared {
            left: AtomicUsize::new(descriptors),
            holders: Mutex::default(),
        }))
    }

    /// What this process can spare, after its soft limit has been raised to the hard one (`RLIMIT_NOFILE`).
    pub fn of_process() -> Budget {
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        // Lowering nothing, this is allowed to everyone; if it fails all the same, there are fewer.
        let limit = match setrlimit(Resource::Nofile, raised) {
            Ok(()) => limit.maximum,
            Err(_) => limit.current,
        };
        let limit = limit.unwrap_or(MOST);
        let spare = limit.saturating_sub(RESERVE).max(limit / 2).min(MOST);
        Budget::new(usize::try_from(spare).unwrap_or(0))
    }

    /// Has a session asked for what it can spare, for as long as it lives.
    pub(super) fn join(&self, session: &Arc<Session>) {
        let mut holders = lock(&self.0.holders);
        holders.retain(|holder| holder.strong_count() > 0);
        holders.push(Arc::downgrade(session));
    }

    /// Puts a descriptor under the budget. To be called without a lock.
    ///
    /// # Errors
    /// The descriptor, when everything is in use.
    pub(super) fn hold(&self, fd: OwnedFd) -> Result<Descriptor, OwnedFd> {
        for _ in 0..ATTEMPTS {
            if self.take() {
                let budget = Some(self.clone());
                return Ok(Descriptor { fd, budget });
            }
            if !self.give_up_one() {
                break;
            }
        }
        Err(fd)
    }

    fn take(&self) -> bool {
        let left = &self.0.left;
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        left.fetch_update(set, fetch, |left| left.checked_sub(1))
            .is_ok()
    }

    /// Has one descriptor closed that is not in use. Whether there was one.
    fn give_up_one(&self) -> bool {
        let holders = lock(&self.0.holders).clone();
        let mut holders: Vec<_> = holders.iter().filter_map(Weak::upgrade).collect();
        holders.sort_by_cached_key(|session| Reverse(session.spare()));
        holders.iter().any(|session| session.give_up_one())
    }

    /// Descriptors left.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.0.left.load(Ordering::Relaxed)
    }
}

/// A descriptor that counts against a budget until it is closed.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    budget: Option<Budget>,
}

impl Descriptor {
    /// One that does not count: that of the shared directory itself, or one that a request holds only while it is served.
    pub fn free(fd: OwnedFd) -> Descriptor {
        Descriptor { fd, budget: None }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.0.left.fetch_add(1, Ordering::Relaxed);
        }
    }
}
