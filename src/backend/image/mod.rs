//! Guests' roots: what a path is, and a root disk made of it.
//!
//! A guest boots from a disk, but what people have is a directory, a tar, or a container image. This takes any of them
//! and writes an ext4 image with the right owners, modes, links and devices, without root and without mounting
//! anything:
//!
//! ```text
//!   recognise ──▶ directory ──────────────────────────────────▶ tree ──▶ ext4
//!             ──▶ entries (a tar) ──▶ unpack ─────────────────▶
//!             ──▶ blobs ──▶ oci, docker ──▶ layers ──▶ unpack ▶
//! ```
//!
//! An archive is not trusted. Digests are verified, paths are resolved inside the tree and never on the host, and
//! what it may take of memory and disk is bounded.
//!
//! How a container image wants to be run goes into the root disk as `/.sarang/config.json` (an [`ImageConfig`]), where
//! [`read_config`] finds it again, however the disk is copied or renamed.

mod blobs;
mod cache;
mod compression;
mod config;
mod contents;
mod directory;
mod docker;
mod entries;
mod error;
mod ext4;
mod names;
mod oci;
mod output;
mod recognise;
mod stored;
mod stream;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

use std::ffi::OsStr;
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use cache::{cache_directory, ensure_disk};
pub use compression::Compression;
pub use config::{Identity, ImageConfig};
pub use error::{Error, Result};
pub use recognise::{Disk, Kind};
pub use stored::read_config;

use blobs::Blobs;
use contents::Spool;
use entries::Entries;
use oci::{Chosen, Layer};
use output::Partial;
use stream::{Hashed, Range, Sequential};
use tree::Tree;
use unpack::{Part, Unpack};

/// How far some work is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is being done.
    pub what: &'a str,
    /// Bytes, or files, done.
    pub done: u64,
    /// Of how many; 0 if that is not known.
    pub total: u64,
}

/// Is told of progress again and again, and may end the work.
pub type Watch<'a> = dyn FnMut(&Progress<'_>) -> ControlFlow<()> + 'a;

/// Something that can be a guest's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    path: PathBuf,
    reference: Option<String>,
    kind: Kind,
}

/// How a root disk is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Build<'a> {
    /// Bytes of the file system. Without it, what is needed and some more.
    pub size: Option<u64>,
    /// The file system's name, up to 16 bytes.
    pub label: Option<&'a str>,
    /// Whether a file that is there is replaced.
    pub replace: bool,
}

/// A root disk that has been made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Built {
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes that the contents of its files have.
    pub content: u64,
    /// Names in all its directories.
    pub files: usize,
    /// The image it was made of: the digest of its manifest or configuration.
    pub digest: Option<String>,
    pub config: Option<ImageConfig>,
}

/// What there is to say about a source without unpacking it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    pub kind: &'static str,
    pub compression: Option<&'static str>,
    /// Bytes of the file. A directory's are not counted.
    pub size: Option<u64>,
    /// All images in it, by tag or digest.
    pub images: Vec<String>,
    /// The image that was asked for, or the only one: the digest of its manifest or configuration.
    pub digest: Option<String>,
    pub layers: Vec<LayerSummary>,
    pub config: Option<ImageConfig>,
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerSummary {
    /// The digest of the layer, or of the tar in it.
    pub digest: Option<String>,
    /// Bytes, compressed as it is.
    pub size: u64,
}

