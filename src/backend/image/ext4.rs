//! A tree as an ext4 file system, written by the `mkext4` crate.
//!
//! The crate takes the names, owners and sizes of all files first, then knows every block of the file system (ext4 has
//! checksums of metadata only, so nothing depends on what is in the files), and at last is given their contents in
//! order. The same tree always gives the same bytes: the file system's UUID is a digest of its names and attributes,
//! its age is that of its newest file.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use mkext4::{FsBuilder, InodeCount, InodeHandle, Meta, RegionSink, SparseSeg, SpecialKind};
use sha2::{Digest as _, Sha256};

use super::contents::Contents;
use super::names::{Names, Renames};
use super::tree::{Attributes, Id, Kind, ROOT, Tree};
use super::{Error, Progress, Result, Watch};

/// Bytes in a block.
const BLOCK: u64 = 4096;
/// Bytes of one inode.
const INODE: u64 = 256;
/// Bytes for each inode, unless there are many small files: what mke2fs takes.
const BYTES_PER_INODE: u64 = 16 << 10;
/// What is added to what a tree needs, if nobody says how large the file system should be.
const SPARE: u64 = 64 << 20;
/// The largest file system with 32-bit block numbers.
const SIZE_MAX: u64 = (1 << 44) - BLOCK;
/// Bytes of extended attributes that one file can have: a block, less its header and end.
const XATTRS_MAX: usize = 4096 - 36;
/// Contents that have this many zeros in a row are left as a hole of the host's file.
const ZEROS: usize = BLOCK as usize;

/// How the file system is made.
pub(super) struct Options<'a> {
    /// What the tree came from, for errors.
    pub source: &'a Path,
    /// The image, for errors.
    pub target: &'a Path,
    /// Bytes.
    pub size: Option<u64>,
    pub label: Option<&'a str>,
}

/// Writes the file system. The result is its size in bytes.
///
/// # Errors
/// When the tree does not fit, a file cannot be read, or the image cannot be written.
pub(super) fn write(
    tree: &Tree,
    options: &Options<'_>,
    file: &File,
    watch: &mut Watch<'_>,
) -> Result<u64> {
    let need = Need::of(tree);
    let size = match options.size {
        Some(size) => size / BLOCK * BLOCK,
        None => need.enough(),
    };
    let too_small = || Error::TooSmall {
        path: options.source.to_owned(),
        size,
        enough: need.enough(),
    };
    if size < need.blocks * BLOCK {
        return Err(too_small());
    }
    let unfit = |error: mkext4::Error| Error::Ext4 {
        path: options.source.to_owned(),
        why: error.to_string(),
    };
    if size > SIZE_MAX {
        let why = format!("it would have {size} bytes, more than 16 TiB");
        let path = options.source.to_owned();
        return Err(Error::Ext4 { path, why });
    }
    let (uuid, epoch) = identity(tree);
    let mut settings = mkext4::Options::new(size, uuid, epoch);
    settings.label = options.label.map(str::to_owned);
    settings.reserved_percent = 0;
    settings.inodes = InodeCount::Exact(need.inodes(size));
    let mut declared = Declared {
        builder: FsBuilder::new(settings).map_err(unfit)?,
        source: options.source,
        files: Vec::new(),
        renames: Renames::default(),
    };
    declared.all(tree)?;
    let Declared {
        builder,
        files,
        renames,
        ..
    } = declared;
    // All else that can be wrong has been looked at, so what is left is that it does not fit.
    let layout = builder.seal().map_err(|error| match error {
        mkext4::Error::Invalid(_) => too_small(),
        error => unfit(error),
    })?;
    let writing = |source: io::Error| Error::Write {
        path: options.target.to_owned(),
        source,
    };
    let failed = |error: mkext4::Error| match error {
        mkext4::Error::Io(source) => writing(source),
        error => unfit(error),
    };
    file.set_len(size).map_err(writing)?;
    let mut writer = layout.writer(Image { file, size }).map_err(failed)?;
    let total = files.iter().map(|(_, contents)| contents.stored()).sum();
    let mut done = 0;
    for (handle, contents) in files {
        let mut source = Watched {
            reader: contents.open()?,
            wrong: None,
            done: &mut done,
            total,
            watch,
        };
        let filled = writer.fill(handle, &mut source);
        match (source.wrong, filled) {
            (_, Ok(())) => {}
            (None, Err(error)) => return Err(failed(error)),
            (Some(Wrong::Interrupted), _) => return Err(Error::Interrupted),
            (Some(wrong), _) => {
                let path = contents.path().unwrap_or(options.source).to_owned();
                return Err(match wrong {
                    Wrong::Read(source) => Error::Read { path, source },
                    _ => Error::Changed { path },
                });
            }
        }
    }
    writer.finish().map_err(failed)?;
    renames.apply(file).map_err(writing)?;
    Ok(size)
}

