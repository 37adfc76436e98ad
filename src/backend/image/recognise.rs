//! What a path is, by what is in it and never by its name.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::compression::Compression;
use super::entries::{Entries, is_header};
use super::stream::{Input, Range, Sequential};
use super::{Error, Result};

/// Bytes that are looked at: btrfs has its magic number in the second 64 KiB.
const FIRST: usize = 68 << 10;

/// What can be a guest's root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A tree of files.
    Directory,
    /// A tree of files in one file.
    Tar(Compression),
    /// A directory that holds images (OCI image specification, image-layout.md).
    OciLayout,
    /// The same in one file.
    OciArchive(Compression),
    /// What `docker save` writes.
    DockerArchive(Compression),
    /// The blocks of a disk or of one file system.
    Disk(Disk),
}

/// What a disk image has in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    Ext4,
    Xfs,
    Btrfs,
    Squashfs,
    Erofs,
    Partitions,
    Qcow2,
}

impl Disk {
    /// What a disk holds that begins like this.
    fn of(first: &[u8]) -> Option<Disk> {
        const MAGIC: &[(usize, &[u8], Disk)] = &[
            (0, b"QFI\xfb", Disk::Qcow2),
            (0, b"XFSB", Disk::Xfs),
            (0, b"hsqs", Disk::Squashfs),
            (0x400, &[0xe2, 0xe1, 0xf5, 0xe0], Disk::Erofs),
            // s_magic in the superblock at 1024; ext2 and ext3 have the same.
            (0x438, &[0x53, 0xef], Disk::Ext4),
            (0x1_0040, b"_BHRfS_M", Disk::Btrfs),
            // The header of a GPT, in the second sector of 512 or 4096 bytes.
            (0x200, b"EFI PART", Disk::Partitions),
            (0x1000, b"EFI PART", Disk::Partitions),
        ];
        let magic = MAGIC.iter().find(|(at, magic, _)| {
            let end = at + magic.len();
            first.get(*at..end) == Some(*magic)
        });
        if let Some((_, _, disk)) = magic {
            return Some(*disk);
        }
        // A master boot record: four entries of 16 bytes, whose first says 0x00 or 0x80, then the signature.
        let table = first.get(446..512)?;
        let mut entries = table.chunks_exact(16);
        let plausible = entries.all(|entry| entry[0] & 0x7f == 0);
        let used = table.chunks_exact(16).any(|entry| entry[4] != 0);
        (table[64..] == [0x55, 0xaa] && plausible && used).then_some(Disk::Partitions)
    }

    fn name(self) -> &'static str {
        match self {
            Disk::Ext4 => "a disk image with an ext4 file system",
            Disk::Xfs => "a disk image with an xfs file system",
            Disk::Btrfs => "a disk image with a btrfs file system",
            Disk::Squashfs => "a disk image with a squashfs file system",
            Disk::Erofs => "a disk image with an erofs file system",
            Disk::Partitions => "a disk image with partitions",
            Disk::Qcow2 => "a qcow2 disk image",
        }
    }
}

impl Kind {
    /// What it is, for a person.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Directory => "a directory",
            Kind::Tar(_) => "a tar",
            Kind::OciLayout => "an OCI image layout",
            Kind::OciArchive(_) => "an OCI image layout in a tar",
            Kind::DockerArchive(_) => "a docker-archive",
            Kind::Disk(disk) => disk.name(),
        }
    }

    /// What it is, for a program.
    pub fn id(self) -> &'static str {
        match self {
            Kind::Directory => "directory",
            Kind::Tar(_) => "tar",
            Kind::OciLayout => "oci-layout",
            Kind::OciArchive(_) => "oci-archive",
            Kind::DockerArchive(_) => "docker-archive",
            Kind::Disk(_) => "disk",
        }
    }

    /// How the file is compressed.
    pub fn compression(self) -> Compression {
        match self {
            Kind::Tar(compression)
            | Kind::OciArchive(compression)
            | Kind::DockerArchive(compression) => compression,
            Kind::Directory | Kind::OciLayout | Kind::Disk(_) => Compression::None,
        }
    }
}

