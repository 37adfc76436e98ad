//! OCI layouts and docker-archives.

use super::super::{ImageConfig, read_config};
use super::*;

const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwww:x:34:\nlog:x:40:web\n";

/// Three layers, each compressed in another way, that replace, hide and link what is in the ones below.
fn layers() -> Vec<Packed> {
    let below = Tar::new()
        .directory("etc/", 0o755)
        .file("etc/passwd", PASSWD)
        .file("etc/group", GROUP)
        .file("etc/motd", "old")
        .file("data/gone", "gone")
        .file("data/kept", "kept")
        .file("opaque/old", "old")
        .file("opaque/sub/old", "old")
        .entry(b'0', "bin/su", 0o4755, (0, 0), "", b"su")
        .entry(b'0', "home/file", 0o600, (1000, 100), "", b"mine")
        .symlink("lib", "usr/lib")
        .finish();
    let middle = Tar::new()
        .file("etc/motd", "new")
        .file("data/.wh.gone", "")
        .file("opaque/new", "new")
        .file("opaque/.wh..wh..opq", "")
        .file("lib/libc.so", "libc")
        .hard_link("data/link", "data/kept")
        .file(".wh..wh.plnk", "")
        .finish();
    let above = Tar::new()
        .file("data/kept", "replaced")
        .directory("home/", 0o700)
        .finish();
    vec![(below, gzip), (middle, zstd), (above, plain)]
}

fn config() -> Value {
    json!({
        "User": "web:log", "Env": ["PATH=/bin", "A=b c"], "Entrypoint": ["/bin/su"], "Cmd": ["-c", "id"],
        "WorkingDir": "/srv", "ExposedPorts": {"80/tcp": {}}, "Volumes": null,
    })
}

fn expected_config() -> ImageConfig {
    let strings = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    ImageConfig {
        entrypoint: strings(&["/bin/su"]),
        cmd: strings(&["-c", "id"]),
        env: strings(&["PATH=/bin", "A=b c"]),
        user: "web:log".to_owned(),
        working_dir: "/srv".to_owned(),
        identity: Some(super::super::Identity {
            uid: 33,
            gid: 40,
            groups: Vec::new(),
            home: Some("/srv".to_owned()),
        }),
    }
}

fn check_contents(disk: &Path) {
    check(disk);
    for (path, contents) in [
        ("/etc/motd", "new"),
        ("/data/kept", "replaced"),
        ("/data/link", "kept"),
        ("/opaque/new", "new"),
        ("/usr/lib/libc.so", "libc"),
        ("/home/file", "mine"),
    ] {
        assert_eq!(cat(disk, path), contents, "{path}");
    }
    assert_eq!(names(disk, "/data"), ["kept", "link"]);
    assert_eq!(names(disk, "/opaque"), ["new"]);
    assert_eq!(
        names(disk, "/"),
        [
            ".sarang", "bin", "data", "etc", "home", "lib", "opaque", "usr"
        ]
    );
    says(&stat(disk, "/bin/su"), &["Mode: 04755", "User: 0 Group: 0"]);
    says(
        &stat(disk, "/home/file"),
        &["Mode: 0600", "User: 1000 Group: 100", "mtime: 0x5f5e1000"],
    );
    says(&stat(disk, "/home"), &["Type: directory", "Mode: 0700"]);
    says(
        &stat(disk, "/lib"),
        &["Type: symlink", "Fast link dest: \"usr/lib\""],
    );
    assert_eq!(read_config(disk).unwrap(), Some(expected_config()));
}

/// The same image as `docker save` writes it.
fn docker(config: &Value, layers: &[Packed], tags: &[&str]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|(tar, _)| digest(tar)).collect();
    let configuration = json!({
        "os": "linux", "architecture": "amd64", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string();
    let id = digest(configuration.as_bytes()).replace("sha256:", "");
    let mut files = vec![(format!("{id}.json"), configuration.into_bytes())];
    let mut paths = Vec::new();
    for (tar, pack) in layers {
        let name = format!("{}/layer.tar", digest(tar).replace("sha256:", ""));
        files.push((name.clone(), pack(tar)));
        paths.push(name);
    }
    let manifest = json!([{"Config": format!("{id}.json"), "RepoTags": tags, "Layers": paths}]);
    files.push((
        "manifest.json".to_owned(),
        manifest.to_string().into_bytes(),
    ));
    archive(&files)
}

#[test]
fn layers_are_applied_one_above_the_other_whatever_the_image_comes_in() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let layout = image(&config(), &layers());
    layout.write(&at("layout"));
    fs::write(at("oci.tar"), archive(&layout.all())).unwrap();
    fs::write(at("oci.tar.gz"), gzip(&archive(&layout.all()))).unwrap();
    let saved = docker(&config(), &layers(), &["me/image:1"]);
    fs::write(at("docker.tar"), &saved).unwrap();
    fs::write(at("docker.tar.zst"), zstd(&saved)).unwrap();
    let mut disks = Vec::new();
    for name in [
        "layout",
        "oci.tar",
        "oci.tar.gz",
        "docker.tar",
        "docker.tar.zst",
    ] {
        let disk = at(&format!("{name}.ext4"));
        let built = build(&at(name), &disk).unwrap();
        check_contents(&disk);
        assert_eq!(built.config, Some(expected_config()), "{name}");
        disks.push(fs::read(disk).unwrap());
    }
    assert!(
        disks.windows(2).all(|pair| pair[0] == pair[1]),
        "the same image makes the same disk"
    );
}

