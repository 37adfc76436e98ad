//! For tests: times at which no child process has copies of this process's descriptors.
//!
//! Between fork(2) and execve(2) a child has every descriptor of its parent, also those that are closed on exec. Whatever
//! another thread closes then stays open for a moment: a socket's peer sees no end, and a lock is not released. Tests run
//! as threads of one process, so one that looks at once for what a close brings about must not run beside one that starts
//! a process.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static CHILDREN: RwLock<()> = RwLock::new(());

/// For a test that needs what it closes to be closed at once, as long as the guard lives.
pub(crate) fn none() -> RwLockReadGuard<'static, ()> {
    CHILDREN.read().unwrap_or_else(PoisonError::into_inner)
}

/// For a test that starts a process, from before until it has ended.
pub(crate) fn some() -> RwLockWriteGuard<'static, ()> {
    CHILDREN.write().unwrap_or_else(PoisonError::into_inner)
}
