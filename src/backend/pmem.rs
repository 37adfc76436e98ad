//! Persistent memory: a file that the guest uses as memory, without requests.
//!
//! The file is mapped into this process ([`FileRegion`]) and given to the guest as it is. The guest's loads and
//! stores reach the host's page cache, and two copies of a file's data, one in each kernel's cache, become one. What
//! is left to ask of the host is to make stores last; that is a flush of the file, and so it is opened, locked and
//! flushed as a [`Disk`], of which nothing but flushes is ever asked.
//!
//! Nothing on Linux keeps another program from cutting a file short that is mapped. What a guest meets behind the new
//! end depends on KVM: it may fail (EFAULT), have the vCPU try again for ever, or, where it interprets the guest's
//! instructions, treat the place as one with no memory. None of these is an honest answer, so the file is watched by
//! inotify(7), and a machine that finds it cut ends with an error.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use rustix::fs::inotify;
use rustix::io::Errno;

use crate::backend::disk::{self, Disk, Format, Operation};
use crate::mem::{FileRegion, GuestRam};

/// A file's size is a multiple of this many bytes: guests map persistent memory by 2 MiB pages (Linux:
/// `SUBSECTION_SIZE`).
pub const SIZE_UNIT: u64 = 2 << 20;

/// Which file to use, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    /// The guest's writes are dropped.
    pub read_only: bool,
}

/// Why a file cannot be the guest's memory, or cannot be it any longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error(
        "{} is not a file, so it cannot be persistent memory: name a file, or use --disk",
        path.display()
    )]
    NotAFile { path: PathBuf },
    #[error(
        "{} has {bytes} bytes, but persistent memory comes in units of 2 MiB: grow it with `truncate -s %2M {}`",
        path.display(),
        path.display()
    )]
    Size { path: PathBuf, bytes: u64 },
    #[error("cannot map {} into memory: {source}", path.display())]
    Map { path: PathBuf, source: io::Error },
    #[error(
        "the file {} was cut from {before} to {now} bytes while the guest had it as memory: what it held is lost, so \
         leave it alone while a machine runs",
        path.display()
    )]
    Shrunk {
        path: PathBuf,
        before: u64,
        now: u64,
    },
}

/// The mapping of a file. Clones share it.
#[derive(Clone, Debug)]
pub struct Mapping {
    path: PathBuf,
    region: Arc<FileRegion>,
    /// Made when it is first asked for.
    changes: Arc<OnceLock<Option<Arc<OwnedFd>>>>,
}

impl Mapping {
    /// The memory, to be given to a machine.
    pub fn region(&self) -> &Arc<FileRegion> {
        &self.region
    }

    /// Readable when a program has changed the file by system calls since this was called first, which a guest's stores
    /// are not. `None` where the host has no more watches to give; then a file that is cut is found out only by
    /// [`Mapping::check`].
    pub fn changes(&self) -> Option<&Arc<OwnedFd>> {
        let changes = self.changes.get_or_init(|| match watch(&self.path) {
            Ok(changes) => Some(Arc::new(changes)),
            Err(error) => {
                log::debug!("{} cannot be watched: {error}", self.path.display());
                None
            }
        });
        changes.as_ref()
    }

    /// Takes note of what made [`Mapping::changes`] readable.
    pub fn acknowledge(&self) {
        if let Some(Some(changes)) = self.changes.get() {
            // What remains makes it readable again.
            let _ = rustix::io::read(changes, &mut [0; 4096]);
        }
    }

    /// Whether the file still has all that is mapped of it.
    ///
    /// # Errors
    /// [`Error::Shrunk`].
    pub fn check(&self) -> Result<(), Error> {
        let before = self.region.size();
        match self.region.file_size() {
            Ok(now) if now < before => Err(Error::Shrunk {
                path: self.path.clone(),
                before,
                now,
            }),
            _ => Ok(()),
        }
    }
}

/// An open file that is mapped. When it is dropped, it waits for a flush under way.
pub struct File {
    disk: Disk,
    mapping: Mapping,
    /// A flush needs none, but an operation comes with some.
    no_ram: GuestRam,
}

impl File {
    /// Opens, locks and maps a file: one writer, or any number of readers, disks of this and other machines among
    /// them.
    ///
    /// # Errors
    /// When there is none, it cannot be opened so, somebody else has it, or its size is not one of persistent memory.
    pub fn open(options: &Options) -> Result<File, Error> {
        let path = options.path.clone();
        let is_device = |kind: std::fs::FileType| !kind.is_file() && !kind.is_dir();
        if std::fs::metadata(&path).is_ok_and(|metadata| is_device(metadata.file_type())) {
            return Err(Error::NotAFile { path });
        }
        let opened = Disk::open_with_file(&disk::Options {
            path: path.clone(),
            read_only: options.read_only,
            direct: false,
            format: Format::Raw,
            // One flush at a time.
            depth: 1,
        });
        let (disk, file) = match opened {
            Err(disk::Error::OddSize { path, bytes }) => return Err(Error::Size { path, bytes }),
            opened => opened?,
        };
        let bytes = disk.capacity();
        if !bytes.is_multiple_of(SIZE_UNIT) {
            return Err(Error::Size { path, bytes });
        }
        let region = match FileRegion::map(file, bytes, options.read_only) {
            Ok(region) => Arc::new(region),
            Err(source) => return Err(Error::Map { path, source }),
        };
        let mapping = Mapping {
            path,
            region,
            changes: Arc::default(),
        };
        Ok(File {
            disk,
            mapping,
            no_ram: GuestRam::new(),
        })
    }

