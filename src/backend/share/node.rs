//! Which file is which, and a descriptor that stands for one.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};
use rustix::io::Errno;

use super::descriptor::Descriptor;

/// What is asked of a file: what the guest is told, and what makes an [`Identity`].
pub(super) const WANTED: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// Attributes of what a descriptor stands for.
pub(super) fn status(fd: BorrowedFd<'_>) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(fd, c"", flags, WANTED)
}

/// By what the host knows a file: device, inode, and mount, since one file can be mounted in two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id {
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl Id {
    pub fn of(stat: &Statx) -> Id {
        Id {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }

    /// The same file, in whatever mount.
    pub fn in_any_mount(self) -> Id {
        Id { mount: 0, ..self }
    }

    /// Another file of the same file system, in whatever mount.
    pub fn beside(self, inode: u64) -> Id {
        let device = self.device;
        Id {
            device,
            inode,
            mount: 0,
        }
    }

    /// Whether both are in one file system.
    pub fn same_device(self, other: Id) -> bool {
        self.device == other.device
    }
}

/// By what a file is known again after nothing has stood for it for a while. Its inode alone does not do: when the file has
/// been removed, the next one that is made may get the inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub id: Id,
    pub kind: FileType,
    /// When the file was made, in seconds and nanoseconds. Zeroes where the file system does not keep it.
    pub born: (i64, u32),
}

impl Identity {
    pub fn of(stat: &Statx) -> Identity {
        let kept = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        let born = (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec);
        Identity {
            id: Id::of(stat),
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            born: if kept { born } else { (0, 0) },
        }
    }
}

/// A file that the guest knows of, or has just named.
#[derive(Debug)]
pub(super) struct Node {
    descriptor: Descriptor,
    pub kind: FileType,
    pub id: Id,
}

impl Node {
    pub fn new(descriptor: Descriptor, stat: &Statx) -> Node {
        Node {
            descriptor,
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            id: Id::of(stat),
        }
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
