//! The walk along all hidden paths, and the table that it gives.
//!
//! There are thousands of paths, nearly all of which lead nowhere, and they are walked every second while a guest is busy. So as
//! little as possible is done twice. The paths are kept as a tree of names ([`Paths`]), where each way that some have in
//! common is one. What is found on the host is a tree of *places*: paths without links. The first is walked down in
//! the second: a home that does not exist is one question, whatever it might have held, and two homes that lead to the
//! same place are one place.
//!
//! Where many names are wanted, it is asked once what there is at all, by reading the directory, and then only for those. A
//! name that is not in the list is not there, if
//!
//! * the directory can be read, and is short;
//! * its file system is known to list all it has, which one that makes files up when they are asked for does not;
//! * no name in it can be the same as a wanted one in a directory that does not tell case: compared without case, and
//!   only if all are ASCII, since what is the same beyond that depends on the file system.
//!
//! If not, each name is asked for.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, fstatfs, openat, readlinkat, statx,
};

use super::node::{Id, WANTED};

/// So many links are followed in a path, as the kernel does (path_resolution(7)).
const LINKS_MAX: u32 = 40;
/// From so many wanted names on, a directory is read: that takes five system calls.
const MANY: usize = 8;
/// If a directory has more entries than this, to read it costs more than to ask for each name.
const ENTRIES_MAX: usize = 500;
/// Bytes of entries that are read at once: room for those with names of common length.
const BUFFER_LEN: usize = 16 << 10;
/// File systems that list all they have (statfs(2)): ext2 to ext4, XFS, Btrfs, tmpfs, overlayfs.
const LISTS_ALL: [u32; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630];

/// The paths that are hidden, by their names.
#[derive(Debug)]
pub(super) struct Paths(Vec<Wanted>);

/// A name of some paths.
#[derive(Debug)]
struct Wanted {
    name: Arc<CStr>,
    /// Whether it is the last of one of them.
    hidden: bool,
    /// The names that come next.
    below: Vec<Wanted>,
}

impl Paths {
    /// Takes absolute paths apart. One with a NUL in it is the path of nothing.
    pub fn of(paths: &[PathBuf]) -> Paths {
        let paths = paths.iter().map(|path| path.as_os_str().as_bytes());
        let paths = paths.filter(|path| !path.contains(&0));
        let mut split: Vec<Vec<&[u8]>> = paths.map(|path| names(path).collect()).collect();
        // Then those with the same beginning follow each other.
        split.sort_unstable();
        let mut tree = Vec::new();
        for names in split {
            let mut level = &mut tree;
            let mut names = names.into_iter().peekable();
            while let Some(name) = names.next() {
                let is_new = |last: &Wanted| last.name.to_bytes() != name;
                if level.last().is_none_or(is_new) {
                    level.push(Wanted {
                        name: CString::new(name).unwrap_or_default().into(),
                        hidden: false,
                        below: Vec::new(),
                    });
                }
                let Some(last) = level.last_mut() else { break };
                last.hidden |= names.peek().is_none();
                level = &mut last.below;
            }
        }
        Paths(tree)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The names of a path, `..` among them.
fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    let names = path.split(|byte| *byte == b'/');
    names.filter(|name| !name.is_empty() && *name != b".")
}

/// What the paths were found to be. Files are known in whatever mount.
#[derive(Debug)]
pub(super) struct Table {
    /// When the walk began.
    pub walked: Instant,
    /// By directory: names that are hidden or on the way.
    names: HashMap<Id, HashMap<Arc<CStr>, Name>>,
    /// Files and directories that are hidden.
    pub files: HashSet<Id>,
    /// Directories and links on the way.
    pub way: HashSet<Id>,
}

#[derive(Debug, Default)]
pub(super) struct Name {
    hidden: bool,
    /// What it leads to if it is on the way, by the directory in its mount: another mount of the directory may have something
    /// else mounted there.
    leads: Vec<(Id, Option<Id>)>,
}

impl Table {
    /// Walks along the paths. `root` is not hidden, even if it is on the list.
    pub fn walk(paths: &Paths, root: Id) -> Table {
        let mut walk = Walk {
            places: Vec::new(),
            table: Table {
                walked: Instant::now(),
                names: HashMap::new(),
                files: HashSet::new(),
                way: HashSet::new(),
            },
        };
        walk.places.extend(Place::at(c"/".into(), 0));
        if !walk.places.is_empty() {
            walk.descend(0, &paths.0, 0);
        }
        walk.table.files.remove(&root.in_any_mount());
        walk.table
    }

