//! `sarang run -- CMD`: commands in a guest that has the host's own files, or a root of its own.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::UNIX_EPOCH;

use crate::guest::{Kernel, binary, host, on_each_kernel};

/// `sarang run` with a kernel and these flags.
fn run(kernel: Kernel, flags: &[&str]) -> Command {
    run_for("100s", kernel, flags)
}

fn run_for(timeout: &str, kernel: Kernel, flags: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["run", "--timeout", timeout, "-c", "2", "-m", "1G", "-k"])
        .arg(kernel.image())
        .args(flags)
        .stdin(Stdio::null());
    command
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code(), text(stdout), text(stderr))
}

/// A command's streams and status come back apart, and nothing else is on them.
fn streams_and_status_are_the_commands_own(kernel: Kernel) {
    let script = "echo out; echo err >&2; pwd; id -u; exit 7";
    let (code, out, err) = output(run(kernel, &["--", "sh", "-c", script]));
    let here = std::env::current_dir().unwrap();
    let user = rustix::process::geteuid().as_raw();
    assert_eq!(out, format!("out\n{}\n{user}\n", here.display()), "{err}");
    assert_eq!((code, err.as_str()), (Some(7), "err\n"));
}

/// The bytes, names, times and owners of all files in a directory, as one number.
fn state_of(directory: &Path) -> String {
    let directory = directory.to_str().unwrap();
    let script = "tar -C \"$0\" --sort=name --numeric-owner --acls --xattrs -cf - . | sha256sum";
    host("sh", &["-c", script, directory])
}

/// What is written to the host's root stays in the guest; what is written to the shared directory does not.
fn only_what_is_shared_for_writing_changes(kernel: Kernel) {
    let work = tempfile::tempdir().unwrap();
    let probe = Path::new("/etc/sarang-was-here");
    let (etc, licenses) = (Path::new("/etc"), Path::new("/usr/share/common-licenses"));
    let before = (state_of(etc), state_of(licenses));
    let script = "set -e; echo changed >/etc/sarang-was-here; cat /etc/sarang-was-here; [ ! -e /etc/shadow ]; echo kept >kept
        rm -rf /usr/share/common-licenses /etc; [ ! -e /usr/share/common-licenses ]; [ ! -e /etc/passwd ]";
    let mut command = run(kernel, &["--user", "root", "--", "sh", "-c", script]);
    command.current_dir(work.path());
    let (code, out, err) = output(command);
    assert_eq!((code, out.as_str()), (Some(0), "changed\n"), "{err}");
    assert!(!probe.exists());
    assert_eq!((state_of(etc), state_of(licenses)), before);
    assert_eq!(
        fs::read_to_string(work.path().join("kept")).unwrap(),
        "kept\n"
    );
}

on_each_kernel! {
    streams_and_status_are_the_commands_own;
    only_what_is_shared_for_writing_changes;
}

#[test]
#[ignore = "needs a full KVM"]
fn every_end_of_a_command_has_its_code() {
    let sh = |script: &'static str| vec!["sh", "-c", script];
    for (words, code, sentence) in [
        (sh("kill -9 $$"), 137, ""),
        (vec!["no-such-program"], 127, "no-such-program"),
        (vec!["/etc/passwd"], 126, "/etc/passwd"),
        (vec!["/etc"], 126, "/etc"),
    ] {
        let mut flags = vec!["--"];
        flags.extend(&words);
        let (got, out, err) = output(run(Kernel::Small, &flags));
        assert_eq!((got, out.as_str()), (Some(code), ""), "{words:?}: {err}");
        assert!(err.contains(sentence), "{words:?}: {err}");
        assert_eq!(
            err.lines().count(),
            usize::from(!sentence.is_empty()),
            "{err}"
        );
    }
}

#[test]
#[ignore = "needs a full KVM"]
fn a_panic_and_a_timeout_are_told_apart_from_a_commands_end() {
    let panic = [
        "--user",
        "root",
        "--json",
        "--",
        "sh",
        "-c",
        "echo c >/proc/sysrq-trigger",
    ];
    let (code, out, err) = output(run(Kernel::Small, &panic));
    assert_eq!(code, Some(80), "{err}");
    assert!(out.contains("\"panicked\""), "{out}");
    assert!(
        err.contains("Kernel panic"),
        "the kernel's last words: {err}"
    );
    let sleep = ["--timeout", "6s", "--", "sleep", "99"];
    let mut command = Command::new(binary());
    command
        .args(["run", "-k"])
        .arg(Kernel::Small.image())
        .args(sleep);
    let (code, _, err) = output(command);
    assert_eq!(code, Some(124), "{err}");
}

