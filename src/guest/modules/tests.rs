//! Small trees of modules that are no more than a name and what they need.

use std::fs;
use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::*;

/// An ELF object with a section `.modinfo` and nothing else.
fn module(name: &str, depends: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let info = format!("license=GPL\0depends={depends}\0name={name}\0");
    let names_at = 64 + info.len();
    let sections_at = (names_at + names.len()).next_multiple_of(8);
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // A relocatable object for x86-64; three section headers of 64 bytes, the last of which has their names.
    for half in [1_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for long in [0, 0, sections_at as u64] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 0, 0, 64, 3, 2] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(info.as_bytes());
    elf.extend(names);
    elf.resize(sections_at + 64, 0);
    for (name, kind, at, len) in [
        (1_u32, 1_u32, 64, info.len()),
        (10, 3, names_at, names.len()),
    ] {
        elf.extend(name.to_le_bytes());
        elf.extend(kind.to_le_bytes());
        for long in [0, 0, at as u64, len as u64, 0, 1, 0] {
            elf.extend(long.to_le_bytes());
        }
        elf.resize(elf.len().next_multiple_of(64), 0);
        elf.truncate(sections_at + 64 * if name == 1 { 2 } else { 3 });
    }
    elf
}

fn write(root: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// An unpacked package of a kernel 6.1-x in the manner of Debian: some modules, some built in, an index if `indexed`.
fn package(indexed: bool) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    write(root, "boot/vmlinuz-6.1-x", "kernel");
    let tree = root.join("lib/modules/6.1-x");
    for (path, depends) in [
        ("kernel/drivers/virtio/virtio_ring.ko", ""),
        ("kernel/drivers/virtio/virtio.ko", "virtio_ring"),
        ("kernel/drivers/virtio/virtio_mmio.ko", "virtio,virtio_ring"),
        ("kernel/drivers/char/hw_random/virtio-rng.ko", "virtio"),
        ("kernel/drivers/net/virtio_net.ko", "virtio,net_failover"),
        ("kernel/drivers/net/net_failover.ko", "failover"),
        ("kernel/net/core/failover.ko", ""),
        ("kernel/drivers/block/virtio_blk.ko", "virtio"),
        ("kernel/fs/ext4/ext4.ko", "mbcache"),
        ("kernel/fs/mbcache.ko", ""),
        ("kernel/crypto/crc32c_generic.ko", ""),
    ] {
        let name = file::name(path).unwrap();
        write(&tree, path, module(&name, depends));
    }
    write(
        &tree,
        "modules.builtin",
        "kernel/fs/fuse/virtiofs.ko\nkernel/drivers/char/virtio_console.ko\n",
    );
    write(
        &tree,
        "modules.softdep",
        "# a comment\nsoftdep cifs gcm\nsoftdep ext4 pre: crypto-crc32c missing post: virtio_rng\n",
    );
    write(
        &tree,
        "modules.alias",
        "alias pci:v0001 virtio_net\nalias crypto-crc32c crc32c_generic\n",
    );
    if indexed {
        write(
            &tree,
            "modules.dep",
            "kernel/drivers/virtio/virtio_ring.ko:\n\
             kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n\
             kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
             kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
             kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko\n\
             kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
             kernel/net/core/failover.ko:\n\
             kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
             kernel/fs/ext4/ext4.ko: kernel/fs/mbcache.ko\n\
             kernel/fs/mbcache.ko:\n\
             kernel/crypto/crc32c_generic.ko:\n",
        );
    }
    scratch
}

