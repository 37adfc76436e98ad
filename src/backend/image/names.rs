//! Names that are not UTF-8, in a file system written by a crate that takes names as text.
//!
//! To Linux a name is bytes, and old archives have names in other encodings. Such a name is told to the crate as a
//! stand-in of the same length, and put in its place once the file system is written. The checksum of the directory
//! block is computed anew (ext4 has one at the end of each, "Linear (Classic) Directories" in the kernel's ext4
//! documentation). A directory that is large enough for an index, which is sorted by a hash of the names, loses the
//! index: its blocks were made so that a reader who knows nothing of indexes sees a plain directory in them.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mkext4::csum;
use mkext4::reader::Fs;
use mkext4::spec::{DirentIter, Inode, iflags};

/// Bytes in a block.
const BLOCK: usize = 4096;
/// Bytes at the end of a directory block that hold its checksum, in the shape of an entry.
const TAIL: usize = 12;
/// How many stand-ins are tried for a name.
const TRIES: u32 = 100_000;

/// The names in one directory, as they are told to the crate.
pub(super) struct Names {
    /// The path of the directory, as it is told to the crate.
    directory: String,
    /// Names that no stand-in may have.
    taken: HashSet<String>,
    /// Real names by their stand-ins.
    stand_ins: BTreeMap<String, Vec<u8>>,
    /// Real targets by the names of the symbolic links.
    targets: BTreeMap<String, Vec<u8>>,
}

impl Names {
    /// The names in the directory at `directory`.
    pub fn of<'a>(directory: &str, names: impl Iterator<Item = &'a [u8]>) -> Names {
        let names: Vec<_> = names.map(std::str::from_utf8).collect();
        let taken = if names.iter().all(Result::is_ok) {
            HashSet::new()
        } else {
            names.into_iter().flatten().map(str::to_owned).collect()
        };
        Names {
            directory: directory.to_owned(),
            taken,
            stand_ins: BTreeMap::new(),
            targets: BTreeMap::new(),
        }
    }

    /// What to tell the crate instead of `name`: itself, if it is text. Nothing if all stand-ins are taken, as can be
    /// with names of one byte.
    pub fn declare(&mut self, name: &[u8]) -> Option<String> {
        if let Ok(text) = std::str::from_utf8(name) {
            return Some(text.to_owned());
        }
        // `x`, with a number at the end.
        let stand_in = (0..TRIES).find_map(|number| {
            let number = number.to_string();
            let fill = name.len().checked_sub(number.len())?;
            let text = format!("{}{number}", "x".repeat(fill));
            (!self.taken.contains(&text)).then_some(text)
        })?;
        self.taken.insert(stand_in.clone());
        self.stand_ins.insert(stand_in.clone(), name.to_vec());
        Some(stand_in)
    }

    /// What to tell the crate instead of `target`, to which the symbolic link `declared` leads.
    pub fn target(&mut self, declared: &str, target: &[u8]) -> String {
        match std::str::from_utf8(target) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                self.targets.insert(declared.to_owned(), target.to_vec());
                "x".repeat(target.len())
            }
        }
    }
}

/// All directories in which something has to be put in its place.
#[derive(Default)]
pub(super) struct Renames(Vec<Names>);

impl Renames {
    pub fn add(&mut self, names: Names) {
        if !names.stand_ins.is_empty() || !names.targets.is_empty() {
            self.0.push(names);
        }
    }

    /// Puts the real names into the file system in `file`.
    pub fn apply(&self, file: &File) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut inodes = Vec::new();
        let fs = Fs::open(file).map_err(io::Error::other)?;
        // While all paths are as they were told.
        for names in &self.0 {
            inodes.push(fs.resolve(&names.directory).map_err(io::Error::other)?);
        }
        for (names, inode) in self.0.iter().zip(inodes) {
            let directory = Directory { file, fs: &fs };
            directory.set_targets(inode, &names.targets)?;
            directory.rename(inode, &names.stand_ins)?;
        }
        Ok(())
    }
}

/// Changes directories of a file system that has just been written.
struct Directory<'a> {
    file: &'a File,
    fs: &'a Fs<&'a File>,
}