/// A file on a shared directory has the time of the host, and what is written into it the guest's.
#[test]
#[ignore = "needs a full KVM"]
fn the_clock_of_a_command_is_the_hosts() {
    let work = tempfile::tempdir().unwrap();
    // The first time, `date` itself has to be read from the host.
    let script = "date >clock; date +%s.%N >clock";
    let mut command = run(Kernel::Debian612, &["--", "sh", "-c", script]);
    command.current_dir(work.path());
    let (code, _, err) = output(command);
    assert_eq!(code, Some(0), "{err}");
    let clock = work.path().join("clock");
    let host = fs::metadata(&clock).unwrap().modified().unwrap();
    let host = host.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let guest: f64 = fs::read_to_string(clock).unwrap().trim().parse().unwrap();
    assert!((guest - host).abs() < 1.0, "guest {guest}, host {host}");
}

/// A gibibyte: to `sha256sum`, and back.
#[test]
#[ignore = "needs a full KVM"]
fn bytes_go_through_a_guest_unchanged() {
    const BYTES: u64 = 1 << 30;
    let scratch = tempfile::tempdir().unwrap();
    let (input, back) = (scratch.path().join("in"), scratch.path().join("out"));
    let mut random = File::open("/dev/urandom").unwrap().take(BYTES);
    std::io::copy(&mut random, &mut File::create(&input).unwrap()).unwrap();
    let script = "mkfifo /tmp/sum; sha256sum </tmp/sum >&2 & tee /tmp/sum; wait";
    let mut command = run_for("400s", Kernel::Small, &["--", "sh", "-c", script]);
    command.stdin(File::open(&input).unwrap());
    command.stdout(File::create(&back).unwrap());
    let output = command.stderr(Stdio::piped()).output().unwrap();
    let sum = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{sum}");
    let [input, back] = [&input, &back].map(|path| path.to_str().unwrap());
    host("cmp", &[input, back]);
    let expected = host("sha256sum", &[input]);
    assert_eq!(
        sum.split_whitespace().next(),
        expected.split_whitespace().next()
    );
}

