//! The nodes that a guest knows, and for which of them there is a descriptor just now.
//!
//! A guest's kernel keeps what it knows of files for as long as it has memory, and that may be far more files than a process
//! may have open. So the descriptors of nodes are a *cache*. What is always kept of a node is small: by what the file
//! is known again, and its *place*, that is the number of its directory and its name there, as they were in the
//! last LOOKUP or RENAME. By these it is opened again ([`super::session`]).
//!
//! Which descriptor is given up is decided by a *clock*: a hand goes round the nodes in order of their numbers, passes over
//! those that were used since it last came by, and stops at the first that was not. One round of `find` thus does not
//! drive out what is used all the time.
//!
//! A file whose last name has been removed has no place, and its descriptor is not given up.
//!
//! This is the table alone. It makes no system calls, and its owner makes none while it is locked.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CStr;
use std::ops::Bound;
use std::sync::Arc;

use rustix::io::Errno;

use super::node::{Id, Identity, Node};
use super::wire::ROOT;

/// Where a file was last found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The number of its directory. The guest may have forgotten it since.
    pub parent: u64,
    pub name: Box<CStr>,
}

impl Place {
    pub fn new(parent: u64, name: &CStr) -> Place {
        let name = name.into();
        Place { parent, name }
    }
}

#[derive(Debug)]
struct Known {
    /// How often it was handed out and not given back.
    lookups: u64,
    identity: Identity,
    /// `None` when it has been given up.
    node: Option<Arc<Node>>,
    /// `None` when its last name is gone.
    place: Option<Place>,
    /// Since the hand was here.
    used: bool,
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: HashMap<u64, Known>,
    by_id: HashMap<Id, u64>,
    /// The last number that was handed out.
    last: u64,
    /// Those whose descriptor can be given up: it is there, and so is their place.
    spare: BTreeSet<u64>,
    /// The number where the clock's hand is.
    hand: u64,
}

impl Nodes {
    /// How many the guest knows.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// How many descriptors could be given up, more or less.
    pub fn spare(&self) -> usize {
        self.spare.len()
    }

    /// The node of a number, for use. `None` if it has been given up.
    ///
    /// # Errors
    /// ESTALE when the number was never handed out, or has been forgotten.
    pub fn get(&mut self, number: u64) -> Result<Option<Arc<Node>>, Errno> {
        let known = self.known.get_mut(&number).ok_or(Errno::STALE)?;
        known.used = true;
        Ok(known.node.clone())
    }

    /// Whether a node has a descriptor. This is no use of it.
    pub fn has_descriptor(&self, number: u64) -> bool {
        let known = self.known.get(&number);
        known.is_some_and(|known| known.node.is_some())
    }

    /// How to find a file again, and by what to know it.
    ///
    /// # Errors
    /// ESTALE when the number is not known, or the file has no name any more.
    pub fn place(&self, number: u64) -> Result<(&Place, Identity), Errno> {
        let known = self.known.get(&number).ok_or(Errno::STALE)?;
        let place = known.place.as_ref().ok_or(Errno::STALE)?;
        Ok((place, known.identity))
    }

    /// The number of a file.
    pub fn number(&self, identity: &Identity) -> Option<u64> {
        let number = self.by_id.get(&identity.id)?;
        let known = self.known.get(number)?;
        // As long as a descriptor is open, no other file can have the inode.
        let same = known.node.is_some() || known.identity == *identity;
        same.then_some(*number)
    }

    /// Counts a file that has been found, which is known from now on if it was not before.
    ///
    /// # Errors
    /// ENFILE when there are `most` already.
    pub fn count(&mut self, identity: Identity, place: Place, most: usize) -> Result<u64, Errno> {
        if let Some(number) = self.number(&identity) {
            if let Some(known) = self.known.get_mut(&number) {
                known.lookups = known.lookups.saturating_add(1);
            }
            self.moved(number, place);
            return Ok(number);
        }
        if self.known.len() >= most {
            return Err(Errno::NFILE);
        }
        self.last = self.last.max(ROOT).saturating_add(1);
        let known = Known {
            lookups: 1,
            identity,
            node: None,
            place: Some(place),
            used: false,
        };
        // A file that had this inode before does not find itself again.
        self.by_id.insert(identity.id, self.last);
        self.known.insert(self.last, known);
        Ok(self.last)
    }

