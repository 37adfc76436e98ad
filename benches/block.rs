//! A disk's speed: random reads of 4 KiB with one and with 32 requests under way, and 128 KiB after 128 KiB read and
//! written, on a file in tmpfs: sarang and `qemu-system-x86_64 -M microvm -drive aio=io_uring`, alternately in one run.
//! Run it with `cargo bench --bench block`.
//!
//! The guest is the same for both, `guest-kernels/src/bin/block.rs`, and so is what it drives, virtio-blk behind
//! memory-mapped registers, with the host's page cache. It says on its serial port when its requests begin and when
//! they end; the time between is taken here. It looks for answers itself instead of waiting for interrupts, so its vCPU
//! is busy all the time under either VMM; the CPU time that a disk costs is that of all *other* threads of the VMM
//! (the event loop, io_uring's workers), between the same two lines, as `/proc/PID/task/*/schedstat` has it.
//!
//! Machines are shared and noisy, so what counts is the ratio of the two medians.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 9;
const FILE_BYTES: usize = 256 << 20;
/// Where Linux has a tmpfs.
const TMPFS: &str = "/dev/shm";

struct Workload {
    name: &'static str,
    /// The guest's command line.
    words: &'static str,
    requests: u32,
    /// Of each request.
    bytes: u32,
}

const WORKLOADS: [Workload; 4] = [
    Workload {
        name: "random 4 KiB reads, depth 1",
        words: "do=random size=4096 depth=1",
        requests: 20_000,
        bytes: 4096,
    },
    Workload {
        name: "random 4 KiB reads, depth 32",
        words: "do=random size=4096 depth=32",
        requests: 200_000,
        bytes: 4096,
    },
    Workload {
        name: "sequential 128 KiB reads, depth 8",
        words: "do=read size=131072 depth=8",
        requests: 20_000,
        bytes: 128 << 10,
    },
    Workload {
        name: "sequential 128 KiB writes, depth 8",
        words: "do=write size=131072 depth=8",
        requests: 20_000,
        bytes: 128 << 10,
    },
];

/// A VMM, how its vCPU thread is called, and what boots a kernel with a disk and a command line on it.
type Vmm = (
    &'static str,
    &'static str,
    fn(&Path, &Path, &str) -> Command,
);

const VMMS: [Vmm; 2] = [
    ("sarang", "vcpu0", sarang),
    ("qemu microvm", "CPU 0/KVM", qemu),
];

fn sarang(kernel: &Path, disk: &Path, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sarang"));
    command.args(["run", "-m", "128M", "-p", words, "-k"]);
    command.arg(kernel).arg("--disk").arg(disk);
    command
}

fn qemu(kernel: &Path, disk: &Path, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let drive = format!(
        "if=none,id=disk,format=raw,cache=writeback,aio=io_uring,file={}",
        disk.display()
    );
    for arguments in [
        "-M microvm -accel kvm -cpu host -m 128M -nodefaults -no-user-config -display none -no-reboot",
        // By which the threads get names.
        "-name bench,debug-threads=on -serial stdio -device isa-debug-exit,iobase=0xf4",
        "-global virtio-mmio.force-legacy=false -device virtio-blk-device,drive=disk",
    ] {
        command.args(arguments.split(' '));
    }
    command.args(["-drive", &drive, "-append", words]);
    command.arg("-kernel").arg(kernel);
    command
}

/// What a run took.
#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    /// CPU time of all threads but the vCPU's.
    cpu: Duration,
}

/// CPU time so far of all threads but the one called `vcpu`.
fn cpu_beside(child: &Child, vcpu: &str) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{}/task", child.id())).ok()? {
        let task = task.ok()?.path();
        if fs::read_to_string(task.join("comm")).ok()?.trim_end() == vcpu {
            continue;
        }
        let times = fs::read_to_string(task.join("schedstat")).ok()?;
        let nanos = times.split(' ').next()?.parse().ok()?;
        sum += Duration::from_nanos(nanos);
    }
    Some(sum)
}

