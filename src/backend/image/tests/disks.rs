//! Trees of files as disks, compared with what they were made of.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::super::read_config;
use super::*;

/// Everything below a directory: its kind and permissions, and what is in it or where it leads.
fn contents(root: &Path) -> BTreeMap<Vec<u8>, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let found = path.symlink_metadata().unwrap();
            let bytes = if found.is_dir() {
                open.push(path.clone());
                Vec::new()
            } else if found.is_symlink() {
                fs::read_link(&path)
                    .unwrap()
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
            } else {
                digest(&fs::read(&path).unwrap()).into_bytes()
            };
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
            if name != b"lost+found" {
                all.insert(name.to_vec(), (found.mode(), bytes));
            }
        }
    }
    all
}

/// Has debugfs take all files out of a disk.
fn unpacked(disk: &Path, into: &Path) -> BTreeMap<Vec<u8>, (u32, Vec<u8>)> {
    fs::create_dir(into).unwrap();
    debugfs(disk, format!("rdump / {}", into.display()).as_bytes());
    contents(into)
}

#[test]
fn a_directory_with_thousands_of_files_comes_out_as_it_went_in() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("root");
    let odd = |name: &[u8]| root.join(OsStr::from_bytes(name));
    fs::create_dir_all(root.join("many")).unwrap();
    for number in 0..2000 {
        let name = format!("many/{number}-{}", "n".repeat(number % 200));
        fs::write(root.join(name), format!("file {number}")).unwrap();
    }
    // A name of the longest kind, and some that are no text, in a directory with an index and in one without.
    fs::write(root.join("l".repeat(255)), "long").unwrap();
    for name in [
        &b"many/caf\xe9"[..],
        b"many/\xff",
        b"caf\xe9",
        b"caf\xe8",
        b"xxxx",
        b"xxx0",
        b"xxx1",
        b"xxx2",
    ] {
        fs::write(odd(name), name).unwrap();
    }
    fs::create_dir(odd(b"d\xef\xbf")).unwrap();
    fs::write(odd(b"d\xef\xbf/inside"), "inside").unwrap();
    let far = [&b"to/caf\xe9/"[..], &[b'f'; 100]].concat();
    for (name, target) in [
        (&b"short"[..], &b"to/caf\xe9"[..]),
        (b"long", &far),
        (b"li\xf1k", b"plain"),
    ] {
        std::os::unix::fs::symlink(OsStr::from_bytes(target), odd(name)).unwrap();
    }
    let mut deep = root.clone();
    for level in 0..100 {
        deep.push(format!("level{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "bottom").unwrap();
    fs::write(root.join("program"), "x").unwrap();
    fs::set_permissions(root.join("program"), PermissionsExt::from_mode(0o6711)).unwrap();
    let disk = scratch.path().join("disk");
    build(&root, &disk).unwrap();
    check(&disk);
    let out = unpacked(&disk, &scratch.path().join("out"));
    let mut expected = contents(&root);
    // debugfs does not set these bits on the host.
    expected.get_mut(&b"program"[..]).unwrap().0 &= !0o6000;
    let mut out_masked = out.clone();
    out_masked.get_mut(&b"program"[..]).unwrap().0 &= !0o6000;
    for (name, value) in &expected {
        assert_eq!(out_masked.get(name), Some(value), "{}", name.escape_ascii());
    }
    assert_eq!(out_masked.len(), expected.len());
    says(&stat(&disk, "/program"), &["Mode: 06711"]);
    assert_eq!(read_config(&disk).unwrap(), None);
}

#[test]
fn a_large_sparse_file_stays_sparse_in_the_disk_and_on_the_host() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("root");
    fs::create_dir(&root).unwrap();
    let file = fs::File::create(root.join("sparse")).unwrap();
    file.set_len(100 << 20).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(&[7; 200_000], 60 << 20).unwrap();
    let disk = scratch.path().join("disk");
    let built = build(&root, &disk).unwrap();
    check(&disk);
    assert!(built.content < 1 << 20, "{}", built.content);
    assert!(built.size < 80 << 20, "{}", built.size);
    let found = fs::metadata(&disk).unwrap();
    assert_eq!(found.len(), built.size);
    assert!(found.blocks() * 512 < 8 << 20, "{}", found.blocks());
    let out = scratch.path().join("out");
    debugfs(&disk, format!("dump /sparse {}", out.display()).as_bytes());
    assert!(fs::read(out).unwrap() == fs::read(root.join("sparse")).unwrap());
}

#[test]
fn devices_pipes_links_attributes_and_owners_are_those_of_the_tar() {
    let scratch = tempfile::tempdir().unwrap();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10];
    let tar = Tar::new()
        .directory("./", 0o750)
        .device(b'3', "dev/null", 1, 3)
        .device(b'4', "dev/sda", 8, 260)
        .entry(b'6', "run/pipe", 0o622, (5, 6), "", b"")
        .records(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"hello"),
            ("SCHILY.xattr.nonsense", b"left out"),
            ("uid", b"2000000000"),
            ("mtime", b"1234567890.5"),
        ])
        .file("bin/ping", "ping")
        .hard_link("bin/ping4", "/bin/ping")
        .file("twice", "first")
        .file("./twice", "second")
        .symlink("far", &"f/".repeat(45))
        .entry(b'0', "empty", 0o444, (0, 0), "", b"")
        .finish();
    for pack in [plain, gzip, zstd] {
        let disk = disk_of(scratch.path(), &pack(&tar)).unwrap();
        says(&stat(&disk, "/"), &["Mode: 0750"]);
        says(
            &stat(&disk, "/dev/null"),
            &["character special", "number: 01:03", "Group: 6"],
        );
        says(
            &stat(&disk, "/dev/sda"),
            &["block special", "number: 08:260"],
        );
        says(
            &stat(&disk, "/run/pipe"),
            &["Type: FIFO", "User: 5 Group: 6"],
        );
        says(
            &stat(&disk, "/bin/ping"),
            &[
                "Links: 2",
                "User: 2000000000",
                "user.note (5) = \"hello\"",
                "security.capability (20)",
                "mtime: 0x499602d2:77359400",
            ],
        );
        assert_eq!(cat(&disk, "/bin/ping4"), "ping");
        assert_eq!(cat(&disk, "/twice"), "second");
        says(&stat(&disk, "/far"), &["Type: symlink", "Size: 90"]);
        says(&stat(&disk, "/empty"), &["Size: 0", "Mode: 0444"]);
        let other = scratch.path().join("again");
        fs::copy(&disk, &other).unwrap();
        let disk = disk_of(scratch.path(), &pack(&tar)).unwrap();
        assert!(
            fs::read(disk).unwrap() == fs::read(other).unwrap(),
            "the same every time"
        );
    }
}