#[test]
fn an_image_is_chosen_by_tag_digest_and_platform() {
    let mut layout = Layout::new();
    let layer =
        |text: &str| -> Vec<Packed> { vec![(Tar::new().file("which", text).finish(), plain)] };
    let one = layout.manifest(&json!({}), ("linux", "amd64"), &layer("one"));
    let arm = layout.manifest(&json!({}), ("linux", "arm64"), &layer("arm"));
    let two = layout.manifest(&json!({}), ("linux", "amd64"), &layer("two"));
    let mut signature = one.clone();
    signature["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let index = json!({"schemaVersion": 2, "manifests": [signature, arm, two]}).to_string();
    let nested = layout.blob("application/vnd.oci.image.index.v1+json", index.as_bytes());
    layout.tag(one.clone(), "docker.io/library/one:1.0");
    layout.tag(one.clone(), "also-one");
    layout.tag(nested, "two");
    layout.tag(arm.clone(), "arm");
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("images");
    layout.write(&path);
    let target = scratch.path().join("disk");
    let options = Build {
        replace: true,
        ..Build::default()
    };
    let by =
        |reference: &str| build_with(&format!("{}{reference}", path.display()), &target, &options);
    let digest = one["digest"].as_str().unwrap();
    for (reference, which) in [
        (":1.0".to_owned(), "one"),
        (":docker.io/library/one:1.0".to_owned(), "one"),
        (":also-one".to_owned(), "one"),
        (":two".to_owned(), "two"),
        (format!("@{digest}"), "one"),
    ] {
        by(&reference).unwrap();
        assert_eq!(cat(&target, "/which"), which, "{reference}");
    }
    for (reference, words) in [
        ("", &["several images", "one:1.0, also-one, two, arm"][..]),
        (":three", &["nothing called `three`", "one:1.0"]),
        (":arm", &["nothing for linux/amd64", "linux/arm64"]),
    ] {
        says(&sentence(by(reference)), words);
    }
    // An index that has one name for the same image twice, and another for another machine, is not ambiguous.
    layout.index.remove(2);
    layout.write(&path);
    by("").unwrap();
    let summary = Source::open(path.as_os_str())
        .unwrap()
        .summary(&mut patient)
        .unwrap();
    assert_eq!(summary.digest.as_deref(), Some(digest));
    assert_eq!(
        summary.images,
        ["docker.io/library/one:1.0", "also-one", "arm"]
    );
    assert_eq!((summary.kind, summary.layers.len()), ("oci-layout", 1));
}

#[test]
fn a_docker_archive_with_several_images_needs_a_tag() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::write(
        at("one.tar"),
        docker(&config(), &layers(), &["me/image:1", "me/other:2"]),
    )
    .unwrap();
    let by = |reference: &str| {
        let options = Build {
            replace: true,
            ..Build::default()
        };
        build_with(
            &format!("{}{reference}", at("one.tar").display()),
            &at("disk"),
            &options,
        )
    };
    for reference in ["", ":1", ":2", ":me/image:1", ":image:1"] {
        by(reference).unwrap();
    }
    says(
        &sentence(by(":3")),
        &["nothing called `3`", "me/image:1, me/other:2"],
    );
    let summary = Source::open(at("one.tar").as_os_str()).unwrap();
    let summary = summary.summary(&mut patient).unwrap();
    assert_eq!(summary.images, ["me/image:1", "me/other:2"]);
    assert_eq!(summary.config.unwrap().user, "web:log");
}

