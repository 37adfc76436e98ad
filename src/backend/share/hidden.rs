//! What of a shared directory is not there for the guest.
//!
//! A guest of which the whole `/` is the root disk need not see the keys of the host's users. What is hidden is given by paths
//! of the host, and each is walked as the host's kernel would walk it, links and all. That gives a table, by which a
//! LOOKUP is decided (`walk`):
//!
//! * the last *name* of a path in its directory: hidden, whatever it stands for and whenever it was made. Editors
//!   replace a file by another, and `~/.ssh` may be made while the guest runs. Directories are known by device and
//!   inode, so that the name is hidden in every mount of the directory.
//! * the *file* itself, by device and inode: hidden under any name, such as a hard link or a bind mount.
//! * the names *on the way* there, with what they led to. One that leads elsewhere now, or that has appeared, makes the table
//!   out of date, and the paths are walked anew before the guest gets an answer. The guest may neither move nor
//!   remove them, since it would otherwise move a secret to where it is not hidden.
//!
//! The rest of what the host may change, such as a hard link to a file that was made after the last walk, is found within a
//! second, for which the guest may remember names anyway. Not hidden are copies, what a hidden directory holds
//! and another name outside leads to, and a file that the guest had opened before it was hidden.

use std::ffi::CStr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::node::Id;
use super::session::lock;
use super::walk::{Paths, Table};
use super::wire::VALID_SECONDS;

/// The paths are walked anew when the last time was this long ago.
const WALK_AGAIN: Duration = Duration::from_secs(VALID_SECONDS);

/// The paths that are hidden, and the table that they give.
#[derive(Debug)]
pub(super) struct Hidden {
    paths: Paths,
    /// The shared directory itself, which is there even if it is on the list: somebody has asked for it.
    root: Id,
    table: RwLock<Table>,
    /// Held while the paths are walked anew.
    walking: Mutex<()>,
}

impl Hidden {
    pub fn new(paths: &[PathBuf], root: Id) -> Hidden {
        let paths = Paths::of(paths);
        Hidden {
            table: RwLock::new(Table::walk(&paths, root)),
            paths,
            root,
            walking: Mutex::default(),
        }
    }

    /// Whether a name is hidden, whatever it stands for.
    pub fn has_name(&self, directory: Id, name: &CStr) -> bool {
        !self.paths.is_empty() && self.with(|table| table.hides(directory, name))
    }

    /// Whether a file is hidden, whatever its name.
    pub fn has_file(&self, file: Id) -> bool {
        self.holds(|table| table.files.contains(&file.in_any_mount()))
    }

    /// Whether an entry of a directory is hidden, as far as the directory can tell.
    pub fn has_entry(&self, directory: Id, name: &CStr, inode: u64) -> bool {
        self.has_name(directory, name) || self.has_file(directory.beside(inode))
    }

    /// Lets a file pass that was found by a name which is not hidden.
    ///
    /// # Errors
    /// ENOENT when the file is hidden, or the directory is, or the name has come to lead there.
    pub fn admit(&self, directory: Id, name: &CStr, found: Id) -> Result<(), Errno> {
        let found = found.in_any_mount();
        let hidden = self.holds(|table| {
            table.files.contains(&found)
                || table.files.contains(&directory.in_any_mount())
                || table.hides(directory, name)
                || table.is_outdated(directory, name, found)
        });
        if hidden { Err(Errno::NOENT) } else { Ok(()) }
    }

    /// That something may get this name.
    ///
    /// # Errors
    /// EACCES when it is hidden.
    pub fn may_make(&self, directory: Id, name: &CStr) -> Result<(), Errno> {
        match self.has_name(directory, name) {
            true => Err(Errno::ACCESS),
            false => Ok(()),
        }
    }

    /// That what has this name may lose it, or another file may get it. `found` is what has it, if anything.
    ///
    /// # Errors
    /// EACCES when it is hidden, or on the way to what is hidden.
    pub fn may_move(&self, directory: Id, name: &CStr, found: Option<Id>) -> Result<(), Errno> {
        self.may_make(directory, name)?;
        let Some(found) = found.map(Id::in_any_mount) else {
            return Ok(());
        };
        let refused = self.holds(|table| {
            table.files.contains(&found)
                || table.way.contains(&found)
                || table.name(directory, name).is_some()
        });
        if refused { Err(Errno::ACCESS) } else { Ok(()) }
    }

    fn with<T>(&self, ask: impl Fn(&Table) -> T) -> T {
        ask(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a question to the table has `true` for its answer, which is given only after another walk: the inode may
    /// belong to another file by now, or the name may lead elsewhere.
    fn holds(&self, ask: impl Fn(&Table) -> bool) -> bool {
        if self.paths.is_empty() {
            return false;
        }
        let now = Instant::now();
        let walked = self.with(|table| table.walked);
        // One thread does it. The others go on with what is known.
        if now.saturating_duration_since(walked) >= WALK_AGAIN
            && let Ok(_walking) = self.walking.try_lock()
        {
            self.walk();
        }
        if !self.with(&ask) {
            return false;
        }
        let walking = lock(&self.walking);
        if self.with(|table| table.walked) < now {
            self.walk();
        }
        drop(walking);
        self.with(&ask)
    }

    /// Makes the table anew. `walking` is held.
    fn walk(&self) {
        let table = Table::walk(&self.paths, self.root);
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::walk::id;
    use super::*;

    #[test]
    fn the_paths_are_walked_again_after_a_while_even_if_nothing_looks_wrong() {
        let scratch = tempfile::tempdir().unwrap();
        let [secret, link] = ["secret", "link"].map(|name| scratch.path().join(name));
        let hidden = Hidden::new(std::slice::from_ref(&secret), id(scratch.path()));
        std::fs::write(&secret, "").unwrap();
        std::fs::hard_link(&secret, &link).unwrap();
        hidden.table.write().unwrap().walked -= WALK_AGAIN;
        let found = hidden.admit(id(scratch.path()), c"link", id(&link));
        assert_eq!(found, Err(Errno::NOENT));
        assert!(hidden.with(|table| table.walked.elapsed() < WALK_AGAIN));
    }

    #[test]
    fn links_that_go_round_and_histories_that_are_nowhere_end() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        for (target, link) in [("b", "a"), ("a/x", "b"), ("/dev/null", "c"), ("/", "d")] {
            std::os::unix::fs::symlink(target, at(link)).unwrap();
        }
        let paths = ["a", "c", "d", "e/../f", "a/../../.."].map(at);
        let root = id(scratch.path());
        let hidden = Hidden::new(&paths, root);
        for name in [c"a", c"c", c"d"] {
            assert!(hidden.has_name(root, name), "{name:?}");
        }
        assert!(!hidden.has_file(id(Path::new("/dev/null"))));
        assert!(!hidden.has_file(id(Path::new("/"))));
        assert!(!hidden.has_name(id(Path::new("/dev")), c"null"));
    }
}
