//! Each bare-metal guest on the host's own `/dev/kvm`, through the binary, as a user runs it.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Writes an embedded guest to a scratch directory.
fn guest(scratch: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = scratch.path().join(format!("{name}.elf"));
    let image = sarang::guest::bare_metal(name).unwrap_or_else(|| panic!("no guest {name}"));
    fs::write(&path, image).unwrap();
    path
}

fn sarang(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sarang"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs a guest to its end; no guest here takes long, but a wedged one must not hang the tests.
fn run(name: &str, flags: &[&str]) -> Output {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, name);
    sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .args(flags)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn code(output: &Output) -> Option<i32> {
    if output.status.code() == Some(125) {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.code()
}

#[test]
fn hello_prints_its_line_and_powers_off() {
    let output = run("hello", &[]);
    assert_eq!(
        stdout(&output),
        "Hello from a guest with no operating system!\n"
    );
    assert_eq!(code(&output), Some(0));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.starts_with("# sarang run -k "), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn each_way_to_end_has_its_own_outcome_and_exit_code() {
    for (name, exit_code, outcome) in [
        ("poweroff", 0, "powered-off"),
        ("reset", 0, "rebooted"),
        ("reset-i8042", 0, "rebooted"),
        ("exit", 42, "exited"),
        ("pvpanic", 80, "panicked"),
        ("triplefault", 81, "triple-faulted"),
    ] {
        let output = run(name, &["--json", "--console", "off"]);
        assert_eq!(code(&output), Some(exit_code), "{name}: {output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["outcome"], outcome, "{name}");
        assert_eq!(report["exit_code"], exit_code, "{name}");
    }
}

#[test]
fn all_vcpus_start_and_acpi_names_each_of_them() {
    let output = run("smp", &["-c", "4"]);
    assert!(
        stdout(&output).contains("smp: 4 of 4 processors are running"),
        "{}",
        stdout(&output)
    );
    assert_eq!(code(&output), Some(0));
    let output = run("acpi", &["-c", "3"]);
    assert!(
        stdout(&output).contains("acpi: all checksums are right"),
        "{}",
        stdout(&output)
    );
    assert_eq!(code(&output), Some(0));
}

#[test]
fn the_local_apic_timer_ticks() {
    let output = run("timer", &[]);
    assert_eq!(code(&output), Some(0), "{}", stdout(&output));
}

#[test]
fn every_byte_of_ram_is_there() {
    let output = run("memory", &["-m", "32M"]);
    assert!(
        stdout(&output).contains("every byte holds what was written"),
        "{}",
        stdout(&output)
    );
    assert_eq!(code(&output), Some(0));
}

#[test]
fn what_is_piped_in_comes_back_by_interrupt() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "echo");
    let mut child = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Written at once, before the guest listens: nothing of it may be lost.
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"the quick brown fox\x04")
        .unwrap();
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(text.contains("the quick brown fox"), "{text}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Runs a guest that is talked to, and gives its exit code, its report and what is on standard error.
fn talk(name: &str, flags: &[&str]) -> (Option<i32>, serde_json::Value, String) {
    let output = run(name, &[flags, &["--json"]].concat());
    let text = stdout(&output);
    let line = text.lines().last().unwrap_or_default();
    let report = serde_json::from_str(line).unwrap_or_else(|_| panic!("{output:?}"));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), report, stderr)
}

#[test]
fn a_conversation_ends_with_what_was_waited_for() {
    let scratch = tempfile::tempdir().unwrap();
    let file = format!("file={}", scratch.path().join("log").display());
    // More than fits into the queue and the FIFO, typed before the guest listens: nothing of it may be lost.
    let long = "x".repeat(5000);
    for console in ["stdio", "off", "pty", &file] {
        let (code, report, _) = talk(
            "echo",
            &[
                "--console",
                console,
                "--send",
                &long,
                "--expect",
                "echo: ready",
                "--send",
                "!\\n",
                "--expect",
                "^(x+)!$",
                "--send",
                r"\x32+3\r\n",
                "--expect",
                r"^(\d)\+3$",
            ],
        );
        assert_eq!(code, Some(0), "{console}: {report}");
        assert_eq!(report["outcome"], "expected", "{console}");
        assert_eq!(report["script"]["done"], 6);
        let matches = &report["script"]["matches"];
        assert_eq!(matches[1]["groups"], serde_json::json!([long]));
        assert_eq!(matches[2]["text"], "2+3");
        assert_eq!(matches[2]["groups"], serde_json::json!(["2"]));
    }
}

#[test]
fn a_conversation_that_ends_with_typing_leaves_the_end_to_the_guest() {
    let steps = ["--expect", "ready", "--send", r"bye\x04"];
    let (code, report, stderr) = talk("echo", &steps);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(report["outcome"], "powered-off");
    assert_eq!(report["script"]["done"], 2);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn what_the_host_sends_comes_after_the_steps() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "echo");
    let mut child = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .args([
            "--expect", "ready", "--send", "first", "--expect", "first", "--send", " second",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b" third\x04")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "echo: ready\nfirst second third");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_guest_that_ends_too_early_fails_with_the_step_and_its_last_words() {
    for (name, flags, exit_code, outcome, said) in [
        (
            "hello",
            &[][..],
            1,
            "not-expected",
            "  Hello from a guest with no operating system!",
        ),
        (
            "triplefault",
            &[],
            81,
            "triple-faulted",
            "  triplefault: jumping off",
        ),
        ("exit", &[], 42, "exited", ""),
        (
            "spin",
            &["--console", "virtio,off"],
            124,
            "timed-out",
            "  spin: running",
        ),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let kernel = guest(&scratch, name);
        let output = sarang(&["run", "-k", kernel.to_str().unwrap(), "--json"])
            .args(["--timeout", if name == "spin" { "1s" } else { "120s" }])
            .args(["--send", "x", "--expect", "no such (thing)"])
            .args(flags)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(exit_code), "{name}: {stderr}");
        let report: serde_json::Value =
            serde_json::from_str(stdout(&output).lines().last().unwrap()).unwrap();
        assert_eq!(report["outcome"], outcome);
        assert_eq!(report["script"]["waiting_for"], "no such (thing)");
        let sentence = "sarang: step 2 of 2, --expect 'no such (thing)', was not seen";
        let mut lines = stderr
            .lines()
            .skip_while(|line| !line.starts_with(sentence));
        let end = match said {
            "" => "; the guest's console said nothing",
            _ => "; the guest's console said last:",
        };
        assert_eq!(lines.next(), Some(format!("{sentence}{end}").as_str()));
        let last = lines.last().unwrap_or_default();
        assert!(last.starts_with(said), "{name}: {stderr}");
    }
}

