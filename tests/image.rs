//! `sarang image` through the binary: what it says, its exit codes, and that nothing is left behind.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn sarang(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sarang"));
    command
        .arg("image")
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null());
    command
}

fn image(directory: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    parts(sarang(directory, arguments).output().unwrap())
}

fn parts(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What `docker save` writes for an image of one layer.
fn docker(tag: &str) -> Vec<u8> {
    let layer = tar(&[("etc/motd", b"hello")]);
    let diff_id = digest(&layer);
    let config = format!(
        r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["sha256:{diff_id}"]}},
            "config":{{"Entrypoint":["/bin/sh","-c"],"Cmd":["echo hi"],"Env":["A=1"],"User":"7:8"}}}}"#
    );
    let id = digest(config.as_bytes());
    let manifest = format!(
        r#"[{{"Config":"{id}.json","RepoTags":["{tag}"],"Layers":["{diff_id}/layer.tar"]}}]"#
    );
    tar(&[
        (&format!("{id}.json"), config.as_bytes()),
        (&format!("{diff_id}/layer.tar"), &layer),
        ("manifest.json", manifest.as_bytes()),
    ])
}

fn left_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Has e2fsck look for anything wrong.
fn check(disk: &Path) {
    let paths = ["/usr/sbin/e2fsck", "/sbin/e2fsck"].map(Path::new);
    let e2fsck = paths.iter().find(|path| path.exists());
    let output = Command::new(e2fsck.expect("e2fsprogs"))
        .arg("-fn")
        .arg(disk)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().to_owned();
    (scratch, path)
}

#[test]
fn a_disk_is_made_of_an_image_and_tells_how_it_wants_to_be_run() {
    let (_scratch, at) = scratch();
    fs::write(at.join("image.tar"), docker("me/app:v1")).unwrap();
    let (code, out, err) = image(&at, &["build", "image.tar:v1", "disk.ext4"]);
    assert_eq!((code, &err[..]), (Some(0), ""));
    assert!(
        out.starts_with("disk.ext4: 65M with ") && out.ends_with(" in 4 files\n"),
        "{out}"
    );
    check(&at.join("disk.ext4"));
    let (code, out, err) = image(&at, &["show", "disk.ext4"]);
    assert_eq!((code, &err[..]), (Some(0), ""));
    for line in [
        "kind         a disk image with an ext4 file system",
        "entrypoint   /bin/sh -c",
        "command      'echo hi'",
        "environment  A=1",
        "user         7:8 (7:8)",
        "directory    /",
    ] {
        assert!(out.lines().any(|found| found == line), "{line}: {out}");
    }
    let (_, out, _) = image(&at, &["show", "image.tar", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(shown["kind"], "docker-archive");
    assert_eq!(shown["images"][0], "me/app:v1");
    assert_eq!(shown["config"]["cmd"][0], "echo hi");
    let arguments = [
        "build",
        "image.tar",
        "disk.ext4",
        "--force",
        "--json",
        "--size",
        "32M",
    ];
    let (code, out, _) = image(&at, &arguments);
    let built: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &built["size"]), (Some(0), &(32 << 20).into()));
    assert_eq!(built["config"]["identity"]["gid"], 8);
    assert_eq!(left_in(&at), ["disk.ext4", "image.tar"]);
}

#[test]
fn whoever_is_not_root_makes_a_disk_of_files_that_root_owns() {
    let (_scratch, at) = scratch();
    fs::set_permissions(&at, PermissionsExt::from_mode(0o777)).unwrap();
    // The program may lie where nobody else may go.
    fs::copy(env!("CARGO_BIN_EXE_sarang"), at.join("sarang")).unwrap();
    let as_nobody = |program: &Path, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&at);
        if rustix::process::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        command.output().unwrap()
    };
    let made = as_nobody(
        Path::new("/bin/sh"),
        &[
            "-c",
            "mkdir root && echo x > root/file && chmod 600 root/file",
        ],
    );
    assert!(made.status.success());
    let (code, _, err) = parts(as_nobody(
        &at.join("sarang"),
        &["image", "build", "root", "disk"],
    ));
    assert_eq!(code, Some(0), "{err}");
    check(&at.join("disk"));
    let debugfs = ["/usr/sbin/debugfs", "/sbin/debugfs"].map(Path::new);
    let debugfs = debugfs.iter().find(|path| path.exists()).unwrap();
    let stat = Command::new(debugfs)
        .args(["-R", "stat /file"])
        .arg(at.join("disk"))
        .output()
        .unwrap();
    let stat = String::from_utf8_lossy(&stat.stdout).into_owned();
    let words: Vec<&str> = stat.split_whitespace().collect();
    let owner = words.iter().position(|word| *word == "User:").unwrap();
    assert_eq!(
        words[owner..owner + 4],
        ["User:", "0", "Group:", "0"],
        "{stat}"
    );
    assert!(stat.contains("Mode:  0600"), "{stat}");
    // And what may not be read is not silently left out.
    fs::write(at.join("root/secret"), "x").unwrap();
    fs::set_permissions(at.join("root/secret"), PermissionsExt::from_mode(0o000)).unwrap();
    let refused = as_nobody(&at.join("sarang"), &["image", "build", "root", "other"]);
    let (code, _, err) = parts(refused);
    assert_eq!(code, Some(125), "{err}");
    assert!(err.contains("no permission to read root/secret"), "{err}");
    assert!(!at.join("other").exists());
}

