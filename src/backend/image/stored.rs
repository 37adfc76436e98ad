//! The configuration of an image inside the root disk that was made of it, and how it is read back.
//!
//! A guest may have written the disk in between, so what is read back is as hostile as the guest: every step is
//! bounded, and what cannot be read in one step, is not read. The disk of a guest that was ended rather than shut down
//! has a journal to replay; nothing in it concerns this file, which nobody writes, so the mark of that is overlooked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mkext4::csum;
use mkext4::reader::{Fs, ReadAt};
use mkext4::spec::{Inode, ROOT_INO, Superblock};

use super::config::ImageConfig;
use super::contents::Contents;
use super::tree::{Attributes, Kind, Tree};
use super::{Error, Result};

/// The directory in the root, and the file in it.
const DIRECTORY: &[u8] = b".sarang";
const FILE: &[u8] = b"config.json";
/// A directory or configuration with more bytes is not read.
const READ_MAX: u64 = 1 << 20;
/// Where the superblock is (kernel documentation, "The Super Block").
const SUPERBLOCK: u64 = 1024;
/// `s_feature_incompat` and `s_checksum` in it.
const INCOMPAT: usize = 0x60;
const CHECKSUM: usize = 0x3fc;
/// `INCOMPAT_RECOVER`: the journal has to be replayed.
const RECOVER: u32 = 0x4;

/// Puts the configuration into a tree.
pub(super) fn put_config(tree: &mut Tree, config: &ImageConfig) {
    let json = serde_json::to_vec_pretty(config).unwrap_or_default();
    if json.len() as u64 > READ_MAX {
        log::warn!("how the image wants to be run is not remembered: it has too much to say");
        return;
    }
    let root = super::tree::ROOT;
    // By name, not by path, so that a link of this name leads nowhere else.
    let directory = tree.put_in(
        root,
        DIRECTORY,
        Attributes::of_root(0o755),
        Kind::directory(),
    );
    let put = directory.and_then(|directory| {
        let kind = Kind::File(Contents::from(json));
        tree.put_in(directory, FILE, Attributes::of_root(0o644), kind)
    });
    if let Err(why) = put {
        log::warn!("how the image wants to be run is not remembered: its configuration {why}");
    }
}

/// How the image that a root disk was made of wants to be run, or nothing if the disk does not say.
///
/// # Errors
/// When the file cannot be read. A disk that is damaged, or has another file system, does not say.
pub fn read_config(path: &Path) -> Result<Option<ImageConfig>> {
    let file = File::open(path).map_err(Error::reading(path))?;
    let json = match json(&file) {
        Ok(json) => json,
        Err(error) => {
            log::debug!("{} has no configuration: {error}", path.display());
            return Ok(None);
        }
    };
    match serde_json::from_slice(&json) {
        Ok(config) => Ok(Some(config)),
        Err(error) => {
            log::warn!(
                "how {} wants to be run cannot be understood: {error}",
                path.display()
            );
            Ok(None)
        }
    }
}

fn json(file: &File) -> std::result::Result<Vec<u8>, mkext4::Error> {
    let fs = Fs::open(Disk(file))?;
    let missing = || mkext4::Error::Io(io::ErrorKind::NotFound.into());
    small(&fs, ROOT_INO)?;
    let directory = fs.lookup(ROOT_INO, DIRECTORY)?.ok_or_else(missing)?;
    small(&fs, directory)?;
    let number = fs.lookup(directory, FILE)?.ok_or_else(missing)?;
    small(&fs, number)?;
    fs.read_file(number)
}

/// Makes sure that a file is small and that its map needs no further blocks, which might lead in circles.
fn small(fs: &Fs<Disk<'_>>, number: u32) -> std::result::Result<(), mkext4::Error> {
    let inode: Inode = fs.inode(number)?;
    // The depth of the map, in its header (`eh_depth`).
    let depth = u16::from_le_bytes([inode.block[6], inode.block[7]]);
    if inode.size > READ_MAX || depth > 0 {
        return Err(mkext4::Error::Unsupported("a file this large".to_owned()));
    }
    Ok(())
}

/// A disk whose journal is taken for empty.
struct Disk<'a>(&'a File);

impl ReadAt for Disk<'_> {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        // Files have no larger offsets, and sums of them do not wrap.
        if offset > i64::MAX as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        FileExt::read_exact_at(self.0, buffer, offset)?;
        if offset == SUPERBLOCK && buffer.len() == Superblock::LEN {
            let stored = |at: usize| {
                u32::from_le_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]])
            };
            let incompat = stored(INCOMPAT);
            let sound = csum::superblock(buffer) == stored(CHECKSUM);
            if incompat & RECOVER != 0 && sound {
                buffer[INCOMPAT..INCOMPAT + 4]
                    .copy_from_slice(&(incompat & !RECOVER).to_le_bytes());
                let sum = csum::superblock(buffer).to_le_bytes();
                buffer[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum);
            }
        }
        Ok(())
    }
}
