//! Requests about what files are, rather than what is in them.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, chmod,
    chownat, fstatvfs, ftruncate, getxattr, getxattr_query, listxattr, listxattr_query, readlinkat,
    removexattr, setxattr, utimensat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::names::permissions;
use super::node::{Node, status};
use super::server::{Call, Server, path};

/// `FUSE_GETATTR_FH`: the request has a handle.
const GETATTR_FH: u32 = 1 << 0;

/// Bits of SETATTR's `valid` (`FATTR_…`): which of its fields to set.
const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_FH: u32 = 1 << 6;
const FATTR_ATIME_NOW: u32 = 1 << 7;
const FATTR_MTIME_NOW: u32 = 1 << 8;
const FATTR_KILL_SUIDGID: u32 = 1 << 11;

/// The longest value of an extended attribute, and the longest list of their names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: u32 = 64 << 10;

impl Server {
    /// GETATTR: flags, padding, handle.
    pub(super) fn getattr(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let flags = call.body.u32()?;
        call.body.skip(4)?;
        let handle = call.body.u64()?;
        let stat = if flags & GETATTR_FH != 0 {
            let file = call
                .session
                .handle(handle, call.number, call.node()?.kind)?;
            status(file.as_fd())?
        } else {
            status(call.node()?.as_fd())?
        };
        call.answer.attr_out(&stat)
    }

