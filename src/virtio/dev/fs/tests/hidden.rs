//! What is hidden from a guest, and its ways around that.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use super::*;
use crate::worker::children;

/// A share of what `prepare` puts into the directory, with these names hidden.
fn rig(hidden: &[&str], prepare: impl FnOnce(&Path)) -> Rig {
    let scratch = tempfile::tempdir().unwrap();
    let shared = scratch.path().join("shared");
    fs::create_dir(&shared).unwrap();
    prepare(&shared);
    let mut rig = Rig::hiding(scratch, false, 1000, hidden);
    rig.mount();
    rig
}

/// The names in a directory as the guest is told them, by READDIR and by READDIRPLUS, which have to agree.
fn list(rig: &mut Rig, directory: u64) -> Vec<String> {
    let handle = u64_at(&rig.ask(OPENDIR, directory, &[&[0; 8]]).unwrap(), 0);
    let mut listed = [READDIR, READDIRPLUS].map(|opcode| {
        let (mut offset, mut names) = (0_u64, Vec::new());
        loop {
            // Little at once, so that a hidden name comes first, last and in the middle.
            let body = bytes!(handle, offset, 400_u32, 0_u32, 0_u64, 0_u32, 0_u32);
            let answer = rig.ask(opcode, directory, &[&body]).unwrap();
            let entries = entries(&answer, opcode == READDIRPLUS);
            let Some(last) = entries.last() else { break };
            offset = last.2;
            names.extend(entries.into_iter().map(|entry| entry.4));
        }
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    });
    let plus = std::mem::take(&mut listed[1]);
    assert_eq!(listed[0], plus);
    plus
}

fn gone(rig: &mut Rig, directory: u64, text: &str) {
    assert_eq!(
        rig.lookup(directory, text).unwrap_err(),
        libc::ENOENT,
        "{text}"
    );
}

#[test]
fn a_hidden_file_and_a_hidden_directory_are_not_there() {
    let mut rig = rig(&["secret", "home/.ssh"], |shared| {
        fs::write(shared.join("secret"), "x").unwrap();
        fs::create_dir_all(shared.join("home/.ssh")).unwrap();
        fs::write(shared.join("home/.ssh/id"), "x").unwrap();
        for number in 0..20 {
            fs::write(shared.join(format!("file-{number:02}")), "").unwrap();
        }
        // The same names elsewhere are nobody's secret.
        fs::create_dir(shared.join(".ssh")).unwrap();
        fs::write(shared.join("home/secret"), "").unwrap();
    });
    gone(&mut rig, ROOT, "secret");
    let (home, _) = rig.lookup(ROOT, "home").unwrap();
    gone(&mut rig, home, ".ssh");
    for (directory, name) in [(ROOT, ".ssh"), (home, "secret"), (ROOT, "file-00")] {
        rig.lookup(directory, name).unwrap();
    }
    let names = list(&mut rig, ROOT);
    assert_eq!(names.len(), 22, "{names:?}");
    assert!(!names.contains(&"secret".to_owned()));
    assert_eq!(list(&mut rig, home), ["secret"]);
    // Up to the directory itself and back leads no further.
    for name in ["..", ".", "home/.ssh", "../shared/secret"] {
        assert_eq!(rig.lookup(home, name).unwrap_err(), libc::EINVAL);
    }
}

#[test]
fn another_name_of_a_hidden_file_is_hidden_as_well() {
    let mut rig = rig(&["secret"], |shared| {
        fs::write(shared.join("secret"), "x").unwrap();
        fs::create_dir(shared.join("d")).unwrap();
        fs::hard_link(shared.join("secret"), shared.join("d/before")).unwrap();
        fs::write(shared.join("d/other"), "").unwrap();
    });
    let (directory, _) = rig.lookup(ROOT, "d").unwrap();
    gone(&mut rig, directory, "before");
    fs::hard_link(rig.at("secret"), rig.at("d/later")).unwrap();
    gone(&mut rig, directory, "later");
    assert_eq!(list(&mut rig, directory), ["other"]);
    assert_eq!(
        rig.ask(UNLINK, directory, &[&name("before")]),
        Err(libc::EACCES)
    );
    assert_eq!(
        rig.create(directory, "before", RDWR, 0o600),
        Err(libc::ENOENT)
    );
    // Once it is no secret of anybody's, the inode is like any other.
    fs::remove_file(rig.at("secret")).unwrap();
    rig.lookup(directory, "before").unwrap();
    assert_eq!(list(&mut rig, directory), ["before", "later", "other"]);
}

