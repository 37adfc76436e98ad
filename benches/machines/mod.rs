//! What the benches share: assets, Linux guests in sarang and in QEMU, and how two machines are compared.
//!
//! Machines are shared and noisy, so the two run alternately, and what counts is the ratio of the two medians.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// How many figures of each kind are taken of a machine.
pub const RUNS: usize = 3;

/// The argument by which a bench runs itself inside `scripts/kvm-anywhere`.
const INSIDE: &str = "--inside";

/// What `NAME=PATH` lines of a script say.
pub fn asset(script: &str, name: &str) -> PathBuf {
    let output = Command::new(scripts().join(script))
        .stderr(Stdio::inherit())
        .output()
        .expect("the script runs");
    let text = String::from_utf8(output.stdout).expect("lines of text");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value.expect("the script knows the asset").into()
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts")
}

/// The arguments with which this program was started inside a machine with a full KVM, if it was.
pub fn inside() -> Option<Vec<PathBuf>> {
    let mut arguments = std::env::args_os().skip_while(|argument| argument != INSIDE);
    arguments.next()?;
    Some(arguments.map(PathBuf::from).collect())
}

/// Runs this program again inside `scripts/kvm-anywhere`, with these arguments.
pub fn go_inside(arguments: &[PathBuf]) {
    let status = Command::new(scripts().join("kvm-anywhere"))
        .args(["--mem", "6G", "--"])
        .arg(std::env::current_exe().expect("this program"))
        .arg(INSIDE)
        .args(arguments)
        .stdin(Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "no Linux");
}

pub fn median<T: PartialOrd + Copy>(values: &mut [T]) -> Option<T> {
    values.sort_unstable_by(|a, b| a.partial_cmp(b).expect("numbers"));
    values.get(values.len() / 2).copied()
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    Sarang,
    Qemu,
}

impl Vmm {
    /// In the order in which they take turns.
    pub const BOTH: [Vmm; 2] = [Vmm::Sarang, Vmm::Qemu];

    pub fn name(self) -> &'static str {
        match self {
            Vmm::Sarang => "sarang",
            Vmm::Qemu => "qemu microvm",
        }
    }

    /// The program with the flags for a kernel and an initramfs, so many vCPUs and 512 MiB. The console is on its standard
    /// streams.
    pub fn linux(self, kernel: &Path, initrd: &Path, cpus: u32) -> Vec<String> {
        let (kernel, initrd) = (kernel.display(), initrd.display());
        let words = "console=ttyS0 reboot=a panic=-1 quiet";
        let line = match self {
            Vmm::Sarang => format!(
                "{} run -c {cpus} -m 512M --timeout 120s -k {kernel} -i {initrd} -p quiet",
                env!("CARGO_BIN_EXE_sarang")
            ),
            Vmm::Qemu => format!(
                "timeout 120 qemu-system-x86_64 -M microvm -global virtio-mmio.force-legacy=false -accel kvm -cpu host \
                 -smp {cpus} -m 512M -nodefaults -no-user-config -display none -no-reboot -serial stdio \
                 -kernel {kernel} -initrd {initrd} -append"
            ),
        };
        let mut line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        if self == Vmm::Qemu {
            line.push(words.to_owned());
        }
        line
    }
}

/// Figures of one kind, taken from both machines in turn.
pub struct Comparison {
    what: &'static str,
    unit: &'static str,
    /// Whether more is better.
    rate: bool,
    figures: [Vec<f64>; 2],
}

impl Comparison {
    pub fn new(what: &'static str, unit: &'static str, rate: bool) -> Comparison {
        Comparison {
            what,
            unit,
            rate,
            figures: [Vec::new(), Vec::new()],
        }
    }

    /// Takes the figure after `result WHAT ` in what a guest has printed, if it is there.
    pub fn take(&mut self, vmm: Vmm, text: &str) {
        let mark = format!("result {} ", self.what);
        let figure: Option<f64> = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(&mark)?.trim().parse().ok());
        self.add(vmm, figure);
    }

    /// Takes a figure, if there is one.
    pub fn add(&mut self, vmm: Vmm, figure: Option<f64>) {
        match figure {
            Some(figure) => eprintln!("{}: {} {figure:.1} {}", vmm.name(), self.what, self.unit),
            None => eprintln!("{}: {} failed", vmm.name(), self.what),
        }
        self.figures[vmm as usize].extend(figure);
    }

    /// A line: both medians, and how many times better sarang is.
    pub fn print(&mut self) {
        let [ours, theirs] = &mut self.figures;
        let (ours, theirs) = (median(ours), median(theirs));
        let show = |figure: Option<f64>| match figure {
            Some(figure) => format!("{figure:10.1} {}", self.unit),
            None => "does not run here".to_owned(),
        };
        let ratio = match (ours, theirs) {
            (Some(ours), Some(theirs)) if self.rate => format!("{:.2} times", ours / theirs),
            (Some(ours), Some(theirs)) => format!("{:.2} times", theirs / ours),
            _ => String::new(),
        };
        println!(
            "  {:<28} {:>18} {:>18}   {ratio}",
            self.what,
            show(ours),
            show(theirs)
        );
    }
}

