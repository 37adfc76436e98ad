//! Requests about the content of files.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, chmod, copy_file_range, fallocate,
    fdatasync, fsync, openat, seek,
};
use rustix::io::{Errno, pread, pwrite};

use super::names::permissions;
use super::node::{Node, status};
use super::nodes::Place;
use super::server::{Call, Server, path};
use super::wire::{DATA_MAX, ENTRY_LEN, OPEN_LEN};

/// `FOPEN_KEEP_CACHE`: what the guest has cached of the file is good until its size or time changes.
const KEEP_CACHE: u32 = 1 << 1;
/// `FUSE_OPEN_KILL_SUIDGID`: with a truncation, set-user-ID and set-group-ID go.
const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`: the same with a write.
const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`: the data are enough.
const FSYNC_FDATASYNC: u32 = 1 << 0;

/// The most that one COPY_FILE_RANGE copies, in bytes, so that it ends soon. The guest asks again.
const COPY_MAX: u64 = 64 << 20;

/// `SEEK_DATA` and `SEEK_HOLE`, the only ones for which a guest needs the host.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// Takes from the flags of a guest's open(2) those that mean something here. `O_PATH` and the like would make
/// another kind of descriptor; `O_DIRECT` wants buffers that are aligned.
fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags);
    let access = flags & OFlags::RWMODE;
    if access != OFlags::RDONLY && access != OFlags::WRONLY && access != OFlags::RDWR {
        return Err(Errno::INVAL);
    }
    let kept = OFlags::APPEND | OFlags::TRUNC | OFlags::DSYNC | OFlags::SYNC;
    Ok(access | (flags & kept))
}

impl Server {
    /// OPEN: flags, open flags.
    pub(super) fn open(&self, mut call: Call<'_>) -> Result<(), Errno> {
        call.answer.needs(OPEN_LEN)?;
        let flags = open_flags(call.body.u32()?)?;
        let kill = call.body.u32()? & OPEN_KILL_SUIDGID != 0;
        let node = call.node()?;
        let (fd, kind) = (self.open_file(&call, &node, flags, kill)?, node.kind);
        // The last descriptor that can be given up may be its own.
        drop(node);
        let handle = call.session.keep(call.number, fd, kind)?;
        call.answer.open_out(handle, KEEP_CACHE)
    }