/// Looks at what is at `path`.
///
/// # Errors
/// One sentence when it cannot be read, or is nothing that can be a root.
pub(super) fn recognise(path: &Path) -> Result<Kind> {
    let found = std::fs::metadata(path).map_err(Error::reading(path))?;
    let kind = found.file_type();
    if found.is_dir() {
        // So that one that may not be read is told at once.
        std::fs::read_dir(path).map_err(Error::reading(path))?;
        let layout = path.join("oci-layout").is_file() && path.join("index.json").is_file();
        return Ok(if layout {
            Kind::OciLayout
        } else {
            Kind::Directory
        });
    }
    if !found.is_file() && !kind.is_block_device() {
        let path = path.to_owned();
        return Err(Error::Special { path });
    }
    let whole = open(path)?;
    let mut first = Vec::new();
    let read = whole.clone().take(FIRST as u64).read_to_end(&mut first);
    read.map_err(Error::reading(path))?;
    if first.is_empty() {
        let path = path.to_owned();
        return Err(Error::Empty { path });
    }
    if is_header(&first) {
        return Ok(archive(path, whole, Compression::None));
    }
    if let Some(disk) = Disk::of(&first) {
        return Ok(Kind::Disk(disk));
    }
    let compression = Compression::of(&first);
    let Some(name) = compression.name() else {
        let path = path.to_owned();
        return Err(Error::Unknown { path });
    };
    let mut inside = Vec::new();
    let unpacked = compression.unpack(whole.clone());
    match unpacked.take(512).read_to_end(&mut inside) {
        Ok(_) if is_header(&inside) => {
            let unpacked = Sequential(compression.unpack(whole));
            Ok(archive(path, unpacked, compression))
        }
        Ok(_) => Err(Error::NoTarInside {
            path: path.to_owned(),
            compression: name,
        }),
        Err(error) => Err(Error::Archive {
            path: path.to_owned(),
            why: format!("it does not unpack ({error})"),
        }),
    }
}

/// All of a file or block device.
pub(super) fn open(path: &Path) -> Result<Range> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::reading(path))?;
    let len = length(&file).map_err(Error::reading(path))?;
    Ok(Range {
        file: Arc::new(file),
        offset: 0,
        len,
    })
}

/// The metadata of a block device has no size, but its end can be sought.
fn length(mut file: &File) -> io::Result<u64> {
    io::Seek::seek(&mut file, io::SeekFrom::End(0))
}

/// What a tar is for. An archive of images has nothing but images in it, so the first name of another kind says that
/// it is a plain one. A damaged archive is taken for plain: reading it will tell.
fn archive<R: Input>(path: &Path, input: R, compression: Compression) -> Kind {
    let mut entries = Entries::new(input);
    let mut seen = HashSet::new();
    loop {
        match entries.next() {
            Ok(Some(entry)) => {
                let name = super::blobs::clean(&entry.path);
                if !belongs_to_images(&name) {
                    return Kind::Tar(compression);
                }
                if let name @ (b"oci-layout" | b"index.json" | b"manifest.json") = &name[..] {
                    seen.insert(name.to_vec());
                }
            }
            Ok(None) => break,
            Err(error) => {
                log::debug!("{}: {error}", path.display());
                break;
            }
        }
    }
    let has = |name: &str| seen.contains(name.as_bytes());
    if has("oci-layout") && has("index.json") {
        Kind::OciArchive(compression)
    } else if has("manifest.json") {
        Kind::DockerArchive(compression)
    } else {
        Kind::Tar(compression)
    }
}

