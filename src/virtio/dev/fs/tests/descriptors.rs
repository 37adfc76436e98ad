//! A guest that knows more files than the host has descriptors for.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

/// Far fewer than the files below.
const FEW: usize = 10;

fn rig(budget: usize, hidden: &[&str]) -> Rig {
    let scratch = tempfile::tempdir().unwrap();
    fs::create_dir(scratch.path().join("shared")).unwrap();
    let mut rig = Rig::hiding(scratch, false, budget, hidden);
    rig.mount();
    rig
}

/// Has the guest look at so many other files that what it has not used lately is given up.
fn crowd(rig: &mut Rig) {
    let _ = fs::create_dir(rig.at("crowd"));
    let (crowd, _) = rig.lookup(ROOT, "crowd").unwrap();
    for number in 0..3 * FEW {
        let text = format!("{number}");
        rig.write_file(&format!("crowd/{text}"), b"");
        let (node, _) = rig.lookup(crowd, &text).unwrap();
        rig.getattr(node).unwrap();
    }
    assert_eq!(rig.budget.left(), 0);
}

/// A directory's entries by READDIRPLUS.
fn list(rig: &mut Rig, directory: u64) -> Vec<Listed> {
    let handle = u64_at(&rig.ask(OPENDIR, directory, &[&[0; 8]]).unwrap(), 0);
    let (mut offset, mut found) = (0_u64, Vec::new());
    loop {
        let body = bytes!(handle, offset, 2000_u32, 0_u32, 0_u64, 0_u32, 0_u32);
        let answer = rig.ask(READDIRPLUS, directory, &[&body]).unwrap();
        let entries = entries(&answer, true);
        let Some(last) = entries.last() else { break };
        offset = last.2;
        found.extend(
            entries
                .into_iter()
                .filter(|entry| !entry.4.starts_with('.')),
        );
    }
    release(rig, RELEASEDIR, directory, handle);
    found
}

fn release(rig: &mut Rig, opcode: u32, node: u64, handle: u64) {
    let body = bytes!(handle, 0_u32, 0_u32, 0_u64);
    rig.ask(opcode, node, &[&body]).unwrap();
}

/// What is in a file, from open to close.
fn content(rig: &mut Rig, node: u64) -> Result<Vec<u8>, i32> {
    let handle = rig.open(node, RDONLY)?;
    let content = rig.read(node, handle, 0, 100);
    release(rig, RELEASE, node, handle);
    content
}

/// A tree that is 20 directories deep and 200 files wide: each file says its path.
fn plant(rig: &Rig) {
    let mut directory = String::new();
    for level in 0..20 {
        let wide = if level == 10 { 200 } else { 5 };
        for number in 0..wide {
            let path = format!("{directory}f{number}");
            rig.write_file(&path, path.as_bytes());
        }
        directory.push_str("d/");
        fs::create_dir(rig.at(&directory)).unwrap();
    }
}

/// All below the root by path, found as `find` does.
fn walk(rig: &mut Rig) -> BTreeMap<String, u64> {
    let (mut found, mut rest) = (BTreeMap::new(), vec![(ROOT, String::new())]);
    while let Some((directory, prefix)) = rest.pop() {
        for (node, _, _, kind, text) in list(rig, directory) {
            assert_ne!(node, 0);
            let path = format!("{prefix}{text}");
            if kind == 4 {
                rest.push((node, format!("{path}/")));
            }
            found.insert(path, node);
        }
    }
    found
}

fn check(rig: &mut Rig, found: &BTreeMap<String, u64>) {
    for (path, node) in found {
        let inode = fs::metadata(rig.at(path)).unwrap().ino();
        assert_eq!(rig.getattr(*node).unwrap().ino, inode, "{path}");
        let (above, text) = path.rsplit_once('/').unwrap_or(("", path));
        if text.starts_with('f') {
            assert_eq!(content(rig, *node).unwrap().len(), path.len());
        }
        let above = found.get(above).copied().unwrap_or(ROOT);
        assert_eq!(rig.lookup(above, text).unwrap().0, *node, "the same number");
    }
}