/// Takes figures of both machines in turn, until there are [`RUNS`] of every kind: each time, this program runs again
/// inside a machine with a full KVM, where [`this_turn`] says what to do. A guest on an emulated machine hangs or dies
/// now and then, or the machine itself does; so each has twice as many chances.
pub fn take_turns(figures: &mut [Comparison], arguments: &[PathBuf]) {
    for _ in 0..2 * RUNS {
        for vmm in Vmm::BOTH {
            let missing = |figure: &Comparison| figure.figures[vmm as usize].len() < RUNS;
            if figures.iter().any(missing) {
                let text = turn(vmm, arguments);
                figures
                    .iter_mut()
                    .for_each(|figure| figure.take(vmm, &text));
            }
        }
    }
}

/// What a guest of one machine printed.
fn turn(vmm: Vmm, arguments: &[PathBuf]) -> String {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=10", "300"])
        .arg(scripts().join("kvm-anywhere"))
        .args(["--mem", "6G", "--"])
        .arg(std::env::current_exe().expect("this program"))
        .args([INSIDE, vmm.name()])
        .args(arguments);
    output(command)
}

/// Whose turn it is and the arguments of [`take_turns`], inside.
pub fn this_turn() -> Option<(Vmm, Vec<PathBuf>)> {
    let mut arguments = inside()?.into_iter();
    let name = arguments.next()?;
    let vmm = Vmm::BOTH
        .into_iter()
        .find(|vmm| Path::new(vmm.name()) == name)?;
    Some((vmm, arguments.collect()))
}

/// Runs a command to its end, and prints what it printed.
pub fn show(line: &[String]) {
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]);
    print!("{}", output(command));
}

/// Joins initramfs archives, and adds a script that the init of `scripts/guest-assets` runs.
pub fn initrd(scratch: &Path, parts: &[PathBuf], script: &str) -> PathBuf {
    let root = scratch.join("rc");
    std::fs::create_dir_all(root.join("etc")).expect("room for a script");
    std::fs::write(root.join("etc/rc"), script).expect("room for a script");
    let mut joined = Vec::new();
    for part in parts {
        joined.extend(std::fs::read(part).expect("an initramfs"));
    }
    joined.extend(pack(&root));
    let path = scratch.join("initrd");
    std::fs::write(&path, joined).expect("room for an initramfs");
    path
}

/// A directory as an initramfs archive.
pub fn pack(directory: &Path) -> Vec<u8> {
    let cache = asset("guest-assets", "SARANG_INITRD");
    let busybox = cache.with_file_name("busybox").join("bin/busybox");
    let output = Command::new("sh")
        .args(["-c", "find . | \"$0\" cpio -o -H newc"])
        .arg(busybox)
        .current_dir(directory)
        .output()
        .expect("busybox runs");
    output.stdout
}

/// Runs a command to its end, and gives what it printed.
fn output(mut command: Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .expect("the command runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A daemon that shares a directory with QEMU's guests. Ended when dropped.
pub struct Virtiofsd {
    child: Child,
    socket: PathBuf,
}

impl Virtiofsd {
    /// With its socket in a scratch directory. `None` where there is none: Debian has it beside QEMU, or as a package of
    /// its own.
    pub fn start(scratch: &Path, directory: &Path) -> Option<Virtiofsd> {
        let socket = scratch.join("virtiofsd");
        let places = [
            "/usr/libexec/virtiofsd",
            "/usr/lib/qemu/virtiofsd",
            "/usr/bin/virtiofsd",
        ];
        let program = places.into_iter().find(|place| Path::new(place).exists())?;
        let child = Command::new(program)
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-o", &format!("source={}", directory.display())])
            .args(["-o", "cache=auto", "-o", "sandbox=chroot"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut daemon = Virtiofsd { child, socket };
        while !daemon.socket.exists() {
            if daemon.child.try_wait().ok()?.is_some() {
                return None;
            }
            std::thread::yield_now();
        }
        Some(daemon)
    }

    /// What QEMU is told for a guest that mounts `tag`.
    pub fn flags(&self, tag: &str) -> Vec<String> {
        [
            "-object".to_owned(),
            "memory-backend-memfd,id=m,size=512M,share=on".to_owned(),
            "-machine".to_owned(),
            "memory-backend=m".to_owned(),
            "-chardev".to_owned(),
            format!("socket,id=c,path={}", self.socket.display()),
            "-device".to_owned(),
            format!("vhost-user-fs-device,chardev=c,tag={tag}"),
        ]
        .into()
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