    pub fn name(&self, directory: Id, name: &CStr) -> Option<&Name> {
        self.names.get(&directory.in_any_mount())?.get(name)
    }

    pub fn hides(&self, directory: Id, name: &CStr) -> bool {
        self.name(directory, name).is_some_and(|name| name.hidden)
    }

    /// Whether a name on the way leads elsewhere than it did.
    pub fn is_outdated(&self, directory: Id, name: &CStr, found: Id) -> bool {
        self.name(directory, name).is_some_and(|name| {
            let mut leads = name.leads.iter();
            leads.any(|(from, to)| *from == directory && *to != Some(found))
        })
    }
}

/// What is at a path that has no links in it but perhaps the last name.
#[derive(Debug)]
struct Place {
    path: CString,
    /// The index of its directory.
    parent: usize,
    id: Id,
    kind: FileType,
    /// Of a link.
    target: Option<CString>,
    /// What has been asked for in it, by index.
    below: HashMap<Arc<CStr>, Option<usize>>,
}

impl Place {
    /// `None` also for what this process may not see; the guest sees it no better.
    fn at(path: CString, parent: usize) -> Option<Place> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(CWD, &path, flags, WANTED).ok()?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let target = match kind {
            FileType::Symlink => Some(readlinkat(CWD, &path, Vec::new()).ok()?),
            _ => None,
        };
        Some(Place {
            path,
            parent,
            id: Id::of(&stat),
            kind,
            target,
            below: HashMap::new(),
        })
    }

    fn is_special(&self) -> bool {
        use FileType::{Directory, RegularFile, Symlink};
        !matches!(self.kind, RegularFile | Directory | Symlink)
    }

    /// The path of a name in it.
    fn join(&self, name: &CStr) -> Option<CString> {
        let mut path = self.path.to_bytes().to_vec();
        if path != b"/" {
            path.push(b'/');
        }
        path.extend(name.to_bytes());
        CString::new(path).ok()
    }

    /// Notes of these names which are not there, if that can be known for certain.
    fn list(&mut self, wanted: &[Wanted]) {
        let unknown = |below: &Wanted| !self.below.contains_key(&below.name);
        if wanted.iter().filter(|below| unknown(below)).count() < MANY {
            return;
        }
        let Some(there) = list(&self.path) else {
            return;
        };
        for Wanted { name, .. } in wanted {
            if !there.contains(&name.to_bytes().to_ascii_lowercase()) {
                self.below.entry(Arc::clone(name)).or_insert(None);
            }
        }
    }
}

/// All names in a directory, in lower case. `None` if they cannot be had, or do not tell what is not there.
fn list(directory: &CStr) -> Option<HashSet<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(CWD, directory, flags, Mode::empty()).ok()?;
    let kind = fstatfs(&fd).ok()?.f_type;
    if !LISTS_ALL
        .iter()
        .any(|known| i128::from(*known) == i128::from(kind))
    {
        return None;
    }
    let mut buffer = Vec::with_capacity(BUFFER_LEN);
    let mut entries = RawDir::new(&fd, buffer.spare_capacity_mut());
    let mut names = HashSet::new();
    while let Some(entry) = entries.next() {
        let entry = entry.ok()?;
        let name = entry.file_name().to_bytes();
        if names.len() == ENTRIES_MAX || !name.is_ascii() {
            return None;
        }
        names.insert(name.to_ascii_lowercase());
    }
    Some(names)
}

/// A walk along all paths.
struct Walk {
    /// The first is `/`.
    places: Vec<Place>,
    table: Table,
}

impl Walk {
    /// Walks on along all names in one place, after so many links.
    fn descend(&mut self, at: usize, wanted: &[Wanted], links: u32) {
        if self.places[at].kind == FileType::Directory {
            self.places[at].list(wanted);
        }
        for name in wanted {
            self.follow(at, name, links);
        }
    }