#[test]
fn a_tree_with_more_files_than_descriptors_is_walked_and_read() {
    // With none but what is held while a directory or a file is open, too.
    for budget in [1, FEW] {
        let mut rig = rig(budget, &[]);
        plant(&rig);
        let found = walk(&mut rig);
        assert_eq!(found.len(), 19 * 5 + 200 + 20);
        check(&mut rig, &found);
        // The deepest, straight after the shallowest.
        for path in ["f0", "d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/f4"] {
            assert_eq!(content(&mut rig, found[path]).unwrap(), path.as_bytes());
        }
        // Each was counted twice: listed, and looked up.
        for node in found.values() {
            rig.tell(FORGET, *node, &[&2_u64.to_le_bytes()]);
            assert_eq!(rig.getattr(*node).unwrap_err(), libc::ESTALE);
        }
        assert_eq!(rig.budget.left(), budget);
    }
}

#[test]
fn requests_that_run_at_the_same_time_find_everything_again() {
    let mut rig = rig(FEW, &[]);
    plant(&rig);
    let found = walk(&mut rig);
    let nodes: Vec<u64> = found.values().copied().collect();
    for batch in nodes.chunks(30) {
        // The same ones by several threads, and all by way of the same directories.
        for node in batch.iter().chain(&batch[..1]) {
            let message = rig.message(GETATTR, *node, &[&[0; 16]]);
            rig.driver.send(REQUESTS, &[&message], &[ROOM]);
        }
        rig.device.process(REQUESTS).unwrap();
        for _ in 0..=batch.len() {
            assert_eq!(rig.used(REQUESTS).len, 16 + 16 + 88);
        }
    }
}

#[test]
fn what_the_guest_has_moved_is_found_where_it_is() {
    let mut rig = rig(FEW, &[]);
    plant(&rig);
    let mut found = walk(&mut rig);
    let top = found["d"];
    let second = found["d/d"];
    // A directory on the way, known but not at hand.
    let body = [bytes!(ROOT), name("d"), name("e")].concat();
    rig.ask(RENAME, second, &[&body]).unwrap();
    // Two at once.
    let body = [bytes!(top, 2_u32, 0_u32), name("f0"), name("f1")].concat();
    rig.ask(RENAME2, ROOT, &[&body]).unwrap();
    // One over another, which is gone then but for who knows it.
    let body = [bytes!(top), name("f2"), name("f3")].concat();
    rig.ask(RENAME, ROOT, &[&body]).unwrap();
    let replaced = found["d/f3"];
    let moved: BTreeMap<String, u64> = std::mem::take(&mut found)
        .into_iter()
        .filter(|(path, _)| path != "d/f3")
        .map(|(path, node)| {
            let path = match &*path {
                "f0" => "d/f1".to_owned(),
                "d/f1" => "f0".to_owned(),
                "f2" => "d/f3".to_owned(),
                path => match path.strip_prefix("d/d/d") {
                    Some(rest) => format!("e{rest}"),
                    None => path.to_owned(),
                },
            };
            (path, node)
        })
        .collect();
    for (path, node) in &moved {
        let inode = fs::metadata(rig.at(path)).unwrap().ino();
        assert_eq!(rig.getattr(*node).unwrap().ino, inode, "{path}");
    }
    assert_eq!(content(&mut rig, replaced).unwrap(), b"d/f3");
    assert_eq!(rig.getattr(replaced).unwrap().links, 0);
    // Two names of one file, one over the other: nothing happens (rename(2)).
    rig.ask(LINK, ROOT, &[&moved["f0"].to_le_bytes(), &name("l")])
        .unwrap();
    let body = [bytes!(ROOT), name("f0"), name("l")].concat();
    rig.ask(RENAME, ROOT, &[&body]).unwrap();
    crowd(&mut rig);
    assert_eq!(content(&mut rig, moved["f0"]).unwrap(), b"d/f1");
}