#[test]
fn what_replaces_a_hidden_file_is_hidden() {
    let mut rig = rig(&["secret", "directory", "other"], |shared| {
        fs::write(shared.join("secret"), "old").unwrap();
        fs::write(shared.join("other"), "").unwrap();
        fs::hard_link(shared.join("other"), shared.join("other link")).unwrap();
    });
    rig.write_file("secret.new", b"new");
    // The guest may know it by its first name.
    let (node, _) = rig.lookup(ROOT, "secret.new").unwrap();
    fs::hard_link(rig.at("secret.new"), rig.at("link")).unwrap();
    fs::create_dir(rig.at("directory.new")).unwrap();
    let (directory, _) = rig.lookup(ROOT, "directory.new").unwrap();
    fs::rename(rig.at("secret.new"), rig.at("secret")).unwrap();
    fs::rename(rig.at("directory.new"), rig.at("directory")).unwrap();
    rig.write_file("directory/key", b"x");
    gone(&mut rig, ROOT, "secret");
    assert!(!list(&mut rig, ROOT).contains(&"secret".to_owned()));
    // Its other names and its node are found out with the next walk, for which this is a reason.
    gone(&mut rig, ROOT, "other link");
    gone(&mut rig, ROOT, "link");
    gone(&mut rig, directory, "key");
    assert_eq!(rig.ask(OPENDIR, directory, &[&[0; 8]]), Err(libc::ENOENT));
    assert_eq!(rig.open(node, RDONLY), Err(libc::ENOENT));
    assert!(list(&mut rig, ROOT).is_empty());
}

#[test]
fn what_is_made_later_is_hidden_with_all_that_leads_there() {
    let mut rig = rig(
        &["home/.config/cloud/key", "home/.config/gh", ".ssh"],
        |_| {},
    );
    gone(&mut rig, ROOT, "home");
    for directory in ["home/.config/cloud", "home/.config/gh", ".ssh"] {
        fs::create_dir_all(rig.at(directory)).unwrap();
    }
    gone(&mut rig, ROOT, ".ssh");
    let (home, _) = rig.lookup(ROOT, "home").unwrap();
    let (config, _) = rig.lookup(home, ".config").unwrap();
    gone(&mut rig, config, "gh");
    let (cloud, _) = rig.lookup(config, "cloud").unwrap();
    gone(&mut rig, cloud, "key");
    fs::write(rig.at("home/.config/cloud/key"), "x").unwrap();
    gone(&mut rig, cloud, "key");
    assert!(list(&mut rig, cloud).is_empty());
    assert_eq!(list(&mut rig, config), ["cloud"]);
    // Another directory in the place of one on the way.
    fs::rename(rig.at("home/.config"), rig.at("home/old")).unwrap();
    fs::create_dir_all(rig.at("home/.config/cloud")).unwrap();
    fs::write(rig.at("home/.config/cloud/key"), "x").unwrap();
    let (config, _) = rig.lookup(home, ".config").unwrap();
    let (cloud, _) = rig.lookup(config, "cloud").unwrap();
    gone(&mut rig, cloud, "key");
    // Found while a directory is listed.
    fs::rename(rig.at("home/.config"), rig.at("home/older")).unwrap();
    fs::create_dir_all(rig.at("home/.config/gh")).unwrap();
    let handle = u64_at(&rig.ask(OPENDIR, home, &[&[0; 8]]).unwrap(), 0);
    let body = bytes!(handle, 0_u64, 2000_u32, 0_u32, 0_u64, 0_u32, 0_u32);
    let listed = rig.ask(READDIRPLUS, home, &[&body]).unwrap();
    let config = entries(&listed, true)
        .into_iter()
        .find(|entry| entry.4 == ".config");
    gone(&mut rig, config.unwrap().0, "gh");
}