/// What a tree takes up.
#[derive(Debug, Default)]
struct Need {
    /// Blocks of contents, directories and the rest, without the inodes.
    blocks: u64,
    nodes: u64,
}

impl Need {
    fn of(tree: &Tree) -> Need {
        let mut need = Need::default();
        each(tree, |id, first| {
            if !first {
                return;
            }
            need.nodes += 1;
            let node = tree.node(id);
            if !node.attributes.xattrs.is_empty() {
                need.blocks += 1;
            }
            need.blocks += match &node.kind {
                Kind::Directory(names) => {
                    // A record has 8 bytes before the name, and blocks of an index are three quarters full.
                    let bytes: u64 = names.keys().map(|name| name.len() as u64 + 12).sum();
                    1 + (bytes + bytes / 3).div_ceil(BLOCK)
                }
                Kind::File(contents) => {
                    let parts = contents.pieces().len() as u64;
                    contents.stored().div_ceil(BLOCK) + parts / 300
                }
                Kind::Symlink(target) if target.len() > 59 => 1,
                _ => 0,
            };
        });
        need
    }

    /// A size that leaves room for more.
    fn enough(&self) -> u64 {
        let bytes = self.blocks * BLOCK + (self.nodes + self.nodes / 4) * INODE;
        (bytes + bytes / 4 + SPARE).next_multiple_of(1 << 20)
    }

    fn inodes(&self, size: u64) -> u32 {
        let wanted = (size / BYTES_PER_INODE).max(self.nodes + self.nodes / 4 + 1024);
        u32::try_from(wanted).unwrap_or(u32::MAX)
    }
}

/// Calls `visit` for every name in the tree, and whether it is the first of that file; parents before children.
fn each(tree: &Tree, mut visit: impl FnMut(Id, bool)) {
    let mut seen = HashSet::new();
    let mut open = vec![ROOT];
    while let Some(id) = open.pop() {
        let first = seen.insert(id);
        visit(id, first);
        if first {
            open.extend(tree.names(id).map(|(_, child)| child));
        }
    }
}

