//! What one mount of a guest holds: the nodes it knows and the files it has open.
//!
//! A guest names a file by a *node number* that it got from a LOOKUP. For the host, a descriptor that was opened with
//! `O_PATH` stands for the file: it cannot read or write, and goes on meaning the file wherever that is moved to. A node counts
//! how often it was handed out; the guest gives the counts back with FORGET, and at 0 the node is forgotten. An open file has a
//! *handle*, with a descriptor of its own.
//!
//! Descriptors of nodes are given up when there are too few ([`super::nodes`]), and had again when the guest names the node:
//! from an open handle of it, which is the file for certain, or else by its directory and name. The directory may have to be
//! had again first, and so on up to one that is there, at last the shared directory. Each step is a LOOKUP like any
//! other, of one name, in a descriptor, without following links, and past what is hidden; and what is found must be
//! the very file that was given up. Otherwise the guest gets ESTALE, as it does from a network file system, and looks the
//! path up anew. (Handles as of name_to_handle_at(2) would find a file that the host has moved. They need a
//! privilege, and would find it outside of the shared directory as well.)
//!
//! Of the two locks here one is held at a time, for a look at a table, and never during a system call.
//!
//! Numbers are never used twice, so a guest cannot reach another file by a number that it should have forgotten.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{CWD, FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;

use super::descriptor::{Budget, Descriptor};
use super::directories::Listing;
use super::hidden::Hidden;
use super::node::{Id, Identity, Node, status};
use super::nodes::{Nodes, Place};
use super::server::path;
use super::wire::ROOT;

/// The most nodes that a guest may know of a share, at about 300 bytes each. The guest's own kernel takes four times as many.
const NODES_MAX: usize = 1 << 21;
/// So many directories are opened again to get at a file in the last of them: no path that a program can write down
/// has more (`PATH_MAX`, half of which are slashes).
const DEPTH_MAX: usize = 2048;

/// A file or directory that the guest has open.
#[derive(Debug)]
pub(super) struct Handle {
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

#[derive(Default)]
struct Handles {
    /// By node and handle.
    open: BTreeMap<(u64, u64), Arc<Handle>>,
    last: u64,
}

/// A node that keeps its descriptor while its name changes.
pub(super) struct Kept {
    pub number: u64,
    _node: Arc<Node>,
}

/// The nodes and handles of one mount.
pub(super) struct Session {
    root: Arc<Node>,
    hidden: Arc<Hidden>,
    budget: Budget,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
    started: AtomicBool,
}

impl Session {
    pub fn new(root: Arc<Node>, hidden: Arc<Hidden>, budget: Budget) -> Arc<Session> {
        let session = Arc::new(Session {
            root,
            hidden,
            budget,
            nodes: Mutex::default(),
            handles: Mutex::default(),
            started: AtomicBool::new(false),
        });
        session.budget.join(&session);
        session
    }

    /// A session that knows nothing yet, of the same directory.
    pub fn fresh(&self) -> Arc<Session> {
        let (root, hidden) = (Arc::clone(&self.root), Arc::clone(&self.hidden));
        Session::new(root, hidden, self.budget.clone())
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
        let nodes = lock(&self.nodes).clear();
        let handles = std::mem::take(&mut lock(&self.handles).open);
        drop((nodes, handles));
    }

    /// Whether nothing would have to be closed.
    pub fn is_empty(&self) -> bool {
        lock(&self.nodes).len() == 0 && lock(&self.handles).open.is_empty()
    }

    /// The node of a number.
    ///
    /// # Errors
    /// ESTALE when it was never handed out, has been forgotten, or its file cannot be found again; others of the host.
    pub fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        // From the file up to what is at hand, and down again.
        let mut way = Vec::new();
        let mut at = number;
        let mut node = loop {
            if let Some(node) = self.at_hand(at)? {
                break node;
            }
            // Places that go round in a circle, which the host can make by moving directories, end here as well.
            if way.len() == DEPTH_MAX {
                return Err(Errno::STALE);
            }
            let parent = lock(&self.nodes).place(at)?.0.parent;
            way.push(at);
            at = parent;
        };
        while let Some(below) = way.pop() {
            node = self.again(at, &node, below)?;
            at = below;
        }
        Ok(node)
    }