    /// Puts a node into the table, unless another thread has been faster. The result is the one that is there now.
    pub fn install(&mut self, number: u64, node: Arc<Node>) -> Arc<Node> {
        let Some(known) = self.known.get_mut(&number) else {
            return node;
        };
        if known.place.is_some() {
            self.spare.insert(number);
        }
        Arc::clone(known.node.get_or_insert(node))
    }

    /// A file has got another name.
    pub fn moved(&mut self, number: u64, place: Place) {
        if let Some(known) = self.known.get_mut(&number) {
            known.place = Some(place);
            if known.node.is_some() {
                self.spare.insert(number);
            }
        }
    }

    /// A file has lost its last name.
    pub fn removed(&mut self, number: u64) {
        if let Some(known) = self.known.get_mut(&number) {
            known.place = None;
            self.spare.remove(&number);
        }
    }

    /// The next node that is not in use. Each call goes on where the last one stopped.
    pub fn next_unused(&mut self) -> Option<(u64, Arc<Node>)> {
        // In the first round all may have been used, since the hand was there.
        for _ in 0..self.spare.len().saturating_mul(2) {
            let after = (Bound::Excluded(self.hand), Bound::Unbounded);
            let next = self.spare.range(after).next();
            self.hand = *next.or_else(|| self.spare.first())?;
            let known = self.known.get_mut(&self.hand)?;
            let node = known.node.as_ref()?;
            if !std::mem::take(&mut known.used) && Arc::strong_count(node) == 1 {
                return Some((self.hand, Arc::clone(node)));
            }
        }
        None
    }

    /// Takes a node out that [`Nodes::next_unused`] has given, if nobody has come to use it meanwhile. `identity` is by what
    /// the file is to be known again. The result is to be dropped after the table is unlocked: that may take a while.
    pub fn give_up(&mut self, number: u64, identity: Option<Identity>) -> Option<Arc<Node>> {
        let known = self.known.get_mut(&number)?;
        let node = known.node.as_ref()?;
        // One is the table's, one the caller's.
        if known.used || known.place.is_none() || Arc::strong_count(node) > 2 {
            return None;
        }
        if let Some(identity) = identity.filter(|identity| identity.id == known.identity.id) {
            known.identity = identity;
        }
        self.spare.remove(&number);
        known.node.take()
    }