#[test]
fn links_lead_to_hidden_names_and_hidden_links_hide_what_they_lead_to() {
    let mut rig = rig(&["secret", "home/.ssh", "home/.history"], |shared| {
        fs::write(shared.join("secret"), "x").unwrap();
        symlink("secret", shared.join("link")).unwrap();
        // As those do it who keep these in a repository.
        fs::create_dir(shared.join("home")).unwrap();
        fs::create_dir_all(shared.join("dots/all/ssh")).unwrap();
        symlink(shared.join("dots/all"), shared.join("home/dots")).unwrap();
        symlink("../home/./dots/ssh", shared.join("home/.ssh")).unwrap();
        symlink("/dev/null", shared.join("home/.history")).unwrap();
    });
    let (link, _) = rig.lookup(ROOT, "link").unwrap();
    assert_eq!(rig.ask(READLINK, link, &[]).unwrap(), b"secret");
    gone(&mut rig, ROOT, "secret");
    let (home, _) = rig.lookup(ROOT, "home").unwrap();
    gone(&mut rig, home, ".ssh");
    gone(&mut rig, home, ".history");
    let (dots, _) = rig.lookup(ROOT, "dots").unwrap();
    let (all, _) = rig.lookup(dots, "all").unwrap();
    gone(&mut rig, all, "ssh");
    assert!(list(&mut rig, all).is_empty());
    assert_eq!(list(&mut rig, home), ["dots"]);
    // Without the link on the way, what it leads to would be hidden no longer.
    assert_eq!(rig.ask(UNLINK, home, &[&name("dots")]), Err(libc::EACCES));
    // What goes round leads nowhere, and everything else is still there.
    fs::remove_file(rig.at("home/dots")).unwrap();
    symlink("dots", rig.at("home/dots")).unwrap();
    rig.lookup(home, "dots").unwrap();
    gone(&mut rig, home, ".ssh");
}

#[test]
fn a_guest_can_neither_make_nor_move_nor_remove_what_is_hidden() {
    let hidden = ["secret", "home/.ssh", "home/.config/gh", "home/.none"];
    let mut rig = rig(&hidden, |shared| {
        fs::write(shared.join("secret"), "x").unwrap();
        fs::create_dir_all(shared.join("home/.ssh")).unwrap();
        fs::create_dir_all(shared.join("home/.config/gh")).unwrap();
        fs::create_dir_all(shared.join("home/free")).unwrap();
        fs::write(shared.join("home/file"), "").unwrap();
    });
    let (home, _) = rig.lookup(ROOT, "home").unwrap();
    let (file, _) = rig.lookup(home, "file").unwrap();
    let rename = |flags: u32, old: &str, new: &str| {
        [bytes!(home, flags, 0_u32), name(old), name(new)].concat()
    };
    let refused = Err(libc::EACCES);
    for hidden in [".ssh", ".none"] {
        let text = name(hidden);
        let requests: [(u32, Vec<u8>); 9] = [
            (UNLINK, text.clone()),
            (RMDIR, text.clone()),
            (MKDIR, [&[0; 8], &text[..]].concat()),
            (
                MKNOD,
                [bytes!(0o100_644_u32, 0_u32, 0_u64), text.clone()].concat(),
            ),
            (
                CREATE,
                [bytes!(RDWR, 0o600_u32, 0_u64), text.clone()].concat(),
            ),
            (SYMLINK, [text.clone(), name("target")].concat()),
            (LINK, [file.to_le_bytes().to_vec(), text.clone()].concat()),
            (RENAME2, rename(0, hidden, "free")),
            (RENAME2, rename(0, "free", hidden)),
        ];
        for (opcode, body) in requests {
            assert_eq!(rig.ask(opcode, home, &[&body]), refused, "{opcode}");
        }
        let exchange = rig.ask(RENAME2, home, &[&rename(2, "free", hidden)]);
        assert_eq!(exchange, refused);
    }
    // Nor what is on the way, under whose new name it would be seen.
    for (old, new) in [(".config", "x"), ("free", ".config")] {
        assert_eq!(rig.ask(RENAME2, home, &[&rename(0, old, new)]), refused);
        assert_eq!(rig.ask(RENAME2, home, &[&rename(2, old, new)]), refused);
    }
    let body = [&ROOT.to_le_bytes()[..], &name("home"), &name("x")].concat();
    assert_eq!(rig.ask(RENAME, ROOT, &[&body]), refused);
    assert_eq!(rig.ask(RMDIR, home, &[&name(".config")]), refused);
    // All else goes on.
    rig.ask(RENAME2, home, &[&rename(0, "free", "moved")])
        .unwrap();
    rig.ask(UNLINK, home, &[&name("file")]).unwrap();
    rig.create(home, "secret", RDWR, 0o600).unwrap();
    assert_eq!(list(&mut rig, home), [".config", "moved", "secret"]);
    for path in ["secret", "home/.ssh", "home/.config/gh"] {
        assert!(rig.at(path).exists());
    }
    assert!(!rig.at("home/.none").exists());
}

