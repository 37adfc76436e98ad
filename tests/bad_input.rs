//! Mistakes of a user: one sentence that names the file or flag, the right exit code, nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

fn run(flags: &[&str]) -> (Option<i32>, String) {
    run_with(&[], flags)
}

fn run_with(environment: &[(&str, &str)], flags: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sarang"))
        .arg("run")
        .args(flags)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// The sentence after the resolved command line; there must be exactly one.
fn sentence(stderr: &str) -> &str {
    let lines: Vec<&str> = stderr
        .lines()
        .filter(|line| !line.starts_with("# "))
        .collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    lines[0]
}

fn refused(kernel: &Path, flags: &[&str], words: &str) {
    let mut arguments = vec!["-k", kernel.to_str().unwrap()];
    arguments.extend(flags);
    let (code, stderr) = run(&arguments);
    assert_eq!(code, Some(125), "{kernel:?}: {stderr}");
    let sentence = sentence(&stderr);
    assert!(sentence.starts_with("sarang: "), "{sentence}");
    assert!(
        sentence.to_lowercase().contains(&words.to_lowercase()),
        "{sentence:?} lacks {words:?}"
    );
}

fn hello() -> Vec<u8> {
    sarang::guest::bare_metal("hello").unwrap().to_vec()
}

#[test]
fn a_file_that_is_no_kernel_is_named_with_what_is_wrong() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let file = |name: &str, bytes: &[u8]| {
        fs::write(at(name), bytes).unwrap();
        at(name)
    };
    refused(&at("missing"), &[], "missing");
    refused(scratch.path(), &[], "directory");
    refused(&file("empty", b""), &[], "empty");
    refused(&file("notes.txt", b"Dear diary,\n"), &[], "notes.txt");
    let mut other = hello();
    other[18] = 0xb7; // e_machine: AArch64
    refused(&file("arm", &other), &[], "arm");
    let image = hello();
    refused(&file("cut", &image[..400]), &[], "cut");
    refused(&file("header", &image[..40]), &[], "header");
}

#[test]
fn what_does_not_fit_into_the_guest_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join("hello.elf");
    fs::write(&kernel, hello()).unwrap();
    let initrd = scratch.path().join("big.img");
    fs::File::create(&initrd)
        .unwrap()
        .set_len(40 << 20)
        .unwrap();
    refused(
        &kernel,
        &["-m", "32M", "-i", initrd.to_str().unwrap()],
        "--mem",
    );
    refused(&kernel, &["-p", &"x".repeat(4000)], "command line");
    refused(&kernel, &["-i", "/nonexistent.img"], "/nonexistent.img");
}

#[test]
fn a_disk_that_cannot_be_used_is_named_with_what_to_do() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join("hello.elf");
    fs::write(&kernel, hello()).unwrap();
    let odd = scratch.path().join("odd.img");
    fs::write(&odd, [0; 1000]).unwrap();
    let odd = odd.to_str().unwrap();
    let qcow2 = format!("{odd},format=qcow2");
    let directory = scratch.path().to_str().unwrap();
    for (value, words) in [
        (
            "/nonexistent.img",
            "there is no disk image /nonexistent.img",
        ),
        (directory, "is a directory"),
        (odd, "multiple of 512"),
        (&qcow2, "is not a qcow2 image"),
    ] {
        refused(&kernel, &["--disk", value], words);
        refused(&kernel, &["--root-disk", value], words);
    }
}

#[test]
fn flags_out_of_range_end_with_code_two() {
    for flags in [
        ["-m", "0"],
        ["-m", "1T"],
        ["-m", "12"],
        ["-m", "abc"],
        ["-c", "0"],
        ["-c", "100000"],
        ["--disk", "a.img,rw"],
        ["--disk", "a.img,queues=99"],
        ["--root-disk", "a.img,ro,ro"],
    ] {
        let (code, stderr) = run(&flags);
        assert_eq!(code, Some(2), "{flags:?}");
        assert!(
            stderr.contains(flags[0]) && stderr.contains(flags[1]),
            "{stderr}"
        );
    }
}

#[test]
fn a_host_without_kvm_is_told_so() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join("hello.elf");
    fs::write(&kernel, hello()).unwrap();
    let kernel = kernel.to_str().unwrap();
    let (code, stderr) = run_with(&[("SARANG_KVM", "/nonexistent/kvm")], &["-k", kernel]);
    assert_eq!(code, Some(125));
    assert!(
        sentence(&stderr).contains("there is no /nonexistent/kvm"),
        "{stderr}"
    );
    // Root opens everything; for anyone else a device without permission says what to do.
    let node = scratch.path().join("kvm");
    fs::write(&node, "").unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o000)).unwrap();
    let (code, stderr) = run_with(&[("SARANG_KVM", node.to_str().unwrap())], &["-k", kernel]);
    assert_eq!(code, Some(125));
    let expected = if rustix::process::geteuid().is_root() {
        "is not a KVM"
    } else {
        "usermod"
    };
    assert!(sentence(&stderr).contains(expected), "{stderr}");
}
