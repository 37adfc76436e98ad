//! Requests that read directories.

use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::node::{Id, status};
use super::server::{Call, Server};
use super::session::lock;
use super::wire::{DATA_MAX, DirEntry, ENTRY_LEN, OPEN_LEN, dirent_len};

/// Bytes of directory entries that are asked of the host at once: at least what the longest name needs, and no more than is
/// used.
const HOST_MIN: usize = 1 << 10;
const HOST_MAX: usize = 64 << 10;

/// An entry of a directory, as the host has given it.
#[derive(Debug)]
struct Found {
    name: CString,
    ino: u64,
    kind: FileType,
    /// The position behind it.
    next: u64,
}

/// How far an open directory has been listed.
///
/// A guest that asks for what follows gets it without the host's position being set anew: in some file systems (tmpfs, for
/// one) a position is a count of the entries before it, and whoever removes what he has seen, as `rm -r` does, would skip
/// others.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The position behind the last entry that the guest was told.
    told: u64,
    /// What the host has given beyond that.
    ahead: VecDeque<Found>,
}

impl Listing {
    /// Reads about `enough` bytes of entries from where the host is. None are left when the directory ends.
    fn read(&mut self, directory: BorrowedFd<'_>, enough: usize) -> Result<(), Errno> {
        let mut buffer = Vec::with_capacity(enough);
        let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            self.ahead.push_back(Found {
                name: entry.file_name().to_owned(),
                ino: entry.ino(),
                kind: entry.file_type(),
                next: entry.next_entry_cookie(),
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

impl Server {
    /// OPENDIR: flags, which mean nothing for a directory.
    pub(super) fn opendir(&self, call: Call<'_>) -> Result<(), Errno> {
        call.answer.needs(OPEN_LEN)?;
        let node = call.node()?;
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let fd = self.reopen(call.session, &node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        // The last descriptor that can be given up may be its own.
        drop(node);
        let handle = call.session.keep(call.number, fd, FileType::Directory)?;
        call.answer.open_out(handle, 0)
    }

    /// READDIR and READDIRPLUS: handle, offset, size, and more. With `plus`, each entry is looked up as well.
    pub(super) fn readdir(&self, mut call: Call<'_>, plus: bool) -> Result<(), Errno> {
        let handle = call.body.u64()?;
        let offset = call.body.u64()?;
        let size = call.body.u32()?.min(DATA_MAX) as usize;
        let directory = call
            .session
            .handle(handle, call.number, FileType::Directory)?;
        let enough = if plus { size / 4 } else { size };
        let enough = enough.clamp(HOST_MIN, HOST_MAX);
        let itself = status(directory.as_fd())?;
        let id = Id::of(&itself);
        let mut listing = lock(&directory.listing);
        if offset == 0 || offset != listing.told {
            seek(&*directory, SeekFrom::Start(offset))?;
            listing.ahead.clear();
            listing.told = offset;
        }
        let mut left = size.min(call.answer.left());
        let mut empty = true;
        loop {
            if listing.ahead.is_empty()
                && let Err(error) = listing.read(directory.as_fd(), enough)
            {
                // What has been found before is told; the next request meets the error.
                if empty {
                    return Err(error);
                }
                break;
            }
            let Some(entry) = listing.ahead.front() else {
                break;
            };
            let name = entry.name.as_c_str();
            let len = dirent_len(name.to_bytes()) + if plus { ENTRY_LEN } else { 0 };
            if len > left {
                if empty {
                    return Err(Errno::INVAL);
                }
                break;
            }
            // What is hidden is passed over, and so is what is gone already.
            let is_dot = matches!(name.to_bytes(), b"." | b"..");
            let found = (plus && !is_dot).then(|| call.find_in(directory.as_fd(), id, name));
            let gone = match &found {
                Some(found) => matches!(found, Err(Errno::NOENT)),
                None => !is_dot && self.hidden.has_entry(id, name, entry.ino),
            };
            if gone {
                listing.ahead.pop_front();
                continue;
            }
            left -= len;
            empty = false;
            if plus {
                match found {
                    Some(Ok((number, stat))) => call.answer.entry(number, &stat)?,
                    // Without a node the guest looks the name up when it needs to.
                    _ => call.answer.zeroes(ENTRY_LEN)?,
                }
            }
            // What is above the shared directory is not told.
            let ino = match name.to_bytes() {
                b".." if call.number == super::wire::ROOT => itself.stx_ino,
                _ => entry.ino,
            };
            call.answer.dirent(&DirEntry {
                ino,
                next: entry.next,
                kind: entry.kind,
                name: name.to_bytes(),
            })?;
            listing.told = entry.next;
            listing.ahead.pop_front();
        }
        Ok(())
    }
}
