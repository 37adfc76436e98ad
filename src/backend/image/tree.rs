//! A root file system in memory: directories, owners, modes and links, with file contents left where they are.
//!
//! An unprivileged user cannot give files to other owners or make device nodes, so what a tar says cannot be unpacked
//! to the host. It goes into this model instead, and from here into a file system image. That also makes hostile
//! archives harmless: every path is resolved *inside the model*, the way a container runtime resolves it under its root
//! (symbolic links are followed, `..` stops at the root), and the host's file system is never asked.
//!
//! Layers of an image come one above the other. Each name remembers which layer it was last written by, because a
//! *whiteout* (OCI image specification, "Whiteouts") hides what lower layers have, never what its own layer brings.

use std::collections::BTreeMap;

use super::contents::Contents;

/// Names in all directories of a tree; several times what the largest distribution has.
const NAMES_MAX: usize = 4 << 20;
/// Directories within each other.
const DEPTH_MAX: usize = 2048;
/// Bytes of a path, as Linux has it (`PATH_MAX`).
const PATH_MAX: usize = 4096;
/// Bytes of a name (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// Symbolic links followed on the way to one file.
const LINKS_FOLLOWED_MAX: usize = 255;
/// Names of one file, by ext4's limit.
const HARD_LINKS_MAX: u32 = 65_000;

/// Why something has no place in the tree: the end of a sentence that begins with its path.
pub(super) type Refused = String;

/// A file, directory, link or node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(usize);

/// The root directory.
pub(super) const ROOT: Id = Id(0);

/// Whose a file is, who may use it, and when it was last written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    /// Permissions with setuid, setgid and sticky: 0 to 0o7777.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Attributes {
    /// Of root, written in 1970.
    pub fn of_root(mode: u16) -> Attributes {
        Attributes {
            mode,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: BTreeMap::new(),
        }
    }
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory(BTreeMap<Box<[u8]>, Slot>),
    File(Contents),
    Symlink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

impl Kind {
    pub fn directory() -> Kind {
        Kind::Directory(BTreeMap::new())
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub attributes: Attributes,
    pub kind: Kind,
    /// Names that lead to it. Without any, it is no longer there.
    links: u32,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub node: Id,
    /// The layer that wrote it last.
    layer: u32,
}

#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    names: usize,
    /// Bytes that the contents of all files take.
    bytes: u64,
}

impl Tree {
    /// An empty root.
    pub fn new() -> Tree {
        Tree {
            nodes: vec![Node {
                attributes: Attributes::of_root(0o755),
                kind: Kind::directory(),
                links: 1,
            }],
            layer: 0,
            names: 0,
            bytes: 0,
        }
    }

