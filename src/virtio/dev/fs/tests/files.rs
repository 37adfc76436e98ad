//! What programs do with files.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

#[test]
fn a_file_is_found_opened_read_and_closed() {
    let mut rig = Rig::new();
    let content: Vec<u8> = (0..5000).map(|n| (n % 251) as u8).collect();
    rig.write_file("a", &content);
    let (node, attr) = rig.lookup(ROOT, "a").unwrap();
    let host = fs::metadata(rig.at("a")).unwrap();
    assert_eq!((attr.size, attr.ino), (5000, host.ino()));
    assert_eq!((attr.mode, attr.links), (host.mode(), 1));
    assert_eq!((attr.uid, attr.gid), (host.uid(), host.gid()));
    assert_eq!(rig.getattr(node).unwrap().size, 5000);
    let handle = rig.open(node, RDONLY).unwrap();
    assert!(rig.read(node, handle, 0, 4096).unwrap() == content[..4096]);
    assert!(rig.read(node, handle, 4096, 4096).unwrap() == content[4096..]);
    assert_eq!(rig.read(node, handle, 5000, 10).unwrap(), b"");
    assert_eq!(rig.read(node, handle, u64::MAX, 10), Err(libc::EINVAL));
    // As the guest asks by an open file.
    let body = bytes!(1_u32, 0_u32, handle);
    let answer = rig.ask(GETATTR, node, &[&body]).unwrap();
    assert_eq!(Attr::parse(&answer[16..]).size, 5000);
    assert_eq!(rig.write(node, handle, 0, b"x"), Err(libc::EBADF));
    let release = bytes!(handle, 0_u32, 0_u32, 0_u64);
    rig.ask(RELEASE, node, &[&release]).unwrap();
    assert_eq!(rig.ask(RELEASE, node, &[&release]), Err(libc::EBADF));
    assert_eq!(rig.read(node, handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn a_file_is_created_written_synced_and_truncated() {
    let mut rig = Rig::new();
    let (node, handle) = rig.create(ROOT, "new", RDWR, 0o666).unwrap();
    assert_eq!(rig.write(node, handle, 2, b"abc").unwrap(), 3);
    assert_eq!(fs::read(rig.at("new")).unwrap(), b"\0\0abc");
    let mode = fs::metadata(rig.at("new")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o666, "the umask of sarang does not count");
    for flags in [0_u32, 1] {
        rig.ask(FSYNC, node, &[&bytes!(handle, flags, 0_u32)])
            .unwrap();
    }
    let flush = rig.ask(FLUSH, node, &[&bytes!(handle, 0_u32, 0_u32, 0_u64)]);
    assert_eq!(flush, Err(libc::ENOSYS), "need not be asked again");
    // By handle and by node.
    for (valid, size) in [(1 << 3 | 1 << 6, 1), (1 << 3, 4)] {
        let set = Set {
            valid,
            handle,
            size,
            ..Set::default()
        };
        assert_eq!(rig.setattr(node, &set).unwrap().size, size);
    }
    assert_eq!(fs::read(rig.at("new")).unwrap(), b"\0\0\0\0");
    // What is there is opened, unless it has to be new.
    let trunc = RDWR | libc::O_TRUNC as u32;
    assert_eq!(rig.create(ROOT, "new", trunc, 0o666).unwrap().0, node);
    assert_eq!(rig.getattr(node).unwrap().size, 0);
    let exclusive = RDWR | libc::O_EXCL as u32;
    assert_eq!(rig.create(ROOT, "new", exclusive, 0), Err(libc::EEXIST));
    // Appending is the host's business, so that both sides may do it.
    let append = rig.open(node, RDWR | libc::O_APPEND as u32).unwrap();
    rig.write(node, append, 0, b"one").unwrap();
    rig.write(node, append, 0, b"two").unwrap();
    assert_eq!(fs::read(rig.at("new")).unwrap(), b"onetwo");
}

#[test]
fn attributes_are_set() {
    let mut rig = Rig::new();
    rig.write_file("a", b"");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    let set = Set {
        valid: 1 << 0 | 1 << 4 | 1 << 5,
        mode: 0o100_751,
        time: 1_000_000,
        ..Set::default()
    };
    assert_eq!(rig.setattr(node, &set).unwrap().mode, 0o100_751);
    let host = fs::metadata(rig.at("a")).unwrap();
    assert_eq!(host.mode() & 0o7777, 0o751);
    assert_eq!((host.atime(), host.atime_nsec()), (1_000_000, 5));
    assert_eq!((host.mtime(), host.mtime_nsec()), (1_000_000, 6));
    let now = Set {
        valid: 1 << 5 | 1 << 8,
        ..Set::default()
    };
    rig.setattr(node, &now).unwrap();
    let host = fs::metadata(rig.at("a")).unwrap();
    assert!(host.mtime() > 1_000_000);
    assert_eq!(host.atime(), 1_000_000);
    let nobody = Set {
        valid: 1 << 1,
        uid: u32::MAX,
        ..Set::default()
    };
    assert_eq!(rig.setattr(node, &nobody).unwrap_err(), libc::EINVAL);
}

#[test]
fn a_write_by_someone_who_may_not_keep_them_drops_set_id_bits() {
    let mut rig = Rig::new();
    rig.write_file("a", b"");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    let handle = rig.open(node, RDWR).unwrap();
    fs::set_permissions(rig.at("a"), fs::Permissions::from_mode(0o6755)).unwrap();
    let kill = 1_u32 << 2;
    let body = bytes!(handle, 0_u64, 1_u32, kill, 0_u64, 0_u32, 0_u32);
    rig.ask(WRITE, node, &[&body, b"x"]).unwrap();
    assert_eq!(rig.getattr(node).unwrap().mode & 0o7777, 0o755);
    fs::set_permissions(rig.at("a"), fs::Permissions::from_mode(0o6755)).unwrap();
    let set = Set {
        valid: 1 << 3 | 1 << 11,
        ..Set::default()
    };
    assert_eq!(rig.setattr(node, &set).unwrap().mode & 0o7777, 0o755);
    fs::set_permissions(rig.at("a"), fs::Permissions::from_mode(0o6755)).unwrap();
    let trunc = RDWR | libc::O_TRUNC as u32;
    rig.ask(OPEN, node, &[&bytes!(trunc, 1_u32)]).unwrap();
    assert_eq!(rig.getattr(node).unwrap().mode & 0o7777, 0o755);
}

#[test]
fn names_are_made_moved_and_removed() {
    let mut rig = Rig::new();
    let directory = rig.mkdir(ROOT, "d").unwrap();
    assert_eq!(rig.mkdir(ROOT, "d"), Err(libc::EEXIST));
    assert!(rig.at("d").is_dir());
    let (file, _) = rig.create(directory, "f", RDWR, 0o600).unwrap();
    let link = rig.ask(LINK, ROOT, &[&file.to_le_bytes(), &name("hard")]);
    assert_eq!(u64_at(&link.unwrap(), 0), file, "one file, one node");
    assert_eq!(rig.getattr(file).unwrap().links, 2);
    // From d/f to moved, which leaves the node what it is.
    let body = [&ROOT.to_le_bytes()[..], &name("f"), &name("moved")].concat();
    rig.ask(RENAME, directory, &[&body]).unwrap();
    assert_eq!(rig.lookup(ROOT, "moved").unwrap().0, file);
    let rename2 = |flags: u32, old: &str, new: &str| {
        [bytes!(ROOT, flags, 0_u32), name(old), name(new)].concat()
    };
    let taken = rig.ask(RENAME2, ROOT, &[&rename2(1, "moved", "hard")]);
    assert_eq!(taken, Err(libc::EEXIST));
    rig.ask(RENAME2, ROOT, &[&rename2(2, "moved", "d")])
        .unwrap();
    assert!(rig.at("moved").is_dir() && rig.at("d").is_file());
    let whiteout = rig.ask(RENAME2, ROOT, &[&rename2(4, "d", "e")]);
    assert_eq!(whiteout, Err(libc::EINVAL));
    assert_eq!(rig.ask(UNLINK, ROOT, &[&name("moved")]), Err(libc::EISDIR));
    rig.ask(UNLINK, ROOT, &[&name("d")]).unwrap();
    rig.ask(UNLINK, ROOT, &[&name("hard")]).unwrap();
    assert_eq!(rig.ask(RMDIR, ROOT, &[&name("none")]), Err(libc::ENOENT));
    rig.ask(RMDIR, ROOT, &[&name("moved")]).unwrap();
    assert_eq!(fs::read_dir(&rig.path).unwrap().count(), 0);
    assert_eq!(rig.getattr(file).unwrap().links, 0, "still open");
}

#[test]
fn a_link_is_text_for_the_guest() {
    let mut rig = Rig::new();
    let body = [name("l"), name("/etc/passwd")].concat();
    let entry = rig.ask(SYMLINK, ROOT, &[&body]).unwrap();
    let node = u64_at(&entry, 0);
    assert_eq!(Attr::parse(&entry[40..]).mode & 0o170_000, 0o120_000);
    assert_eq!(rig.ask(READLINK, node, &[]).unwrap(), b"/etc/passwd");
    // Another name for the link itself, not for what it points to.
    let hard = rig.ask(LINK, ROOT, &[&node.to_le_bytes(), &name("l2")]);
    assert_eq!(u64_at(&hard.unwrap(), 0), node);
    // Its own times can be set; its permissions mean nothing.
    let times = Set {
        valid: 1 << 5,
        time: 99,
        ..Set::default()
    };
    rig.setattr(node, &times).unwrap();
    assert_eq!(fs::symlink_metadata(rig.at("l")).unwrap().mtime(), 99);
    assert_ne!(fs::metadata("/etc/passwd").unwrap().mtime(), 99);
    let mode = Set {
        valid: 1,
        mode: 0o777,
        ..Set::default()
    };
    assert_eq!(rig.setattr(node, &mode).unwrap_err(), libc::EOPNOTSUPP);
    let file = rig.create(ROOT, "f", RDWR, 0o600).unwrap().0;
    assert_eq!(rig.ask(READLINK, file, &[]), Err(libc::EINVAL));
}

#[test]
fn directories_are_read_in_pieces_with_or_without_attributes() {
    let mut rig = Rig::new();
    for number in 0..100 {
        rig.write_file(&format!("file-{number:03}"), b"");
    }
    rig.mkdir(ROOT, "below").unwrap();
    for (opcode, plus) in [(READDIR, false), (READDIRPLUS, true)] {
        let handle = u64_at(&rig.ask(OPENDIR, ROOT, &[&[0; 8]]).unwrap(), 0);
        let (mut offset, mut found) = (0_u64, Vec::new());
        loop {
            let body = bytes!(handle, offset, 1000_u32, 0_u32, 0_u64, 0_u32, 0_u32);
            let answer = rig.ask(opcode, ROOT, &[&body]).unwrap();
            assert!(answer.len() <= 1000);
            let entries = entries(&answer, plus);
            let Some(last) = entries.last() else { break };
            offset = last.2;
            found.extend(entries);
        }
        let mut names: Vec<&str> = found.iter().map(|entry| &*entry.4).collect();
        names.sort_unstable();
        assert_eq!(
            (names.len(), names[2], names[102]),
            (103, "below", "file-099")
        );
        for (node, ino, _, kind, name) in &found {
            let itself = name == "." || name == "..";
            assert_eq!(*node != 0, plus && !itself, "{name}");
            assert_eq!(*kind, if itself || name == "below" { 4 } else { 8 });
            if itself {
                assert_eq!(
                    *ino,
                    fs::metadata(&rig.path).unwrap().ino(),
                    "nothing of what is above"
                );
            }
            if plus && !itself {
                assert_eq!(rig.getattr(*node).unwrap().ino, *ino);
            }
        }
        // An entry that does not fit is not left out in silence.
        let body = bytes!(handle, 0_u64, 10_u32, 0_u32, 0_u64, 0_u32, 0_u32);
        assert_eq!(rig.ask(opcode, ROOT, &[&body]), Err(libc::EINVAL));
        rig.ask(FSYNCDIR, ROOT, &[&bytes!(handle, 0_u32, 0_u32)])
            .unwrap();
        let release = bytes!(handle, 0_u32, 0_u32, 0_u64);
        rig.ask(RELEASEDIR, ROOT, &[&release]).unwrap();
    }
    // All were counted once, and `below` twice.
    assert_eq!(rig.budget.left(), 1000 - 101);
}

#[test]
fn a_directory_can_be_emptied_while_it_is_read() {
    // A tmpfs, where a position counts the entries that are before it at the time.
    let mut rig = Rig::sharing(tempfile::tempdir_in("/dev/shm").unwrap(), false, 1000);
    rig.mount();
    for number in 0..300 {
        rig.write_file(&format!("file-{number:03}"), b"");
    }
    let handle = u64_at(&rig.ask(OPENDIR, ROOT, &[&[0; 8]]).unwrap(), 0);
    let mut offset = 0_u64;
    loop {
        let body = bytes!(handle, offset, 2000_u32, 0_u32, 0_u64, 0_u32, 0_u32);
        let answer = rig.ask(READDIRPLUS, ROOT, &[&body]).unwrap();
        let entries = entries(&answer, true);
        let Some(last) = entries.last() else { break };
        offset = last.2;
        for entry in entries.iter().filter(|entry| entry.4.starts_with("file")) {
            rig.ask(UNLINK, ROOT, &[&name(&entry.4)]).unwrap();
        }
    }
    assert_eq!(fs::read_dir(&rig.path).unwrap().count(), 0);
}

#[test]
fn extended_attributes_pass_through() {
    let mut rig = Rig::new();
    rig.write_file("a", b"");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    let set = |flags: u32, value: &[u8]| {
        [
            &bytes!(value.len() as u32, flags)[..],
            &name("user.k"),
            value,
        ]
        .concat()
    };
    if rig.ask(SETXATTR, node, &[&set(0, b"value")]) == Err(libc::EOPNOTSUPP) {
        // The host's file system has none, and that is what the guest is told.
        return;
    }
    assert_eq!(rig.ask(SETXATTR, node, &[&set(1, b"x")]), Err(libc::EEXIST));
    assert_eq!(rig.ask(SETXATTR, node, &[&set(4, b"x")]), Err(libc::EINVAL));
    let get = |size: u32, key: &str| [bytes!(size, 0_u32), name(key)].concat();
    let len = rig.ask(GETXATTR, node, &[&get(0, "user.k")]).unwrap();
    assert_eq!(len, bytes!(5_u32, 0_u32));
    for size in [5, 1000, u32::MAX] {
        let value = rig.ask(GETXATTR, node, &[&get(size, "user.k")]);
        assert_eq!(value.unwrap(), b"value");
    }
    assert_eq!(
        rig.ask(GETXATTR, node, &[&get(4, "user.k")]),
        Err(libc::ERANGE)
    );
    assert_eq!(
        rig.ask(GETXATTR, node, &[&get(9, "user.n")]),
        Err(libc::ENODATA)
    );
    let acl = rig.ask(GETXATTR, node, &[&get(9, "system.posix_acl_access")]);
    assert_eq!(acl, Err(libc::EOPNOTSUPP));
    let list = rig
        .ask(LISTXATTR, node, &[&bytes!(u32::MAX, 0_u32)])
        .unwrap();
    assert!(list.split(|byte| *byte == 0).any(|key| key == b"user.k"));
    rig.ask(REMOVEXATTR, node, &[&name("user.k")]).unwrap();
    assert_eq!(
        rig.ask(REMOVEXATTR, node, &[&name("user.k")]),
        Err(libc::ENODATA)
    );
}

#[test]
fn space_is_reserved_searched_and_copied() {
    let mut rig = Rig::new();
    let (node, handle) = rig.create(ROOT, "a", RDWR, 0o600).unwrap();
    let fallocate = |mode: u32, len: u64| bytes!(handle, 0_u64, len, mode, 0_u32);
    rig.ask(FALLOCATE, node, &[&fallocate(0, 8192)]).unwrap();
    assert_eq!(rig.getattr(node).unwrap().size, 8192);
    let collapse = rig.ask(FALLOCATE, node, &[&fallocate(8, 4096)]);
    assert_eq!(collapse, Err(libc::EOPNOTSUPP));
    rig.write(node, handle, 0, b"data").unwrap();
    let seek = |whence: u32| bytes!(handle, 0_u64, whence, 0_u32);
    let data = rig.ask(LSEEK, node, &[&seek(3)]).unwrap();
    assert_eq!(data, 0_u64.to_le_bytes());
    let hole = u64_at(&rig.ask(LSEEK, node, &[&seek(4)]).unwrap(), 0);
    assert!((4..=8192).contains(&hole));
    assert_eq!(rig.ask(LSEEK, node, &[&seek(0)]), Err(libc::EINVAL));
    let (to_node, to) = rig.create(ROOT, "b", RDWR, 0o600).unwrap();
    let copy = bytes!(handle, 1_u64, to_node, to, 2_u64, 3_u64, 0_u64);
    let copied = rig.ask(COPY_FILE_RANGE, node, &[&copy]).unwrap();
    assert_eq!(u32_at(&copied, 0), 3);
    assert_eq!(fs::read(rig.at("b")).unwrap(), b"\0\0ata");
    let statfs = rig.ask(STATFS, node, &[]).unwrap();
    assert_eq!(statfs.len(), 80);
    assert_eq!(u32_at(&statfs, 44), 255, "the longest name");
}

#[test]
fn what_the_host_changes_is_seen() {
    let mut rig = Rig::new();
    assert_eq!(rig.lookup(ROOT, "a").unwrap_err(), libc::ENOENT);
    rig.write_file("a", b"one");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    rig.write_file("a", b"longer");
    assert_eq!(rig.getattr(node).unwrap().size, 6);
    fs::remove_file(rig.at("a")).unwrap();
    rig.write_file("a", b"another");
    assert_ne!(rig.lookup(ROOT, "a").unwrap().0, node);
    assert_eq!(
        rig.getattr(node).unwrap().size,
        6,
        "the old file, while it is known"
    );
}
