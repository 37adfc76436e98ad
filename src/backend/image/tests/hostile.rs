//! Archives that want to harm.

use super::*;

#[test]
fn no_entry_reaches_the_host() {
    let scratch = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let inside = format!("{target}/x");
    for tar in [
        Tar::new().file("../../../../../../etc/sarang-test", "evil"),
        Tar::new().file(&inside, "evil"),
        Tar::new()
            .symlink("etc", "/")
            .file("etc/sarang-test", "evil"),
        Tar::new().symlink("out", target).file("out/x", "evil"),
        Tar::new()
            .symlink("up", "../../../../../../../..")
            .symlink("up/tmp-link", target)
            .file("tmp-link/x", "evil"),
        Tar::new()
            .symlink("a", target)
            .file("x", "evil")
            .hard_link("a/x", "x"),
    ] {
        disk_of(scratch.path(), &tar.finish()).unwrap();
        assert!(left_in(outside.path()).is_empty());
        assert!(!Path::new("/etc/sarang-test").exists());
        assert!(!Path::new("/sarang-test").exists());
    }
    let tar = Tar::new()
        .symlink("etc", "/")
        .file("etc/x", "evil")
        .finish();
    let disk = disk_of(scratch.path(), &tar).unwrap();
    assert_eq!(cat(&disk, "/x"), "evil");
}

#[test]
fn an_entry_that_has_no_place_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let mut long = Tar::new();
    for _ in 0..2 {
        long = long.records(&[("path", "n".repeat(300).as_bytes())]);
    }
    for (tar, words) in [
        (
            Tar::new().hard_link("a", "/etc/hostname"),
            &["`a`", "not there"][..],
        ),
        (
            Tar::new().directory("d", 0o755).hard_link("a", "d"),
            &["`a`", "directory"],
        ),
        (
            Tar::new().file("f", "").file("f/x", ""),
            &["`f/x`", "not a directory"],
        ),
        (
            Tar::new().symlink("l", "l").file("l/x", ""),
            &["`l/x`", "symbolic links"],
        ),
        (Tar::new().symlink("l", ""), &["`l`", "1 to 4095"]),
        (Tar::new().device(b'3', "c", 5000, 1), &["`c`", "5000:1"]),
        (Tar::new().file("..", "x"), &["`..`", "root"]),
        (long.file("f", ""), &["1 to 255 bytes"]),
        (
            Tar::new()
                .records(&[("SCHILY.xattr.user.big", &[b'x'; 5000])])
                .file("f", ""),
            &["`f`", "more extended attributes"],
        ),
        (
            Tar::new()
                .records(&[("SCHILY.xattr.system.posix_acl_access", b"??")])
                .file("f", ""),
            &["`f`", "malformed access list"],
        ),
    ] {
        let said = sentence(disk_of(scratch.path(), &tar.finish()));
        says(&said, words);
        assert!(said.contains("cannot be unpacked"), "{said}");
        assert_eq!(left_in(scratch.path()), ["source"]);
    }
}

#[test]
fn an_archive_that_is_damaged_is_told_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let tar = Tar::new()
        .file("a", &"text ".repeat(1000))
        .file("b", "b")
        .finish();
    let mut flipped = tar.clone();
    flipped[5632 + 3] ^= 1;
    for (bytes, words) in [
        (tar[..3000].to_vec(), "cut short"),
        (flipped, "no entry where one should be"),
        (gzip(&tar)[..100].to_vec(), "archive"),
    ] {
        says(&sentence(disk_of(scratch.path(), &bytes)), &[words]);
        assert_eq!(left_in(scratch.path()), ["source"]);
    }
}

#[test]
fn what_unpacks_to_more_than_the_size_allows_is_stopped_early() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("bomb.tar.gz");
    let target = scratch.path().join("disk");
    let options = Build {
        size: Some(16 << 20),
        ..Build::default()
    };
    // One file too large, and many that are.
    let large = Tar::new().entry(b'0', "a", 0o644, (0, 0), "", &vec![1; 40 << 20]);
    let many = (0..40).fold(Tar::new(), |tar, number| {
        tar.entry(b'0', &number.to_string(), 0o644, (0, 0), "", &[1; 1 << 20])
    });
    for tar in [large, many] {
        fs::write(&source, gzip(&tar.finish())).unwrap();
        let built = build_with(source.to_str().unwrap(), &target, &options);
        says(&sentence(built), &["bomb.tar.gz", "16M of --size"]);
    }
    assert_eq!(left_in(scratch.path()), ["bomb.tar.gz"]);
    // A file of 8 TiB that is all holes is no bomb: it takes nothing.
    let sparse = Tar::new().records(&[
        ("GNU.sparse.size", b"8796093022208"),
        ("GNU.sparse.map", b"0,2"),
    ]);
    fs::write(&source, gzip(&sparse.file("holes", "ab").finish())).unwrap();
    build_with(source.to_str().unwrap(), &target, &options).unwrap();
    check(&target);
    says(&stat(&target, "/holes"), &["Size: 8796093022208"]);
}

#[test]
fn a_whiteout_cannot_leave_its_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let below = Tar::new()
        .file("a/keep", "keep")
        .file("b/keep", "keep")
        .finish();
    for name in ["a/.wh..", "a/.wh...", "a/.wh."] {
        let above = Tar::new().file(name, "").finish();
        let layout = image(&json!({}), &[(below.clone(), plain), (above, plain)]);
        let path = scratch.path().join("image");
        layout.write(&path);
        let disk = scratch.path().join("disk");
        match build(&path, &disk) {
            Ok(_) => {
                assert_eq!(cat(&disk, "/a/keep"), "keep", "{name}");
                assert_eq!(cat(&disk, "/b/keep"), "keep", "{name}");
                fs::remove_file(&disk).unwrap();
            }
            Err(error) => says(&error.to_string(), &["not in its directory"]),
        }
        fs::remove_dir_all(&path).unwrap();
    }
    // In a plain tar such a name is a file like others.
    let disk = disk_of(scratch.path(), &Tar::new().file(".wh.a", "x").finish()).unwrap();
    assert_eq!(cat(&disk, "/.wh.a"), "x");
}