    /// What follows is of another layer, above what is there.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id.0]
    }

    /// The names in a directory; nothing for all else.
    pub fn names(&self, id: Id) -> impl Iterator<Item = (&[u8], Id)> {
        let names = match &self.node(id).kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        };
        let names = names.into_iter().flatten();
        names.map(|(name, slot)| (&name[..], slot.node))
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.names
    }

    /// Bytes that the contents of all files take; holes take none.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Puts something at `path`. A directory that meets a directory gives it its attributes; all else replaces what was
    /// there.
    pub fn put(&mut self, path: &[u8], attributes: Attributes, kind: Kind) -> Result<(), Refused> {
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return self.set_root(attributes, &kind);
        };
        let directory = self.resolve(parents)?;
        self.put_in(directory, name, attributes, kind).map(|_| ())
    }

    fn set_root(&mut self, attributes: Attributes, kind: &Kind) -> Result<(), Refused> {
        if !matches!(kind, Kind::Directory(_)) {
            return Err("is the root, which must be a directory".to_owned());
        }
        self.nodes[ROOT.0].attributes = attributes;
        Ok(())
    }

    /// The same for a name in a directory that is known.
    pub fn put_in(
        &mut self,
        directory: Id,
        name: &[u8],
        attributes: Attributes,
        kind: Kind,
    ) -> Result<Id, Refused> {
        if let (Kind::Directory(_), Some(there)) = (&kind, self.child(directory, name))
            && let Kind::Directory(_) = self.node(there).kind
        {
            self.nodes[there.0].attributes = attributes;
            self.stamp(directory, name);
            return Ok(there);
        }
        if self.nodes.len() >= NAMES_MAX {
            return Err(format!("is one of more than {NAMES_MAX} files"));
        }
        self.remove(directory, name);
        let id = Id(self.nodes.len());
        if let Kind::File(contents) = &kind {
            self.bytes = self.bytes.saturating_add(contents.stored());
        }
        self.nodes.push(Node {
            attributes,
            kind,
            links: 1,
        });
        self.insert(directory, name, id)?;
        Ok(id)
    }

    /// Makes `path` another name of what is at `target`.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Refused> {
        let target_text = String::from_utf8_lossy(target).into_owned();
        let missing = || format!("is a hard link to `{target_text}`, which is not there");
        let node = self.find_link(target)?.ok_or_else(missing)?;
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err("is the root, which must be a directory".to_owned());
        };
        let directory = self.resolve(parents)?;
        self.link_in(directory, name, node)
    }

    /// The same for a name in a directory that is known.
    pub fn link_in(&mut self, directory: Id, name: &[u8], node: Id) -> Result<(), Refused> {
        if self.child(directory, name) == Some(node) {
            self.stamp(directory, name);
            return Ok(());
        }
        if matches!(self.node(node).kind, Kind::Directory(_)) {
            return Err("is a hard link to a directory".to_owned());
        }
        if self.node(node).links >= HARD_LINKS_MAX {
            return Err(format!("is one of more than {HARD_LINKS_MAX} hard links"));
        }
        // First, in case the file lies in a directory that this name replaces.
        self.nodes[node.0].links += 1;
        self.remove(directory, name);
        self.insert(directory, name, node)
    }

    /// Hides what lower layers have at `path`.
    pub fn hide(&mut self, path: &[u8]) -> Result<(), Refused> {
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Ok(());
        };
        if let Some(directory) = self.lookup(parents)? {
            self.hide_in(directory, name);
        }
        Ok(())
    }

    /// Hides all that lower layers have in the directory `path`.
    pub fn hide_all(&mut self, path: &[u8]) -> Result<(), Refused> {
        if let Some(directory) = self.lookup(&parts(path)?)? {
            let names: Vec<Box<[u8]>> =
                self.names(directory).map(|(name, _)| name.into()).collect();
            for name in names {
                self.hide_in(directory, &name);
            }
        }
        Ok(())
    }

    /// Hides what lower layers have under one name, and keeps what the current layer has below it.
    fn hide_in(&mut self, directory: Id, name: &[u8]) {
        // A directory comes before what it holds, so from the end, each is seen when the rest has gone.
        let mut order: Vec<(Id, Box<[u8]>)> = vec![(directory, name.into())];
        let mut next = 0;
        while let Some((directory, name)) = order.get(next) {
            if let Some(child) = self.child(*directory, name) {
                order.extend(self.names(child).map(|(name, _)| (child, name.into())));
            }
            next += 1;
        }
        for (directory, name) in order.into_iter().rev() {
            let Some(slot) = self.slot(directory, &name) else {
                continue;
            };
            let empty = self.names(slot.node).next().is_none();
            if slot.layer < self.layer && empty {
                self.remove(directory, &name);
            }
        }
    }

    /// What is at `path`, with all symbolic links followed.
    pub fn find(&self, path: &[u8]) -> Result<Option<Id>, Refused> {
        self.walk(&parts(path)?).map(|walk| walk.found())
    }

    /// What is at `path`, which may itself be a symbolic link.
    fn find_link(&self, path: &[u8]) -> Result<Option<Id>, Refused> {
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Ok(Some(ROOT));
        };
        let directory = self.lookup(parents)?;
        Ok(directory.and_then(|directory| self.child(directory, name)))
    }

    fn lookup(&self, parts: &[&[u8]]) -> Result<Option<Id>, Refused> {
        let found = self.walk(parts)?.found();
        Ok(found.filter(|id| matches!(self.node(*id).kind, Kind::Directory(_))))
    }

    /// The directory that `parts` lead to. What is missing is made, as a directory of root.
    fn resolve(&mut self, parts: &[&[u8]]) -> Result<Id, Refused> {
        let mut walk = self.walk(parts)?;
        while let Some(name) = walk.missing.pop() {
            match &name[..] {
                b"." => {}
                b".." if walk.path.len() > 1 => {
                    walk.path.pop();
                }
                b".." => {}
                name => {
                    check_name(name)?;
                    let made = match self.child(walk.end(), name) {
                        Some(there) => there,
                        None => {
                            let attributes = Attributes::of_root(0o755);
                            self.put_in(walk.end(), name, attributes, Kind::directory())?
                        }
                    };
                    walk.path.push(made);
                }
            }
            check_depth(walk.path.len())?;
        }
        match self.node(walk.end()).kind {
            Kind::Directory(_) => Ok(walk.end()),
            _ => Err("lies in something that is not a directory".to_owned()),
        }
    }

    /// Follows `parts` from the root as far as they lead.
    fn walk(&self, parts: &[&[u8]]) -> Result<Walk, Refused> {
        let mut walk = Walk {
            path: vec![ROOT],
            missing: parts.iter().rev().map(|part| (*part).into()).collect(),
        };
        let mut followed = 0;
        while let Some(name) = walk.missing.last() {
            if &name[..] == b".." {
                if walk.path.len() > 1 {
                    walk.path.pop();
                }
                walk.missing.pop();
                continue;
            }
            if !matches!(self.node(walk.end()).kind, Kind::Directory(_)) {
                return Err("lies in something that is not a directory".to_owned());
            }
            let Some(child) = self.child(walk.end(), name) else {
                break;
            };
            walk.missing.pop();
            if let Kind::Symlink(target) = &self.node(child).kind {
                followed += 1;
                if followed > LINKS_FOLLOWED_MAX {
                    return Err("lies behind too many symbolic links".to_owned());
                }
                if target.first() == Some(&b'/') {
                    walk.path.truncate(1);
                }
                let parts = target.split(|byte| *byte == b'/').rev();
                let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                walk.missing.extend(parts.map(Into::into));
            } else {
                walk.path.push(child);
            }
            check_depth(walk.path.len())?;
        }
        Ok(walk)
    }

    fn slot(&self, directory: Id, name: &[u8]) -> Option<Slot> {
        match &self.node(directory).kind {
            Kind::Directory(names) => names.get(name).copied(),
            _ => None,
        }
    }

    fn child(&self, directory: Id, name: &[u8]) -> Option<Id> {
        self.slot(directory, name).map(|slot| slot.node)
    }

    fn insert(&mut self, directory: Id, name: &[u8], node: Id) -> Result<(), Refused> {
        check_name(name)?;
        if self.names >= NAMES_MAX {
            return Err(format!("is one of more than {NAMES_MAX} names"));
        }
        let layer = self.layer;
        if let Kind::Directory(names) = &mut self.nodes[directory.0].kind {
            names.insert(name.into(), Slot { node, layer });
            self.names += 1;
        }
        Ok(())
    }

    /// Remembers that the current layer wrote this name.
    fn stamp(&mut self, directory: Id, name: &[u8]) {
        let layer = self.layer;
        if let Kind::Directory(names) = &mut self.nodes[directory.0].kind
            && let Some(slot) = names.get_mut(name)
        {
            slot.layer = layer;
        }
    }

    /// Takes a name away, and all that can no longer be reached without it.
    fn remove(&mut self, directory: Id, name: &[u8]) {
        let Kind::Directory(names) = &mut self.nodes[directory.0].kind else {
            return;
        };
        let mut gone: Vec<Id> = names.remove(name).iter().map(|slot| slot.node).collect();
        while let Some(id) = gone.pop() {
            self.names -= 1;
            let node = &mut self.nodes[id.0];
            node.links -= 1;
            if node.links > 0 {
                continue;
            }
            match &mut node.kind {
                Kind::Directory(names) => {
                    gone.extend(std::mem::take(names).values().map(|slot| slot.node));
                }
                Kind::File(contents) => self.bytes = self.bytes.saturating_sub(contents.stored()),
                _ => {}
            }
        }
    }
}

