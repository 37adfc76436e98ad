//! How many descriptors a guest may hold open.
//!
//! Each file that a guest knows of costs the host a descriptor, and a process has a limited number of them. All shares of a
//! machine draw on one budget that leaves some for the rest of the process: a guest that wants more gets ENFILE, and its
//! console and disks go on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Never more than this many, whatever the host allows: each costs some memory too.
const MOST: u64 = 1 << 20;
/// Descriptors left to the rest of the process, or half of all if there are fewer.
const RESERVE: u64 = 512;

/// Descriptors that guests may still take. Clones draw on the same budget.
#[derive(Clone, Debug)]
pub struct Budget(Arc<AtomicUsize>);

impl Budget {
    /// A budget of so many descriptors.
    pub fn new(descriptors: usize) -> Budget {
        Budget(Arc::new(AtomicUsize::new(descriptors)))
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

    /// Puts a descriptor under the budget.
    ///
    /// # Errors
    /// ENFILE when none is left.
    pub(super) fn hold(&self, fd: OwnedFd) -> Result<Descriptor, Errno> {
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            });
        match taken {
            Ok(_) => Ok(Descriptor {
                fd,
                budget: Some(self.clone()),
            }),
            Err(_) => Err(Errno::NFILE),
        }
    }

    /// Descriptors left.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A descriptor that counts against a budget until it is closed.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    budget: Option<Budget>,
}

impl Descriptor {
    /// One that does not count, such as that of the shared directory itself.
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
            budget.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}