#[test]
fn what_the_guest_has_removed_stays_for_as_long_as_it_knows_it() {
    let mut rig = rig(FEW, &[]);
    for text in ["at hand", "given up", "first"] {
        rig.write_file(text, text.as_bytes());
    }
    fs::hard_link(rig.at("first"), rig.at("second")).unwrap();
    fs::create_dir(rig.at("directory")).unwrap();
    let (given_up, _) = rig.lookup(ROOT, "given up").unwrap();
    let (directory, _) = rig.lookup(ROOT, "directory").unwrap();
    let (first, _) = rig.lookup(ROOT, "first").unwrap();
    crowd(&mut rig);
    let (at_hand, _) = rig.lookup(ROOT, "at hand").unwrap();
    for text in ["at hand", "given up", "first"] {
        rig.ask(UNLINK, ROOT, &[&name(text)]).unwrap();
        assert!(!rig.at(text).exists());
    }
    rig.ask(RMDIR, ROOT, &[&name("directory")]).unwrap();
    // Others get the names, and perhaps the inodes.
    for text in ["at hand", "given up", "directory"] {
        rig.write_file(text, b"another");
    }
    crowd(&mut rig);
    for (node, text) in [(at_hand, "at hand"), (given_up, "given up")] {
        assert_eq!(rig.getattr(node).unwrap().links, 0);
        assert_eq!(content(&mut rig, node).unwrap(), text.as_bytes());
        assert_ne!(rig.lookup(ROOT, text).unwrap().0, node);
    }
    assert_eq!(rig.getattr(directory).unwrap().mode & 0o170_000, 0o040_000);
    // One with another name is found by that, under its number.
    assert_eq!(rig.getattr(first).unwrap_err(), libc::ESTALE);
    assert_eq!(rig.lookup(ROOT, "second").unwrap().0, first);
    assert_eq!(content(&mut rig, first).unwrap(), b"first");
    // Those without a name keep their descriptors until they are forgotten.
    let kept = [at_hand, given_up, directory];
    let before = rig.budget.left();
    for node in kept {
        rig.tell(FORGET, node, &[&1_u64.to_le_bytes()]);
    }
    assert_eq!(rig.budget.left(), before + kept.len());
}

#[test]
fn what_the_host_has_put_in_the_place_of_a_file_is_not_that_file() {
    let mut rig = rig(FEW, &[]);
    let texts: Vec<String> = (0..20).map(|number| format!("f{number}")).collect();
    let mut nodes = Vec::new();
    for text in &texts {
        rig.write_file(text, b"old");
        nodes.push(rig.lookup(ROOT, text).unwrap().0);
    }
    crowd(&mut rig);
    // Among so many, some get an inode that another had, on file systems that use them again.
    for text in &texts {
        fs::remove_file(rig.at(text)).unwrap();
        rig.write_file(text, b"new");
    }
    for (text, node) in texts.iter().zip(&nodes) {
        assert_eq!(rig.getattr(*node).unwrap_err(), libc::ESTALE);
        assert_eq!(rig.open(*node, RDWR), Err(libc::ESTALE));
        let (new, _) = rig.lookup(ROOT, text).unwrap();
        assert!(!nodes.contains(&new));
        assert_eq!(content(&mut rig, new).unwrap(), b"new");
        // To give the old number back does nothing to the new one.
        rig.tell(FORGET, *node, &[&1_u64.to_le_bytes()]);
        assert_eq!(rig.lookup(ROOT, text).unwrap().0, new);
    }
    // Nor is it found under another name, until the guest has looked that up.
    let (node, _) = rig.lookup(ROOT, "f0").unwrap();
    crowd(&mut rig);
    fs::rename(rig.at("f0"), rig.at("elsewhere")).unwrap();
    assert_eq!(rig.getattr(node).unwrap_err(), libc::ESTALE);
    assert_eq!(rig.lookup(ROOT, "elsewhere").unwrap().0, node);
    crowd(&mut rig);
    assert_eq!(content(&mut rig, node).unwrap(), b"new");
}

