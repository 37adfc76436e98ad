//! A command in a guest on the host's own files, from process start to process end: `sarang run -- CMD`, and
//! `qemu-system-x86_64 -M microvm` with the host's root, an overlay above it and the same kernel, alternately in one run.
//! The command is `true` on the small kernel and on Debian's, with QEMU's root over virtiofsd, and then a `find` and a C
//! build on the small kernel, with QEMU's root over its own 9p. Run it with `cargo bench --bench run`, or for those
//! figures alone whose names have a word, `cargo bench --bench run -- find`; the guests run inside `scripts/kvm-anywhere`.
//!
//! QEMU's guest has an initramfs with busybox and the modules, and powers off by itself; sarang's has its own init.

#[allow(dead_code)]
mod machines;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use machines::{Comparison, RUNS, Virtiofsd, Vmm};

const FIND: &str = "find /usr/lib/x86_64-linux-gnu -type f | wc -l";
const BUILD: &str = "cd /tmp; i=0; while [ $i -lt 5 ]; do
    printf '#include <stdio.h>\\nint main(void) { return puts(\"hi\") < 0; }\\n' >$i.c; cc -O2 -c -o $i.o $i.c; i=$((i + 1)); done";

/// What QEMU is told for a root over its own 9p server.
const NINE_P: [&str; 4] = [
    "-fsdev",
    "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
    "-device",
    "virtio-9p-device,fsdev=root,mount_tag=root",
];

/// What is run: how the figure is called, on Debian's kernel or the small one, how QEMU shares the root, the command.
const WORKLOADS: [(&str, bool, Share, &str); 4] = [
    ("true, small kernel", false, Share::Virtiofsd, "true"),
    ("true, Debian's kernel", true, Share::Virtiofsd, "true"),
    ("find in /usr/lib", false, Share::NineP, FIND),
    ("compile 5 C files", false, Share::NineP, BUILD),
];

fn main() {
    if let Some((vmm, arguments)) = machines::this_turn() {
        return guest(vmm, &arguments);
    }
    let assets = [
        machines::asset("build-guest-kernel", "SARANG_GUEST_KERNEL"),
        machines::asset("guest-assets", "SARANG_KERNEL_61"),
        machines::asset("guest-assets", "SARANG_KERNEL_61_MODULES"),
        machines::asset("guest-assets", "SARANG_INITRD"),
    ];
    println!(
        "a command, process start to process end, median of {RUNS}, and how many times better sarang is:"
    );
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|word| name.contains(word));
    let workloads = WORKLOADS.iter().enumerate();
    for (number, (name, ..)) in workloads.filter(|(_, (name, ..))| is_wanted(name)) {
        let mut figures = [Comparison::new(name, "ms", false)];
        let mut arguments = vec![PathBuf::from(number.to_string())];
        arguments.extend(assets.iter().cloned());
        machines::take_turns(&mut figures, &arguments);
        figures.iter_mut().for_each(Comparison::print);
    }
}

/// How QEMU's guest gets at the host's root.
#[derive(Clone, Copy)]
enum Share {
    Virtiofsd,
    NineP,
}

/// Mounts the host's root below an overlay in memory, runs the command there, and powers off.
fn script(share: Share, command: &str) -> String {
    let mount = match share {
        Share::Virtiofsd => "-t virtiofs",
        Share::NineP => "-t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose",
    };
    format!(
        "mkdir -p /lower /layer /host; mount {mount} root /lower; mount -t tmpfs layer /layer
        mkdir /layer/upper /layer/work
        mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work none /host
        mount -o bind /dev /host/dev; mount -t proc proc /host/proc; mount -t tmpfs tmp /host/tmp
        PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot /host sh -c '{command}'"
    )
}

fn sarang(kernel: &Path, command: &str) -> Command {
    let mut line = Command::new(env!("CARGO_BIN_EXE_sarang"));
    line.args([
        "run",
        "--timeout",
        "120s",
        "-c",
        "2",
        "-m",
        "512M",
        "--user",
        "root",
        "-k",
    ])
    .arg(kernel)
    .args(["--", "sh", "-c", command]);
    line
}

/// Milliseconds that a command takes; `None` if it fails.
fn time(mut command: Command) -> Option<f64> {
    let begin = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .ok()?;
    status
        .success()
        .then(|| begin.elapsed().as_secs_f64() * 1000.0)
}

/// Inside: one command in one machine's guest, and how long it took. It runs twice, and the first time only fills the
/// host's caches.
fn guest(vmm: Vmm, arguments: &[PathBuf]) {
    let [number, small, debian, modules, busybox] = arguments else {
        panic!("a workload, kernels, modules and an initramfs");
    };
    let number: Option<usize> = number.to_str().and_then(|number| number.parse().ok());
    let (name, on_debian, share, command) = WORKLOADS[number.expect("a workload's number")];
    let (kernel, mut parts) = (
        if on_debian { debian } else { small },
        vec![busybox.clone()],
    );
    parts.extend(on_debian.then(|| modules.clone()));
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let quoted = command.replace('\'', "'\\''");
    let initrd = machines::initrd(scratch.path(), &parts, &script(share, &quoted));
    let run = || match vmm {
        Vmm::Sarang => time(sarang(kernel, command)),
        Vmm::Qemu => {
            let mut line = vmm.linux(kernel, &initrd, 2);
            let _daemon = match share {
                Share::Virtiofsd => {
                    let daemon = Virtiofsd::start(scratch.path(), Path::new("/"))?;
                    line.extend(daemon.flags("root"));
                    Some(daemon)
                }
                Share::NineP => {
                    line.extend(NINE_P.map(str::to_owned));
                    None
                }
            };
            let mut command = Command::new(&line[0]);
            command.args(&line[1..]);
            time(command)
        }
    };
    if let (Some(_), Some(taken)) = (run(), run()) {
        println!("result {name} {taken}");
    }
}