/// Boots the guest and measures between its two lines.
fn run(mut command: Command, vcpu: &str) -> Option<Cost> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let cost = measure(&mut child, vcpu);
    let _ = child.kill();
    let _ = child.wait();
    cost
}

fn measure(child: &mut Child, vcpu: &str) -> Option<Cost> {
    let mut lines = BufReader::new(child.stdout.take()?).lines();
    let mut wait_for =
        |line: &str| lines.any(|seen| seen.is_ok_and(|seen| seen.trim_end() == line));
    wait_for("block: begin").then_some(())?;
    let (start, before) = (Instant::now(), cpu_beside(child, vcpu)?);
    wait_for("block: end").then_some(())?;
    let wall = start.elapsed();
    Some(Cost {
        wall,
        cpu: cpu_beside(child, vcpu)?.saturating_sub(before),
    })
}

fn median(values: impl Iterator<Item = Duration>) -> Option<f64> {
    let mut values: Vec<Duration> = values.collect();
    values.sort_unstable();
    Some(values.get(values.len() / 2)?.as_secs_f64())
}

fn print(workload: &Workload, costs: &[Vec<Cost>; 2]) {
    println!("{}, median of {RUNS}:", workload.name);
    let (requests, bytes) = (f64::from(workload.requests), f64::from(workload.bytes));
    let mut figures = Vec::new();
    for ((name, ..), costs) in VMMS.iter().zip(costs) {
        let wall = median(costs.iter().map(|cost| cost.wall));
        let cpu = median(costs.iter().map(|cost| cost.cpu));
        let (Some(wall), Some(cpu)) = (wall, cpu) else {
            println!("  {name:<13} does not run here");
            continue;
        };
        println!(
            "  {name:<13} {:>9.0} IOPS {:>8.0} MiB/s {:>7.2} µs of CPU a request",
            requests / wall,
            requests * bytes / wall / f64::from(1 << 20),
            cpu / requests * 1e6,
        );
        figures.push((wall, cpu));
    }
    if let [ours, theirs] = figures[..] {
        println!(
            "  ratio         {:>9.2} of its IOPS and bandwidth, {:.2} of its CPU time",
            theirs.0 / ours.0,
            ours.1 / theirs.1
        );
    }
}

/// Why nothing can be measured here.
fn obstacle() -> Option<&'static str> {
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    if !Path::new("/dev/kvm").exists() {
        Some("there is no /dev/kvm here, which both VMMs need")
    } else if !qemu.is_ok_and(|output| output.status.success()) {
        Some(
            "there is no qemu-system-x86_64 here to compare with; on Debian, install qemu-system-x86",
        )
    } else if !Path::new(TMPFS).is_dir() {
        Some("there is no tmpfs at /dev/shm here to put the disk into")
    } else {
        None
    }
}

fn main() {
    if let Some(obstacle) = obstacle() {
        return println!("block: not measured: {obstacle}");
    }
    let scratch = tempfile::tempdir_in(TMPFS).expect("a scratch directory in tmpfs");
    let (kernel, disk) = (scratch.path().join("block"), scratch.path().join("disk"));
    fs::write(
        &kernel,
        sarang::guest::bare_metal("block").expect("a guest"),
    )
    .expect("room for it");
    // Not zeroes: all of it takes memory, none of it is a hole.
    fs::write(&disk, vec![0x5a; FILE_BYTES]).expect("256 MiB in tmpfs");
    for workload in &WORKLOADS {
        let words = format!("{} requests={}", workload.words, workload.requests);
        let mut costs = [vec![], vec![]];
        for _ in 0..RUNS {
            for ((_, vcpu, command), costs) in VMMS.iter().zip(&mut costs) {
                costs.extend(run(command(&kernel, &disk, &words), vcpu));
            }
        }
        print(workload, &costs);
    }
}