    /// The file's path, for messages.
    pub fn path(&self) -> &Path {
        &self.mapping.path
    }

    /// Size in bytes, a multiple of 2 MiB.
    pub fn size(&self) -> u64 {
        self.mapping.region.size()
    }

    /// What a machine is given.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Readable when a flush has ended, for the event loop to watch.
    pub fn event(&self) -> Arc<OwnedFd> {
        self.disk.event()
    }

    /// Starts to make all that has been stored so far last. One flush at a time; if it has not ended when this returns,
    /// its end is told by [`File::flushed`].
    pub fn flush(&mut self) -> Poll<io::Result<()>> {
        match self.disk.submit(0, &self.no_ram, Operation::Flush) {
            Poll::Pending => self.flushed().map_or(Poll::Pending, Poll::Ready),
            ended => ended,
        }
    }

    /// How the flush ended, if it has. To be called when [`File::event`] is readable.
    pub fn flushed(&mut self) -> Option<io::Result<()>> {
        let completion = self.disk.proceed().pop()?;
        Some(completion.result)
    }

    /// Waits for a flush under way and forgets its end.
    pub fn drain(&mut self) {
        self.disk.drain();
    }
}

/// An inotify descriptor that hears of changes of a file.
fn watch(path: &Path) -> Result<OwnedFd, Errno> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
    Ok(watch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::children;

    fn options(path: &Path) -> Options {
        Options {
            path: path.to_owned(),
            read_only: false,
        }
    }

    fn refusal(options: &Options) -> String {
        match File::open(options) {
            Ok(_) => panic!("{} was opened", options.path.display()),
            Err(error) => error.to_string(),
        }
    }

    fn sized(path: &Path, bytes: u64) {
        std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
    }

    #[test]
    fn what_cannot_be_persistent_memory_is_refused_in_a_sentence_that_names_it() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        sized(&at("empty"), 0);
        sized(&at("odd"), 1000);
        sized(&at("small"), 1 << 20);
        for (path, words) in [
            (at("missing"), "there is no disk image"),
            (at(""), "is a directory"),
            ("/dev/null".into(), "is not a file"),
            (at("empty"), "is empty"),
            (at("odd"), "`truncate -s %2M "),
            (at("small"), "has 1048576 bytes"),
        ] {
            let sentence = refusal(&options(&path));
            assert!(sentence.contains(words), "{sentence}");
            assert!(sentence.contains(path.to_str().unwrap()), "{sentence}");
            assert!(!sentence.contains('\n'), "{sentence}");
        }
    }

    #[test]
    fn a_file_has_one_writer_be_it_as_memory_or_as_a_disk() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pmem.img");
        sized(&path, 2 << 20);
        let reading = Options {
            read_only: true,
            ..options(&path)
        };
        let disk = disk::Options {
            path: path.clone(),
            read_only: false,
            direct: false,
            format: Format::Raw,
            depth: 1,
        };
        let _closing = children::none();
        let writer = File::open(&options(&path)).unwrap();
        assert!(refusal(&options(&path)).contains("in use"));
        assert!(refusal(&reading).contains("in use"));
        assert!(Disk::open(&disk).is_err());
        // A machine may have the mapping for longer than the device lives.
        let mapping = writer.mapping().clone();
        drop(writer);
        assert!(refusal(&reading).contains("in use"));
        drop(mapping);
        let readers = [File::open(&reading).unwrap(), File::open(&reading).unwrap()];
        assert!(refusal(&options(&path)).contains("in use"));
        drop(readers);
        assert!(File::open(&options(&path)).is_ok());
    }

    #[test]
    fn a_mapping_knows_when_its_file_was_cut() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pmem.img");
        sized(&path, 4 << 20);
        let file = File::open(&options(&path)).unwrap();
        assert_eq!(file.size(), 4 << 20);
        let changes = file.mapping().changes().unwrap();
        sized(&path, 8 << 20);
        assert!(file.mapping().check().is_ok(), "growing does no harm");
        wait(changes);
        file.mapping().acknowledge();
        assert_eq!(rustix::io::read(changes, &mut [0; 4096]), Err(Errno::AGAIN));
        sized(&path, 4096);
        wait(changes);
        let sentence = file.mapping().check().unwrap_err().to_string();
        assert!(
            sentence.contains("from 4194304 to 4096 bytes"),
            "{sentence}"
        );
    }

    #[test]
    fn a_flush_ends_and_is_told_once() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pmem.img");
        for read_only in [false, true] {
            // A file each: a child that another test is just starting may still hold the lock of the one before.
            let path = path.with_extension(read_only.to_string());
            sized(&path, 2 << 20);
            let mut file = File::open(&Options {
                read_only,
                ..options(&path)
            })
            .unwrap();
            let result = match file.flush() {
                Poll::Ready(result) => result,
                Poll::Pending => {
                    wait(&file.event());
                    file.flushed().unwrap()
                }
            };
            assert!(result.is_ok());
            assert!(file.flushed().is_none());
            let _ = file.flush();
            file.drain();
            assert!(file.flushed().is_none());
        }
    }

    fn wait(event: &OwnedFd) {
        let mut fds = [rustix::event::PollFd::new(
            event,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, None).unwrap();
    }
}