    /// Puts a name, and what comes after it, and those of the links there, into the table.
    fn follow(&mut self, mut at: usize, wanted: &Wanted, mut links: u32) {
        // What is still to be walked, backwards.
        let mut rest = vec![Arc::clone(&wanted.name)];
        while let Some(name) = rest.pop() {
            // No links are left in the path of a place, so that this is what the kernel does.
            if &*name == c".." {
                at = self.places[at].parent;
                continue;
            }
            let found = self.look(at, &name);
            let is_last = rest.is_empty();
            // A history that is a link to /dev/null is not there, and /dev/null is.
            let is_nothing =
                links > 0 && found.is_some_and(|found| self.places[found].is_special());
            let hidden = is_last && wanted.hidden && !is_nothing;
            let on_the_way = !is_last || !wanted.below.is_empty();
            if hidden || on_the_way {
                self.note(at, name, found, hidden, on_the_way);
            }
            let Some(found) = found else { return };
            let Some(target) = &self.places[found].target else {
                at = found;
                continue;
            };
            links += 1;
            if links > LINKS_MAX {
                return;
            }
            let target = target.to_bytes();
            if target.starts_with(b"/") {
                at = 0;
            }
            let names = names(target)
                .rev()
                .filter_map(|name| CString::new(name).ok());
            rest.extend(names.map(Arc::from));
        }
        if !wanted.below.is_empty() {
            self.descend(at, &wanted.below, links);
        }
    }

    fn note(
        &mut self,
        at: usize,
        name: Arc<CStr>,
        found: Option<usize>,
        hidden: bool,
        on_the_way: bool,
    ) {
        let directory = self.places[at].id;
        let id = found.map(|found| self.places[found].id.in_any_mount());
        let names = self.table.names.entry(directory.in_any_mount());
        let name = names.or_default().entry(name).or_default();
        name.hidden |= hidden;
        if hidden {
            self.table.files.extend(id);
        }
        if on_the_way {
            if !name.leads.contains(&(directory, id)) {
                name.leads.push((directory, id));
            }
            self.table.way.extend(id);
        }
    }

    /// What a name is in a place: an index.
    fn look(&mut self, at: usize, name: &Arc<CStr>) -> Option<usize> {
        let place = &self.places[at];
        if let Some(known) = place.below.get(name) {
            return *known;
        }
        if place.kind != FileType::Directory {
            return None;
        }
        let found = place.join(name).and_then(|path| Place::at(path, at));
        let index = found.map(|found| {
            self.places.push(found);
            self.places.len() - 1
        });
        self.places[at].below.insert(Arc::clone(name), index);
        index
    }
}