    /// SETATTR: a bit for each thing to set, and all of them.
    pub(super) fn setattr(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let body = &mut call.body;
        let valid = body.u32()?;
        body.skip(4)?;
        let (handle, size) = (body.u64()?, body.u64()?);
        body.skip(8)?;
        let (atime, mtime, _ctime) = (body.u64()?, body.u64()?, body.u64()?);
        let (atime_nsec, mtime_nsec, _) = (body.u32()?, body.u32()?, body.u32()?);
        let mode = body.u32()?;
        body.skip(4)?;
        let (uid, gid) = (body.u32()?, body.u32()?);
        let node = call.node()?;

        // The owner first: changing it takes set-user-ID away, which the mode may give.
        if valid & (FATTR_UID | FATTR_GID) != 0 {
            let owner = (valid & FATTR_UID != 0).then_some(uid);
            let group = (valid & FATTR_GID != 0).then_some(gid);
            if owner == Some(u32::MAX) || group == Some(u32::MAX) {
                return Err(Errno::INVAL);
            }
            chownat(
                &*node,
                c"",
                owner.map(Uid::from_raw),
                group.map(Gid::from_raw),
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if valid & FATTR_MODE != 0 {
            // The permissions of a link mean nothing and cannot be set.
            if node.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            chmod(path(&*node), permissions(mode))?;
        }
        if valid & FATTR_SIZE != 0 {
            let handle = (valid & FATTR_FH != 0).then_some(handle);
            self.truncate(&call, &node, handle, size)?;
            if valid & FATTR_KILL_SUIDGID != 0 {
                self.drop_set_id(&*node)?;
            }
        }
        if valid & (FATTR_ATIME | FATTR_MTIME) != 0 {
            let times = Timestamps {
                last_access: time(
                    valid & FATTR_ATIME != 0,
                    valid & FATTR_ATIME_NOW != 0,
                    atime,
                    atime_nsec,
                ),
                last_modification: time(
                    valid & FATTR_MTIME != 0,
                    valid & FATTR_MTIME_NOW != 0,
                    mtime,
                    mtime_nsec,
                ),
            };
            utimensat(rustix::fs::CWD, path(&*node), &times, AtFlags::empty())?;
        }
        call.answer.attr_out(&status(node.as_fd())?)
    }

    fn truncate(
        &self,
        call: &Call<'_>,
        node: &Node,
        handle: Option<u64>,
        size: u64,
    ) -> Result<(), Errno> {
        let kind = FileType::RegularFile;
        if let Some(handle) = handle {
            return ftruncate(&*call.session.handle(handle, call.number, kind)?, size);
        }
        if node.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        ftruncate(self.reopen(call.session, node, OFlags::WRONLY)?, size)
    }

    /// READLINK: nothing more.
    pub(super) fn readlink(&self, call: Call<'_>) -> Result<(), Errno> {
        let node = call.node()?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = readlinkat(&*node, c"", Vec::new())?;
        call.answer.bytes(target.to_bytes())
    }

    /// STATFS: nothing more. The answer is `struct fuse_kstatfs`.
    pub(super) fn statfs(&self, call: Call<'_>) -> Result<(), Errno> {
        let stat = fstatvfs(&*call.node()?)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let answer = call.answer;
        for count in [
            stat.f_blocks,
            stat.f_bfree,
            stat.f_bavail,
            stat.f_files,
            stat.f_ffree,
        ] {
            answer.u64(count)?;
        }
        answer.u32(narrow(stat.f_bsize))?;
        answer.u32(narrow(stat.f_namemax))?;
        answer.u32(narrow(stat.f_frsize))?;
        answer.zeroes(4 + 24)
    }

    /// SETXATTR: size, flags, name, value.
    pub(super) fn setxattr(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let size = call.body.u32()?;
        let flags = XattrFlags::from_bits(call.body.u32()?).ok_or(Errno::INVAL)?;
        let name = attribute(call.body.text()?)?;
        let value = call.body.bytes(size as usize)?;
        setxattr(path(&*call.node()?), name, value, flags)
    }

    /// GETXATTR: size, padding, name. With a size of 0, the answer is how long the value is.
    pub(super) fn getxattr(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let size = call.body.u32()?;
        call.body.skip(4)?;
        let name = attribute(call.body.text()?)?;
        let path = path(&*call.node()?);
        answer_xattr(
            call,
            size,
            || getxattr_query(&path, name),
            |buffer| getxattr(&path, name, buffer),
        )
    }

    /// LISTXATTR: size, padding.
    pub(super) fn listxattr(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let size = call.body.u32()?;
        let path = path(&*call.node()?);
        answer_xattr(
            call,
            size,
            || listxattr_query(&path),
            |buffer| listxattr(&path, buffer),
        )
    }

    /// REMOVEXATTR: name.
    pub(super) fn removexattr(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let name = attribute(call.body.text()?)?;
        removexattr(path(&*call.node()?), name)
    }
}

/// The name of an extended attribute. Those of `system.` are access control lists, which the guest's kernel would have to
/// obey and does not.
fn attribute(name: &CStr) -> Result<&CStr, Errno> {
    match name.to_bytes() {
        name if name.starts_with(b"system.") => Err(Errno::OPNOTSUPP),
        _ => Ok(name),
    }
}

fn answer_xattr(
    call: Call<'_>,
    size: u32,
    len: impl FnOnce() -> Result<usize, Errno>,
    read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    if size == 0 {
        let len = u32::try_from(len()?).unwrap_or(u32::MAX);
        call.answer.u32(len)?;
        return call.answer.u32(0);
    }
    // A buffer that is too small is ERANGE to the guest, as everywhere.
    call.answer.fill(size.min(XATTR_MAX) as usize, |buffer| {
        match buffer.is_empty() {
            // The host would take it for the question how long it is.
            true => Err(Errno::RANGE),
            false => read(buffer),
        }
    })?;
    Ok(())
}

/// A time to set: left alone, now, or what the guest says.
fn time(set: bool, now: bool, seconds: u64, nanoseconds: u32) -> Timespec {
    let (tv_sec, tv_nsec) = match (set, now) {
        (false, _) => (0, UTIME_OMIT),
        (true, true) => (0, UTIME_NOW),
        (true, false) => (seconds.cast_signed(), i64::from(nanoseconds)),
    };
    Timespec { tv_sec, tv_nsec }
}