#[test]
fn what_cannot_be_made_is_one_sentence_and_leaves_nothing() {
    let (_scratch, at) = scratch();
    fs::write(at.join("empty"), "").unwrap();
    fs::write(at.join("notes.txt"), "Dear diary,\n").unwrap();
    fs::write(at.join("good.tar"), tar(&[("a", b"a")])).unwrap();
    fs::write(at.join("app.tar"), docker("app:1")).unwrap();
    fs::write(at.join("cut.tar"), &tar(&[("a", &[7; 4000])])[..2000]).unwrap();
    fs::write(at.join("large.tar"), tar(&[("a", &vec![7; 17 << 20])])).unwrap();
    fs::write(at.join("there"), "precious").unwrap();
    fs::create_dir(at.join("directory")).unwrap();
    let before = left_in(&at);
    for (arguments, words) in [
        (
            &["build", "missing", "out"][..],
            "there is no file or directory missing",
        ),
        (&["build", "empty", "out"], "empty is empty"),
        (&["build", "notes.txt", "out"], "notes.txt is not an image"),
        (&["build", "/dev/null", "out"], "/dev/null is neither"),
        (
            &["build", "cut.tar", "out"],
            "cut.tar cannot be used: it is cut short",
        ),
        (
            &["build", "good.tar:1", "out"],
            "good.tar is a tar, which has no tags: leave `1` out",
        ),
        (
            &["build", "app.tar:2", "out"],
            "nothing called `2`; it has app:1",
        ),
        (&["build", "good.tar", "there"], "there exists already"),
        (
            &["build", "good.tar", "directory", "--force"],
            "directory is not a plain file",
        ),
        (
            &["build", "good.tar", "no/such/out"],
            "cannot write no/such/out",
        ),
        (
            &["build", "large.tar", "out", "--size", "16M"],
            "large.tar holds needs more than the 16M of --size",
        ),
        (
            &["show", "missing"],
            "there is no file or directory missing",
        ),
        (&["show", "app.tar@sha256:12"], "nothing called `sha256:12`"),
    ] {
        let (code, out, err) = image(&at, arguments);
        assert_eq!((code, &out[..]), (Some(125), ""), "{arguments:?}: {err}");
        assert!(
            err.starts_with("sarang: ") && err.contains(words),
            "{arguments:?}: {err}"
        );
        assert_eq!(err.lines().count(), 1, "{err}");
        assert_eq!(left_in(&at), before, "{arguments:?}");
    }
    assert_eq!(fs::read(at.join("there")).unwrap(), b"precious");
    for arguments in [
        &["build"][..],
        &["build", "good.tar"],
        &["build", "good.tar", "out", "--size", "small"],
        &[
            "build",
            "good.tar",
            "out",
            "--label",
            "a name that is too long",
        ],
        &["show"],
        &["shrink"],
    ] {
        let (code, _, err) = image(&at, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {err}");
    }
}

#[test]
fn a_path_need_not_be_text_and_may_have_a_colon_in_it() {
    let (_scratch, at) = scratch();
    let odd = at.join(std::ffi::OsStr::from_bytes(b"caf\xe9:1"));
    fs::write(&odd, docker("app:1")).unwrap();
    let out = at.join(std::ffi::OsStr::from_bytes(b"d\xefsk"));
    let mut command = sarang(&at, &["build", "--json"]);
    let output = command.arg(&odd).arg(&out).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    check(&out);
    let mut tagged = odd.into_os_string();
    tagged.push(":1");
    let output = sarang(&at, &["show"]).arg(tagged).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn an_interrupted_build_says_so_and_leaves_nothing() {
    let (_scratch, at) = scratch();
    // Much to unpack, of which most is zeros, so that it neither ends at once nor takes room.
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(8 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    let mut bytes = gzip(header.as_bytes());
    let zeros = gzip(&vec![0; 8 << 20]);
    for _ in 0..1024 {
        bytes.extend(&zeros);
    }
    fs::write(at.join("zeros.tar.gz"), bytes).unwrap();
    let mut child = sarang(&at, &["build", "zeros.tar.gz", "disk"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It has begun when its file is there.
    while left_in(&at).len() == 1 {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let (code, _, err) = parts(child.wait_with_output().unwrap());
    assert_eq!(code, Some(130), "{err}");
    assert_eq!(
        err,
        "sarang: stopped before the image was complete; nothing was written\n"
    );
    assert_eq!(left_in(&at), ["zeros.tar.gz"]);
}
