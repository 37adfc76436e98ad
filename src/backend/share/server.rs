//! The file system that a guest sees: each request, and what it does to the host.
//!
//! It is a *pass-through*: a descriptor of a host's file stands for a node, and a request becomes the system call of the same
//! name on it. What keeps a guest inside the shared directory is that a name is one component that is looked up in the
//! descriptor of its directory without following links (`O_NOFOLLOW`), and never `..`. A symbolic link is
//! text, which the guest resolves on its own side. Swapping a directory for a link while a request runs gains nothing,
//! because a descriptor goes on standing for what it was opened as.
//!
//! Some requests are refused that would be dangerous or could wait without end:
//!
//! * to open anything but files and directories: a FIFO would wait for its other end, and a device node is a
//!   device of the *host* here. The guest's kernel serves both by itself, and asks only for their attributes.
//! * locks: not offered, so that the guest's kernel keeps them among its own processes.
//! * a file of `/proc` below a shared `/`: this process's memory is one.
//! * what is hidden, which is not there at all.
//! * everything that changes something, if the share is read-only, whatever the guest's mount options.
//!
//! FLUSH, which a guest sends at each close(2), is answered once with ENOSYS and not sent again: data have been written by
//! then. SYNCFS is not known either, so that a guest's sync(1) does not write back all of the host; fsync(2) makes
//! a file last.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, Statx, fstatfs, openat};
use rustix::io::Errno;

use super::caller::Host;
use super::hidden::Hidden;
use super::node::{Id, Node};
use super::nodes::Place;
use super::opcode;
use super::session::Session;
use super::wire::{ANSWER_HEADER_LEN, ATTR_LEN, Answer, Body, Caller, DATA_MAX, ENTRY_LEN, Header};

/// The protocol version: 7.33.
const MAJOR: u32 = 7;
const MINOR: u32 = 33;
/// Guests with virtio-fs are no older than this.
const MINOR_MIN: u32 = 27;

/// `FUSE_ASYNC_READ`: several reads of a file at once.
const ASYNC_READ: u32 = 1 << 0;
/// `FUSE_ATOMIC_O_TRUNC`: OPEN truncates.
const ATOMIC_O_TRUNC: u32 = 1 << 3;
/// `FUSE_BIG_WRITES`: more than a page at once.
const BIG_WRITES: u32 = 1 << 5;
/// `FUSE_AUTO_INVAL_DATA`: the guest drops cached pages of a file whose size or time has changed.
const AUTO_INVAL_DATA: u32 = 1 << 12;
/// `FUSE_DO_READDIRPLUS`: directories are read with the attributes of their entries.
const DO_READDIRPLUS: u32 = 1 << 13;
/// `FUSE_READDIRPLUS_AUTO`: where that seems worth it.
const READDIRPLUS_AUTO: u32 = 1 << 14;
/// `FUSE_ASYNC_DIO`: several direct reads and writes at once.
const ASYNC_DIO: u32 = 1 << 15;
/// `FUSE_PARALLEL_DIROPS`: several requests for a directory at once.
const PARALLEL_DIROPS: u32 = 1 << 18;
/// `FUSE_MAX_PAGES`: INIT says how many pages a request may have.
const MAX_PAGES: u32 = 1 << 22;
/// `FUSE_CACHE_SYMLINKS`: the text of a link does not change.
const CACHE_SYMLINKS: u32 = 1 << 23;
/// `FUSE_HANDLE_KILLPRIV_V2`: set-user-ID bits go with a write, so the guest need not ask before each whether there are any.
const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
/// What this side can do. Not the write-back cache: with it the guest would not see what the host writes.
const OFFERED: u32 = ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | CACHE_SYMLINKS
    | HANDLE_KILLPRIV_V2;

/// Pages of a request, 4 KiB each.
const PAGES_MAX: u16 = (DATA_MAX / 4096) as u16;
/// Requests that a guest makes on its own account (readahead) at once, and from which on it takes the disk for busy.
const BACKGROUND: u16 = 64;
const CONGESTION: u16 = 48;
/// Bytes of `struct fuse_init_out`.
const INIT_LEN: usize = 64;

