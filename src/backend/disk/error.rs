//! Why a disk image cannot be used: one sentence that names it and says what to do.

use std::io;
use std::path::PathBuf;

/// Why a disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "there is no disk image {}: check the path, or make one with `truncate -s 4G {}`",
        path.display(),
        path.display()
    )]
    Missing { path: PathBuf },
    #[error(
        "no permission to {} the disk image {}: {}",
        if *write { "write" } else { "read" },
        path.display(),
        if *write { "give it with chmod, or add `,ro` to only read it" } else { "give it with chmod" }
    )]
    Permission { path: PathBuf, write: bool },
    #[error(
        "the disk image {} is on a read-only file system or device: add `,ro` to use it without writing",
        path.display()
    )]
    ReadOnly { path: PathBuf },
    #[error(
        "{} is a directory, not a disk image: name a file or a block device",
        path.display()
    )]
    Directory { path: PathBuf },
    #[error(
        "{} is neither a file nor a block device, so it cannot be a disk",
        path.display()
    )]
    NotADisk { path: PathBuf },
    #[error(
        "the disk image {} cannot be opened past the host's page cache: leave `direct` out",
        path.display()
    )]
    NoDirect { path: PathBuf },
    #[error(
        "past the host's page cache, {} takes requests of {alignment} bytes only, but this disk's sectors have \
         {sector}: leave `direct` out",
        path.display()
    )]
    DirectAlignment {
        path: PathBuf,
        /// Bytes.
        alignment: u32,
        /// Bytes.
        sector: u32,
    },
    #[error(
        "the disk image {} is in use by another VM, or twice by this one: stop the other, or add `,ro` to all of them",
        path.display()
    )]
    Locked { path: PathBuf },
    #[error(
        "the disk image {} is empty: give it a size, for example with `truncate -s 4G {}`",
        path.display(),
        path.display()
    )]
    Empty { path: PathBuf },
    #[error(
        "the disk image {} has {bytes} bytes, which is no multiple of 512: is it a disk image? `truncate -s %512 {}` \
         fills it up",
        path.display(),
        path.display()
    )]
    OddSize { path: PathBuf, bytes: u64 },
    #[error(
        "{} is not a qcow2 image that can be used: {source}; say `format=raw` if it holds the bytes of a disk as they \
         are",
        path.display()
    )]
    NotQcow2 { path: PathBuf, source: io::Error },
    #[error(
        "the qcow2 image {} builds on another file, {other}, which sarang does not open unasked: merge them with \
         `qemu-img convert -O qcow2 {} NEW`",
        path.display(),
        path.display()
    )]
    BackingFile { path: PathBuf, other: String },
    #[error("cannot use the disk image {}: {source}", path.display())]
    Host { path: PathBuf, source: io::Error },
}