#[test]
fn access_lists_of_a_directory_are_stored_as_ext4_wants_them() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "x").unwrap();
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 4, 1000),
        (4, 4, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let set = rustix::fs::lsetxattr(
        root.join("file"),
        "system.posix_acl_access",
        &list,
        rustix::fs::XattrFlags::empty(),
    );
    if set.is_err() {
        // This file system has no access lists; the conversion has a test of its own.
        return;
    }
    let disk = scratch.path().join("disk");
    build(&root, &disk).unwrap();
    check(&disk);
    // Five entries of 4 bytes, one of them with an id, and the version.
    says(&stat(&disk, "/file"), &["system.posix_acl_access"]);
}

#[test]
fn a_size_that_is_too_small_is_told_with_one_that_is_enough() {
    let scratch = tempfile::tempdir().unwrap();
    let tar = Tar::new()
        .entry(b'0', "file", 0o644, (0, 0), "", &[7; 20 << 20])
        .finish();
    let source = scratch.path().join("tar");
    fs::write(&source, tar).unwrap();
    let disk = scratch.path().join("disk");
    let with = |size: u64| {
        let options = Build {
            size: Some(size),
            label: Some("root"),
            replace: true,
        };
        build_with(source.to_str().unwrap(), &disk, &options)
    };
    says(&sentence(with(8 << 20)), &["--size", "8M"]);
    says(
        &sentence(with(22 << 20)),
        &["22M is too small", "at least 90M"],
    );
    assert_eq!(left_in(scratch.path()), ["tar"]);
    with(90 << 20).unwrap();
    check(&disk);
    with(64 << 30).unwrap();
    check(&disk);
    assert_eq!(fs::metadata(&disk).unwrap().len(), 64 << 30);
    let stats = String::from_utf8(debugfs(&disk, b"stats")).unwrap();
    says(&stats, &["root"]);
}

#[test]
fn an_image_made_inside_its_own_source_is_not_part_of_itself() {
    let scratch = tempfile::tempdir().unwrap();
    fs::write(scratch.path().join("file"), "x").unwrap();
    let disk = scratch.path().join("disk");
    let options = Build {
        replace: true,
        ..Build::default()
    };
    for _ in 0..2 {
        build_with(scratch.path().to_str().unwrap(), &disk, &options).unwrap();
        check(&disk);
        assert_eq!(names(&disk, "/"), ["file"]);
    }
}

#[test]
fn what_ext4_keeps_for_itself_is_left_out_of_the_root() {
    let scratch = tempfile::tempdir().unwrap();
    let tar = Tar::new()
        .directory("lost+found", 0o700)
        .file("lost+found/#12", "found")
        .file("sub/lost+found/kept", "kept")
        .finish();
    let disk = disk_of(scratch.path(), &tar).unwrap();
    assert_eq!(names(&disk, "/lost+found"), Vec::<String>::new());
    assert_eq!(cat(&disk, "/sub/lost+found/kept"), "kept");
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("root");
    fs::create_dir(&root).unwrap();
    let file = root.join("file");
    fs::write(&file, vec![7; 1 << 20]).unwrap();
    let source = Source::open(root.as_os_str()).unwrap();
    let mut shrink = |progress: &Progress<'_>| {
        if progress.what == "writing the image" {
            let opened = fs::OpenOptions::new().write(true).open(&file).unwrap();
            opened.set_len(10).unwrap();
        }
        ControlFlow::Continue(())
    };
    let disk = scratch.path().join("disk");
    let failed = source.build(&disk, &Build::default(), &mut shrink);
    assert!(matches!(failed, Err(Error::Changed { path }) if path == file));
    assert_eq!(left_in(scratch.path()), ["root"]);
}
