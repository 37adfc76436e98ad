//! Root disks that have been made once, for the next time.
//!
//! A container image is known by its digest and a plain tar by its inode, size and times, so a disk that was made of it
//! is found again without reading it. The disk is made under a lock, so that several runs at once make it only once,
//! and it appears when it is complete. It is shared by all that use it: it is read-only, and a guest that writes needs a
//! copy or a layer above it.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::stream::digest;
use super::{Build, Compression, Error, Kind, Progress, Result, Source, Watch};

/// Changes whenever disks are made in another way, so that old ones are not used.
const FORMAT: u32 = 1;
/// How often one looks whether somebody else has made the disk.
const WAIT: Duration = Duration::from_millis(20);

/// Where root disks are kept: `$XDG_CACHE_HOME/sarang/images`, or `~/.cache/sarang/images`. Nothing if there is no home.
pub fn cache_directory() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
    // The specification of these directories wants relative paths to be ignored.
    let cache = cache.filter(|path| path.is_absolute());
    let home = || set("HOME").map(|home| Path::new(&home).join(".cache"));
    Some(cache.or_else(home)?.join("sarang/images"))
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
    if disk.exists() {
        return Ok(disk);
    }
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(directory);
    made.map_err(Error::writing(directory))?;
    let lock = directory.join(format!("{key}.lock"));
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