#[test]
fn a_guest_that_prints_without_end_is_searched_without_end() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "flood");
    for console in ["off", "stdio"] {
        let output = sarang(&["run", "--timeout", "2s", "-k", kernel.to_str().unwrap()])
            .args([
                "--console",
                console,
                "--expect",
                r"(?s)(\w|\W)+no such thing$",
            ])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(124), "{stderr}");
        assert!(
            stderr.contains("was not seen; the guest's console said last:"),
            "{stderr}"
        );
        assert!(stderr.lines().count() <= 14, "{stderr}");
    }
}

#[test]
fn a_guest_that_never_ends_meets_its_timeout() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "spin");
    let output = sarang(&["run", "--timeout", "1s", "-k", kernel.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(124));
    assert!(stdout(&output).contains("spin: running"));
}

#[test]
fn a_second_signal_stops_a_guest_that_ignores_the_power_button() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "spin");
    let mut child = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = [0; 13];
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"spin: running");
    let pid = rustix::process::Pid::from_child(&child);
    // Two of the same kind could merge into one while they wait to be read.
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(matches!(child.wait().unwrap().code(), Some(130 | 143)));
}

#[test]
fn a_reader_that_leaves_or_stalls_does_not_hold_the_guest_up() {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "flood");
    let start = |timeout: &str| {
        sarang(&["run", "--timeout", timeout, "-k", kernel.to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut closed = start("2s");
    drop(closed.stdout.take());
    assert_eq!(closed.wait().unwrap().code(), Some(124));
    let mut stalled = start("2s");
    let unread = stalled.stdout.take();
    assert_eq!(stalled.wait().unwrap().code(), Some(124));
    drop(unread);
}

#[test]
fn the_trace_names_registers() {
    let scratch = tempfile::tempdir().unwrap();
    let (kernel, trace) = (guest(&scratch, "hello"), scratch.path().join("exits.txt"));
    let output = sarang(&[
        "run",
        "-k",
        kernel.to_str().unwrap(),
        "--trace",
        trace.to_str().unwrap(),
    ])
    .output()
    .unwrap();
    assert_eq!(code(&output), Some(0));
    let text = fs::read_to_string(&trace).unwrap();
    assert!(text.contains("io out 0x3f8 ← 0x48 COM1.THR"), "{text}");
    assert!(
        text.lines().all(|line| line.contains(" vcpu0 rip=0x")),
        "{text}"
    );
}

#[test]
fn the_console_can_be_a_file() {
    let scratch = tempfile::tempdir().unwrap();
    let (kernel, file) = (guest(&scratch, "hello"), scratch.path().join("console.txt"));
    let console = format!("file={}", file.display());
    let output = sarang(&["run", "-k", kernel.to_str().unwrap(), "--console", &console])
        .output()
        .unwrap();
    assert_eq!((code(&output), stdout(&output).as_str()), (Some(0), ""));
    assert!(fs::read_to_string(file).unwrap().starts_with("Hello"));
}

#[test]
fn a_guest_drives_a_virtio_device_by_queues_and_interrupts() {
    let scratch = tempfile::tempdir().unwrap();
    let (kernel, trace) = (guest(&scratch, "entropy"), scratch.path().join("exits.txt"));
    let output = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .args(["--trace", trace.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(code(&output), Some(0), "{}", stdout(&output));
    let text = stdout(&output);
    assert!(text.contains("entropy: 4 requests, "), "{text}");
    let exits = fs::read_to_string(&trace).unwrap();
    assert!(
        exits.contains("RNG0.Status{ACKNOWLEDGE,DRIVER,DRIVER_OK,FEATURES_OK}"),
        "{exits}"
    );
    assert!(exits.contains("RNG0.InterruptACK{USED_BUFFER}"), "{exits}");
    assert!(!exits.contains("RNG0.QueueNotify"), "KVM takes it: {exits}");
}

/// A file as the guest `pmem` wants it, of 4 MiB.
fn persistent(scratch: &tempfile::TempDir) -> PathBuf {
    let path = scratch.path().join("pmem.img");
    let mut bytes = vec![0; 4 << 20];
    bytes[..8].copy_from_slice(b"persists");
    bytes[(4 << 20) - 8..].copy_from_slice(b"the end.");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_file_is_memory_of_the_guest_and_keeps_what_it_stores() {
    let scratch = tempfile::tempdir().unwrap();
    let file = persistent(&scratch);
    let before = fs::read(&file).unwrap();
    // 4 GiB of RAM, so that the memory lies above it.
    for (ram, place) in [("128M", "0x100000000"), ("4G", "0x140000000")] {
        fs::write(&file, &before).unwrap();
        let output = run("pmem", &["-m", ram, "--pmem", file.to_str().unwrap()]);
        let text = stdout(&output);
        assert_eq!(code(&output), Some(0), "{text}");
        let found = format!("pmem: 4194304 bytes at {place}\n");
        assert!(text.contains(&found), "{text}");
        assert!(text.contains("pmem: written and flushed"), "{text}");
        let mut expected = before.clone();
        expected[0x1000..0x1008].copy_from_slice(b"was here");
        assert!(fs::read(&file).unwrap() == expected, "{ram}");
    }
}

#[test]
fn read_only_memory_is_read_and_stays_as_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    let (file, trace) = (persistent(&scratch), scratch.path().join("exits.txt"));
    let before = fs::read(&file).unwrap();
    let pmem = format!("{},ro", file.display());
    let output = run(
        "pmem",
        &["--pmem", &pmem, "--trace", trace.to_str().unwrap()],
    );
    assert_eq!(code(&output), Some(3), "{}", stdout(&output));
    assert!(fs::read(&file).unwrap() == before);
    let exits = fs::read_to_string(&trace).unwrap();
    assert!(exits.contains("mmio write 0x100001000"), "{exits}");
}

#[test]
fn a_file_that_is_cut_under_the_guest_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let (kernel, file) = (guest(&scratch, "pmem"), persistent(&scratch));
    let mut child = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .args(["-p", "wait", "--pmem", file.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut text, mut out) = (Vec::new(), child.stdout.take().unwrap());
    while !text.ends_with(b"pmem: waiting\n") {
        let mut byte = [0];
        assert_eq!(out.read(&mut byte).unwrap(), 1, "{text:?}");
        text.push(byte[0]);
    }
    let cut = fs::OpenOptions::new().write(true).open(&file).unwrap();
    cut.set_len(4096).unwrap();
    // Lets the guest go on, if it is still there.
    let _ = child.stdin.take().unwrap().write_all(b"!");
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    let sentence = format!("{} was cut from 4194304 to 4096 bytes", file.display());
    assert!(stderr.contains(&sentence), "{stderr}");
}

#[test]
fn a_guest_writes_a_disk_from_end_to_end_and_reads_back_what_it_wrote() {
    const BYTES: u64 = 4 << 20;
    let scratch = tempfile::tempdir().unwrap();
    let kernel = guest(&scratch, "block");
    for (options, serial) in [
        ("", "sarang-0"),
        (",queues=2,serial=S1,iops=1000000,worker=own", "S1"),
    ] {
        let image = scratch.path().join(format!("{serial}.img"));
        fs::File::create(&image).unwrap().set_len(BYTES).unwrap();
        let output = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
            .args(["--disk", &format!("{}{options}", image.display())])
            .output()
            .unwrap();
        assert_eq!(code(&output), Some(0), "{}", stdout(&output));
        assert_eq!(
            stdout(&output),
            format!(
                "block: serial number {serial}\nblock: 4096 KiB, every byte holds what was written\n"
            )
        );
        let bytes = fs::read(&image).unwrap();
        assert_eq!(bytes.len() as u64, BYTES);
        for (number, word) in (0..).zip(bytes.chunks(8)) {
            let expected = !(number * 8_u64);
            assert_eq!(word, expected.to_le_bytes(), "word {number} of the image");
        }
    }
}

#[test]
fn a_disk_that_cannot_be_written_tells_the_guest_so() {
    let scratch = tempfile::tempdir().unwrap();
    let (kernel, image) = (guest(&scratch, "block"), scratch.path().join("disk.img"));
    fs::write(&image, [1; 1 << 20]).unwrap();
    let output = sarang(&["run", "--timeout", "120s", "-k", kernel.to_str().unwrap()])
        .args(["--disk", &format!("{},ro", image.display())])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "block: writing: status 1\n");
    assert_eq!(code(&output), Some(1));
    assert_eq!(fs::read(&image).unwrap(), [1; 1 << 20]);
}