    /// Takes back `lookups` counts of a number. A guest that gives back more than it got has forgotten it as well. The result,
    /// too, is to be dropped after the table is unlocked.
    pub fn forget(&mut self, number: u64, lookups: u64) -> Option<Arc<Node>> {
        let known = self.known.get_mut(&number)?;
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return None;
        }
        let gone = self.known.remove(&number)?;
        self.spare.remove(&number);
        if self.by_id.get(&gone.identity.id) == Some(&number) {
            self.by_id.remove(&gone.identity.id);
        }
        gone.node
    }

    /// Forgets everything but which number was the last. The result is to be dropped after the table is unlocked.
    pub fn clear(&mut self) -> Nodes {
        let last = self.last;
        std::mem::replace(
            self,
            Nodes {
                last,
                ..Nodes::default()
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::descriptor::Descriptor;
    use super::super::node::status;
    use super::*;

    /// Nodes of so many files, which have a descriptor each. All are in the shared directory.
    fn nodes(files: u64) -> (Nodes, Vec<Identity>, tempfile::TempDir) {
        let scratch = tempfile::tempdir().unwrap();
        let (mut nodes, mut identities) = (Nodes::default(), Vec::new());
        for number in 2..2 + files {
            let file = std::fs::File::create(scratch.path().join(number.to_string())).unwrap();
            let stat = status(file.as_fd()).unwrap();
            identities.push(Identity::of(&stat));
            let counted = nodes.count(identities[identities.len() - 1], place(), 100);
            assert_eq!(counted, Ok(number));
            let node = Node::new(Descriptor::free(file.into()), &stat);
            nodes.install(number, Arc::new(node));
        }
        (nodes, identities, scratch)
    }

    fn place() -> Place {
        Place::new(ROOT, c"name")
    }

    /// Gives up one: which.
    fn give_up(nodes: &mut Nodes) -> Option<u64> {
        let (number, _node) = nodes.next_unused()?;
        nodes.give_up(number, None).map(|_| number)
    }

    #[test]
    fn what_was_used_stays_longer_than_what_was_only_found() {
        let (mut nodes, ..) = nodes(5);
        for number in [2, 4] {
            drop(nodes.get(number).unwrap());
        }
        // In use at this moment, and without a name.
        let _busy = nodes.get(3).unwrap();
        nodes.removed(5);
        let order: Vec<u64> = std::iter::from_fn(|| give_up(&mut nodes)).collect();
        assert_eq!(order, [6, 2, 4]);
        let there: Vec<bool> = (2..7).map(|number| nodes.has_descriptor(number)).collect();
        assert_eq!(there, [false, true, false, true, false]);
        // With a name again, it is like any other.
        nodes.moved(5, place());
        assert_eq!(give_up(&mut nodes), Some(5));
        assert_eq!(nodes.place(6).unwrap().0.parent, ROOT);
    }

    #[test]
    fn a_node_that_comes_into_use_or_is_forgotten_is_not_given_up() {
        let (mut nodes, identities, _scratch) = nodes(3);
        let (number, node) = nodes.next_unused().unwrap();
        drop(nodes.get(number).unwrap());
        assert!(nodes.give_up(number, None).is_none());
        drop(node);
        let (number, _node) = nodes.next_unused().unwrap();
        nodes.removed(number);
        assert!(nodes.give_up(number, None).is_none());
        let (number, _node) = nodes.next_unused().unwrap();
        assert!(nodes.forget(number, 1).is_some());
        assert!(nodes.give_up(number, None).is_none());
        assert_eq!(nodes.number(&identities[2]), None);
        assert_eq!(nodes.spare(), 1);
    }

    #[test]
    fn a_file_that_was_born_at_another_time_is_another_file_unless_it_is_open() {
        let (mut nodes, identities, _scratch) = nodes(2);
        let reborn = Identity {
            born: (1, 2),
            ..identities[0]
        };
        assert_eq!(nodes.number(&reborn), Some(2), "only its time has changed");
        assert_eq!(give_up(&mut nodes), Some(2));
        assert_eq!(nodes.number(&reborn), None);
        assert_eq!(nodes.number(&identities[0]), Some(2));
        // What it was given up as counts.
        assert_eq!(nodes.next_unused().unwrap().0, 3);
        let later = Identity {
            born: (3, 4),
            ..identities[1]
        };
        assert!(nodes.give_up(3, Some(later)).is_some());
        assert_eq!(nodes.number(&later), Some(3));
        // The new one takes the inode over.
        assert_eq!(nodes.count(reborn, place(), 100), Ok(4));
        nodes.forget(2, 1);
        assert_eq!(nodes.number(&reborn), Some(4));
    }

    #[test]
    fn a_guest_that_knows_too_much_learns_nothing_new() {
        let (mut nodes, identities, _scratch) = nodes(2);
        let other = Identity {
            id: identities[0].id.beside(1),
            ..identities[0]
        };
        assert_eq!(nodes.count(other, place(), 2), Err(Errno::NFILE));
        assert_eq!(nodes.count(identities[1], place(), 2), Ok(3));
        nodes.forget(2, 1);
        assert_eq!(nodes.count(other, place(), 2), Ok(4));
        assert_eq!(nodes.clear().len(), 2);
        assert_eq!((nodes.len(), nodes.spare()), (0, 0));
        assert_eq!(nodes.count(other, place(), 2), Ok(5), "numbers go on");
    }
}
