//! Root disks that have been made once, for the next time.
//!
//! A container image is known by its digest and a plain tar by its inode, size and times, so a disk that was made of it
//! is found again without reading it. The disk is made under a lock, so that several runs at once make it only once,
//! and it appears when it is complete. It is shared by all that use it: it is read-only, and a guest that writes needs a
//! copy or a layer above it.
//!
//! Beside each disk is the file that was locked, and its time of change says when the disk was last asked for. Whoever makes
//! a disk removes those that nobody has asked for in a month.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::stream::digest;
use super::{Build, Compression, Error, Kind, Progress, Result, Source, Watch};
use crate::backend::cache;

/// Changes whenever disks are made in another way, so that old ones are not used.
const FORMAT: u32 = 1;
/// How long a disk is kept that nobody asks for.
const KEEP: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How often one looks whether somebody else has made the disk.
const WAIT: Duration = Duration::from_millis(20);

/// Where root disks are kept: `images` in sarang's cache. Nothing if the user has no home.
pub fn cache_directory() -> Option<PathBuf> {
    Some(cache::directory()?.join("images"))
}

/// The root disk for `source`: itself if it is one, else one that is made of it now or was made before. It must not be
/// written.
///
/// # Errors
/// One sentence when it cannot be made. A directory is none that can be kept, because nothing tells whether it has
/// changed.
pub fn ensure_disk(source: &Source, directory: &Path, watch: &mut Watch<'_>) -> Result<PathBuf> {
    let key = match source.kind {
        Kind::Disk(_) => return Ok(source.path.clone()),
        Kind::Directory => {
            return Err(Error::NoDiskNeeded {
                path: source.path.clone(),
                kind: source.kind.name(),
            });
        }
        _ => key(source, directory, watch)?,
    };
    let disk = directory.join(format!("{key}.ext4"));
    let lock = directory.join(format!("{key}.lock"));
    // Before one looks, so that nobody removes what has been seen.
    let opened = OpenOptions::new().write(true).open(&lock);
    let _ = opened.and_then(|lock| lock.set_modified(SystemTime::now()));
    if disk.exists() {
        return Ok(disk);
    }
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(directory);
    made.map_err(Error::writing(directory))?;
    let locked = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock)
        .map_err(Error::writing(&lock))?;
    wait(&locked, &lock, watch)?;
    if disk.exists() {
        return Ok(disk);
    }
    remove_leftovers(directory, &key);
    remove_unused(directory);
    let options = Build {
        replace: true,
        ..Build::default()
    };
    source.build(&disk, &options, watch)?;
    let read_only = Permissions::from_mode(0o444);
    std::fs::set_permissions(&disk, read_only).map_err(Error::writing(&disk))?;
    Ok(disk)
}

/// Waits until this process has the lock, which goes with `file`.
fn wait(file: &File, path: &Path, watch: &mut Watch<'_>) -> Result<()> {
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(Error::writing(path)(error)),
        }
        let progress = Progress {
            what: "waiting for another run that unpacks the same image",
            done: 0,
            total: 0,
        };
        if let ControlFlow::Break(()) = watch(&progress) {
            return Err(Error::Interrupted);
        }
        std::thread::sleep(WAIT);
    }
}

/// Removes what a process left that was killed while it had the lock.
fn remove_leftovers(directory: &Path, key: &str) {
    let prefix = format!(".{key}.ext4.");
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().as_bytes().starts_with(prefix.as_bytes()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Removes the disks that nobody has asked for in [`KEEP`]. A run that has one still can read it. What cannot be removed
/// stays, and so do the files to lock: somebody may be waiting for one.
fn remove_unused(directory: &Path) {
    let now = SystemTime::now();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_unused = path.extension() == Some(OsStr::new("lock"))
            && (entry.metadata().and_then(|found| found.modified()))
                .is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age > KEEP));
        if is_unused {
            let _ = std::fs::remove_file(path.with_extension("ext4"));
        }
    }
}

/// What a source is known by.
fn key(source: &Source, directory: &Path, watch: &mut Watch<'_>) -> Result<String> {
    let compressed = source.kind.compression() != Compression::None;
    let identity = match source.kind {
        Kind::OciLayout | Kind::OciArchive(_) | Kind::DockerArchive(_) if !compressed => {
            // Nothing has to be unpacked for this.
            let blobs = source.blobs(directory, watch)?;
            source.choose(&blobs)?.digest
        }
        _ => {
            let found = std::fs::metadata(&source.path).map_err(Error::reading(&source.path))?;
            format!(
                "{} {} {} {}.{} {}.{} {:?}",
                found.dev(),
                found.ino(),
                found.len(),
                found.mtime(),
                found.mtime_nsec(),
                found.ctime(),
                found.ctime_nsec(),
                source.reference
            )
        }
    };
    let text = format!("{FORMAT} {} {identity}", source.kind.id());
    let digest = digest(text.as_bytes());
    let digits = digest.trim_start_matches("sha256:");
    Ok(digits.chars().take(32).collect())
}
