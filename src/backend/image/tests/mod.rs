//! Archives and images as programs make them, and what e2fsprogs finds in the disks that come of them.

mod cached;
mod disks;
mod hostile;
mod images;

use std::fs;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::stream::digest;
use super::{Build, Built, Error, Progress, Result, Source};
use crate::worker::children;

/// Does not end the work.
pub fn patient(_: &Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A tar in the making.
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    pub fn new() -> Tar {
        Tar { bytes: Vec::new() }
    }

    /// Any entry. The path and link are written as they are.
    pub fn entry(
        mut self,
        kind: u8,
        path: &str,
        mode: u32,
        (uid, gid): (u64, u64),
        link: &str,
        data: &[u8],
    ) -> Tar {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(EntryType::new(kind));
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(1_600_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, path: &str, data: &str) -> Tar {
        self.entry(b'0', path, 0o644, (0, 0), "", data.as_bytes())
    }

    pub fn directory(self, path: &str, mode: u32) -> Tar {
        self.entry(b'5', path, mode, (0, 0), "", b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Tar {
        self.entry(b'2', path, 0o777, (0, 0), target, b"")
    }

    pub fn hard_link(self, path: &str, target: &str) -> Tar {
        self.entry(b'1', path, 0o644, (0, 0), target, b"")
    }

    pub fn device(mut self, kind: u8, path: &str, major: u32, minor: u32) -> Tar {
        let mut header = Header::new_gnu();
        header.set_path(path).unwrap();
        header.set_entry_type(EntryType::new(kind));
        header.set_mode(0o660);
        header.set_uid(0);
        header.set_gid(6);
        header.set_size(0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self
    }

    /// An extended header for the next entry.
    pub fn records(mut self, records: &[(&str, &[u8])]) -> Tar {
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        let bytes = builder.into_inner().unwrap();
        self.bytes.extend(&bytes[..bytes.len() - 1024]);
        self
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// The tar of a layer, and how it is compressed.
pub type Packed = (Vec<u8>, fn(&[u8]) -> Vec<u8>);

/// An OCI image layout in the making: files by name.
#[derive(Clone)]
pub struct Layout {
    pub files: Vec<(String, Vec<u8>)>,
    pub index: Vec<Value>,
}

impl Layout {
    pub fn new() -> Layout {
        let marker = br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec();
        Layout {
            files: vec![("oci-layout".to_owned(), marker)],
            index: Vec::new(),
        }
    }

    pub fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        let name = super::blobs::blob_name(&digest);
        self.files.push((name, bytes.to_vec()));
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// A manifest with its configuration and layers: tars, packed as they should be.
    pub fn manifest(&mut self, config: &Value, platform: (&str, &str), layers: &[Packed]) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|(tar, _)| digest(tar)).collect();
        let configuration = json!({
            "os": platform.0,
            "architecture": platform.1,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            configuration.to_string().as_bytes(),
        );
        let layers: Vec<Value> = layers
            .iter()
            .map(|(tar, pack)| self.blob("application/vnd.oci.image.layer.v1.tar", &pack(tar)))
            .collect();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let mut descriptor = self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().as_bytes(),
        );
        descriptor["platform"] = json!({"os": platform.0, "architecture": platform.1});
        descriptor
    }

    /// Lists something in the index, under a tag.
    pub fn tag(&mut self, mut descriptor: Value, tag: &str) {
        if !tag.is_empty() {
            descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        }
        self.index.push(descriptor);
    }

    /// All files, with the index.
    pub fn all(&self) -> Vec<(String, Vec<u8>)> {
        let index = json!({"schemaVersion": 2, "manifests": self.index});
        let mut files = self.files.clone();
        files.push(("index.json".to_owned(), index.to_string().into_bytes()));
        files
    }

    pub fn write(&self, directory: &Path) {
        for (name, bytes) in self.all() {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
}

/// A layout with one image of these layers.
pub fn image(config: &Value, layers: &[Packed]) -> Layout {
    let mut layout = Layout::new();
    let manifest = layout.manifest(config, ("linux", "amd64"), layers);
    layout.tag(manifest, "latest");
    layout
}

pub fn plain(tar: &[u8]) -> Vec<u8> {
    tar.to_vec()
}

/// Files as an archive.
pub fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Makes a disk of a path, which may have a reference behind it.
pub fn build_with(source: &str, target: &Path, options: &Build<'_>) -> Result<Built> {
    let source = Source::open(source.as_ref())?;
    source.build(target, options, &mut patient)
}

pub fn build(source: &Path, target: &Path) -> Result<Built> {
    build_with(source.to_str().unwrap(), target, &Build::default())
}

/// Makes a disk of an archive and checks it. Everything happens in `scratch`.
pub fn disk_of(scratch: &Path, archive: &[u8]) -> Result<PathBuf> {
    let (source, target) = (scratch.join("source"), scratch.join("disk.ext4"));
    fs::write(&source, archive).unwrap();
    let options = Build {
        replace: true,
        ..Build::default()
    };
    build_with(source.to_str().unwrap(), &target, &options)?;
    check(&target);
    Ok(target)
}

fn tool(name: &str) -> Command {
    let path = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists());
    Command::new(path.unwrap_or_else(|| panic!("{name} is missing: install e2fsprogs")))
}

/// Has e2fsck look for anything wrong.
pub fn check(disk: &Path) {
    let _child = children::some();
    let output = tool("e2fsck").arg("-fn").arg(disk).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What debugfs says to a request.
pub fn debugfs(disk: &Path, request: &[u8]) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let _child = children::some();
    let output = tool("debugfs")
        .args(["-R"])
        .arg(std::ffi::OsStr::from_bytes(request))
        .arg(disk)
        .output()
        .unwrap();
    output.stdout
}

pub fn cat(disk: &Path, path: &str) -> String {
    let bytes = debugfs(disk, format!("cat \"{path}\"").as_bytes());
    String::from_utf8(bytes).unwrap()
}

/// What debugfs says about a file, with one space between words.
pub fn stat(disk: &Path, path: &str) -> String {
    let text = debugfs(disk, format!("stat \"{path}\"").as_bytes());
    let text = String::from_utf8_lossy(&text).into_owned();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The names in a directory of a disk, but for `.`, `..` and `lost+found`.
pub fn names(disk: &Path, path: &str) -> Vec<String> {
    let text = debugfs(disk, format!("ls -p \"{path}\"").as_bytes());
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut names: Vec<String> = text
        .lines()
        .filter_map(|line| line.split('/').nth(5))
        .filter(|name| !matches!(*name, "" | "." | ".." | "lost+found"))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

/// Whether all of `words` are in `text`.
pub fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

/// The sentence that an attempt came to.
pub fn sentence<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this should have failed"),
        Err(error) => error.to_string(),
    }
}

/// The names in a directory of the host.
pub fn left_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<_> = entries
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_build_that_is_interrupted_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("file"), vec![7; 5 << 20]).unwrap();
    let tar = Tar::new()
        .entry(b'0', "file", 0o644, (0, 0), "", &vec![7; 5 << 20])
        .finish();
    let packed = tree.path().join("tar.gz");
    fs::write(&packed, gzip(&tar)).unwrap();
    let target = scratch.path().join("disk.ext4");
    for source in [tree.path(), &packed] {
        let source = Source::open(source.as_os_str()).unwrap();
        let mut told = 0;
        let mut count = |_: &Progress<'_>| {
            told += 1;
            ControlFlow::Continue(())
        };
        source
            .build(&target, &Build::default(), &mut count)
            .unwrap();
        fs::remove_file(&target).unwrap();
        for last in (0..told).step_by(usize::try_from(told).unwrap() / 8 + 1) {
            let mut left = last;
            let mut impatient = |_: &Progress<'_>| {
                left -= 1;
                if left < 0 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            };
            let stopped = source.build(&target, &Build::default(), &mut impatient);
            assert!(matches!(stopped, Err(Error::Interrupted)));
            assert!(left_in(scratch.path()).is_empty());
        }
    }
}