#[test]
fn an_image_that_is_not_whole_is_refused_and_leaves_no_disk() {
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("disk");
    let good = image(&config(), &layers());
    let position = |layout: &Layout, bytes: &[u8]| {
        let name = super::super::blobs::blob_name(&digest(bytes));
        layout.files.iter().position(|file| file.0 == name).unwrap()
    };
    let first = gzip(&layers()[0].0);
    let mut cases: Vec<(Layout, &[&str])> = Vec::new();
    let mut changed = |words: &'static [&'static str], change: &dyn Fn(&mut Layout)| {
        let mut layout = good.clone();
        change(&mut layout);
        cases.push((layout, words));
    };
    changed(
        &["a layer should have the digest", "fetch it again"],
        &|layout| {
            let at = position(layout, &first);
            let bytes = &mut layout.files[at].1;
            let last = bytes.len() - 20;
            bytes[last] ^= 1;
        },
    );
    changed(&["a layer should have", "bytes but has"], &|layout| {
        let at = position(layout, &first);
        layout.files[at].1.pop();
    });
    changed(&["lacks blobs/sha256/"], &|layout| {
        let at = position(layout, &first);
        layout.files.remove(at);
    });
    changed(&["a document of it should have the digest"], &|layout| {
        // The manifest is the last blob.
        let bytes = &mut layout.files.last_mut().unwrap().1;
        let at = bytes.iter().position(|byte| *byte == b':').unwrap();
        bytes[at + 1] = b' ';
    });
    changed(&["lists no image"], &|layout| layout.index.clear());
    changed(&["index cannot be understood"], &|layout| {
        layout
            .index
            .push(json!({"digest": "../../etc/passwd", "size": 1, "mediaType": "x"}));
    });
    changed(&["knows sha256 only"], &|layout| {
        layout.index[0]["digest"] = json!(format!("sha512:{}", "0".repeat(128)));
    });
    for (number, (layout, words)) in cases.into_iter().enumerate() {
        let path = scratch.path().join(number.to_string());
        layout.write(&path);
        says(&sentence(build(&path, &target)), words);
        assert!(!target.exists());
    }
    let mut other = image(&config(), &layers());
    other.index.clear();
    let manifest = other.manifest(&json!({}), ("windows", "amd64"), &layers());
    let mut silent = manifest.clone();
    silent.as_object_mut().unwrap().remove("platform");
    for descriptor in [manifest, silent] {
        other.index = vec![descriptor];
        let path = scratch.path().join("windows");
        other.write(&path);
        says(
            &sentence(build(&path, &target)),
            &["only for windows/amd64"],
        );
    }
}

#[test]
fn a_layer_that_does_not_unpack_to_what_the_configuration_says_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let saved = docker(&config(), &layers(), &["a:b"]);
    let text = digest(&layers()[2].0);
    // The third layer is stored as it is, so a change of it changes the tar.
    let tar = layers()[2].0.clone();
    let at = saved
        .windows(tar.len())
        .position(|part| part == tar)
        .unwrap();
    let mut bad = saved.clone();
    let within = tar.windows(8).position(|part| part == b"replaced").unwrap();
    bad[at + within] = b'R';
    let path = scratch.path().join("docker.tar");
    fs::write(&path, bad).unwrap();
    let said = sentence(build(&path, &scratch.path().join("disk")));
    says(&said, &["should have the digest", &text]);
    assert_eq!(left_in(scratch.path()), ["docker.tar"]);
}

#[test]
fn a_user_that_the_image_does_not_know_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    image(&json!({"User": "nobody"}), &layers()).write(&scratch.path().join("image"));
    let said = sentence(build(
        &scratch.path().join("image"),
        &scratch.path().join("disk"),
    ));
    says(&said, &["wants to run as `nobody`", "/etc/passwd"]);
}

#[test]
fn an_image_cannot_choose_where_its_configuration_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let layer = Tar::new()
        .file("etc/passwd", PASSWD)
        .symlink(".sarang", "etc")
        .file("etc/config.json", "theirs")
        .finish();
    image(&json!({"Cmd": ["x"]}), &[(layer, plain)]).write(&scratch.path().join("image"));
    let disk = scratch.path().join("disk");
    build(&scratch.path().join("image"), &disk).unwrap();
    check(&disk);
    assert_eq!(cat(&disk, "/etc/config.json"), "theirs");
    assert_eq!(read_config(&disk).unwrap().unwrap().cmd, ["x"]);
}

#[test]
fn the_configuration_is_found_in_a_disk_that_was_not_shut_down() {
    use std::os::unix::fs::FileExt;
    let scratch = tempfile::tempdir().unwrap();
    image(&config(), &layers()).write(&scratch.path().join("image"));
    let disk = scratch.path().join("disk");
    build(&scratch.path().join("image"), &disk).unwrap();
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024).unwrap();
    superblock[0x60] |= 4;
    let sum = mkext4::csum::superblock(&superblock).to_le_bytes();
    superblock[0x3fc..].copy_from_slice(&sum);
    file.write_all_at(&superblock, 1024).unwrap();
    assert_eq!(read_config(&disk).unwrap(), Some(expected_config()));
    // Damage is not an error: such a disk just does not say.
    for at in [1024 + 0x60, 1024 + 0x18] {
        file.write_all_at(&[0xff; 4], at).unwrap();
        assert_eq!(read_config(&disk).unwrap(), None);
    }
}
