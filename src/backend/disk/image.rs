//! Opening an image: what it is, how large, and that nobody else writes it.
//!
//! Two guests that write one file system destroy it, so an image is locked for as long as it is open. The lock is an
//! *open file description* lock (fcntl(2), `F_OFD_SETLK`): unlike the older POSIX locks it goes away only with the
//! descriptor it was taken through, and two disks of one process exclude each other too. It is the kind that QEMU
//! takes.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};

use rustix::fs::{AtFlags, StatxFlags, ioctl_blksszget, statx};

use super::{Error, Format, Options, SECTOR};

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// An image that is open, locked and known to be a file or a block device.
pub(super) struct Image {
    pub file: File,
    /// Size of the file or device in bytes.
    pub len: u64,
    /// The device's logical block size in bytes, 512 for a file.
    pub sector: u32,
}

impl Image {
    pub fn open(options: &Options) -> Result<Image, Error> {
        let path = &options.path;
        // Looked at before it is opened, because opening a FIFO would wait for its other end.
        let kind = std::fs::metadata(path)
            .map_err(|error| refusal(options, error))?
            .file_type();
        if kind.is_dir() {
            return Err(Error::Directory { path: path.clone() });
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotADisk { path: path.clone() });
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(if options.direct { libc::O_DIRECT } else { 0 })
            .open(path)
            .map_err(|error| refusal(options, error))?;
        lock(&file, options)?;
        let host = |source| Error::Host {
            path: path.clone(),
            source,
        };
        // The metadata of a block device has no size, but its end can be sought.
        let len = file.seek(SeekFrom::End(0)).map_err(host)?;
        if len == 0 {
            return Err(Error::Empty { path: path.clone() });
        }
        let sector = if kind.is_block_device() {
            ioctl_blksszget(&file).map_err(|error| host(error.into()))?
        } else {
            SECTOR
        };
        let image = Image { file, len, sector };
        if options.direct {
            image.check_alignment(options)?;
        }
        if options.format == Format::Raw {
            image.warn_of_another_format(options);
        }
        Ok(image)
    }

    /// A guest's requests are whole sectors; with `O_DIRECT` the host may want larger ones.
    fn check_alignment(&self, options: &Options) -> Result<(), Error> {
        // Hosts before Linux 6.1 do not say, and then the guest's first request will.
        let alignment = statx(&self.file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
            .map_or(0, |stat| stat.stx_dio_offset_align);
        if options.format == Format::Raw && alignment > self.sector {
            return Err(Error::DirectAlignment {
                path: options.path.clone(),
                alignment,
                sector: self.sector,
            });
        }
        Ok(())
    }

    /// The format is never guessed: a guest could write another format's header into its raw disk and would be given
    /// whatever file that names. But a person who forgot to say it should know.
    fn warn_of_another_format(&self, options: &Options) {
        let mut magic = [0; 4];
        // With O_DIRECT the read is refused, and the hint is left out.
        if self.file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC {
            log::warn!(
                "{} begins like a qcow2 image but is used as raw; if it is one, make it a --disk with `,format=qcow2`",
                options.path.display()
            );
        }
    }
}

/// Makes a sentence of what open(2) says.
pub(super) fn refusal(options: &Options, source: io::Error) -> Error {
    let path = options.path.clone();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Error::Missing { path },
        Some(libc::EACCES | libc::EPERM) => Error::Permission {
            path,
            write: !options.read_only,
        },
        Some(libc::EROFS) => Error::ReadOnly { path },
        Some(libc::EISDIR) => Error::Directory { path },
        Some(libc::EINVAL) if options.direct => Error::NoDirect { path },
        _ => Error::Host { path, source },
    }
}

/// One writer, or any number of readers.
fn lock(file: &File, options: &Options) -> Result<(), Error> {
    let kind = if options.read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // To the end, wherever that comes to be.
        l_len: 0,
        // Must be 0 for this kind of lock.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel only reads the structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if let Some(libc::EAGAIN | libc::EACCES) = error.raw_os_error() {
        return Err(Error::Locked {
            path: options.path.clone(),
        });
    }
    log::warn!(
        "the disk image {} cannot be locked, so nothing keeps another VM from writing it too: {error}",
        options.path.display()
    );
    Ok(())
}
