//! Linux in sarang, through the binary. These need a full KVM, and the kernels that `scripts/guest-assets`
//! fetches and `scripts/build-guest-kernel` builds. So they run only when asked for: `scripts/test` does, inside
//! `scripts/kvm-anywhere` if need be.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

fn asset(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; see scripts/guest-assets"))
}

fn binary() -> String {
    std::env::var("SARANG_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_sarang").to_owned())
}

/// A file of a cpio archive in the "newc" format, which Linux unpacks into its first root file system.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let header = [
        1,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    header
        .iter()
        .for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Boots a kernel whose init runs `script` and powers off.
fn boot(kernel: &str, script: &str, flags: &[&str]) -> (Output, String) {
    let scratch = tempfile::tempdir().unwrap();
    let mut archive = Vec::new();
    entry(&mut archive, "etc", 0o040_755, b"");
    entry(&mut archive, "etc/rc", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, b"");
    let rc = scratch.path().join("rc.cpio");
    fs::write(&rc, archive).unwrap();
    let output = Command::new(binary())
        .args([
            "run",
            "--timeout",
            "120s",
            "-k",
            kernel,
            "-i",
            &asset("SARANG_INITRD"),
            "-i",
        ])
        .arg(&rc)
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.code() != Some(0) {
        eprintln!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    (output, text)
}

fn sees_processors(kernel: &str, cpus: &str) {
    let script = "echo cpus=$(nproc) cores=$(grep -m1 'cpu cores' /proc/cpuinfo)";
    let (output, text) = boot(&asset(kernel), script, &["-c", cpus, "-m", "256M"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        text.contains(&format!("cpus={cpus} cores=cpu cores : {cpus}")),
        "{text}"
    );
}

/// One boot a test: where the machine itself is emulated, what can be repeated alone can be judged alone.
macro_rules! processors {
    ($($name:ident: $kernel:literal, $cpus:literal;)*) => {$(
        #[test]
        #[ignore = "needs a full KVM"]
        fn $name() {
            sees_processors($kernel, $cpus);
        }
    )*};
}

processors! {
    debian_6_1_sees_one_processor: "SARANG_KERNEL_61", "1";
    debian_6_1_sees_two_processors: "SARANG_KERNEL_61", "2";
    debian_6_1_sees_four_processors: "SARANG_KERNEL_61", "4";
    debian_6_12_sees_one_processor: "SARANG_KERNEL_612", "1";
    debian_6_12_sees_two_processors: "SARANG_KERNEL_612", "2";
    debian_6_12_sees_four_processors: "SARANG_KERNEL_612", "4";
}

#[test]
#[ignore = "needs a full KVM"]
fn an_elf_vmlinux_boots_and_reads_its_command_line() {
    let kernel = asset("SARANG_GUEST_KERNEL");
    let (output, text) = boot(
        &kernel,
        "echo cpus=$(nproc); cat /proc/cmdline",
        &["-c", "2", "-p", "spice=1"],
    );
    assert_eq!(output.status.code(), Some(0));
    assert!(
        text.contains("cpus=2") && text.contains("spice=1"),
        "{text}"
    );
}

/// Boots with `flag` of memory; what the kernel keeps for itself may be missing from it, but no more.
fn memory_arrives(flag: &str, low: u32, high: u32) {
    let script = "echo total=$(free -m | awk '/Mem:/ { print $2 }') end";
    let (output, text) = boot(&asset("SARANG_KERNEL_61"), script, &["-m", flag]);
    assert_eq!(output.status.code(), Some(0));
    let total: u32 = text
        .split("total=")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("{text}"));
    assert!((low..=high).contains(&total), "{flag}: {total} MiB");
}

#[test]
#[ignore = "needs a full KVM"]
fn a_small_memory_arrives_in_full() {
    memory_arrives("128M", 60, 128);
}

#[test]
#[ignore = "needs a full KVM"]
fn memory_above_the_hole_arrives_in_full() {
    memory_arrives("4G", 3800, 4096);
}

#[test]
#[ignore = "needs a full KVM"]
fn the_clock_is_the_hosts() {
    let (_, text) = boot(&asset("SARANG_KERNEL_61"), "echo now=$(date +%s) end", &[]);
    let now: u64 = text
        .split("now=")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let host = std::time::SystemTime::now()
        .duration_since(std::time::SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(host.abs_diff(now) < 120, "guest {now}, host {host}");
}

/// Runs `script` in a guest without a console; the JSON of its outcome.
fn outcome_of(script: &str) -> (Option<i32>, String) {
    let flags = ["--json", "--console", "off"];
    let (output, text) = boot(&asset("SARANG_KERNEL_61"), script, &flags);
    (output.status.code(), text)
}

#[test]
#[ignore = "needs a full KVM"]
fn a_reboot_ends_the_run_as_such() {
    let (code, json) = outcome_of("reboot -f");
    assert_eq!(code, Some(0));
    assert!(json.contains("\"rebooted\""), "{json}");
}

#[test]
#[ignore = "needs a full KVM"]
fn a_kernel_panic_ends_the_run_as_such() {
    let (code, json) = outcome_of("echo c > /proc/sysrq-trigger");
    assert_eq!(code, Some(80));
    assert!(
        json.contains("\"panicked\"") && json.contains("sysrq"),
        "{json}"
    );
}

#[test]
#[ignore = "needs a full KVM"]
fn commands_piped_to_the_shell_are_run() {
    let mut child = Command::new(binary())
        .args(["run", "--timeout", "120s", "-k", &asset("SARANG_KERNEL_61")])
        .args(["-i", &asset("SARANG_INITRD")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"echo sum=$((40 + 2))\npoweroff -f\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("sum=42"), "{text}\n{stderr}");
    assert_eq!(output.status.code(), Some(0));
}