#[test]
fn a_link_in_the_place_of_a_directory_does_not_lead_out() {
    let mut rig = rig(FEW, &[]);
    fs::create_dir_all(rig.at("a/b")).unwrap();
    rig.write_file("a/b/f", b"shared");
    let (a, _) = rig.lookup(ROOT, "a").unwrap();
    let (b, _) = rig.lookup(a, "b").unwrap();
    let (file, _) = rig.lookup(b, "f").unwrap();
    crowd(&mut rig);
    // The very same file, but by way of a link.
    let outside = rig.path.with_file_name("outside");
    fs::rename(rig.at("a/b"), &outside).unwrap();
    symlink(&outside, rig.at("a/b")).unwrap();
    for node in [b, file] {
        assert_eq!(rig.getattr(node).unwrap_err(), libc::ESTALE);
    }
    assert_eq!(rig.open(file, RDWR), Err(libc::ESTALE));
    assert_eq!(rig.create(b, "new", RDWR, 0o600), Err(libc::ESTALE));
    let (link, attr) = rig.lookup(a, "b").unwrap();
    assert_eq!(attr.mode & 0o170_000, 0o120_000);
    crowd(&mut rig);
    // A link, too, is found again as what it is.
    let target = outside.to_str().unwrap().as_bytes();
    assert_eq!(rig.ask(READLINK, link, &[]).unwrap(), target);
    assert_eq!(rig.lookup(link, "f").unwrap_err(), libc::ENOTDIR);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn directories_that_the_host_has_moved_into_each_other_are_lost_and_nothing_hangs() {
    let mut rig = rig(FEW, &[]);
    fs::create_dir_all(rig.at("a")).unwrap();
    fs::create_dir_all(rig.at("b")).unwrap();
    let (a, _) = rig.lookup(ROOT, "a").unwrap();
    let (b, _) = rig.lookup(ROOT, "b").unwrap();
    fs::rename(rig.at("a"), rig.at("b/a")).unwrap();
    assert_eq!(rig.lookup(b, "a").unwrap().0, a);
    fs::rename(rig.at("b/a"), rig.at("a")).unwrap();
    fs::rename(rig.at("b"), rig.at("a/b")).unwrap();
    assert_eq!(rig.lookup(a, "b").unwrap().0, b);
    // As far as the guest has seen, each is in the other.
    crowd(&mut rig);
    for node in [a, b] {
        assert_eq!(rig.getattr(node).unwrap_err(), libc::ESTALE);
    }
    assert_eq!(rig.lookup(ROOT, "a").unwrap().0, a);
    rig.getattr(b).unwrap();
    // A directory that the guest has forgotten leads to nothing either.
    crowd(&mut rig);
    rig.tell(FORGET, a, &[&9_u64.to_le_bytes()]);
    assert_eq!(rig.getattr(b).unwrap_err(), libc::ESTALE);
}

#[test]
fn what_has_been_hidden_meanwhile_is_not_found_again() {
    let mut rig = rig(FEW, &["link/secret"]);
    for directory in ["one", "two"] {
        fs::create_dir(rig.at(directory)).unwrap();
        rig.write_file(&format!("{directory}/secret"), b"");
    }
    rig.write_file("two/open", b"");
    symlink("one", rig.at("link")).unwrap();
    let (two, _) = rig.lookup(ROOT, "two").unwrap();
    let (secret, _) = rig.lookup(two, "secret").unwrap();
    let (open, _) = rig.lookup(two, "open").unwrap();
    crowd(&mut rig);
    fs::remove_file(rig.at("link")).unwrap();
    symlink("two", rig.at("link")).unwrap();
    // That the link leads elsewhere is found out by this.
    rig.lookup(ROOT, "link").unwrap();
    assert_eq!(rig.getattr(secret).unwrap_err(), libc::ESTALE);
    assert_eq!(rig.open(secret, RDONLY), Err(libc::ESTALE));
    rig.getattr(open).unwrap();
}

#[test]
fn only_open_files_use_the_budget_up() {
    let mut rig = rig(3, &[]);
    for text in ["a", "b", "c"] {
        rig.write_file(text, text.as_bytes());
    }
    let (a, _) = rig.lookup(ROOT, "a").unwrap();
    let (b, _) = rig.lookup(ROOT, "b").unwrap();
    let (c, _) = rig.lookup(ROOT, "c").unwrap();
    assert_eq!(rig.budget.left(), 0);
    let handles = [a, b, b].map(|node| (node, rig.open(node, RDWR).unwrap()));
    // Nothing more can be opened, not even what is there already.
    assert_eq!(rig.open(c, RDONLY), Err(libc::ENFILE));
    assert_eq!(rig.open(a, RDONLY), Err(libc::ENFILE));
    assert_eq!(rig.ask(OPENDIR, ROOT, &[&[0; 8]]), Err(libc::ENFILE));
    assert_eq!(rig.create(ROOT, "a", RDWR, 0o600), Err(libc::ENFILE));
    assert_eq!(rig.create(ROOT, "d", RDWR, 0o600), Err(libc::ENFILE));
    // All else goes on.
    rig.mkdir(ROOT, "e").unwrap();
    for (text, node) in [("a", a), ("b", b), ("c", c)] {
        assert_eq!(rig.lookup(ROOT, text).unwrap().0, node);
        assert_eq!(rig.getattr(node).unwrap().size, 1);
    }
    // What is open is known by that, whatever the host does to its name.
    fs::rename(rig.at("a"), rig.at("elsewhere")).unwrap();
    fs::remove_file(rig.at("b")).unwrap();
    rig.write_file("b", b"another");
    assert_eq!(rig.getattr(a).unwrap().size, 1);
    assert_eq!(rig.getattr(b).unwrap().links, 0);
    for (node, handle) in handles {
        assert_eq!(rig.read(node, handle, 0, 9).unwrap().len(), 1);
        release(&mut rig, RELEASE, node, handle);
    }
    assert_eq!(rig.budget.left(), 3);
    assert_eq!(rig.getattr(b).unwrap_err(), libc::ESTALE);
    assert_eq!(content(&mut rig, c).unwrap(), b"c");
    assert_eq!(list(&mut rig, ROOT).len(), 5);
}

#[test]
fn one_share_gives_up_what_another_needs() {
    let budget = Budget::new(FEW);
    let [mut idle, mut busy] = [(); 2].map(|()| {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("shared")).unwrap();
        let mut rig = Rig::drawing_on(&budget, scratch, false, &[]);
        rig.mount();
        rig
    });
    crowd(&mut idle);
    busy.write_file("a", b"content");
    let (a, _) = busy.lookup(ROOT, "a").unwrap();
    let handles: Vec<u64> = (0..FEW).map(|_| busy.open(a, RDONLY).unwrap()).collect();
    assert_eq!(busy.open(a, RDONLY), Err(libc::ENFILE));
    // The other still knows what it has given up.
    let (crowd, _) = idle.lookup(ROOT, "crowd").unwrap();
    assert_eq!(idle.lookup(crowd, "0").unwrap().1.size, 0);
    assert_eq!(idle.ask(OPENDIR, crowd, &[&[0; 8]]), Err(libc::ENFILE));
    release(&mut busy, RELEASE, a, handles[0]);
    assert_eq!(list(&mut idle, crowd).len(), 3 * FEW);
}