    fn open_file(
        &self,
        call: &Call<'_>,
        node: &Node,
        flags: OFlags,
        kill: bool,
    ) -> Result<OwnedFd, Errno> {
        if node.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC);
        if self.read_only && writes {
            return Err(Errno::ROFS);
        }
        let fd = self.reopen(call.session, node, flags)?;
        if kill && flags.contains(OFlags::TRUNC) {
            self.drop_set_id(&fd)?;
        }
        Ok(fd)
    }

    /// CREATE: flags, mode, umask, open flags, name. Creates and opens, or opens what is there.
    pub(super) fn create(&self, mut call: Call<'_>) -> Result<(), Errno> {
        call.answer.needs(ENTRY_LEN + OPEN_LEN)?;
        let given = call.body.u32()?;
        let flags = open_flags(given)?;
        let mode = permissions(call.body.u32()?);
        call.body.skip(4)?;
        let kill = call.body.u32()? & OPEN_KILL_SUIDGID != 0;
        let name = call.body.name()?;
        call.body.end()?;
        let directory = call.node()?;
        self.hidden.may_make(directory.id, name)?;
        // Always a new file here, so that nothing is followed or opened that is there already.
        let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let new = new | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let created = self
            .host
            .create_as(call.caller, || openat(&*directory, name, new, mode));
        let exclusive = OFlags::from_bits_retain(given).contains(OFlags::EXCL);
        let (number, stat, fd) = match created {
            Ok(fd) => {
                let stat = self.mend(&fd, status(fd.as_fd())?, mode)?;
                let reference = OFlags::PATH | OFlags::CLOEXEC;
                let reference = openat(CWD, path(&fd), reference, Mode::empty())?;
                let place = Place::new(call.number, name);
                let number = call.session.remember(reference, &stat, place)?;
                (number, stat, Ok(fd))
            }
            Err(Errno::EXIST) if !exclusive => {
                let (number, stat) = call.find(&directory, name)?;
                let fd = call.session.node(number);
                let fd = fd.and_then(|node| self.open_file(&call, &node, flags, kill));
                (number, stat, fd)
            }
            Err(error) => return Err(error),
        };
        drop(directory);
        let handle = fd.and_then(|fd| call.session.keep(number, fd, FileType::RegularFile));
        let handle = handle.inspect_err(|_| call.session.forget(number, 1))?;
        call.answer.entry(number, &stat)?;
        call.answer.open_out(handle, KEEP_CACHE)
    }

    /// RELEASE and RELEASEDIR: handle, and more that matters to locks.
    pub(super) fn release(&self, mut call: Call<'_>, kind: FileType) -> Result<(), Errno> {
        call.session.close(call.body.u64()?, call.number, kind)
    }

    /// READ: handle, offset, size, and more. A short answer means the end of the file, so the host is asked until then.
    pub(super) fn read(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let handle = call.body.u64()?;
        let offset = call.body.u64()?;
        let size = call.body.u32()?.min(DATA_MAX) as usize;
        let file = call
            .session
            .handle(handle, call.number, FileType::RegularFile)?;
        call.answer.fill(size, |buffer| {
            let mut done = 0;
            while done < buffer.len() {
                let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
                let rest = buffer.get_mut(done..).unwrap_or_default();
                match pread(&*file, rest, at) {
                    Ok(0) => break,
                    Ok(read) => done += read,
                    Err(Errno::INTR) => {}
                    // What was read before is told; the next request meets the error.
                    Err(_) if done > 0 => break,
                    Err(error) => return Err(error),
                }
            }
            Ok(done)
        })?;
        Ok(())
    }

    /// WRITE: handle, offset, size, write flags, lock owner, flags, padding, data.
    pub(super) fn write(&self, mut call: Call<'_>) -> Result<(), Errno> {
        call.answer.needs(8)?;
        let handle = call.body.u64()?;
        let offset = call.body.u64()?;
        let size = call.body.u32()?;
        let kill = call.body.u32()? & WRITE_KILL_SUIDGID != 0;
        call.body.skip(16)?;
        let data = call.body.bytes(size as usize)?;
        let file = call
            .session
            .handle(handle, call.number, FileType::RegularFile)?;
        let mut written = 0;
        loop {
            let at = offset.checked_add(written as u64).ok_or(Errno::INVAL)?;
            let rest = data.get(written..).unwrap_or_default();
            match pwrite(&*file, rest, at) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(Errno::INTR) => {}
                Err(_) if written > 0 => break,
                Err(error) => return Err(error),
            }
        }
        if kill {
            self.drop_set_id(&*file)?;
        }
        call.answer
            .u32(u32::try_from(written).unwrap_or(u32::MAX))?;
        call.answer.u32(0)
    }

    /// Takes set-user-ID and set-group-ID from a file that is written by a guest's user who may not keep them. For an
    /// ordinary process the host's kernel does that itself.
    pub(super) fn drop_set_id(&self, file: impl AsFd) -> Result<(), Errno> {
        if !self.host.is_root() {
            return Ok(());
        }
        let has = permissions(status(file.as_fd())?.stx_mode.into());
        let mut drop = has & Mode::SUID;
        if has.contains(Mode::XGRP) {
            drop |= has & Mode::SGID;
        }
        match drop.is_empty() {
            true => Ok(()),
            false => chmod(path(file), has - drop),
        }
    }

    /// FSYNC and FSYNCDIR: handle, flags, padding.
    pub(super) fn fsync(&self, mut call: Call<'_>, kind: FileType) -> Result<(), Errno> {
        let handle = call.body.u64()?;
        let data_only = call.body.u32()? & FSYNC_FDATASYNC != 0;
        let file = call.session.handle(handle, call.number, kind)?;
        match data_only {
            true => fdatasync(&*file),
            false => fsync(&*file),
        }
    }

    /// FALLOCATE: handle, offset, length, mode, padding.
    pub(super) fn fallocate(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let handle = call.body.u64()?;
        let (offset, len) = (call.body.u64()?, call.body.u64()?);
        let mode = FallocateFlags::from_bits_retain(call.body.u32()?);
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let file = call
            .session
            .handle(handle, call.number, FileType::RegularFile)?;
        fallocate(&*file, mode, offset, len)
    }

    /// LSEEK: handle, offset, whence, padding. Finds data and holes; the position that it leaves the descriptor at
    /// matters to nobody.
    pub(super) fn lseek(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let handle = call.body.u64()?;
        let offset = call.body.u64()?;
        let to = match call.body.u32()? {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let file = call
            .session
            .handle(handle, call.number, FileType::RegularFile)?;
        call.answer.u64(seek(&*file, to)?)
    }

    /// COPY_FILE_RANGE: handle and offset to copy from, node, handle and offset to copy to, length, flags.
    pub(super) fn copy_file_range(&self, mut call: Call<'_>) -> Result<(), Errno> {
        call.answer.needs(8)?;
        let from = call.body.u64()?;
        let mut from_offset = call.body.u64()?;
        let (to_node, to) = (call.body.u64()?, call.body.u64()?);
        let mut to_offset = call.body.u64()?;
        let len = call.body.u64()?.min(COPY_MAX);
        let kind = FileType::RegularFile;
        let from = call.session.handle(from, call.number, kind)?;
        let to = call.session.handle(to, to_node, kind)?;
        let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let copied = copy_file_range(
            &*from,
            Some(&mut from_offset),
            &*to,
            Some(&mut to_offset),
            len,
        )?;
        call.answer.u32(u32::try_from(copied).unwrap_or(u32::MAX))?;
        call.answer.u32(0)
    }
}
