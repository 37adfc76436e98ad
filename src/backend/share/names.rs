//! Requests that make, move and remove names.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, RenameFlags, Statx, StatxFlags, chmod, linkat, mkdirat, mknodat,
    renameat_with, statx, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::server::{Call, Server, path};
use super::session::{Id, Node};
use super::wire::ENTRY_LEN;

/// The permission bits of a mode, with set-user-ID, set-group-ID and sticky.
pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

impl Server {
    /// MKNOD: mode, device, umask, padding, name. Device nodes are refused: they would be the host's devices.
    pub(super) fn mknod(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let mode = call.body.u32()?;
        call.body.skip(12)?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(
            kind,
            FileType::RegularFile | FileType::Fifo | FileType::Socket
        ) {
            return Err(Errno::PERM);
        }
        let name = call.body.name()?;
        call.body.end()?;
        self.make(call, name, permissions(mode), |directory| {
            mknodat(directory, name, kind, permissions(mode), 0)
        })
    }

    /// MKDIR: mode, umask, name.
    pub(super) fn mkdir(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let mode = permissions(call.body.u32()?);
        call.body.skip(4)?;
        let name = call.body.name()?;
        call.body.end()?;
        self.make(call, name, mode, |directory| mkdirat(directory, name, mode))
    }

    /// SYMLINK: name, target. The target is any text; only the guest ever follows it.
    pub(super) fn symlink(&self, mut call: Call<'_>) -> Result<(), Errno> {
        let name = call.body.name()?;
        let target = call.body.text()?;
        call.body.end()?;
        self.make(call, name, Mode::empty(), |directory| {
            symlinkat(target, directory, name)
        })
    }

    /// Makes something as the caller of the request, and answers with its node.
    fn make(
        &self,
        call: Call<'_>,
        name: &CStr,
        mode: Mode,
        make: impl FnOnce(&Node) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        call.answer.needs(ENTRY_LEN)?;
        let directory = call.node()?;
        self.hidden.may_make(directory.id, name)?;
        self.host.create_as(call.caller, || make(&directory))?;
        let (number, stat) = self.find(call.session, directory.as_fd(), directory.id, name)?;
        let stat = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::Symlink => stat,
            _ => self.mend(&*call.session.node(number)?, stat, mode)?,
        };
        call.answer.entry(number, &stat)
    }

    /// Gives a new file the permissions that this process's umask took from it: the guest has applied its own umask,
    /// and the host's is not its business.
    pub(super) fn mend(&self, fd: impl AsFd, stat: Statx, mode: Mode) -> Result<Statx, Errno> {
        let has = permissions(stat.stx_mode.into());
        let missing = (mode & self.umask) - has;
        if missing.is_empty() {
            return Ok(stat);
        }
        // Refused on file systems that keep no permissions. Then it has what it has.
        let _ = chmod(path(&fd), has | missing);
        super::server::status(fd.as_fd())
    }

    /// UNLINK and RMDIR: name.
    pub(super) fn unlink(&self, mut call: Call<'_>, flags: AtFlags) -> Result<(), Errno> {
        let name = call.body.name()?;
        call.body.end()?;
        let directory = call.node()?;
        self.may_move(&directory, name)?;
        unlinkat(&*directory, name, flags)
    }

    /// That what is hidden stays where it is, and stays hidden.
    fn may_move(&self, directory: &Node, name: &CStr) -> Result<(), Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let found = statx(directory, name, flags, StatxFlags::BASIC_STATS);
        let found = found.ok().map(|stat| Id::of(&stat));
        self.hidden.may_move(directory.id, name, found)
    }

    /// RENAME: new directory, names. RENAME2: flags and padding after the directory. A whiteout would be a device node.
    pub(super) fn rename(&self, mut call: Call<'_>, with_flags: bool) -> Result<(), Errno> {
        let to = call.session.node(call.body.u64()?)?;
        let mut flags = RenameFlags::empty();
        if with_flags {
            flags = RenameFlags::from_bits_retain(call.body.u32()?);
            call.body.skip(4)?;
        }
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (call.body.name()?, call.body.name()?);
        call.body.end()?;
        let from = call.node()?;
        self.may_move(&from, old)?;
        self.may_move(&to, new)?;
        renameat_with(&*from, old, &*to, new, flags)
    }

    /// LINK: the node that gets another name, the name.
    pub(super) fn link(&self, mut call: Call<'_>) -> Result<(), Errno> {
        call.answer.needs(ENTRY_LEN)?;
        let node = call.session.node(call.body.u64()?)?;
        let name = call.body.name()?;
        call.body.end()?;
        let directory = call.node()?;
        self.hidden.may_make(directory.id, name)?;
        linkat(
            CWD,
            path(&*node),
            &*directory,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let (number, stat) = self.find(call.session, directory.as_fd(), directory.id, name)?;
        call.answer.entry(number, &stat)
    }
}