    /// A node for which there is a descriptor.
    fn at_hand(&self, number: u64) -> Result<Option<Arc<Node>>, Errno> {
        if number == ROOT {
            return Ok(Some(Arc::clone(&self.root)));
        }
        if let Some(node) = lock(&self.nodes).get(number)? {
            return Ok(Some(node));
        }
        let Some(handle) = self.handle_of(number) else {
            return Ok(None);
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = openat(CWD, path(&*handle), flags, Mode::empty())?;
        let stat = status(fd.as_fd())?;
        Ok(Some(self.install(number, fd, &stat)))
    }

    fn handle_of(&self, number: u64) -> Option<Arc<Handle>> {
        let handles = lock(&self.handles);
        let mut open = handles.open.range((number, 0)..=(number, u64::MAX));
        open.next().map(|(_, handle)| Arc::clone(handle))
    }

    /// Finds a file again whose descriptor has been given up, in its directory.
    fn again(&self, parent: u64, directory: &Node, number: u64) -> Result<Arc<Node>, Errno> {
        // Somebody else may have done it, or the guest may be moving it.
        if let Some(node) = self.at_hand(number)? {
            return Ok(node);
        }
        let (place, identity) = {
            let nodes = lock(&self.nodes);
            let (place, identity) = nodes.place(number)?;
            (place.clone(), identity)
        };
        if place.parent != parent {
            return Err(Errno::STALE);
        }
        match self.look(directory.as_fd(), directory.id, &place.name) {
            Ok((fd, stat)) if Identity::of(&stat) == identity => {
                Ok(self.install(number, fd, &stat))
            }
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => Err(Errno::STALE),
            Err(error) => Err(error),
        }
    }

    /// Keeps a descriptor for a node, if there is one to spare. If not, the node is good for this request.
    fn install(&self, number: u64, fd: OwnedFd, stat: &Statx) -> Arc<Node> {
        match self.budget.hold(fd) {
            Ok(held) => {
                let node = Arc::new(Node::new(held, stat));
                lock(&self.nodes).install(number, node)
            }
            Err(fd) => Arc::new(Node::new(Descriptor::free(fd), stat)),
        }
    }

    /// How many descriptors this session could give up, more or less.
    pub fn spare(&self) -> usize {
        lock(&self.nodes).spare()
    }

    /// Closes the descriptor of a node that is not in use. Whether there was one.
    pub fn give_up_one(&self) -> bool {
        loop {
            let Some((number, node)) = lock(&self.nodes).next_unused() else {
                return false;
            };
            // As it is now: an overlay gives a file another birth when it is first written to.
            let identity = status(node.as_fd()).ok().map(|stat| Identity::of(&stat));
            let gone = lock(&self.nodes).give_up(number, identity);
            // If another thread has come to need it, the hand has gone on.
            if gone.is_some() {
                return true;
            }
        }
    }

    /// What a name stands for in a directory: one that is not hidden. A link stands for itself.
    pub fn look(
        &self,
        directory: BorrowedFd<'_>,
        id: Id,
        name: &CStr,
    ) -> Result<(OwnedFd, Statx), Errno> {
        if self.hidden.has_name(id, name) {
            return Err(Errno::NOENT);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(directory, name, flags, Mode::empty())?;
        let stat = status(fd.as_fd())?;
        self.hidden.admit(id, name, Id::of(&stat))?;
        Ok((fd, stat))
    }

    /// Hands out the number of a file that has been found at a place, and counts it.
    ///
    /// # Errors
    /// ENFILE when the guest may know no more.
    pub fn remember(&self, fd: OwnedFd, stat: &Statx, place: Place) -> Result<u64, Errno> {
        let identity = Identity::of(stat);
        if identity.id == self.root.id {
            return Ok(ROOT);
        }
        let (number, there) = {
            let mut nodes = lock(&self.nodes);
            let number = nodes.count(identity, place, NODES_MAX)?;
            (number, nodes.has_descriptor(number))
        };
        if !there {
            self.install(number, fd, stat);
        }
        Ok(number)
    }

    /// Keeps the descriptor of what is about to lose its name, if the guest knows it.
    pub fn keep_node(&self, directory: &Node, name: &CStr, stat: &Statx) -> Option<Kept> {
        let identity = Identity::of(stat);
        let number = lock(&self.nodes).number(&identity)?;
        let node = match self.at_hand(number).ok()? {
            Some(node) => node,
            None => {
                let (fd, stat) = self.look(directory.as_fd(), directory.id, name).ok()?;
                (Identity::of(&stat) == identity).then(|| self.install(number, fd, &stat))?
            }
        };
        Some(Kept {
            number,
            _node: node,
        })
    }

    /// What was kept has another name now.
    pub fn moved(&self, kept: &Kept, place: Place) {
        lock(&self.nodes).moved(kept.number, place);
    }

    /// What was kept has lost its last name.
    pub fn removed(&self, kept: &Kept) {
        lock(&self.nodes).removed(kept.number);
    }

    /// Takes back `lookups` counts of a number. A guest that gives back more than it got has forgotten it as well.
    pub fn forget(&self, number: u64, lookups: u64) {
        let gone = lock(&self.nodes).forget(number, lookups);
        // Closed after the lock is free again.
        drop(gone);
    }

    /// Keeps an open file and gives it a handle.
    ///
    /// # Errors
    /// ENFILE when the guest may hold no more.
    pub fn keep(&self, node: u64, fd: OwnedFd, kind: FileType) -> Result<u64, Errno> {
        let handle = Handle {
            descriptor: self.budget.hold(fd).map_err(|_| Errno::NFILE)?,
            kind,
            listing: Mutex::default(),
        };
        let mut handles = lock(&self.handles);
        handles.last = handles.last.saturating_add(1);
        let number = handles.last;
        handles.open.insert((node, number), Arc::new(handle));
        Ok(number)
    }

    /// An open file of this node.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn handle(&self, number: u64, node: u64, kind: FileType) -> Result<Arc<Handle>, Errno> {
        let handles = lock(&self.handles);
        let handle = handles.open.get(&(node, number));
        handle
            .filter(|handle| handle.kind == kind)
            .map(Arc::clone)
            .ok_or(Errno::BADF)
    }

    /// Closes an open file.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn close(&self, number: u64, node: u64, kind: FileType) -> Result<(), Errno> {
        self.handle(number, node, kind)?;
        let gone = lock(&self.handles).open.remove(&(node, number));
        gone.map(drop).ok_or(Errno::BADF)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