#[test]
fn what_a_guest_makes_on_the_way_does_not_uncover_anything() {
    let mut rig = rig(&["home/.config/gh"], |shared| {
        fs::create_dir(shared.join("home")).unwrap();
    });
    let (home, _) = rig.lookup(ROOT, "home").unwrap();
    let config = rig.mkdir(home, ".config").unwrap();
    assert_eq!(rig.mkdir(config, "gh"), Err(libc::EACCES));
    fs::create_dir(rig.at("home/.config/gh")).unwrap();
    gone(&mut rig, config, "gh");
    assert!(list(&mut rig, config).is_empty());
}

#[test]
fn a_shared_directory_that_is_on_the_list_itself_is_there() {
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().to_str().unwrap().to_owned();
    // With it, paths that have nothing to do with the directory, or are none.
    let hidden = [
        ".",
        "../shared",
        &path,
        "/",
        "/none/at/all",
        "/etc/passwd/x",
    ];
    let mut rig = rig(&hidden, |shared| {
        fs::write(shared.join("a"), "content").unwrap();
    });
    let (node, attr) = rig.lookup(ROOT, "a").unwrap();
    assert_eq!(attr.ino, fs::metadata(rig.at("a")).unwrap().ino());
    rig.open(node, RDONLY).unwrap();
    assert_eq!(list(&mut rig, ROOT), ["a"]);
}

/// Set for the test below in its own mount namespace.
const APART: &str = "SARANG_TEST_MOUNTS";

#[test]
fn another_mount_of_a_directory_hides_the_same_names() {
    if std::env::var_os(APART).is_none() {
        let _child = children::some();
        // Only root can mount, and not in every container.
        let possible = Command::new("unshare").args(["--mount", "true"]).status();
        if !possible.is_ok_and(|status| status.success()) {
            return;
        }
        let this = std::thread::current();
        let again = Command::new("unshare")
            .arg("--mount")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", this.name().unwrap()])
            .env(APART, "")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&again.stdout);
        assert!(
            again.status.success() && told.contains("1 passed"),
            "{told}"
        );
        return;
    }
    let bind = |from: PathBuf, to: PathBuf| {
        let mount = Command::new("mount")
            .arg("--bind")
            .args([from, to])
            .status();
        assert!(mount.unwrap().success());
    };
    let mut rig = rig(&["home/.ssh", "home/.config/gh"], |shared| {
        for directory in ["home/.ssh", "home/.config/gh", "copy", "ssh", "over"] {
            fs::create_dir_all(shared.join(directory)).unwrap();
        }
        bind(shared.join("home"), shared.join("copy"));
        bind(shared.join("home/.ssh"), shared.join("ssh"));
        // Something else is on the way in one of the mounts, all the time.
        bind(shared.join("over"), shared.join("copy/.config"));
    });
    gone(&mut rig, ROOT, "ssh");
    let (copy, _) = rig.lookup(ROOT, "copy").unwrap();
    gone(&mut rig, copy, ".ssh");
    let (over, _) = rig.lookup(copy, ".config").unwrap();
    rig.mkdir(over, "gh").unwrap();
    assert_eq!(list(&mut rig, copy), [".config"]);
    let (home, _) = rig.lookup(ROOT, "home").unwrap();
    let (config, _) = rig.lookup(home, ".config").unwrap();
    gone(&mut rig, config, "gh");
    let body = [bytes!(copy, 0_u64), name(".config"), name("x")].concat();
    assert_eq!(rig.ask(RENAME2, copy, &[&body]), Err(libc::EACCES));
}
