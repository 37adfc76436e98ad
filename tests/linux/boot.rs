//! Boots: processors, memory, the clock, and how runs end.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::guest::{Guest, Kernel, asset, binary};

fn sees_processors(kernel: Kernel, cpus: &str) {
    let script = "echo cpus=$(nproc) cores=$(grep -m1 'cpu cores' /proc/cpuinfo)";
    let text = Guest::new(kernel, script)
        .flags(&["-c", cpus, "-m", "256M"])
        .output();
    assert!(
        text.contains(&format!("cpus={cpus} cores=cpu cores : {cpus}")),
        "{text}"
    );
}

/// One boot a test: where the machine itself is emulated, what can be repeated alone can be judged alone.
macro_rules! processors {
    ($($name:ident: $kernel:ident, $cpus:literal;)*) => {$(
        #[test]
        #[ignore = "needs a full KVM"]
        fn $name() {
            sees_processors(Kernel::$kernel, $cpus);
        }
    )*};
}

processors! {
    debian_6_1_sees_one_processor: Debian61, "1";
    debian_6_1_sees_two_processors: Debian61, "2";
    debian_6_1_sees_four_processors: Debian61, "4";
    debian_6_12_sees_one_processor: Debian612, "1";
    debian_6_12_sees_two_processors: Debian612, "2";
    debian_6_12_sees_four_processors: Debian612, "4";
}

#[test]
#[ignore = "needs a full KVM"]
fn an_elf_vmlinux_boots_and_reads_its_command_line() {
    let text = Guest::new(Kernel::Small, "echo cpus=$(nproc); cat /proc/cmdline")
        .flags(&["-c", "2", "-p", "spice=1"])
        .output();
    assert!(
        text.contains("cpus=2") && text.contains("spice=1"),
        "{text}"
    );
}

/// Boots with `flag` of memory; what the kernel keeps for itself may be missing from it, but no more.
fn memory_arrives(flag: &str, low: u32, high: u32) {
    let script = "echo total=$(free -m | awk '/Mem:/ { print $2 }') end";
    let text = Guest::new(Kernel::Debian61, script)
        .flags(&["-m", flag])
        .output();
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
    let text = Guest::new(Kernel::Debian61, "echo now=$(date +%s) end").output();
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
    Guest::new(Kernel::Debian61, script)
        .flags(&["--json", "--console", "off"])
        .run()
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
        .args(["run", "--timeout", "60s", "-p", "quiet", "-k"])
        .arg(Kernel::Debian61.image())
        .arg("-i")
        .arg(asset("SARANG_INITRD"))
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

/// Boots to the shell of the initramfs and talks to it. The exit code, and standard output and error.
fn talk(kernel: Kernel, flags: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(binary())
        .args(["run", "--timeout", "60s", "-p", "quiet", "-k"])
        .arg(kernel.image())
        .arg("-i")
        .arg(asset("SARANG_INITRD"))
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn a_shell_answers(kernel: Kernel, console: &str) {
    let (code, text, stderr) = talk(
        kernel,
        &[
            "--json",
            "--console",
            console,
            "--expect",
            "guest# ",
            "--send",
            r"echo $((6*7))\n",
            "--expect",
            r"^(\d+)$",
        ],
    );
    assert_eq!(code, Some(0), "{text}\n{stderr}");
    let report = text.lines().last().unwrap();
    assert!(report.contains(r#""outcome":"expected""#), "{report}");
    assert!(
        report.contains(r#"{"text":"42","groups":["42"]}"#),
        "{report}"
    );
}

#[test]
#[ignore = "needs a full KVM"]
fn a_conversation_with_a_shell_ends_with_what_was_waited_for() {
    a_shell_answers(Kernel::Debian61, "stdio");
}

#[test]
#[ignore = "needs a full KVM"]
fn a_conversation_goes_over_a_virtio_console_as_well() {
    a_shell_answers(Kernel::Small, "virtio");
}

#[test]
#[ignore = "needs a full KVM"]
fn a_conversation_with_a_shell_can_leave_the_end_to_the_guest() {
    let steps = ["--expect", "guest# ", "--send", r"poweroff -f\n"];
    let (code, text, stderr) = talk(Kernel::Debian61, &steps);
    assert_eq!(code, Some(0), "{text}\n{stderr}");
}