/// The package's tree, with no cache.
fn tree(package: &Path) -> Tree {
    let kernel = package.join("boot/vmlinuz-6.1-x");
    let nowhere = Path::new("/nonexistent");
    let mut tree = Tree::find_in("6.1-x", None, &kernel, nowhere).unwrap();
    tree.cache = Cache::default();
    tree
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn modules_come_behind_what_they_need_with_and_without_an_index() {
    for indexed in [true, false] {
        let package = package(indexed);
        let tree = tree(package.path());
        let modules = tree.load(&[Need::Rng, Need::Net]).unwrap();
        assert_eq!(
            names(&modules),
            [
                "virtio_ring",
                "virtio",
                "virtio_mmio",
                "virtio_rng",
                "failover",
                "net_failover",
                "virtio_net"
            ],
            "indexed: {indexed}"
        );
        assert_eq!(modules[3].bytes, module("virtio_rng", "virtio"));
    }
}

#[test]
fn what_is_asked_for_softly_comes_at_its_time_if_it_exists() {
    let package = package(true);
    let modules = tree(package.path())
        .load(&[Need::Block("ext4".into())])
        .unwrap();
    assert_eq!(
        names(&modules)[3..],
        [
            "virtio_blk",
            "crc32c_generic",
            "mbcache",
            "ext4",
            "virtio_rng"
        ]
    );
}

#[test]
fn what_is_built_in_is_not_loaded_and_what_is_missing_is_named() {
    let package = package(true);
    let tree = tree(package.path());
    let modules = tree.load(&[Need::Console, Need::Fs]).unwrap();
    assert_eq!(names(&modules), ["virtio_ring", "virtio", "virtio_mmio"]);
    for (need, module) in [
        (Need::Overlay, "overlay"),
        (Need::Vsock, "vmw_vsock_virtio_transport"),
        (Need::Balloon, "virtio_balloon"),
        (Need::Pmem, "virtio_pmem"),
        (Need::Block("xfs".into()), "xfs"),
    ] {
        let why = tree.load(&[need]).unwrap_err().to_string();
        assert!(
            why.contains("kernel 6.1-x has no module ") && why.contains(module),
            "{why}"
        );
        assert!(why.contains("--modules"), "{why}");
    }
}

#[test]
fn every_packing_is_unpacked() {
    let package = package(false);
    let tree_path = package.path().join("lib/modules/6.1-x");
    let plain = module("virtio_rng", "virtio");
    let xz = {
        let options = lzma_rust2::XzOptions::default();
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        std::io::Write::write_all(&mut writer, &plain).unwrap();
        writer.finish().unwrap()
    };
    let gz = {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut writer, &plain).unwrap();
        writer.finish().unwrap()
    };
    let zst =
        ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    let path = |end: &str| format!("kernel/drivers/char/hw_random/virtio-rng.ko{end}");
    fs::remove_file(tree_path.join(path(""))).unwrap();
    for (end, packed) in [(".xz", xz), (".gz", gz), (".zst", zst)] {
        write(&tree_path, &path(end), &packed);
        let modules = tree(package.path()).load(&[Need::Rng]).unwrap();
        assert_eq!(modules.last().unwrap().bytes, plain, "{end}");
        write(&tree_path, &path(end), &packed[..packed.len() / 2]);
        let why = tree(package.path())
            .load(&[Need::Rng])
            .unwrap_err()
            .to_string();
        assert!(
            why.contains("virtio-rng.ko") && why.contains("damaged"),
            "{why}"
        );
        fs::remove_file(tree_path.join(path(end))).unwrap();
    }
    write(&tree_path, &path(""), "no ELF file");
    let why = tree(package.path())
        .load(&[Need::Rng])
        .unwrap_err()
        .to_string();
    assert!(why.contains("not an ELF file"), "{why}");
}

#[test]
fn a_tree_is_found_wherever_its_package_was_put() {
    let package = package(true);
    let root = package.path();
    let here = root.join("lib/modules/6.1-x");
    let nowhere = Path::new("/nonexistent/vmlinuz");
    for (given, kernel, installed) in [
        (Some(here.clone()), nowhere.to_owned(), "/nonexistent"),
        (Some(root.to_owned()), nowhere.to_owned(), "/nonexistent"),
        (
            Some(root.join("lib/modules")),
            nowhere.to_owned(),
            "/nonexistent",
        ),
        (None, root.join("boot/vmlinuz-6.1-x"), "/nonexistent"),
        (None, nowhere.to_owned(), root.to_str().unwrap()),
    ] {
        let tree = Tree::find_in("6.1-x", given.as_deref(), &kernel, Path::new(installed)).unwrap();
        let directory = fs::canonicalize(tree.directory()).unwrap();
        assert_eq!(directory, fs::canonicalize(&here).unwrap());
    }
    // And where /lib is not a link to usr/lib but is missing.
    fs::create_dir_all(root.join("usr")).unwrap();
    fs::rename(root.join("lib"), root.join("usr/lib")).unwrap();
    let tree = Tree::find_in("6.1-x", Some(root), nowhere, Path::new("/nonexistent")).unwrap();
    assert!(tree.directory().ends_with("usr/lib/modules/6.1-x"));
}

