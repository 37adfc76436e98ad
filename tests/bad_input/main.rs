//! Mistakes of a user: one sentence that names the file or flag, the right exit code, nothing left behind.

mod devices;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
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

/// A 64-bit ELF with a PVH note whose segments lie at these physical addresses, 16 bytes each.
fn elf(segments: &[u64]) -> Vec<u8> {
    let count = segments.len() as u16 + 1;
    let data_at = 64 + 56 * u64::from(count);
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 0x3e, 0, 1, 0, 0, 0]);
    for value in [segments[0], 64, 0] {
        image.extend(value.to_le_bytes());
    }
    image.extend([0; 4]);
    for value in [64, 56, count, 64, 0, 0] {
        image.extend(value.to_le_bytes());
    }
    let mut header = |kind: u32, address: u64, offset: u64, len: u64| {
        image.extend([kind, 7].iter().flat_map(|value| value.to_le_bytes()));
        for value in [offset, address, address, len, len, 4] {
            image.extend(value.to_le_bytes());
        }
    };
    for address in segments {
        header(1, *address, data_at, 16);
    }
    header(4, 0, data_at + 16, 20);
    image.extend([0x90; 16]);
    // Name length, description length, type 18 (PVH entry), "Xen", the entry.
    for value in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), segments[0] as u32] {
        image.extend(value.to_le_bytes());
    }
    image
}

/// A bzImage around a gzip payload whose last four bytes are `size`.
fn bzimage(payload: &[u8], size: u32) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x236] = 1;
    image[0x248..0x24c].copy_from_slice(&0x400_u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    image.extend([0xcc; 0x400]);
    image.extend(payload);
    image.extend(size.to_le_bytes());
    image
}

fn gzip(data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    let mut packed = encoder.finish().unwrap();
    packed.truncate(packed.len() - 4);
    packed
}

#[test]
fn segments_that_cannot_lie_where_they_say_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let file = |name: &str, segments: &[u64]| {
        let path = scratch.path().join(name);
        fs::write(&path, elf(segments)).unwrap();
        path
    };
    refused(&file("past-ram", &[0x10_0000, 1 << 40]), &[], "past-ram");
    refused(
        &file("in-the-hole", &[0xd000_0000]),
        &["-m", "4G"],
        "in-the-hole",
    );
    refused(&file("wraps", &[u64::MAX - 7]), &[], "wraps");
    refused(&file("twice", &[0x10_0000, 0x10_0008]), &[], "overlap");
}

#[test]
fn a_bzimage_that_does_not_hold_what_it_promises_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = scratch.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let inner = hello();
    let (packed, size) = (gzip(&inner), inner.len() as u32);
    let whole = bzimage(&packed, size);
    refused(
        &file("cut", &whole[..whole.len() - 100]),
        &[],
        "end of the file",
    );
    refused(
        &file("setup-only", &whole[..1024]),
        &[],
        "protected-mode code",
    );
    let mut corrupt = packed.clone();
    corrupt[40..80].fill(0x55);
    refused(
        &file("corrupt", &bzimage(&corrupt, size)),
        &[],
        "does not unpack",
    );
    let claims = file("huge", &bzimage(&packed, u32::MAX));
    refused(&claims, &[], "claims to unpack to 4095 MiB");
    refused(
        &file("short", &bzimage(&packed, size + 1)),
        &["-m", "1G"],
        "does not unpack",
    );
}