/// How far a path leads.
struct Walk {
    /// The directories from the root on, and what was reached last. Never empty.
    path: Vec<Id>,
    /// What does not exist, the next name last.
    missing: Vec<Box<[u8]>>,
}

impl Walk {
    fn end(&self) -> Id {
        self.path.last().copied().unwrap_or(ROOT)
    }

    fn found(&self) -> Option<Id> {
        self.missing.is_empty().then(|| self.end())
    }
}

fn check_depth(depth: usize) -> Result<(), Refused> {
    if depth > DEPTH_MAX {
        return Err(format!("lies more than {DEPTH_MAX} directories deep"));
    }
    Ok(())
}

fn check_name(name: &[u8]) -> Result<(), Refused> {
    if name.is_empty() || name.len() > NAME_MAX || name.contains(&0) {
        return Err(format!("has a name that is not 1 to {NAME_MAX} bytes"));
    }
    Ok(())
}

/// The names of a path: without empty ones and `.`; a `..` takes away the name before it, and stops at the root.
fn parts(path: &[u8]) -> Result<Vec<&[u8]>, Refused> {
    if path.len() > PATH_MAX {
        return Err(format!("has a path of more than {PATH_MAX} bytes"));
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => {
                check_name(part)?;
                parts.push(part);
            }
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tree: &mut Tree, path: &str) -> Result<(), Refused> {
        let kind = Kind::File(Contents::from(path.as_bytes().to_vec()));
        tree.put(path.as_bytes(), Attributes::of_root(0o644), kind)
    }

    fn directory(tree: &mut Tree, path: &str, mode: u16) -> Result<(), Refused> {
        tree.put(
            path.as_bytes(),
            Attributes::of_root(mode),
            Kind::directory(),
        )
    }

    fn symlink(tree: &mut Tree, path: &str, target: &str) {
        let kind = Kind::Symlink(target.into());
        tree.put(path.as_bytes(), Attributes::of_root(0o777), kind)
            .unwrap();
    }

    /// All paths, directories with a slash at the end.
    fn paths(tree: &Tree) -> Vec<String> {
        let mut all = Vec::new();
        let mut open = vec![(String::new(), ROOT)];
        while let Some((path, id)) = open.pop() {
            for (name, child) in tree.names(id) {
                let path = format!("{path}{}", String::from_utf8_lossy(name));
                if let Kind::Directory(_) = tree.node(child).kind {
                    all.push(format!("{path}/"));
                    open.push((format!("{path}/"), child));
                } else {
                    all.push(path);
                }
            }
        }
        all.sort();
        all
    }

    #[test]
    fn a_path_is_resolved_inside_the_tree_wherever_it_points() {
        for (path, where_it_lands) in [
            ("etc/passwd", "etc/passwd"),
            ("/etc/passwd", "etc/passwd"),
            ("./etc//passwd", "etc/passwd"),
            ("../../etc/passwd", "etc/passwd"),
            ("a/../../b", "b"),
            ("up/x", "x"),
            ("out/x", "x"),
            ("rel/x", "real/x"),
            ("chain/x", "real/x"),
            ("dangling/x", "not/there/x"),
            ("climbing/x", "up-there/x"),
        ] {
            let mut tree = Tree::new();
            symlink(&mut tree, "up", "../../../..");
            symlink(&mut tree, "out", "/");
            directory(&mut tree, "real", 0o755).unwrap();
            symlink(&mut tree, "rel", "./real");
            symlink(&mut tree, "chain", "/rel");
            symlink(&mut tree, "dangling", "/not/there");
            symlink(&mut tree, "climbing", "not-there/../../up-there");
            file(&mut tree, path).unwrap();
            assert!(
                paths(&tree).contains(&where_it_lands.to_owned()),
                "{path}: {:?}",
                paths(&tree)
            );
        }
    }

    #[test]
    fn a_path_that_leads_nowhere_is_refused() {
        let mut tree = Tree::new();
        symlink(&mut tree, "loop", "loop");
        file(&mut tree, "file").unwrap();
        for (path, words) in [
            ("loop/x", "too many symbolic links"),
            ("file/x", "not a directory"),
            (&"n".repeat(256), "1 to 255 bytes"),
            (&"n/".repeat(2100), "bytes"),
            ("", "root"),
            ("..", "root"),
        ] {
            let why = file(&mut tree, path).unwrap_err();
            assert!(why.contains(words), "{path}: {why}");
        }
        // A directory may not be deepened by way of symbolic links either.
        let deep = "d/".repeat(2000);
        directory(&mut tree, &deep, 0o755).unwrap();
        symlink(&mut tree, "deep", &deep);
        assert!(
            file(&mut tree, &format!("deep/{deep}x"))
                .unwrap_err()
                .contains("deep")
        );
    }

    #[test]
    fn the_last_of_two_entries_wins_and_directories_are_merged() {
        let mut tree = Tree::new();
        file(&mut tree, "d/a").unwrap();
        directory(&mut tree, "d", 0o700).unwrap();
        assert_eq!(paths(&tree), ["d/", "d/a"]);
        let d = tree.find(b"d").unwrap().unwrap();
        assert_eq!(tree.node(d).attributes.mode, 0o700);
        file(&mut tree, "d").unwrap();
        assert_eq!(
            (paths(&tree), tree.len(), tree.bytes()),
            (vec!["d".to_owned()], 1, 1)
        );
        symlink(&mut tree, "s", "d");
        directory(&mut tree, "s", 0o755).unwrap();
        assert_eq!(paths(&tree), ["d", "s/"]);
    }

    #[test]
    fn a_hard_link_outlives_the_name_it_was_made_from() {
        let mut tree = Tree::new();
        file(&mut tree, "dir/file").unwrap();
        tree.link(b"other", b"/dir/file").unwrap();
        assert_eq!(
            (tree.len(), tree.bytes()),
            (3, 8),
            "the contents are there once"
        );
        // Replacing the directory that the file came from.
        tree.link(b"dir", b"dir/file").unwrap();
        assert_eq!(paths(&tree), ["dir", "other"]);
        assert_eq!(tree.find(b"dir").unwrap(), tree.find(b"other").unwrap());
        tree.link(b"other", b"other").unwrap();
        assert_eq!((tree.len(), tree.bytes()), (2, 8));
        for (target, words) in [
            ("gone", "not there"),
            ("", "directory"),
            ("other/x", "not there"),
        ] {
            let why = tree.link(b"new", target.as_bytes()).unwrap_err();
            assert!(why.contains(words), "{target}: {why}");
        }
    }

    #[test]
    fn a_whiteout_hides_only_what_lower_layers_have() {
        let mut tree = Tree::new();
        for path in ["d/old", "d/sub/old", "d/both", "e/old", "f"] {
            file(&mut tree, path).unwrap();
        }
        tree.begin_layer();
        file(&mut tree, "d/sub/new").unwrap();
        file(&mut tree, "d/both").unwrap();
        tree.hide_all(b"d").unwrap();
        tree.hide(b"e").unwrap();
        tree.hide(b"missing/name").unwrap();
        tree.hide(b"").unwrap();
        assert_eq!(paths(&tree), ["d/", "d/both", "d/sub/", "d/sub/new", "f"]);
        tree.begin_layer();
        directory(&mut tree, "d", 0o711).unwrap();
        tree.hide(b"d").unwrap();
        assert_eq!(
            paths(&tree),
            ["d/", "f"],
            "an empty directory of this layer stays"
        );
        tree.hide_all(b"/").unwrap();
        assert_eq!((paths(&tree), tree.len()), (vec!["d/".to_owned()], 1));
    }
}