impl Directory<'_> {
    fn rename(&self, number: u32, names: &BTreeMap<String, Vec<u8>>) -> io::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let inode = self.fs.inode(number).map_err(io::Error::other)?;
        let indexed = inode.flags & iflags::INDEX != 0;
        let seed = csum::inode_seed(self.fs.fs_seed(), number, inode.generation);
        for (logical, at) in self.blocks(number, &inode)?.into_iter().enumerate() {
            let mut block = vec![0; BLOCK];
            self.file.read_exact_at(&mut block, at)?;
            // The blocks of the index, as a plain directory: `.` and `..`, or nothing.
            if indexed && logical == 0 {
                block[24..].fill(0);
                set_record(&mut block, 12, BLOCK - TAIL - 12);
            } else if indexed && is_empty(&block) {
                block.fill(0);
                set_record(&mut block, 0, BLOCK - TAIL);
            }
            let tail = BLOCK - TAIL;
            block[tail..].fill(0);
            set_record(&mut block, tail, TAIL);
            block[tail + 7] = 0xde;
            let found: Result<Vec<_>, _> = DirentIter::new(&block)
                .map(|entry| entry.map(|entry| (entry.offset + 8, entry.name.to_vec())))
                .collect();
            for (offset, name) in found.map_err(io::Error::other)? {
                if let Ok(name) = std::str::from_utf8(&name)
                    && let Some(real) = names.get(name)
                {
                    block[offset..offset + real.len()].copy_from_slice(real);
                }
            }
            let sum = csum::dirent_block(seed, &block);
            block[tail + 8..].copy_from_slice(&sum.to_le_bytes());
            self.file.write_all_at(&block, at)?;
        }
        if indexed {
            self.change_inode(number, |raw| {
                let flags = inode.flags & !iflags::INDEX;
                raw[0x20..0x24].copy_from_slice(&flags.to_le_bytes());
            })?;
        }
        Ok(())
    }

    fn set_targets(&self, number: u32, targets: &BTreeMap<String, Vec<u8>>) -> io::Result<()> {
        if targets.is_empty() {
            return Ok(());
        }
        for entry in self.fs.read_dir(number).map_err(io::Error::other)? {
            let Ok(name) = std::str::from_utf8(&entry.name) else {
                continue;
            };
            let Some(target) = targets.get(name) else {
                continue;
            };
            let inode = self.fs.inode(entry.inode).map_err(io::Error::other)?;
            if inode.fast_symlink_target().is_some() {
                // A short target stands in the inode itself, where others have their map of blocks.
                self.change_inode(entry.inode, |raw| {
                    raw[0x28..0x28 + target.len()].copy_from_slice(target);
                })?;
            } else if let Some(at) = self.blocks(entry.inode, &inode)?.first() {
                self.file.write_all_at(target, *at)?;
            }
        }
        Ok(())
    }

    /// Where the blocks of a file are in the image, in bytes.
    fn blocks(&self, number: u32, inode: &Inode) -> io::Result<Vec<u64>> {
        let extents = self.fs.extents(number, inode).map_err(io::Error::other)?;
        let blocks = inode.size.div_ceil(BLOCK as u64);
        let at = |logical| self.fs.file_block(&extents, logical);
        Ok((0..blocks)
            .filter_map(|logical| at(logical).map(|block| block * BLOCK as u64))
            .collect())
    }

    fn change_inode(&self, number: u32, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let superblock = self.fs.superblock();
        let index = number - 1;
        let group = u64::from(index / superblock.inodes_per_group);
        let table = self
            .fs
            .group_desc(group)
            .map_err(io::Error::other)?
            .inode_table;
        let within =
            u64::from(index % superblock.inodes_per_group) * u64::from(superblock.inode_size);
        let mut raw = self.fs.inode_raw(number).map_err(io::Error::other)?;
        change(&mut raw);
        let generation = Inode::decode(&raw).map_err(io::Error::other)?.generation;
        let [a, b, c, d] = csum::inode(self.fs.fs_seed(), number, generation, &raw).to_le_bytes();
        raw[0x7c..0x7e].copy_from_slice(&[a, b]);
        raw[0x82..0x84].copy_from_slice(&[c, d]);
        self.file.write_all_at(&raw, table * BLOCK as u64 + within)
    }
}

/// Sets the length of the entry at `offset`.
fn set_record(block: &mut [u8], offset: usize, len: usize) {
    block[offset + 4..offset + 6].copy_from_slice(&(len as u16).to_le_bytes());
}

/// Whether one entry that leads nowhere fills the block, as in the inner blocks of an index.
fn is_empty(block: &[u8]) -> bool {
    block[..4] == [0; 4] && block[4..6] == (BLOCK as u16).to_le_bytes()
}
