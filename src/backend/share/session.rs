//! What one mount of a guest holds: the nodes it knows and the files it has open.
//!
//! A guest names a file by a *node number* that it got from a LOOKUP, and the host finds a descriptor by it. That
//! descriptor was opened with `O_PATH` and cannot read or write; it stands for the file itself, wherever that is moved to,
//! so no path is ever walked twice. A node counts how often it was handed out; the guest gives the counts back with FORGET, and
//! at 0 the descriptor is closed. An open file has a *handle*, with a descriptor of its own.
//!
//! Numbers are never used twice, so a guest cannot reach another file by a number that it should have forgotten.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::descriptor::{Budget, Descriptor};
use super::directories::Listing;
use super::wire::ROOT;

/// By what the host knows a file: device, inode, and mount, since one file can be mounted in two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id {
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl Id {
    pub fn of(stat: &Statx) -> Id {
        Id {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }

    /// The same file, in whatever mount.
    pub fn in_any_mount(self) -> Id {
        Id { mount: 0, ..self }
    }

    /// Another file of the same file system, in whatever mount.
    pub fn beside(self, inode: u64) -> Id {
        let device = self.device;
        Id {
            device,
            inode,
            mount: 0,
        }
    }

    /// Whether both are in one file system.
    pub fn same_device(self, other: Id) -> bool {
        self.device == other.device
    }
}

/// A file that the guest knows of.
#[derive(Debug)]
pub(super) struct Node {
    descriptor: Descriptor,
    pub kind: FileType,
    pub id: Id,
}

impl Node {
    pub fn new(descriptor: Descriptor, stat: &Statx) -> Node {
        Node {
            descriptor,
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            id: Id::of(stat),
        }
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A file or directory that the guest has open.
#[derive(Debug)]
pub(super) struct Handle {
    node: u64,
    descriptor: Descriptor,
    pub kind: FileType,
    /// How far a directory has been listed. Held while it is read.
    pub listing: Mutex<Listing>,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

struct Known {
    node: Arc<Node>,
    lookups: u64,
}

#[derive(Default)]
struct Nodes {
    by_number: HashMap<u64, Known>,
    by_id: HashMap<Id, u64>,
    last: u64,
}

#[derive(Default)]
struct Handles {
    by_number: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// The nodes and handles of one mount.
pub(super) struct Session {
    root: Arc<Node>,
    budget: Budget,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
    started: AtomicBool,
}

impl Session {
    pub fn new(root: Arc<Node>, budget: Budget) -> Session {
        Session {
            root,
            budget,
            nodes: Mutex::default(),
            handles: Mutex::default(),
            started: AtomicBool::new(false),
        }
    }

    /// A session that knows nothing yet, of the same directory.
    pub fn fresh(&self) -> Session {
        Session::new(Arc::clone(&self.root), self.budget.clone())
    }

    pub fn root(&self) -> &Node {
        &self.root
    }

    #[cfg(test)]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Whether both sides have agreed on the protocol (INIT).
    pub fn started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Begins or ends a mount: forgets everything.
    pub fn restart(&self, started: bool) {
        self.started.store(started, Ordering::Release);
        // Closed after the locks are free again.
        let nodes = {
            let mut nodes = lock(&self.nodes);
            nodes.by_id = HashMap::new();
            std::mem::take(&mut nodes.by_number)
        };
        let handles = std::mem::take(&mut lock(&self.handles).by_number);
        drop((nodes, handles));
    }

    /// Whether nothing would have to be closed.
    pub fn is_empty(&self) -> bool {
        lock(&self.nodes).by_number.is_empty() && lock(&self.handles).by_number.is_empty()
    }

    /// The node of a number.
    ///
    /// # Errors
    /// ESTALE when it was never handed out, or has been forgotten.
    pub fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        if number == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        let nodes = lock(&self.nodes);
        let known = nodes.by_number.get(&number);
        known
            .map(|known| Arc::clone(&known.node))
            .ok_or(Errno::STALE)
    }

    /// Hands out the number of a file that has been found, and counts it.
    ///
    /// # Errors
    /// ENFILE when the guest may hold no more.
    pub fn remember(&self, fd: OwnedFd, stat: &Statx) -> Result<u64, Errno> {
        let id = Id::of(stat);
        if id == self.root.id {
            return Ok(ROOT);
        }
        let mut nodes = lock(&self.nodes);
        let nodes = &mut *nodes;
        if let Some(number) = nodes.by_id.get(&id)
            && let Some(known) = nodes.by_number.get_mut(number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(*number);
        }
        let node = Node::new(self.budget.hold(fd)?, stat);
        nodes.last = nodes.last.max(ROOT).saturating_add(1);
        nodes.by_id.insert(id, nodes.last);
        nodes.by_number.insert(
            nodes.last,
            Known {
                node: Arc::new(node),
                lookups: 1,
            },
        );
        Ok(nodes.last)
    }

    /// Takes back `lookups` counts of a number. A guest that gives back more than it got has forgotten it as well.
    pub fn forget(&self, number: u64, lookups: u64) {
        let mut nodes = lock(&self.nodes);
        let Some(known) = nodes.by_number.get_mut(&number) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return;
        }
        let gone = nodes.by_number.remove(&number);
        if let Some(gone) = &gone {
            nodes.by_id.remove(&gone.node.id);
        }
        // Closed after the lock is free again.
        drop(nodes);
        drop(gone);
    }

    /// Keeps an open file and gives it a handle.
    ///
    /// # Errors
    /// ENFILE when the guest may hold no more.
    pub fn keep(&self, node: u64, fd: OwnedFd, kind: FileType) -> Result<u64, Errno> {
        let handle = Handle {
            node,
            descriptor: self.budget.hold(fd)?,
            kind,
            listing: Mutex::default(),
        };
        let mut handles = lock(&self.handles);
        handles.last = handles.last.saturating_add(1);
        let number = handles.last;
        handles.by_number.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// An open file of this node.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn handle(&self, number: u64, node: u64, kind: FileType) -> Result<Arc<Handle>, Errno> {
        let handles = lock(&self.handles);
        let handle = handles.by_number.get(&number);
        handle
            .filter(|handle| handle.node == node && handle.kind == kind)
            .map(Arc::clone)
            .ok_or(Errno::BADF)
    }

    /// Closes an open file.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn close(&self, number: u64, node: u64, kind: FileType) -> Result<(), Errno> {
        self.handle(number, node, kind)?;
        let gone = lock(&self.handles).by_number.remove(&number);
        gone.map(drop).ok_or(Errno::BADF)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
