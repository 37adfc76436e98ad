//! Process start to the first byte of a bare guest on its serial port, and memory beside guest RAM of an idle machine:
//! sarang and `qemu-system-x86_64 -M microvm`, alternately in one run. Run it with `cargo bench --bench startup`.
//!
//! Machines are shared and noisy, so what counts is the ratio of the two medians.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 15;

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

/// Starts a machine and waits for its first byte.
fn start(mut command: Command) -> Option<(Child, Duration)> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut byte = [0];
    let read = child.stdout.as_mut()?.read(&mut byte).ok()?;
    let time = begin.elapsed();
    if read == 1 {
        return Some((child, time));
    }
    let _ = child.wait();
    None
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

fn median<T: Ord + Copy>(values: &mut [T]) -> Option<T> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

fn main() {
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
            if let Some((child, time)) = start(command(&hello)) {
                times[index].push(time);
                end(child);
            }
            if let Some((child, _)) = start(command(&idle)) {
                sizes[index].extend(memory_beside_ram(&child));
                end(child);
            }
        }
    }
    let [ours, theirs] = &mut times;
    let (ours, theirs) = (median(ours), median(theirs));
    println!("first byte on the UART, median of {RUNS}:");
    for ((name, _), time) in machines.iter().zip([ours, theirs]) {
        match time {
            Some(time) => println!("  {name:<13} {time:.1?}"),
            None => println!("  {name:<13} does not run here"),
        }
    }
    if let (Some(ours), Some(theirs)) = (ours, theirs) {
        println!(
            "  ratio         1/{:.1}",
            theirs.as_secs_f64() / ours.as_secs_f64()
        );
    }
    println!("memory beside guest RAM, 1 vCPU, 128 MiB, median:");
    for ((name, _), sizes) in machines.iter().zip(&mut sizes) {
        match median(sizes) {
            Some(kib) => println!("  {name:<13} {:.1} MiB", kib as f64 / 1024.0),
            None => println!("  {name:<13} does not run here"),
        }
    }
}
