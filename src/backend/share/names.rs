//! Requests that make, move and remove names.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, RenameFlags, Statx, chmod, linkat, mkdirat, mknodat,
    renameat_with, statx, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::node::{Id, Node, WANTED, status};
use super::nodes::Place;
use super::server::{Call, Server, path};
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
        let (number, stat) = call.find(&directory, name)?;
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
        status(fd.as_fd())
    }

    /// UNLINK and RMDIR: name.
    pub(super) fn unlink(&self, mut call: Call<'_>, flags: AtFlags) -> Result<(), Errno> {
        let name = call.body.name()?;
        call.body.end()?;
        let directory = call.node()?;
        let found = self.may_move(&directory, name)?;
        // With its last name goes the way to open it again.
        let last = found.filter(is_last_name);
        let kept = last.and_then(|stat| call.session.keep_node(&directory, name, &stat));
        unlinkat(&*directory, name, flags)?;
        if let Some(kept) = kept {
            call.session.removed(&kept);
        }
        Ok(())
    }

    /// That what is hidden stays where it is, and stays hidden. The result is what has the name.
    fn may_move(&self, directory: &Node, name: &CStr) -> Result<Option<Statx>, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let found = statx(directory, name, flags, WANTED).ok();
        let id = found.as_ref().map(Id::of);
        self.hidden.may_move(directory.id, name, id)?;
        Ok(found)
    }

    /// RENAME: new directory, names. RENAME2: flags and padding after the directory. A whiteout would be a device node.
    pub(super) fn rename(&self, mut call: Call<'_>, with_flags: bool) -> Result<(), Errno> {
        let to_number = call.body.u64()?;
        let to = call.session.node(to_number)?;
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
        let moved = self.may_move(&from, old)?;
        let there = self.may_move(&to, new)?;
        // Nobody has to find them again while they are neither here nor there.
        let session = call.session;
        let kept = moved.and_then(|stat| session.keep_node(&from, old, &stat));
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let kept_there = there
            .filter(|stat| exchange || is_last_name(stat))
            .and_then(|stat| session.keep_node(&to, new, &stat));
        renameat_with(&*from, old, &*to, new, flags)?;
        match kept_there {
            // Two names of one file: nothing has happened (rename(2)).
            Some(there)
                if kept
                    .as_ref()
                    .is_some_and(|kept| kept.number == there.number) =>
            {
                return Ok(());
            }
            Some(there) if exchange => session.moved(&there, Place::new(call.number, old)),
            Some(there) => session.removed(&there),
            None => {}
        }
        if let Some(kept) = kept {
            session.moved(&kept, Place::new(to_number, new));
        }
        Ok(())
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
        let (number, stat) = call.find(&directory, name)?;
        call.answer.entry(number, &stat)
    }
}

/// Whether a file is gone when it loses one name. One that has others is found by them.
fn is_last_name(stat: &Statx) -> bool {
    stat.stx_nlink <= 1 || FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory
}