#[test]
fn a_missing_tree_is_said_to_be_of_which_kernel_and_what_to_do() {
    let scratch = tempfile::tempdir().unwrap();
    let find = |given: Option<&Path>| {
        let kernel = PathBuf::from("/nonexistent/boot/vmlinuz");
        Tree::find_in("6.1-x", given, &kernel, scratch.path())
            .unwrap_err()
            .to_string()
    };
    let why = find(None);
    for part in [
        "kernel 6.1-x",
        "lib/modules/6.1-x",
        "install its package",
        "--modules",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let why = find(Some(scratch.path()));
    assert!(why.contains("has no modules of kernel 6.1-x"), "{why}");
}

#[test]
fn modules_that_need_each_other_come_to_an_end() {
    let package = package(false);
    let tree_path = package.path().join("lib/modules/6.1-x");
    write(
        &tree_path,
        "kernel/a/virtio_balloon.ko",
        module("virtio_balloon", "b"),
    );
    write(&tree_path, "kernel/a/b.ko", module("b", "virtio-balloon"));
    let modules = tree(package.path()).load(&[Need::Balloon]).unwrap();
    assert_eq!(names(&modules)[3..], ["b", "virtio_balloon"]);
}

#[test]
fn a_cache_gives_back_what_it_was_given_or_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("deep/modules");
    let cache = Cache {
        directory: Some(directory.clone()),
    };
    assert_eq!(cache.get("fuse", b"packed"), None);
    cache.put("fuse", b"packed", b"unpacked");
    assert_eq!(
        cache.get("fuse", b"packed").as_deref(),
        Some(&b"unpacked"[..])
    );
    assert_eq!(cache.get("fuse", b"another"), None);
    let files: Vec<PathBuf> = fs::read_dir(&directory)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1, "no scratch file is left");
    let good = fs::read(&files[0]).unwrap();
    for len in [0, 7, 8, good.len() - 1] {
        fs::write(&files[0], &good[..len]).unwrap();
        assert_eq!(cache.get("fuse", b"packed"), None, "cut to {len}");
    }
    fs::write(&files[0], [&good[..], b"!"].concat()).unwrap();
    assert_eq!(cache.get("fuse", b"packed"), None);
    // A place that cannot be written to.
    let none = Cache {
        directory: Some(files[0].join("x")),
    };
    none.put("fuse", b"packed", b"unpacked");
    assert_eq!(none.get("fuse", b"packed"), None);
}

#[test]
fn a_packed_module_comes_from_the_cache_the_second_time() {
    let package = package(false);
    let tree_path = package.path().join("lib/modules/6.1-x");
    let path = "kernel/drivers/char/hw_random/virtio-rng.ko";
    let plain = module("virtio_rng", "virtio");
    let packed =
        ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    fs::remove_file(tree_path.join(path)).unwrap();
    write(&tree_path, &format!("{path}.zst"), &packed);
    let mut tree = tree(package.path());
    tree.cache.directory = Some(package.path().join("cache"));
    assert_eq!(
        tree.load(&[Need::Rng]).unwrap().last().unwrap().bytes,
        plain
    );
    let marked = [&plain[..], b"from the cache"].concat();
    tree.cache.put("virtio_rng", &packed, &marked);
    assert_eq!(
        tree.load(&[Need::Rng]).unwrap().last().unwrap().bytes,
        marked
    );
}

/// A bzImage's header that says `version`, at `offset` behind the boot sector.
fn bzimage(version: &[u8], offset: u16) -> Vec<u8> {
    let mut image = vec![0; 0x600];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&offset.to_le_bytes());
    image.truncate(512 + usize::from(offset));
    image.extend(version);
    image
}

#[test]
fn a_kernel_says_its_version() {
    let elf = |text: &str| [b"\x7fELF", text.as_bytes()].concat();
    for (image, version) in [
        (
            bzimage(b"6.1.0-56-cloud-amd64 (me@host) #1\0", 0x200),
            Some("6.1.0-56-cloud-amd64"),
        ),
        (bzimage(b"6.12.117+deb12\0", 0x3c0), Some("6.12.117+deb12")),
        (bzimage(b"6.1", 0x200), None),
        (bzimage(b"", 0x300), None),
        (bzimage(b"../../etc (x) ", 0x200), None),
        (
            elf("..Linux version %s (%s)\0..Linux version 6.19.1-x (gcc)"),
            Some("6.19.1-x"),
        ),
        (elf("Linux version "), None),
        (b"Linux version 6.1 ".to_vec(), None),
        (Vec::new(), None),
    ] {
        assert_eq!(kernel_version(&image).as_deref(), version);
    }
}

#[test]
fn a_kernel_shows_whether_it_takes_modules() {
    for (text, takes) in [
        ("\x7fELF..6.1-x SMP preempt mod_unload modversions \0", true),
        ("\x7fELF..6.1-x mod_unload \0", true),
        ("\x7fELF..Linux version 6.1-x (me@host) #1 SMP\0", false),
        ("\x7fELF..6.1-xy SMP \0", false),
        ("", false),
    ] {
        assert_eq!(takes_modules(text.as_bytes(), "6.1-x"), takes, "{text}");
    }
}

#[test]
fn a_kernel_without_modules_needs_none_and_a_stranger_is_refused() {
    let nowhere = Path::new("/nonexistent/boot/vmlinux");
    let version = "0.0.1-of-no-host";
    let without = format!("\x7fELF..Linux version {version} (gcc)\0");
    let with = format!("{without}{version} SMP mod_unload \0");
    let load = |image: &str| super::load(image.as_bytes(), nowhere, None, &[Need::Fs]);
    assert_eq!(load(&without).unwrap(), []);
    assert!(matches!(load(&with), Err(Error::NoTree { .. })));
    let why = load("\x7fELF, but no Linux").unwrap_err().to_string();
    assert!(
        why.contains("/nonexistent/boot/vmlinux does not say"),
        "{why}"
    );
}
