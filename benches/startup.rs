//! Process start to the first byte of a bare guest on its serial port, memory beside guest RAM of an idle machine, and
//! process start to init of the small Linux of `scripts/build-guest-kernel`: sarang and `qemu-system-x86_64 -M microvm`,
//! alternately in one run. Run it with `cargo bench --bench startup`; Linux boots inside `scripts/kvm-anywhere`.
//!
//! Machines are shared and noisy, so what counts is the ratio of the two medians.

#[allow(dead_code)]
mod machines;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use machines::{asset, median};

const RUNS: usize = 15;
const LINUX_RUNS: usize = 7;
/// What the initramfs of `scripts/guest-assets` prints first.
const INIT: &[u8] = b"sarang-init: ready";

/// Makes the command line that boots a kernel.
type Boot = fn(&Path) -> Command;

fn sarang(kernel: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sarang"));
    command.args(["run", "-m", "128M", "-k"]).arg(kernel);
    command
}

fn qemu(kernel: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "128M",
        "-nodefaults",
    ]);
    command.args([
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command.arg("-kernel").arg(kernel);
    command
}

/// Starts a machine and waits until it has printed `words`; nothing stands for its first byte.
fn start(mut command: Command, words: &[u8]) -> Option<(Child, Duration)> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
    while seen.is_empty() || !contains(&seen, words) {
        match child.stdout.as_mut()?.read(&mut piece) {
            Ok(len) if len > 0 => seen.extend_from_slice(&piece[..len]),
            _ => {
                let _ = child.wait();
                return None;
            }
        }
    }
    Some((child, begin.elapsed()))
}

fn contains(text: &[u8], words: &[u8]) -> bool {
    words.is_empty() || text.windows(words.len()).any(|part| part == words)
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// KiB in memory, but for mappings as large as the guest's RAM.
fn memory_beside_ram(child: &Child) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/smaps", child.id())).ok()?;
    let (mut size, mut sum) = (0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (words.next()?, words.next());
        let number = value
            .and_then(|value| value.parse::<u64>().ok())
            .unwrap_or(0);
        match key {
            "Size:" => size = number,
            "Rss:" if size < 128 << 10 => sum += number,
            _ => {}
        }
    }
    Some(sum)
}

/// A line for each machine, and the ratio.
fn print_times(times: &mut [Vec<Duration>; 2], names: [&str; 2]) {
    let [ours, theirs] = times;
    let (ours, theirs) = (median(ours), median(theirs));
    for (name, time) in names.iter().zip([ours, theirs]) {
        match time {
            Some(time) => println!("  {name:<13} {time:.1?}"),
            None => println!("  {name:<13} does not run here"),
        }
    }
    if let (Some(ours), Some(theirs)) = (ours, theirs) {
        let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
        println!("  ratio         1/{ratio:.1}");
    }
}

/// Inside a machine with a full KVM: boots Linux until its init speaks.
fn linux(kernel: &Path, initrd: &Path) {
    let machines: [(&str, Boot); 2] = [("sarang", sarang), ("qemu microvm", qemu)];
    let mut times = [vec![], vec![]];
    for _ in 0..LINUX_RUNS {
        for (index, (_, command)) in machines.iter().enumerate() {
            let mut command = command(kernel);
            let (flag, append) = match index {
                0 => ("-i", "-p"),
                _ => ("-initrd", "-append"),
            };
            command.arg(flag).arg(initrd);
            command.args([append, "console=ttyS0 reboot=a panic=-1 quiet"]);
            if let Some((child, time)) = start(command, INIT) {
                times[index].push(time);
                end(child);
            }
        }
    }
    println!("init of a small Linux, median of {LINUX_RUNS}:");
    print_times(&mut times, machines.map(|(name, _)| name));
}

fn main() {
    if let Some(assets) = machines::inside() {
        let [kernel, initrd] = &assets[..] else {
            panic!("a kernel and an initramfs");
        };
        return linux(kernel, initrd);
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let guest = |name: &str| {
        let path = scratch.path().join(name);
        fs::write(&path, sarang::guest::bare_metal(name).expect("a guest")).expect("room for it");
        path
    };
    let (hello, idle) = (guest("hello"), guest("idle"));
    let machines: [(&str, Boot); 2] = [("sarang", sarang), ("qemu microvm", qemu)];
    let (mut times, mut sizes) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..RUNS {
        for (index, (_, command)) in machines.iter().enumerate() {
            if let Some((child, time)) = start(command(&hello), b"") {
                times[index].push(time);
                end(child);
            }
            if let Some((child, _)) = start(command(&idle), b"") {
                sizes[index].extend(memory_beside_ram(&child));
                end(child);
            }
        }
    }
    println!("first byte on the UART, median of {RUNS}:");
    print_times(&mut times, machines.map(|(name, _)| name));
    println!("memory beside guest RAM, 1 vCPU, 128 MiB, median:");
    for ((name, _), sizes) in machines.iter().zip(&mut sizes) {
        match median(sizes) {
            Some(kib) => println!("  {name:<13} {:.1} MiB", kib as f64 / 1024.0),
            None => println!("  {name:<13} does not run here"),
        }
    }
    machines::go_inside(&[
        asset("build-guest-kernel", "SARANG_GUEST_KERNEL"),
        asset("guest-assets", "SARANG_INITRD"),
    ]);
}