#[test]
fn a_run_that_does_not_start_leaves_files_as_they_were() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("kernel"), "no kernel").unwrap();
    fs::write(at("log"), "of the last run").unwrap();
    fs::write(at("trace"), "of the last run").unwrap();
    let console = format!("file={}", at("log"));
    refused(
        Path::new(&at("kernel")),
        &["--console", &console, "--trace", &at("trace")],
        "kernel",
    );
    let console = format!("file={}", at("new-log"));
    refused(
        Path::new(&at("kernel")),
        &["--console", &console, "--trace", &at("new-trace")],
        "kernel",
    );
    assert_eq!(fs::read(at("log")).unwrap(), b"of the last run");
    assert_eq!(fs::read(at("trace")).unwrap(), b"of the last run");
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 3);
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join("hello.elf");
    fs::write(&kernel, hello()).unwrap();
    refused(
        &kernel,
        &["--trace", "/nonexistent/trace"],
        "/nonexistent/trace",
    );
    refused(
        &kernel,
        &["--console", "file=/nonexistent/log"],
        "/nonexistent/log",
    );
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
fn flags_out_of_range_end_with_code_two() {
    for flags in [
        ["-m", "0"],
        ["-m", "1T"],
        ["-m", "12"],
        ["-m", "abc"],
        ["-c", "0"],
        ["-c", "100000"],
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
fn steps_that_cannot_be_done_are_refused_with_the_flag_and_the_reason() {
    for (flags, words) in [
        (
            &["--expect", "login("][..],
            "unclosed group, at character 6",
        ),
        (&["--expect", "(?=x)"], "look-around"),
        (&["--expect", "x?"], "nothing to wait for"),
        (&["--expect", "(a{200}){200}"], "too large"),
        (&["--send", r"root\q"], r"\q means nothing"),
        (&["--send", r"\x3"], "two hexadecimal digits"),
        (&["--send", "root\\"], "a backslash at the end"),
    ] {
        let (code, stderr) = run(&[&["-k", "/nonexistent"], flags].concat());
        assert_eq!(code, Some(2), "{flags:?}: {stderr}");
        let first = stderr.lines().next().unwrap();
        assert!(first.contains(flags[0]) && first.contains(words), "{first}");
    }
    for flags in [
        &["-k", "/nonexistent", "--expect", "x", "--", "true"][..],
        &["-k", "/nonexistent", "--send", "x", "--root", "host"],
        &["--expect", "x"],
    ] {
        let (code, stderr) = run(flags);
        assert_eq!(code, Some(2), "{flags:?}: {stderr}");
        assert!(
            sentence(&stderr)
                .starts_with("sarang: --expect and --send talk to a guest that is booted")
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
    let node = scratch.path().join("kvm");
    fs::write(&node, "").unwrap();
    let (code, stderr) = run_with(&[("SARANG_KVM", node.to_str().unwrap())], &["-k", kernel]);
    assert_eq!(code, Some(125));
    assert!(sentence(&stderr).contains("is not a KVM"), "{stderr}");
}

/// A directory that anybody may read, with the binary and a kernel in it, for those without privileges.
struct ForAnybody(tempfile::TempDir);

impl ForAnybody {
    fn new() -> ForAnybody {
        let here = ForAnybody(tempfile::tempdir().unwrap());
        here.mode("", 0o755);
        fs::write(here.at("hello.elf"), hello()).unwrap();
        // Copied by another process: a program that this one holds open for writing, if only in a child that another
        // test is just starting, cannot be executed.
        let copied = Command::new("cp")
            .args([Path::new(env!("CARGO_BIN_EXE_sarang")), &here.at("sarang")])
            .status();
        assert!(copied.unwrap().success());
        here
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.at(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Runs `sarang run` on the kernel as somebody without privileges. Root may do everything, and another user may not
    /// reach the directory that the binary was built in.
    fn run(&self, environment: &[(&str, &Path)], flags: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(self.at("sarang"));
        if rustix::process::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        let output = command
            .args(["run", "-k"])
            .arg(self.at("hello.elf"))
            .args(flags)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), stderr)
    }
}

#[test]
fn a_user_without_permission_on_kvm_is_told_which_group_to_join() {
    let here = ForAnybody::new();
    fs::write(here.at("kvm"), "").unwrap();
    here.mode("kvm", 0o000);
    let (code, stderr) = here.run(&[("SARANG_KVM", &here.at("kvm"))], &[]);
    assert_eq!(code, Some(125), "{stderr}");
    assert!(sentence(&stderr).contains("usermod -aG kvm"), "{stderr}");
}
