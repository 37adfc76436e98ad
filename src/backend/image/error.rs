//! Why something cannot become a guest's root: one sentence each, for the person who named it.

use std::io;
use std::path::PathBuf;

/// What can be wrong with an image, or with making one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no file or directory {}: check the path", path.display())]
    Missing { path: PathBuf },
    #[error("no permission to read {}: give it with chmod, or run as its owner", path.display())]
    Permission { path: PathBuf },
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is empty, so it holds no file system", path.display())]
    Empty { path: PathBuf },
    #[error("{} is neither a directory, a file nor a block device, so it cannot be a root", path.display())]
    Special { path: PathBuf },
    #[error(
        "{} is not an image that sarang knows: name a directory, a tar, an OCI image layout, a docker-archive or a disk \
         image",
        path.display()
    )]
    Unknown { path: PathBuf },
    #[error(
        "{} is compressed with {compression}, but what it holds is no tar: unpack it and name the result",
        path.display()
    )]
    NoTarInside {
        path: PathBuf,
        compression: &'static str,
    },
    #[error(
        "{} is {kind}, which has no tags: leave `{reference}` out",
        path.display()
    )]
    NoReferences {
        path: PathBuf,
        kind: &'static str,
        reference: String,
    },
    #[error("the archive {} cannot be used: {why}", path.display())]
    Archive { path: PathBuf, why: String },
    #[error("the image {} is not whole: {why}", path.display())]
    Image { path: PathBuf, why: String },
    #[error(
        "the image {} is not whole: {what} should have the digest {expected} but has {found}; fetch it again",
        path.display()
    )]
    Digest {
        path: PathBuf,
        what: String,
        expected: String,
        found: String,
    },
    #[error(
        "the image {} has nothing called `{wanted}`; it has {}",
        path.display(),
        list(available)
    )]
    NoSuchTag {
        path: PathBuf,
        wanted: String,
        available: Vec<String>,
    },
    #[error(
        "{} holds several images: say which with {}:TAG or {}@DIGEST, it has {}",
        path.display(),
        path.display(),
        path.display(),
        list(available)
    )]
    Ambiguous {
        path: PathBuf,
        available: Vec<String>,
    },
    #[error(
        "the image {} has nothing for linux/amd64, only for {}",
        path.display(),
        list(available)
    )]
    Platform {
        path: PathBuf,
        available: Vec<String>,
    },
    #[error("{} cannot be unpacked: its entry `{entry}` {why}", path.display())]
    Entry {
        path: PathBuf,
        entry: String,
        why: String,
    },
    #[error("the image {} wants to run as `{user}`, but {why}", path.display())]
    User {
        path: PathBuf,
        user: String,
        why: String,
    },
    #[error("{} changed while it was being read: try again when nothing writes it", path.display())]
    Changed { path: PathBuf },
    #[error(
        "what {} holds needs more than the {} of --size: give a larger one",
        path.display(),
        mebibytes(*size)
    )]
    Bounded {
        path: PathBuf,
        /// Bytes.
        size: u64,
    },
    #[error(
        "unpacking {} would fill the disk under {}: it has {} left",
        path.display(),
        directory.display(),
        mebibytes(*left)
    )]
    DiskFull {
        path: PathBuf,
        directory: PathBuf,
        /// Bytes.
        left: u64,
    },
    #[error(
        "--size {} is too small for what {} holds: give at least {}, or leave it out",
        mebibytes(*size),
        path.display(),
        mebibytes(*enough)
    )]
    TooSmall {
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Bytes that surely do.
        enough: u64,
    },
    #[error("what {} holds does not fit an ext4 file system: {why}", path.display())]
    Ext4 { path: PathBuf, why: String },
    #[error("{} exists already: choose another name, or replace it with --force", path.display())]
    Exists { path: PathBuf },
    #[error("{} is not a plain file, so it is not replaced: choose another name", path.display())]
    NotReplaced { path: PathBuf },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is {kind}, which needs no root disk made of it", path.display())]
    NoDiskNeeded { path: PathBuf, kind: &'static str },
    #[error("stopped before the image was complete; nothing was written")]
    Interrupted,
}

/// What goes wrong with an image.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes a sentence of what an attempt to read `path` came to.
    pub(super) fn reading(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        |source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::Missing { path },
            io::ErrorKind::PermissionDenied => Error::Permission { path },
            _ => Error::Read { path, source },
        }
    }

    /// Makes a sentence of what an attempt to write `path` came to.
    pub(super) fn writing(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        |source| Error::Write { path, source }
    }
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{}M", bytes.div_ceil(1 << 20))
}