#[cfg(test)]
pub(super) fn id(path: &std::path::Path) -> Id {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    Place::at(path, 0).unwrap().id
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    #[test]
    fn paths_that_have_their_way_in_common_are_one_way() {
        let paths = [
            "/a/b",
            "/c",
            "/a//./d/",
            "/a",
            "/a/b",
            "/a/b-",
            "/../x/../c",
            "/",
            "/n\0ul",
        ];
        let tree = Paths::of(&paths.map(PathBuf::from));
        fn flat(level: &[Wanted], prefix: &str, all: &mut Vec<(String, bool)>) {
            for wanted in level {
                let path = format!("{prefix}/{}", wanted.name.to_str().unwrap());
                all.push((path.clone(), wanted.hidden));
                flat(&wanted.below, &path, all);
            }
        }
        let mut all = Vec::new();
        flat(&tree.0, "", &mut all);
        let all: Vec<_> = all
            .iter()
            .map(|(path, hidden)| (&**path, *hidden))
            .collect();
        let expected = [
            ("/..", false),
            ("/../x", false),
            ("/../x/..", false),
            ("/../x/../c", true),
            ("/a", true),
            ("/a/b", true),
            ("/a/b-", true),
            ("/a/d", true),
            ("/c", true),
        ];
        assert_eq!(all, expected);
        assert!(Paths::of(&["/".into()]).is_empty());
    }

    /// Homes of which many names are wanted, where `.ssh` and `.config/gh` are links that have to be followed.
    #[test]
    fn many_names_in_one_directory_are_found_whatever_else_is_there() {
        type Crowd = fn(&Path);
        let crowds: [(&str, Crowd); 4] = [
            ("nothing", |_| {}),
            ("some", |home| fs::write(home.join("name3"), "").unwrap()),
            ("too many", |home| {
                for number in 0..ENTRIES_MAX {
                    fs::write(home.join(format!("file{number}")), "").unwrap();
                }
            }),
            ("not ASCII", |home| {
                fs::write(home.join(".\u{17f}sh"), "").unwrap()
            }),
        ];
        for (text, crowd) in crowds {
            let scratch = tempfile::tempdir().unwrap();
            let at = |name: &str| scratch.path().join(name);
            for directory in ["home/.config", "dots/ssh", "dots/gh"] {
                fs::create_dir_all(at(directory)).unwrap();
            }
            symlink("../dots/ssh", at("home/.ssh")).unwrap();
            symlink(at("dots/gh"), at("home/.config/gh")).unwrap();
            symlink("home", at("alias")).unwrap();
            crowd(&at("home"));
            let mut paths: Vec<PathBuf> = vec![at("home/.ssh"), at("alias/.config/gh")];
            for number in 0..2 * MANY {
                paths.push(at(&format!("home/name{number}")));
                paths.push(at(&format!("home/.config/name{number}")));
                paths.push(at(&format!("none/name{number}")));
            }
            let table = Table::walk(&Paths::of(&paths), id(scratch.path()));
            let [top, home, config, dots] = [".", "home", "home/.config", "dots"].map(at);
            let hidden = [
                (&home, c".ssh"),
                (&dots, c"ssh"),
                (&config, c"gh"),
                (&dots, c"gh"),
                (&home, c"name0"),
                (&home, c"name3"),
                (&config, c"name5"),
            ];
            for (directory, name) in hidden {
                assert!(table.hides(id(directory), name), "{text}: {name:?}");
            }
            for (directory, name) in [(&home, c".config"), (&top, c"alias"), (&top, c"none")] {
                let name = table.name(id(directory), name).unwrap();
                assert!(!name.hidden && name.leads.len() == 1, "{text}: {name:?}");
            }
            // One that comes to be there is seen to be new, and one that stays the same is not.
            let config = id(&config);
            assert!(!table.is_outdated(id(&home), c".config", config.in_any_mount()));
            assert!(table.is_outdated(id(&top), c"none", config.in_any_mount()));
            for file in ["dots/ssh", "dots/gh", "home/.ssh"] {
                assert!(
                    table.files.contains(&id(&at(file)).in_any_mount()),
                    "{text}: {file}"
                );
            }
            assert!(!table.files.contains(&id(&home).in_any_mount()));
            assert!(table.way.contains(&id(&home).in_any_mount()));
        }
    }

    #[test]
    fn a_list_is_taken_only_for_what_it_says() {
        let scratch = tempfile::tempdir().unwrap();
        let list_of = |path: &Path| list(&CString::new(path.as_os_str().as_bytes()).unwrap());
        fs::write(scratch.path().join(".SSH"), "").unwrap();
        symlink(scratch.path(), scratch.path().join("link")).unwrap();
        if let Some(names) = list_of(scratch.path()) {
            let expected = [&b"."[..], b"..", b".ssh", b"link"].map(<[u8]>::to_vec);
            assert_eq!(names, HashSet::from(expected));
        }
        assert_eq!(list_of(&scratch.path().join("link")), None);
        assert_eq!(list_of(&scratch.path().join("none")), None);
        assert_eq!(list_of(Path::new("/proc")), None, "not known to list all");
        // The long s, which some file systems take for an s.
        let odd = scratch.path().join(".\u{17f}sh");
        fs::write(&odd, "").unwrap();
        assert_eq!(list_of(scratch.path()), None);
        fs::remove_file(odd).unwrap();
        for number in 0..ENTRIES_MAX {
            fs::write(scratch.path().join(number.to_string()), "").unwrap();
        }
        assert_eq!(list_of(scratch.path()), None);
    }
}