/// Whether archives of images have files of this name.
fn belongs_to_images(name: &[u8]) -> bool {
    const FILES: &[&[u8]] = &[
        b"",
        b"blobs",
        b"oci-layout",
        b"index.json",
        b"manifest.json",
        b"repositories",
    ];
    if FILES.contains(&name) || name.starts_with(b"blobs/") {
        return true;
    }
    // `DIGEST.json`, `DIGEST.tar`, `DIGEST/layer.tar` and so on: the digest of an image or layer comes first.
    let digest = name.split(|byte| matches!(byte, b'.' | b'/')).next();
    digest.is_some_and(|digest| digest.len() == 64 && digest.iter().all(u8::is_ascii_hexdigit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar(names: &[&str]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, io::empty()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn with(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 80 << 10];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        bytes
    }

    #[test]
    fn files_are_known_by_what_is_in_them() {
        let digest = "0123456789abcdef".repeat(4);
        let layer = format!("{digest}/layer.tar");
        let config = format!("{digest}.json");
        let blob = format!("blobs/sha256/{digest}");
        let oci = tar(&["oci-layout", &blob, "index.json", "manifest.json"]);
        let docker = tar(&[&layer, &config, "manifest.json", "repositories"]);
        let plain = tar(&["etc/passwd", "manifest.json"]);
        let mut boot = with(510, &[0x55, 0xaa]);
        boot[446 + 4] = 0x83;
        let scratch = tempfile::tempdir().unwrap();
        for (bytes, expected) in [
            (plain.clone(), Kind::Tar(Compression::None)),
            (gzip(&plain), Kind::Tar(Compression::Gzip)),
            (oci.clone(), Kind::OciArchive(Compression::None)),
            (gzip(&oci), Kind::OciArchive(Compression::Gzip)),
            (docker.clone(), Kind::DockerArchive(Compression::None)),
            (gzip(&docker), Kind::DockerArchive(Compression::Gzip)),
            (tar(&["index.json"]), Kind::Tar(Compression::None)),
            (with(0x438, &[0x53, 0xef]), Kind::Disk(Disk::Ext4)),
            (with(0, b"XFSB"), Kind::Disk(Disk::Xfs)),
            (with(0x1_0040, b"_BHRfS_M"), Kind::Disk(Disk::Btrfs)),
            (with(0, b"hsqs"), Kind::Disk(Disk::Squashfs)),
            (with(0, b"QFI\xfb"), Kind::Disk(Disk::Qcow2)),
            (with(512, b"EFI PART"), Kind::Disk(Disk::Partitions)),
            (boot, Kind::Disk(Disk::Partitions)),
        ] {
            let path = scratch.path().join("file");
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(recognise(&path).unwrap(), expected);
        }
    }

    #[test]
    fn a_directory_is_a_layout_only_with_both_of_its_files() {
        let scratch = tempfile::tempdir().unwrap();
        assert_eq!(recognise(scratch.path()).unwrap(), Kind::Directory);
        std::fs::write(scratch.path().join("oci-layout"), "{}").unwrap();
        assert_eq!(recognise(scratch.path()).unwrap(), Kind::Directory);
        std::fs::write(scratch.path().join("index.json"), "{}").unwrap();
        assert_eq!(recognise(scratch.path()).unwrap(), Kind::OciLayout);
    }

    #[test]
    fn what_cannot_be_a_root_is_named_with_the_reason() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str, bytes: &[u8]| {
            let path = scratch.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let cut = gzip(&tar(&["a"]));
        for (path, words) in [
            (scratch.path().join("missing"), "there is no file"),
            (at("empty", b""), "is empty"),
            (at("notes", b"Dear diary"), "not an image that sarang knows"),
            (
                at("blank", &[0; 70 << 10]),
                "not an image that sarang knows",
            ),
            (at("kernel.gz", &gzip(&[7; 4096])), "compressed with gzip"),
            (at("cut.gz", &cut[..12]), "does not unpack"),
            ("/dev/null".into(), "neither a directory"),
        ] {
            let error = recognise(&path).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }
}
