//! What devices are given on the command line.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{ForAnybody, hello, refused, run, sentence};

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
fn a_directory_that_cannot_be_shared_is_named_with_what_to_do() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join("hello.elf");
    fs::write(&kernel, hello()).unwrap();
    let kernel_path = kernel.to_str().unwrap();
    for (value, words) in [
        ("/nonexistent", "there is no directory /nonexistent"),
        (kernel_path, "is not a directory"),
    ] {
        refused(&kernel, &["--share", value], words);
    }
    let (code, stderr) = run(&[
        "-k",
        kernel_path,
        "--share",
        "/a/src",
        "--share",
        "/b/src,ro",
    ]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("the tag `src`"), "{stderr}");
}

#[test]
fn an_image_that_another_machine_writes_is_in_use() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("spin.elf"), sarang::guest::bare_metal("spin").unwrap()).unwrap();
    fs::write(at("disk.img"), vec![0; 1 << 20]).unwrap();
    let mut other = Command::new(env!("CARGO_BIN_EXE_sarang"))
        .args(["run", "-k", &at("spin.elf"), "--disk", &at("disk.img")])
        .args(["--trace", &at("trace")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The trace is opened after the disks.
    while !Path::new(&at("trace")).exists() && other.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    refused(
        Path::new(&at("spin.elf")),
        &["--disk", &at("disk.img")],
        "in use",
    );
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn without_privileges_devices_say_what_is_missing() {
    let here = ForAnybody::new();
    fs::write(here.at("mine.img"), vec![0; 4096]).unwrap();
    here.mode("mine.img", 0o600);
    fs::create_dir(here.at("mine")).unwrap();
    here.mode("mine", 0o700);
    let path = |name: &str| here.at(name).to_str().unwrap().to_owned();
    // On most hosts anybody may open /dev/net/tun, but not make a tap; on some not even that.
    let mut cases = vec![("--net", "tap=sarang-no".to_owned(), "--net tap=sarang-no")];

    if rustix::process::geteuid().is_root() {
        cases.push(("--disk", path("mine.img"), "no permission"));
        cases.push(("--share", path("mine"), "permission"));
        cases.push(("--pmem", path("mine.img"), "no permission"));
    }
    for (flag, value, words) in cases {
        let (code, stderr) = here.run(&[], &[flag, &value]);
        assert_eq!(code, Some(125), "{flag} {value}: {stderr}");
        assert!(
            sentence(&stderr).contains(words),
            "{flag} {value}: {stderr}"
        );
    }
}

#[test]
fn a_host_without_passt_is_told_what_to_install() {
    let here = ForAnybody::new();
    let (code, stderr) = here.run(&[("PATH", Path::new("/nonexistent"))], &["--net", "user"]);
    assert_eq!(code, Some(125), "{stderr}");
    assert!(sentence(&stderr).contains("install"), "{stderr}");
    assert!(sentence(&stderr).contains("passt"), "{stderr}");
}

#[test]
fn options_that_make_no_sense_end_with_code_two() {
    for (flag, value) in [
        ("--disk", "a.img,rw"),
        ("--disk", "a.img,queues=99"),
        ("--disk", "a.img,bw=much"),
        ("--root-disk", "a.img,ro,ro"),
        ("--share", "dir,rw"),
        ("--share", "dir,tag="),
        ("--balloon", "much"),
        ("--vsock", "2"),
        ("--vsock", "3,port=1"),
        ("--disk", "a.img,worker=mine"),
        ("--pmem", "a.img,rw"),
        ("--pmem", "a.img,ro=yes"),
        ("--net", "bridge"),
        ("--net", "tap"),
        ("--net", "user,hostfwd=22"),
        ("--net", "tap=t,speed=1"),
    ] {
        let (code, stderr) = run(&[flag, value]);
        assert_eq!(code, Some(2), "{flag} {value}: {stderr}");
        assert!(stderr.contains(flag) && stderr.contains(value), "{stderr}");
    }
}

#[test]
fn persistent_memory_that_cannot_be_had_is_named_with_what_to_do() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join("hello.elf");
    fs::write(&kernel, hello()).unwrap();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    for (name, bytes) in [("empty", 0), ("odd", 1000), ("small", 4096)] {
        fs::File::create(path(name))
            .unwrap()
            .set_len(bytes)
            .unwrap();
    }
    for (value, words) in [
        ("/nonexistent.img".to_owned(), "there is no"),
        (path(""), "is a directory"),
        ("/dev/null".to_owned(), "is not a file"),
        (path("empty"), "is empty"),
        (path("odd"), "`truncate -s %2M "),
        (path("small"), "units of 2 MiB"),
    ] {
        refused(&kernel, &["--pmem", &value], words);
    }
    let twice = path("twice");
    fs::write(&twice, vec![0; 2 << 20]).unwrap();
    refused(&kernel, &["--pmem", &twice, "--disk", &twice], "in use");
    refused(&kernel, &["--pmem", &twice, "--pmem", &twice], "in use");
}
