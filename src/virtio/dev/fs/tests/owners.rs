//! To whom files belong that a guest creates: as root, and as an ordinary user.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::*;

const NOBODY: u32 = 65_534;

/// Runs `test` on a thread that is not root, and so are the threads of a share that it opens.
fn as_somebody(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
        }
        test();
    });
    thread.join().unwrap();
}

/// Creates one of each kind: the owners that the host sees.
fn create_all(rig: &mut Rig) -> Vec<(u32, u32)> {
    rig.create(ROOT, "file", RDWR, 0o644).unwrap();
    rig.mkdir(ROOT, "directory").unwrap();
    let link = [name("link"), name("target")].concat();
    rig.ask(SYMLINK, ROOT, &[&link]).unwrap();
    let node = [bytes!(0o100_644_u32, 0_u32, 0_u64), name("node")].concat();
    rig.ask(MKNOD, ROOT, &[&node]).unwrap();
    ["file", "directory", "link", "node"]
        .iter()
        .map(|name| {
            let host = fs::symlink_metadata(rig.at(name)).unwrap();
            (host.uid(), host.gid())
        })
        .collect()
}

#[test]
fn as_root_a_new_file_belongs_to_the_guests_user() {
    let mut rig = Rig::new();
    let us = (geteuid().as_raw(), getegid().as_raw());
    fs::set_permissions(&rig.path, fs::Permissions::from_mode(0o755)).unwrap();
    rig.caller = (1234, 5678);
    // Although that user may not write there as the host sees it: the guest's kernel has decided.
    let expected = if us.0 == 0 { rig.caller } else { us };
    assert_eq!(create_all(&mut rig), [expected; 4]);
    // Nobody else has become that user, and the threads of the share are root again.
    assert_eq!((geteuid().as_raw(), getegid().as_raw()), us);
    for status in fs::read_dir("/proc/self/task").unwrap() {
        let Ok(status) = fs::read_to_string(status.unwrap().path().join("status")) else {
            continue;
        };
        let uids = status.lines().find(|line| line.starts_with("Uid:"));
        assert!(!uids.unwrap().contains("1234"), "{uids:?}");
    }
    if us.0 == 0 {
        rig.caller = (u32::MAX, u32::MAX);
        rig.create(ROOT, "odd", RDWR, 0o600).unwrap();
        assert_eq!(fs::metadata(rig.at("odd")).unwrap().uid(), 0);
        // In a directory with set-group-ID, the group is the directory's.
        fs::create_dir(rig.at("group")).unwrap();
        std::os::unix::fs::chown(rig.at("group"), None, Some(42)).unwrap();
        fs::set_permissions(rig.at("group"), fs::Permissions::from_mode(0o2777)).unwrap();
        rig.caller = (1234, 5678);
        let (group, _) = rig.lookup(ROOT, "group").unwrap();
        rig.create(group, "f", RDWR, 0o600).unwrap();
        assert_eq!(fs::metadata(rig.at("group/f")).unwrap().gid(), 42);
    }
}

#[test]
fn as_an_ordinary_user_everything_belongs_to_that_user() {
    as_somebody(|| {
        let us = (geteuid().as_raw(), getegid().as_raw());
        let mut rig = Rig::new();
        for caller in [(0, 0), (1234, 5678)] {
            rig.caller = caller;
            assert_eq!(create_all(&mut rig), [us; 4]);
            for name in ["file", "link", "node"] {
                fs::remove_file(rig.at(name)).unwrap();
            }
            fs::remove_dir(rig.at("directory")).unwrap();
        }
        // It is told who the owner is, and cannot give files away.
        let (node, _) = rig.create(ROOT, "f", RDWR, 0o600).unwrap();
        let chown = |uid| Set {
            valid: 1 << 1,
            uid,
            ..Set::default()
        };
        assert_eq!(rig.getattr(node).unwrap().uid, us.0);
        assert_eq!(rig.setattr(node, &chown(us.0)).unwrap().uid, us.0);
        assert_eq!(rig.setattr(node, &chown(1)).unwrap_err(), libc::EPERM);
        // Hard links need no privileges either.
        let link = [&node.to_le_bytes()[..], &name("g")].concat();
        rig.ask(LINK, ROOT, &[&link]).unwrap();
        // What the host denies that user, it denies the guest.
        fs::set_permissions(rig.at("f"), fs::Permissions::from_mode(0o0)).unwrap();
        assert_eq!(rig.open(node, RDONLY), Err(libc::EACCES));
    });
}

#[test]
fn a_directory_that_may_not_be_read_is_told() {
    as_somebody(|| {
        let scratch = tempfile::tempdir().unwrap();
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o0)).unwrap();
        let error = Share::open(&Options {
            path: scratch.path().into(),
            read_only: false,
            hidden: Vec::new(),
            budget: Budget::new(1),
        });
        let sentence = error.err().unwrap().to_string();
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(sentence.contains("no permission to read"), "{sentence}");
    });
}

#[test]
fn a_directory_whose_entries_may_not_be_looked_up_is_listed_all_the_same() {
    as_somebody(|| {
        let mut rig = Rig::new();
        fs::create_dir(rig.at("d")).unwrap();
        rig.write_file("d/a", b"");
        fs::set_permissions(rig.at("d"), fs::Permissions::from_mode(0o600)).unwrap();
        let (directory, _) = rig.lookup(ROOT, "d").unwrap();
        assert_eq!(rig.lookup(directory, "a").unwrap_err(), libc::EACCES);
        let handle = u64_at(&rig.ask(OPENDIR, directory, &[&[0; 8]]).unwrap(), 0);
        let body = bytes!(handle, 0_u64, 2000_u32, 0_u32, 0_u64, 0_u32, 0_u32);
        let listed = rig.ask(READDIRPLUS, directory, &[&body]).unwrap();
        let listed = entries(&listed, true);
        let found = listed.iter().find(|entry| entry.4 == "a");
        assert_eq!(found.unwrap().0, 0, "without a node");
        fs::set_permissions(rig.at("d"), fs::Permissions::from_mode(0o700)).unwrap();
    });
}

#[test]
fn in_a_home_that_may_not_be_read_secrets_are_hidden_all_the_same() {
    as_somebody(|| {
        let scratch = tempfile::tempdir().unwrap();
        let shared = scratch.path().join("shared");
        for directory in ["home", "dots/ssh"] {
            fs::create_dir_all(shared.join(directory)).unwrap();
        }
        std::os::unix::fs::symlink("../dots/ssh", shared.join("home/.ssh")).unwrap();
        fs::set_permissions(shared.join("home"), fs::Permissions::from_mode(0o300)).unwrap();
        // So many names that a list of what there is would be asked for.
        let names: Vec<String> = (0..50).map(|number| format!("home/.{number}")).collect();
        let mut hidden: Vec<&str> = names.iter().map(|name| &**name).collect();
        hidden.push("home/.ssh");
        let mut rig = Rig::hiding(scratch, false, 100, &hidden);
        rig.mount();
        let (dots, _) = rig.lookup(ROOT, "dots").unwrap();
        assert_eq!(rig.lookup(dots, "ssh").unwrap_err(), libc::ENOENT);
        let (home, _) = rig.lookup(ROOT, "home").unwrap();
        assert_eq!(rig.lookup(home, ".ssh").unwrap_err(), libc::ENOENT);
        fs::set_permissions(rig.at("home"), fs::Permissions::from_mode(0o700)).unwrap();
    });
}