/// A UUID that follows from the tree's names and attributes, and the time of its newest file in seconds since 1970.
fn identity(tree: &Tree) -> ([u8; 16], i64) {
    let mut hash = Sha256::new();
    let mut newest = 0;
    each(tree, |id, _| {
        let node = tree.node(id);
        let Attributes {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = &node.attributes;
        newest = newest.max(mtime.0);
        let mut text = format!("{mode} {uid} {gid} {mtime:?} {xattrs:?} ").into_bytes();
        match &node.kind {
            Kind::Directory(names) => {
                for name in names.keys() {
                    text.extend(&name[..]);
                    text.push(b'/');
                }
            }
            Kind::File(contents) => text.extend(contents.size().to_le_bytes()),
            Kind::Symlink(target) => text.extend(target),
            other => text.extend(format!("{other:?}").bytes()),
        }
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(&text);
    });
    let digest = hash.finalize();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    // Version 8, the one for digests of one's own, and the variant of RFC 9562 §5.8.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    // A file system that was made in the future is taken for damaged.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs() as i64);
    (uuid, newest.min(now).clamp(0, i64::from(u32::MAX)))
}

/// A tree as it is told to the crate.
struct Declared<'a> {
    builder: FsBuilder,
    source: &'a Path,
    /// In the order of their contents on the disk.
    files: Vec<(InodeHandle, &'a Contents)>,
    renames: Renames,
}

impl<'a> Declared<'a> {
    fn all(&mut self, tree: &'a Tree) -> Result<()> {
        let mut handles: HashMap<Id, InodeHandle> = HashMap::new();
        let root = &tree.node(ROOT).attributes;
        let refused = |source: &Path, error: mkext4::Error| Error::Ext4 {
            path: source.to_owned(),
            why: error.to_string(),
        };
        let set = self.builder.set_meta(mkext4::ROOT, meta(root));
        set.map_err(|error| refused(self.source, error))?;
        self.xattrs(mkext4::ROOT, root, b"/")?;
        // A directory, its handle, and its path as it is told to the crate.
        let mut open = vec![(ROOT, mkext4::ROOT, String::new())];
        while let Some((directory, parent, path)) = open.pop() {
            let mut names = Names::of(&path, tree.names(directory).map(|(name, _)| name));
            for (name, id) in tree.names(directory) {
                if directory == ROOT && name == b"lost+found" {
                    if tree.names(id).next().is_some() {
                        log::warn!("what is in /lost+found is left out: ext4 makes its own");
                    }
                    continue;
                }
                let node = tree.node(id);
                let entry = |why: String| Error::Entry {
                    path: self.source.to_owned(),
                    entry: name.escape_ascii().to_string(),
                    why,
                };
                let declared = names
                    .declare(name)
                    .ok_or_else(|| entry("has a name that cannot be written to ext4".to_owned()))?;
                if let Some(handle) = handles.get(&id) {
                    self.builder
                        .hardlink(parent, &declared, *handle)
                        .map_err(|error| refused(self.source, error))?;
                    continue;
                }
                let meta = meta(&node.attributes);
                let builder = &mut self.builder;
                let mut special = |kind| builder.mknod(parent, &declared, meta, kind);
                let made = match &node.kind {
                    Kind::CharDevice { major, minor } => special(SpecialKind::Char {
                        major: *major,
                        minor: *minor,
                    }),
                    Kind::BlockDevice { major, minor } => special(SpecialKind::Block {
                        major: *major,
                        minor: *minor,
                    }),
                    Kind::Fifo => special(SpecialKind::Fifo),
                    Kind::Socket => special(SpecialKind::Socket),
                    Kind::Directory(_) => builder.mkdir(parent, &declared, meta),
                    Kind::Symlink(target) => {
                        let target = names.target(&declared, target);
                        builder.symlink(parent, &declared, &target, meta)
                    }
                    Kind::File(contents) if contents.is_sparse() => {
                        let segments = segments(contents);
                        builder.file_sparse(parent, &declared, meta, &segments)
                    }
                    Kind::File(contents) => builder.file(parent, &declared, meta, contents.size()),
                };
                let handle = made.map_err(|error| refused(self.source, error))?;
                self.xattrs(handle, &node.attributes, name)?;
                match &node.kind {
                    Kind::Directory(_) => open.push((id, handle, format!("{path}/{declared}"))),
                    Kind::File(contents) if contents.stored() > 0 => {
                        self.files.push((handle, contents));
                    }
                    _ => {}
                }
                handles.insert(id, handle);
            }
            self.renames.add(names);
        }
        Ok(())
    }

    fn xattrs(&mut self, handle: InodeHandle, attributes: &Attributes, name: &[u8]) -> Result<()> {
        let mut room = XATTRS_MAX;
        for (key, value) in &attributes.xattrs {
            let refused = |why: String| Error::Entry {
                path: self.source.to_owned(),
                entry: name.escape_ascii().to_string(),
                why,
            };
            let value = if key.starts_with("system.posix_acl_") {
                access_list(value)
                    .ok_or_else(|| refused(format!("has a malformed access list `{key}`")))?
            } else {
                value.clone()
            };
            // 16 bytes before the name, both filled up to 4.
            let takes = 16 + key.len().next_multiple_of(4) + value.len().next_multiple_of(4);
            room = room.checked_sub(takes).ok_or_else(|| {
                refused("has more extended attributes than fit a block of ext4".to_owned())
            })?;
            match self.builder.set_xattr(handle, key, &value) {
                Ok(()) => {}
                Err(_) => log::warn!(
                    "`{}`: the extended attribute `{key}` is left out, because Linux has none of that kind",
                    name.escape_ascii()
                ),
            }
        }
        Ok(())
    }
}

fn meta(attributes: &Attributes) -> Meta {
    Meta::new(
        attributes.mode,
        attributes.uid,
        attributes.gid,
        attributes.mtime,
    )
}

/// The parts of a sparse file and the holes between them.
fn segments(contents: &Contents) -> Vec<SparseSeg> {
    let mut segments = Vec::new();
    let mut at = 0;
    for piece in contents.pieces() {
        if piece.at > at {
            segments.push(SparseSeg::Hole(piece.at - at));
        }
        segments.push(SparseSeg::Data(piece.len));
        at = piece.at + piece.len;
    }
    if at < contents.size() {
        segments.push(SparseSeg::Hole(contents.size() - at));
    }
    segments
}

/// An access list as ext4 stores it, made from what programs see.
///
/// Both begin with a version (2 for programs, 1 on disk) and have entries of tag, permissions and an id, but on disk
/// only named users and groups have the id.
fn access_list(value: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != 2 {
        return None;
    }
    let mut stored = 1_u32.to_le_bytes().to_vec();
    let (entries, rest) = entries.as_chunks::<8>();
    for entry in entries {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let named = tag == USER || tag == GROUP;
        stored.extend(&entry[..if named { 8 } else { 4 }]);
    }
    rest.is_empty().then_some(stored)
}

/// Where the file system is written to.
struct Image<'a> {
    file: &'a File,
    size: u64,
}