/// Whether this kind of request has an answer.
pub fn is_answered(kind: u32) -> bool {
    !matches!(
        kind,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
    )
}

/// Answers requests. It holds no state of a guest; that is the [`Session`].
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub read_only: bool,
    pub hidden: Arc<Hidden>,
    pub host: Host,
    /// Permissions that the host takes from files that this process creates.
    pub umask: Mode,
}

/// One request, and where its answer goes.
pub(super) struct Call<'a> {
    pub session: &'a Session,
    /// The number of the node that it is about.
    pub number: u64,
    pub caller: Caller,
    pub body: Body<'a>,
    pub answer: &'a mut Answer,
}

impl Call<'_> {
    /// The node that the request is about.
    pub fn node(&self) -> Result<Arc<Node>, Errno> {
        self.session.node(self.number)
    }

    /// Looks a name up in the directory that the request is about, and counts the node that it leads to.
    pub fn find(&self, directory: &Node, name: &CStr) -> Result<(u64, Statx), Errno> {
        self.find_in(directory.as_fd(), directory.id, name)
    }

    /// The same by a descriptor of the directory.
    pub fn find_in(
        &self,
        directory: BorrowedFd<'_>,
        id: Id,
        name: &CStr,
    ) -> Result<(u64, Statx), Errno> {
        let (fd, stat) = self.session.look(directory, id, name)?;
        let place = Place::new(self.number, name);
        let number = self.session.remember(fd, &stat, place)?;
        Ok((number, stat))
    }
}

impl Server {
    /// Does what a message asks for. The result is the answer, `room` bytes at most; empty if there is none to give.
    pub fn serve(&self, session: &Session, message: &[u8], room: u32) -> Vec<u8> {
        let mut answer = Answer::new(room);
        let (header, body) = match Header::split(message) {
            Ok(parts) => parts,
            Err(Some(header)) if is_answered(header.opcode) => {
                return answer.finish(header.unique, Err(Errno::INVAL));
            }
            Err(_) => return Vec::new(),
        };
        if !is_answered(header.opcode) {
            forget(session, header, body);
            return Vec::new();
        }
        if room < ANSWER_HEADER_LEN {
            return Vec::new();
        }
        let result = self.dispatch(
            header.opcode,
            Call {
                session,
                number: header.node,
                caller: header.caller,
                body,
                answer: &mut answer,
            },
        );
        answer.finish(header.unique, result)
    }

    fn dispatch(&self, kind: u32, call: Call<'_>) -> Result<(), Errno> {
        if kind == opcode::INIT {
            return init(call);
        }
        if !call.session.started() {
            return Err(Errno::NOTCONN);
        }
        if self.read_only && changes(kind) {
            return Err(Errno::ROFS);
        }
        match kind {
            opcode::LOOKUP => self.lookup(call),
            opcode::GETATTR => self.getattr(call),
            opcode::SETATTR => self.setattr(call),
            opcode::READLINK => self.readlink(call),
            opcode::SYMLINK => self.symlink(call),
            opcode::MKNOD => self.mknod(call),
            opcode::MKDIR => self.mkdir(call),
            opcode::UNLINK => self.unlink(call, AtFlags::empty()),
            opcode::RMDIR => self.unlink(call, AtFlags::REMOVEDIR),
            opcode::RENAME => self.rename(call, false),
            opcode::RENAME2 => self.rename(call, true),
            opcode::LINK => self.link(call),
            opcode::OPEN => self.open(call),
            opcode::CREATE => self.create(call),
            opcode::READ => self.read(call),
            opcode::WRITE => self.write(call),
            opcode::RELEASE => self.release(call, FileType::RegularFile),
            opcode::FSYNC => self.fsync(call, FileType::RegularFile),
            opcode::FALLOCATE => self.fallocate(call),
            opcode::LSEEK => self.lseek(call),
            opcode::COPY_FILE_RANGE => self.copy_file_range(call),
            opcode::OPENDIR => self.opendir(call),
            opcode::READDIR => self.readdir(call, false),
            opcode::READDIRPLUS => self.readdir(call, true),
            opcode::RELEASEDIR => self.release(call, FileType::Directory),
            opcode::FSYNCDIR => self.fsync(call, FileType::Directory),
            opcode::STATFS => self.statfs(call),
            opcode::SETXATTR => self.setxattr(call),
            opcode::GETXATTR => self.getxattr(call),
            opcode::LISTXATTR => self.listxattr(call),
            opcode::REMOVEXATTR => self.removexattr(call),
            opcode::DESTROY => {
                call.session.restart(false);
                Ok(())
            }
            _ => Err(Errno::NOSYS),
        }
    }