/// As in `yes | head -n 1`, and with a reader that was never there.
#[test]
#[ignore = "needs a full KVM"]
fn a_reader_that_leaves_ends_the_command() {
    let mut child = run(Kernel::Small, &["--", "yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"y\n");
    assert_eq!(child.wait().unwrap().code(), Some(141), "128 + SIGPIPE");
}

#[test]
#[ignore = "needs a full KVM"]
fn a_filter_ends_with_its_input() {
    let mut child = run(Kernel::Small, &["--", "tr", "a-z", "A-Z"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hi\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"HI\n"[..])
    );
}

/// Somebody without privileges, who can read and run copies of what it takes.
#[test]
#[ignore = "needs a full KVM"]
fn nobody_needs_privileges() {
    if !rustix::process::geteuid().is_root() {
        // Then all tests of this file are run that way.
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    host("chmod", &["777", scratch.path().to_str().unwrap()]);
    fs::copy(Kernel::Small.image(), path("vmlinux")).unwrap();
    host(
        "cp",
        &[binary().to_str().unwrap(), path("sarang").to_str().unwrap()],
    );
    let mut command = Command::new(path("sarang"));
    command
        .args(["run", "--timeout", "100s", "-c", "2", "-m", "1G", "-k"])
        .arg(path("vmlinux"))
        .args([
            "--",
            "sh",
            "-c",
            "id -u; touch mine; cat /etc/shadow; touch /etc/x",
        ])
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        .uid(65534)
        .gid(65534);
    let (code, out, err) = output(command);
    assert_eq!((code, out.as_str()), (Some(1), "65534\n"), "{err}");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(path("mine")).unwrap().uid(), 65534);
}

/// A small root with busybox.
fn tree(directory: &Path) -> PathBuf {
    let root = directory.join("tree");
    for name in ["bin", "etc", "srv", "usr/lib"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let initrd = crate::guest::asset("SARANG_INITRD");
    let busybox = initrd.with_file_name("busybox").join("bin/busybox");
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "ls", "rm", "id"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "web:x:33:33::/srv:/bin/sh\n").unwrap();
    fs::write(root.join("srv/greeting"), "from the image\n").unwrap();
    root
}

fn run_on(root: &str, command: &[&str]) -> (Option<i32>, String, String) {
    let mut flags = vec!["--root", root, "--"];
    flags.extend(command);
    output(run(Kernel::Small, &flags))
}

#[test]
#[ignore = "needs a full KVM"]
fn a_directory_a_tar_and_a_disk_are_roots_that_do_not_change() {
    let scratch = tempfile::tempdir().unwrap();
    let root = tree(scratch.path());
    let (root, tar, disk) = (
        root.to_str().unwrap(),
        scratch.path().join("root.tar").to_str().unwrap().to_owned(),
        scratch
            .path()
            .join("root.ext4")
            .to_str()
            .unwrap()
            .to_owned(),
    );
    host("tar", &["-C", root, "-cf", &tar, "."]);
    host(binary().to_str().unwrap(), &["image", "build", root, &disk]);
    host("e2fsck", &["-f", "-n", &disk]);
    for place in [root, &tar, &disk] {
        let before = (place != root).then(|| fs::read(place).unwrap());
        let tree = state_of(Path::new(root));
        let script = "cat /srv/greeting; rm -rf /usr /etc /srv; ls /";
        let (code, out, err) = run_on(place, &["sh", "-c", script]);
        assert_eq!(code, Some(0), "{place}: {err}");
        assert!(out.starts_with("from the image\n"), "{place}: {out}");
        for name in ["usr", "etc", "srv"] {
            assert!(!out.contains(name), "{place}: {out}");
        }
        if let Some(before) = before {
            assert!(fs::read(place).unwrap() == before, "{place}");
        }
        assert_eq!(state_of(Path::new(root)), tree, "{place}");
    }
}

/// The digest of a file, as images have it.
fn digest(path: &Path) -> String {
    let sum = host("sha256sum", &[path.to_str().unwrap()]);
    format!("sha256:{}", sum.split_whitespace().next().unwrap())
}

/// An image of a small tree as `docker save` writes it, and as an OCI layout. It runs `cat greeting` in /srv as `web`.
fn images(scratch: &Path) -> [PathBuf; 2] {
    let root = tree(scratch);
    let parts = scratch.join("parts");
    let blobs = scratch.join("layout/blobs/sha256");
    fs::create_dir_all(&parts).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir(parts.join("layer")).unwrap();
    let layer = parts.join("layer/layer.tar");
    let root = root.to_str().unwrap();
    host("tar", &["-C", root, "-cf", layer.to_str().unwrap(), "."]);
    let id = |path: &Path| digest(path).trim_start_matches("sha256:").to_owned();
    let layer_name = format!("{}/layer.tar", id(&layer));
    fs::rename(parts.join("layer"), parts.join(id(&layer))).unwrap();
    let layer = parts.join(&layer_name);
    let diff = digest(&layer);
    let text = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Entrypoint":["cat"],"Cmd":["greeting"],"Env":["PATH=/bin"],
            "WorkingDir":"/srv","User":"web"}},"rootfs":{{"type":"layers","diff_ids":["{diff}"]}},"history":[]}}"#
    );
    fs::write(parts.join("config"), text).unwrap();
    let config_name = format!("{}.json", id(&parts.join("config")));
    let config = parts.join(&config_name);
    fs::rename(parts.join("config"), &config).unwrap();
    let text = format!(
        r#"[{{"Config":"{config_name}","RepoTags":["greeter:latest"],"Layers":["{layer_name}"]}}]"#
    );
    fs::write(parts.join("manifest.json"), text).unwrap();
    let docker = scratch.join("greeter.tar");
    host(
        "tar",
        &[
            "-C",
            parts.to_str().unwrap(),
            "-cf",
            docker.to_str().unwrap(),
            ".",
        ],
    );

    let blob = |path: &Path| {
        let digest = digest(path);
        fs::copy(path, blobs.join(digest.trim_start_matches("sha256:"))).unwrap();
        format!(
            r#""digest":"{digest}","size":{}"#,
            fs::metadata(path).unwrap().len()
        )
    };
    let manifest = parts.join("oci-manifest.json");
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json",{}}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar",{}}}]}}"#,
        blob(&config),
        blob(&layer)
    );
    fs::write(&manifest, text).unwrap();
    let layout = scratch.join("layout");
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json",{}}}]}}"#,
        blob(&manifest)
    );
    fs::write(layout.join("index.json"), index).unwrap();
    [docker, layout]
}

#[test]
#[ignore = "needs a full KVM"]
fn container_images_run_what_they_are_for() {
    let scratch = tempfile::tempdir().unwrap();
    for image in images(scratch.path()) {
        let flags = ["--root", image.to_str().unwrap()];
        let mut command = run(Kernel::Small, &flags);
        command.env("SARANG_CACHE", scratch.path().join("cache"));
        let (code, out, err) = output(command);
        assert_eq!((code, out.as_str()), (Some(0), "from the image\n"), "{err}");
    }
}