impl RegionSink for Image<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::Error::other("a block lies past the end"));
        }
        // Zeros are there already.
        let mut at = 0;
        let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        for same in bytes
            .chunks(ZEROS)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| zero(a) == zero(b))
        {
            let len: usize = same.iter().map(|block| block.len()).sum();
            if !zero(same[0]) {
                self.file
                    .write_all_at(&bytes[at..at + len], offset + at as u64)?;
            }
            at += len;
        }
        Ok(())
    }

    fn zeros(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Why contents could not be read.
enum Wrong {
    Read(io::Error),
    Short,
    Interrupted,
}

/// Contents on their way to the image.
struct Watched<'a, 'w> {
    reader: super::contents::Reader<'a>,
    wrong: Option<Wrong>,
    done: &'a mut u64,
    total: u64,
    watch: &'a mut Watch<'w>,
}

impl Read for Watched<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let progress = Progress {
            what: "writing the image",
            done: *self.done,
            total: self.total,
        };
        if let ControlFlow::Break(()) = (self.watch)(&progress) {
            self.wrong = Some(Wrong::Interrupted);
            return Ok(0);
        }
        match self.reader.read(buffer) {
            Ok(0) => {
                self.wrong = Some(Wrong::Short);
                Ok(0)
            }
            Ok(read) => {
                *self.done += read as u64;
                Ok(read)
            }
            Err(error) => {
                let kind = error.kind();
                if kind != io::ErrorKind::Interrupted {
                    self.wrong = Some(Wrong::Read(error));
                }
                Err(kind.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_list_is_stored_without_the_ids_that_mean_nothing() {
        let entry = |tag: u16, permissions: u16, id: u32| {
            [
                &tag.to_le_bytes()[..],
                &permissions.to_le_bytes(),
                &id.to_le_bytes(),
            ]
            .concat()
        };
        let seen = [
            2_u32.to_le_bytes().to_vec(),
            entry(1, 6, u32::MAX),
            entry(2, 4, 1000),
            entry(0x20, 0, u32::MAX),
        ]
        .concat();
        let stored = [
            1_u32.to_le_bytes().to_vec(),
            entry(1, 6, 0)[..4].to_vec(),
            entry(2, 4, 1000),
            entry(0x20, 0, 0)[..4].to_vec(),
        ]
        .concat();
        assert_eq!(access_list(&seen), Some(stored));
        for bad in [&seen[..3], &seen[..7], &seen[1..]] {
            assert_eq!(access_list(bad), None);
        }
    }
}