    /// LOOKUP: a name.
    fn lookup(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let name = call.body.name()?;
        call.body.end()?;
        call.answer.needs(ENTRY_LEN)?;
        let directory = call.node()?;
        match call.find(&directory, name) {
            Ok((number, stat)) => call.answer.entry(number, &stat),
            Err(Errno::NOENT) => call.answer.no_entry(),
            Err(error) => Err(error),
        }
    }

    /// Opens a file that the guest knows of. See the head of this file for what is refused.
    pub(super) fn reopen(
        &self,
        session: &Session,
        node: &Node,
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::ACCESS);
        }
        if self.hidden.has_file(node.id) {
            return Err(Errno::NOENT);
        }
        // Some files of /sys wait for events unless they are opened so; on others it has no effect.
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let fd = openat(CWD, path(node), flags, Mode::empty())?;
        if !node.id.same_device(session.root().id) && fstatfs(&fd)?.f_type == PROC_SUPER_MAGIC {
            return Err(Errno::ACCESS);
        }
        Ok(fd)
    }
}

/// The way to a file that a descriptor stands for, for system calls that take only paths. It leads to that file alone: the
/// kernel goes there directly and does not follow a link that it may be.
pub(super) fn path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Whether a request of this kind always changes something. OPEN does only with some flags. (IOCTL is not served at all;
/// an overlay asks for flags by it, and takes "not served" for "none", but "read-only" for a failure.)
fn changes(kind: u32) -> bool {
    matches!(
        kind,
        opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
    )
}

/// FORGET and BATCH_FORGET: the guest gives counts of nodes back. There is no answer, so a broken one is left.
/// An INTERRUPT finds nothing that it could interrupt.
fn forget(session: &Session, header: Header, mut body: Body<'_>) {
    match header.opcode {
        opcode::FORGET => {
            if let Ok(lookups) = body.u64() {
                session.forget(header.node, lookups);
            }
        }
        opcode::BATCH_FORGET => {
            let count = body.u32();
            if body.skip(4).is_err() {
                return;
            }
            // Ends with the message at the latest.
            for _ in 0..count.unwrap_or(0) {
                let (Ok(node), Ok(lookups)) = (body.u64(), body.u64()) else {
                    return;
                };
                session.forget(node, lookups);
            }
        }
        _ => {}
    }
}

/// INIT begins a mount: `major`, `minor`, `max_readahead`, `flags`, and more that newer guests have.
fn init(mut call: Call<'_>) -> Result<(), Errno> {
    let (major, minor) = (call.body.u32()?, call.body.u32()?);
    let (readahead, flags) = (call.body.u32()?, call.body.u32()?);
    let answer = call.answer;
    answer.needs(INIT_LEN)?;
    if major < MAJOR || (major == MAJOR && minor < MINOR_MIN) {
        return Err(Errno::PROTO);
    }
    answer.u32(MAJOR)?;
    answer.u32(MINOR)?;
    if major > MAJOR {
        // The guest comes back with this version.
        return answer.zeroes(INIT_LEN - 8);
    }
    call.session.restart(true);
    answer.u32(readahead)?;
    answer.u32(flags & OFFERED)?;
    answer.bytes(&BACKGROUND.to_le_bytes())?;
    answer.bytes(&CONGESTION.to_le_bytes())?;
    answer.u32(DATA_MAX)?;
    // Times are kept in nanoseconds.
    answer.u32(1)?;
    answer.bytes(&PAGES_MAX.to_le_bytes())?;
    answer.zeroes(2 + 4 + 28)
}

const _: () = assert!(ATTR_LEN + 40 == ENTRY_LEN);