impl Source {
    /// Takes a path, which for images may have `:TAG` or `@DIGEST` behind it.
    ///
    /// # Errors
    /// One sentence when it cannot be read, or is nothing that can be a root.
    pub fn open(text: &OsStr) -> Result<Source> {
        let (path, reference) = split(text);
        let kind = recognise::recognise(&path)?;
        if let Some(reference) = &reference
            && let Kind::Directory | Kind::Tar(_) | Kind::Disk(_) = kind
        {
            return Err(Error::NoReferences {
                path,
                kind: kind.name(),
                reference: reference.clone(),
            });
        }
        Ok(Source {
            path,
            reference,
            kind,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tag or digest that was asked for.
    pub fn reference(&self) -> Option<&str> {
        self.reference.as_deref()
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Says what is in it, without unpacking more than is needed for that.
    ///
    /// # Errors
    /// When an image cannot be read, or there is none of that tag.
    pub fn summary(&self, watch: &mut Watch<'_>) -> Result<Summary> {
        let found = std::fs::metadata(&self.path).map_err(Error::reading(&self.path))?;
        let mut summary = Summary {
            path: self.path.clone(),
            kind: self.kind.id(),
            compression: self.kind.compression().name(),
            size: found.is_file().then_some(found.len()),
            images: Vec::new(),
            digest: None,
            layers: Vec::new(),
            config: None,
        };
        match self.kind {
            Kind::Disk(Disk::Ext4) => summary.config = read_config(&self.path)?,
            Kind::Directory | Kind::Tar(_) | Kind::Disk(_) => {}
            Kind::OciLayout | Kind::OciArchive(_) | Kind::DockerArchive(_) => {
                let blobs = self.blobs(&std::env::temp_dir(), watch)?;
                summary.images = match self.kind {
                    Kind::DockerArchive(_) => docker::tags(&blobs)?,
                    _ => oci::tags(&blobs)?,
                };
                let chosen = match self.choose(&blobs) {
                    Err(Error::Ambiguous { .. }) => return Ok(summary),
                    chosen => chosen?,
                };
                let layer = |layer: &Layer| LayerSummary {
                    digest: layer.digest.clone().or_else(|| layer.diff_id.clone()),
                    size: layer.blob.len,
                };
                summary.layers = chosen.layers.iter().map(layer).collect();
                summary.config = Some(ImageConfig::of(&chosen.configuration));
                summary.digest = Some(chosen.digest);
            }
        }
        Ok(summary)
    }

    /// Makes a root disk of it: an ext4 file system in the file `target`, which is not there before all is in it.
    ///
    /// # Errors
    /// One sentence about what is wrong with the source, the target or the size.
    pub fn build(
        &self,
        target: &Path,
        options: &Build<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Built> {
        if let Kind::Disk(_) = self.kind {
            return Err(Error::NoDiskNeeded {
                path: self.path.clone(),
                kind: self.kind.name(),
            });
        }
        let partial = Partial::create(target, options.replace)?;
        let directory = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let (tree, digest, config) = self.tree(directory, options, partial.identities(), watch)?;
        let settings = ext4::Options {
            source: &self.path,
            target,
            size: options.size,
            label: options.label,
        };
        let size = ext4::write(&tree, &settings, partial.file(), watch)?;
        partial.complete()?;
        Ok(Built {
            path: target.to_owned(),
            size,
            content: tree.bytes(),
            files: tree.len(),
            digest,
            config,
        })
    }

    /// All that is in it, the digest of the image, and how that wants to be run. What has to be unpacked goes to a
    /// nameless file in the directory `room`.
    fn tree(
        &self,
        room: &Path,
        options: &Build<'_>,
        except: Vec<(u64, u64)>,
        watch: &mut Watch<'_>,
    ) -> Result<(Tree, Option<String>, Option<ImageConfig>)> {
        if self.kind == Kind::Directory {
            let mut reading = directory::Reading {
                caller: directory::caller(),
                except,
                watch,
            };
            return Ok((reading.all(&self.path)?, None, None));
        }
        let mut tree = Tree::new();
        let mut spool = Spool::new(room, &self.path)?;
        if let Kind::Tar(compression) = self.kind {
            let whole = recognise::open(&self.path)?;
            let layer = Layer {
                blob: whole,
                digest: None,
                diff_id: None,
            };
            let mut unpack = Unpack {
                tree: &mut tree,
                spool: &mut spool,
                limit: options.size,
                path: &self.path,
                watch,
            };
            self.unpack(&mut unpack, &layer, "unpacking the tar", Some(compression))?;
            return Ok((tree, None, None));
        }
        let blobs = self.blobs(room, watch)?;
        let chosen = self.choose(&blobs)?;
        let count = chosen.layers.len();
        for (index, layer) in chosen.layers.iter().enumerate() {
            tree.begin_layer();
            let what = format!("unpacking layer {} of {count}", index + 1);
            let mut unpack = Unpack {
                tree: &mut tree,
                spool: &mut spool,
                limit: options.size,
                path: &self.path,
                watch,
            };
            self.unpack(&mut unpack, layer, &what, None)?;
        }
        let mut config = ImageConfig::of(&chosen.configuration);
        config.identify(&self.path, &tree)?;
        stored::put_config(&mut tree, &config);
        Ok((tree, Some(chosen.digest), Some(config)))
    }

    /// Adds a layer, or a plain tar whose compression is known, to the tree.
    fn unpack(
        &self,
        unpack: &mut Unpack<'_, '_>,
        layer: &Layer,
        what: &str,
        plain: Option<Compression>,
    ) -> Result<()> {
        let blob = &layer.blob;
        let compression = match plain {
            Some(compression) => compression,
            None => {
                let mut first = Vec::new();
                let read = blob.clone().take(8).read_to_end(&mut first);
                read.map_err(Error::reading(&self.path))?;
                Compression::of(&first)
            }
        };
        let mut part = Part {
            what,
            total: 0,
            layer: plain.is_none(),
            backing: None,
        };
        if compression == Compression::None {
            part.total = blob.len;
            part.backing = Some((blob.file.clone(), blob.offset));
        }
        // A plain tar that is not compressed need not be read, only looked at.
        if let (Compression::None, Some(_)) = (compression, plain) {
            let mut entries = Entries::new(blob.clone());
            unpack.all(&part, &mut entries)?;
            self.warn_of_no_end(&entries);
            return Ok(());
        }
        let mut packed = Hashed::new(blob.clone());
        let mut unpacked = Hashed::new(compression.unpack(&mut packed));
        let mut entries = Entries::new(Sequential(&mut unpacked));
        let mut done = unpack.all(&part, &mut entries);
        if plain.is_some() && done.is_ok() {
            self.warn_of_no_end(&entries);
        }
        if done.is_ok() {
            done = unpack.drain(&part, &mut unpacked);
        }
        let diff_id = unpacked.digest();
        // A damaged layer is damaged first of all, whatever its damage leads to. If the disk is full or somebody has
        // had enough, its digest does not matter.
        if let (Some(expected), Ok(()) | Err(Error::Archive { .. } | Error::Entry { .. })) =
            (&layer.digest, &done)
        {
            unpack.drain(&part, &mut packed)?;
            self.verify("a layer", expected, &packed.digest())?;
        }
        done?;
        match &layer.diff_id {
            Some(expected) => self.verify("an unpacked layer", expected, &diff_id),
            None => Ok(()),
        }
    }

    fn warn_of_no_end<R: stream::Input>(&self, entries: &Entries<R>) {
        if !entries.has_marked_end() {
            log::warn!(
                "the archive {} has no end mark: perhaps not all of it is there",
                self.path.display()
            );
        }
    }

    fn verify(&self, what: &str, expected: &str, found: &str) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        Err(Error::Digest {
            path: self.path.clone(),
            what: what.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        })
    }

    /// The files of an image. A compressed archive is first unpacked to a nameless file in the directory `room`.
    fn blobs(&self, room: &Path, watch: &mut Watch<'_>) -> Result<Blobs> {
        if self.kind == Kind::OciLayout {
            return Ok(Blobs::Directory(self.path.clone()));
        }
        let mut whole = recognise::open(&self.path)?;
        let compression = self.kind.compression();
        if compression != Compression::None {
            let mut spool = Spool::new(room, &self.path)?;
            let (file, len) = spool.take(compression.unpack(whole), |done| {
                let progress = Progress {
                    what: "unpacking the archive",
                    done,
                    total: 0,
                };
                match watch(&progress) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(Error::Interrupted),
                }
            })?;
            whole = Range {
                file,
                offset: 0,
                len,
            };
        }
        Blobs::of_archive(&self.path, &whole)
    }

    fn choose(&self, blobs: &Blobs) -> Result<Chosen> {
        match self.kind {
            Kind::DockerArchive(_) => docker::choose(blobs, self.reference()),
            _ => oci::choose(blobs, self.reference()),
        }
    }
}

/// JSON has no paths that are not UTF-8; what is not is shown as well as can be.
fn as_text<S: serde::Serializer>(
    path: &Path,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Takes a reference from behind a path: what stands after `@`, or after a `:` before which there is something. A path
/// that exists as it is has none.
fn split(text: &OsStr) -> (PathBuf, Option<String>) {
    let bytes = text.as_bytes();
    let whole = || (PathBuf::from(text), None);
    if Path::new(text).symlink_metadata().is_ok() {
        return whole();
    }
    for (at, byte) in bytes.iter().enumerate().rev() {
        if !matches!(byte, b':' | b'@') {
            continue;
        }
        let path = Path::new(OsStr::from_bytes(&bytes[..at]));
        if let Ok(reference) = std::str::from_utf8(&bytes[at + 1..])
            && !reference.is_empty()
            && path.exists()
        {
            return (path.to_owned(), Some(reference.to_owned()));
        }
    }
    whole()
}
