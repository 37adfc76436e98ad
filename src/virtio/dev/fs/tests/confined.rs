//! A guest that wants out of its directory, or more than it was given.

use std::os::unix::fs::{FileTypeExt, symlink};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn names_that_are_no_names_are_refused_everywhere() {
    let mut rig = Rig::new();
    fs::write(rig.path.with_file_name("secret"), "x").unwrap();
    rig.write_file("a", b"");
    rig.mkdir(ROOT, "d").unwrap();
    let (file, _) = rig.lookup(ROOT, "a").unwrap();
    let (directory, _) = rig.lookup(ROOT, "d").unwrap();
    let bad: [&[u8]; 9] = [
        b"\0",
        b".\0",
        b"..\0",
        b"d/x\0",
        b"/etc\0",
        b"../secret\0",
        b"a",
        b"",
        b"a\0b\0",
    ];
    for bad in bad {
        let good = name("new");
        let requests: [(u32, Vec<u8>); 11] = [
            (LOOKUP, bad.to_vec()),
            (UNLINK, bad.to_vec()),
            (RMDIR, bad.to_vec()),
            (MKDIR, [&[0; 8], bad].concat()),
            (
                MKNOD,
                [&bytes!(0o100_644_u32, 0_u32, 0_u64)[..], bad].concat(),
            ),
            (CREATE, [&bytes!(RDWR, 0o600_u32, 0_u64)[..], bad].concat()),
            (SYMLINK, [bad, &good].concat()),
            (LINK, [&file.to_le_bytes()[..], bad].concat()),
            (RENAME, [&ROOT.to_le_bytes()[..], bad, &good].concat()),
            (RENAME, [&ROOT.to_le_bytes()[..], b"a\0", bad].concat()),
            (RENAME2, [&bytes!(ROOT, 0_u64)[..], b"a\0", bad].concat()),
        ];
        for (opcode, body) in requests {
            // `a` without a NUL and a name after it is one name, and lacks the second.
            for node in [ROOT, directory] {
                let refused = rig.ask(opcode, node, &[&body]);
                let expected = [Err(libc::EINVAL), Err(libc::ENOENT)];
                assert!(expected.contains(&refused), "{opcode} {bad:?} {refused:?}");
            }
        }
    }
    let mut names: Vec<_> = fs::read_dir(&rig.path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a", "d"]);
    let long = "x".repeat(256);
    assert_eq!(rig.lookup(ROOT, &long).unwrap_err(), libc::ENAMETOOLONG);
    assert_eq!(rig.lookup(file, "x").unwrap_err(), libc::ENOTDIR);
}

#[test]
fn links_are_never_followed_by_the_host() {
    let mut rig = Rig::new();
    let outside = rig.path.with_file_name("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    symlink(&outside, rig.at("dir")).unwrap();
    symlink(outside.join("secret"), rig.at("file")).unwrap();
    symlink("../outside/new", rig.at("dangling")).unwrap();
    let (dir, attr) = rig.lookup(ROOT, "dir").unwrap();
    assert_eq!(attr.mode & 0o170_000, 0o120_000);
    let (file, _) = rig.lookup(ROOT, "file").unwrap();
    assert_eq!(rig.lookup(dir, "secret").unwrap_err(), libc::ENOTDIR);
    assert_eq!(rig.mkdir(dir, "x"), Err(libc::ENOTDIR));
    assert_eq!(rig.create(dir, "x", RDWR, 0o600), Err(libc::ENOTDIR));
    for node in [dir, file] {
        assert_eq!(rig.open(node, RDONLY), Err(libc::EACCES));
        let opened = rig.ask(OPENDIR, node, &[&[0; 8]]);
        assert_eq!(opened, Err(libc::ENOTDIR));
        let size = Set {
            valid: 1 << 3,
            ..Set::default()
        };
        assert_eq!(rig.setattr(node, &size).unwrap_err(), libc::EACCES);
    }
    // Flags that would make the host's open(2) another call.
    let odd = (libc::O_PATH | libc::O_DIRECTORY | libc::O_TMPFILE | libc::O_CREAT) as u32;
    for name in ["file", "dangling", "dir"] {
        for flags in [RDWR, RDWR | odd, RDONLY | libc::O_PATH as u32] {
            let created = rig.create(ROOT, name, flags, 0o600);
            assert_eq!(created, Err(libc::EACCES), "{name} {flags:#x}");
        }
    }
    assert_eq!(rig.open(file, 3), Err(libc::EINVAL));
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    assert!(!outside.join("new").exists());
}

#[test]
fn a_directory_that_becomes_a_link_while_names_are_looked_up_leads_nowhere() {
    let mut rig = Rig::new();
    let outside = rig.path.with_file_name("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), "secret").unwrap();
    fs::create_dir(rig.at("real")).unwrap();
    rig.write_file("real/f", b"shared");
    symlink(&outside, rig.at("link")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (path, over) = (rig.path.clone(), Arc::clone(&stop));
    let swapper = std::thread::spawn(move || {
        let directory = fs::File::open(&path).unwrap();
        while !over.load(Ordering::Relaxed) {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(&directory, "real", &directory, "link", flags).unwrap();
        }
    });
    let outside_inode =
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(outside.join("f")).unwrap());
    for _ in 0..300 {
        let (node, _) = rig.lookup(ROOT, "real").unwrap();
        match rig.lookup(node, "f") {
            Ok((_, attr)) => assert_ne!(attr.ino, outside_inode),
            Err(error) => assert_eq!(error, libc::ENOTDIR),
        }
        match rig.create(node, "g", RDWR, 0o600) {
            Ok(_) => {}
            Err(error) => assert_eq!(error, libc::ENOTDIR),
        }
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn special_files_have_attributes_but_are_not_opened() {
    let mut rig = Rig::new();
    let fifo = 0o010_600_u32;
    let body = [bytes!(fifo, 0_u32, 0_u64), name("fifo")].concat();
    let entry = rig.ask(MKNOD, ROOT, &[&body]).unwrap();
    assert!(fs::metadata(rig.at("fifo")).unwrap().file_type().is_fifo());
    let socket = std::os::unix::net::UnixListener::bind(rig.at("socket")).unwrap();
    let mut nodes = vec![u64_at(&entry, 0), rig.lookup(ROOT, "socket").unwrap().0];
    let device = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    // Only root can make one.
    if rustix::fs::mknodat(rustix::fs::CWD, rig.at("null"), kind, mode, device).is_ok() {
        let entry = rig.ask(LOOKUP, ROOT, &[&name("null")]).unwrap();
        assert_eq!(u32_at(&entry, 40 + 76), 1 << 8 | 3, "its number is told");
        nodes.push(u64_at(&entry, 0));
    }
    let before = rig.budget.left();
    for node in nodes {
        rig.getattr(node).unwrap();
        for flags in [RDONLY, RDWR, 1, RDONLY | libc::O_PATH as u32] {
            assert_eq!(rig.open(node, flags), Err(libc::EACCES));
        }
        let size = Set {
            valid: 1 << 3,
            ..Set::default()
        };
        assert_eq!(rig.setattr(node, &size).unwrap_err(), libc::EACCES);
        assert_eq!(rig.ask(OPENDIR, node, &[&[0; 8]]), Err(libc::ENOTDIR));
    }
    assert_eq!(rig.create(ROOT, "fifo", RDWR, 0o600), Err(libc::EACCES));
    assert_eq!(rig.budget.left(), before);
    for (mode, expected) in [
        (0o020_600_u32, Err(libc::EPERM)),
        (0o060_600, Err(libc::EPERM)),
        (0o040_700, Err(libc::EPERM)),
        (0o100_600, Ok(())),
        (0o140_600, Ok(())),
    ] {
        let body = [bytes!(mode, 0x103_u32, 0_u64), name(&mode.to_string())].concat();
        let made = rig.ask(MKNOD, ROOT, &[&body]);
        assert_eq!(made.map(drop), expected, "{mode:o}");
    }
    drop(socket);
}

#[test]
fn what_could_wait_for_ever_is_not_there() {
    let mut rig = Rig::new();
    let (node, handle) = rig.create(ROOT, "a", RDWR, 0o600).unwrap();
    // Locks, SETLKW among them, poll, access, ioctl, DAX windows, and what nobody knows.
    for opcode in [
        31, 32, SETLKW, 34, 37, IOCTL, 40, 41, 48, 49, 50, TMPFILE, 52, 999,
    ] {
        let answer = rig.ask(opcode, node, &[&handle.to_le_bytes(), &[0; 120]]);
        assert_eq!(answer, Err(libc::ENOSYS), "{opcode}");
    }
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let mut rig = Rig::read_only();
    rig.write_file("a", b"content");
    fs::create_dir(rig.at("d")).unwrap();
    let (node, before) = rig.lookup(ROOT, "a").unwrap();
    let handle = rig.open(node, RDONLY).unwrap();
    assert_eq!(rig.read(node, handle, 0, 7).unwrap(), b"content");
    for flags in [
        RDWR,
        libc::O_WRONLY as u32,
        RDONLY | libc::O_TRUNC as u32,
        RDWR | libc::O_APPEND as u32,
    ] {
        assert_eq!(rig.open(node, flags), Err(libc::EROFS), "{flags:#x}");
    }
    let two = [name("a"), name("b")].concat();
    let changes: [(u32, Vec<u8>); 20] = [
        (SETATTR, vec![0; 88]),
        (SYMLINK, two.clone()),
        (
            MKNOD,
            [bytes!(0o100_600_u32, 0_u32, 0_u64), name("b")].concat(),
        ),
        (MKDIR, [vec![0; 8], name("b")].concat()),
        (UNLINK, name("a")),
        (RMDIR, name("d")),
        (RENAME, [ROOT.to_le_bytes().to_vec(), two.clone()].concat()),
        (RENAME2, [bytes!(ROOT, 0_u64), two.clone()].concat()),
        (LINK, [node.to_le_bytes().to_vec(), name("b")].concat()),
        (
            WRITE,
            [bytes!(handle, 0_u64, 1_u32, 0_u32, 0_u64, 0_u64), vec![1]].concat(),
        ),
        (CREATE, [bytes!(RDONLY, 0_u32, 0_u64), name("a")].concat()),
        (CREATE, [bytes!(RDWR, 0o600_u32, 0_u64), name("b")].concat()),
        (
            SETXATTR,
            [bytes!(1_u32, 0_u32), name("user.k"), vec![1]].concat(),
        ),
        (REMOVEXATTR, name("user.k")),
        (FALLOCATE, bytes!(handle, 0_u64, 99_u64, 0_u64)),
        (
            COPY_FILE_RANGE,
            bytes!(handle, 0_u64, node, handle, 0_u64, 1_u64, 0_u64),
        ),
        (TMPFILE, bytes!(RDWR, 0_u32, 0_u64)),
        // Broken ones are refused in the same way.
        (SETATTR, Vec::new()),
        (WRITE, Vec::new()),
        (RENAME, Vec::new()),
    ];
    assert_eq!(rig.ask(IOCTL, ROOT, &[&[0; 32]]), Err(libc::ENOSYS));
    for (opcode, body) in changes {
        for target in [node, ROOT] {
            let refused = rig.ask(opcode, target, &[&body]);
            assert_eq!(refused, Err(libc::EROFS), "{opcode}");
        }
    }
    let after = rig.getattr(node).unwrap();
    assert_eq!(
        (after.size, after.mode, after.links),
        (before.size, before.mode, 1)
    );
    assert_eq!(fs::read_dir(&rig.path).unwrap().count(), 2);
}

#[test]
fn the_hosts_processes_are_not_served_below_a_shared_root() {
    let budget = Budget::new(100);
    let share = Share::open(&Options {
        path: "/".into(),
        read_only: false,
        hidden: Vec::new(),
        budget,
    });
    let mut rig = Rig::unmounted(false, 0);
    rig.device = Fs::new(0, "root", share.unwrap());
    rig.driver = Driver::start(&mut rig.device, TRANSPORT_FEATURES);
    rig.mount();
    let (proc, _) = rig.lookup(ROOT, "proc").unwrap();
    let (own, attr) = rig.lookup(proc, &std::process::id().to_string()).unwrap();
    assert_eq!(attr.mode & 0o170_000, 0o040_000);
    let (memory, _) = rig.lookup(own, "mem").unwrap();
    assert_eq!(rig.open(memory, RDWR), Err(libc::EACCES));
    assert_eq!(rig.create(own, "mem", RDWR, 0), Err(libc::EACCES));
    assert_eq!(rig.ask(OPENDIR, proc, &[&[0; 8]]), Err(libc::EACCES));
}
