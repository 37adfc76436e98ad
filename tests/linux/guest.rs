//! A Linux guest as the tests boot it: one of three kernels, an initramfs with busybox, and a script that it runs.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// What `scripts/guest-assets` and `scripts/build-guest-kernel` print the places of.
pub fn asset(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set; see scripts/guest-assets"))
        .into()
}

pub fn binary() -> PathBuf {
    std::env::var_os("SARANG_BINARY")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_sarang").into())
        .into()
}

#[derive(Clone, Copy)]
pub enum Kernel {
    /// Debian 12's cloud kernel, with its modules.
    Debian61,
    /// The one of Debian's backports, with its modules.
    Debian612,
    /// sarang's own small one, which has everything built in.
    Small,
}

impl Kernel {
    pub fn image(self) -> PathBuf {
        asset(match self {
            Kernel::Debian61 => "SARANG_KERNEL_61",
            Kernel::Debian612 => "SARANG_KERNEL_612",
            Kernel::Small => "SARANG_GUEST_KERNEL",
        })
    }

    fn modules(self) -> Option<PathBuf> {
        match self {
            Kernel::Debian61 => Some(asset("SARANG_KERNEL_61_MODULES")),
            Kernel::Debian612 => Some(asset("SARANG_KERNEL_612_MODULES")),
            Kernel::Small => None,
        }
    }
}

/// One test for each kernel, so that each can be repeated alone where the machine itself is emulated.
macro_rules! on_each_kernel {
    ($($check:ident;)*) => {$(
        mod $check {
            #[test]
            #[ignore = "needs a full KVM"]
            fn debian_6_1() {
                super::$check(crate::guest::Kernel::Debian61);
            }

            #[test]
            #[ignore = "needs a full KVM"]
            fn debian_6_12() {
                super::$check(crate::guest::Kernel::Debian612);
            }

            #[test]
            #[ignore = "needs a full KVM"]
            fn small() {
                super::$check(crate::guest::Kernel::Small);
            }
        }
    )*};
}
pub(crate) use on_each_kernel;

/// Shell functions that a script may use.
///
/// `on_host` runs a command on the host's own files, shared under the tag `host`, with a layer in the guest's memory
/// above them. `until_true` tries a command until it succeeds, for a minute.
const PRELUDE: &str = r#"
mount_host() {
    mkdir -p /lower /layer /host
    mount -t virtiofs host /lower; mount -t tmpfs layer /layer; mkdir /layer/upper /layer/work
    mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work none /host
    mount -t proc proc /host/proc; mount -o bind /dev /host/dev; mount -t tmpfs tmp /host/tmp
}
on_host() { PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot /host "$@"; }
until_true() {
    n=0
    until "$@"; do n=$((n + 1)); [ $n -lt 60 ] || return 1; sleep 1; done
}
"#;

/// A file of a cpio archive in the "newc" format, which Linux unpacks into its first root file system.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let size = data.len() as u32;
    let header = [
        1,
        mode,
        0,
        0,
        1,
        0,
        size,
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

/// A guest that has not been started.
pub struct Guest {
    command: Command,
    kernel: Kernel,
    modules: bool,
    script: String,
    flags: Vec<String>,
    timeout: &'static str,
    for_anybody: bool,
    scratch: TempDir,
}

impl Guest {
    /// A guest whose init runs `script` and powers off.
    pub fn new(kernel: Kernel, script: &str) -> Guest {
        Guest {
            command: Command::new(binary()),
            kernel,
            modules: false,
            script: script.to_owned(),
            flags: Vec::new(),
            timeout: "60s",
            for_anybody: false,
            scratch: tempfile::tempdir().unwrap(),
        }
    }

    /// Runs it by a command that ends in the binary.
    pub fn by(mut self, command: Command) -> Guest {
        self.command = command;
        self
    }

    /// Runs it by a command that makes somebody without privileges of them, who can read copies of what it takes.
    pub fn by_anybody(mut self, command: impl FnOnce(&Path) -> Command) -> Guest {
        host("chmod", &["755", self.scratch.path().to_str().unwrap()]);
        self.for_anybody = true;
        self.command = command(&self.copied(&binary()));
        self
    }

    /// Gives it the modules of its kernel, if that has any.
    pub fn with_modules(mut self) -> Guest {
        self.modules = true;
        self
    }

    pub fn flags<S: AsRef<str>>(mut self, flags: &[S]) -> Guest {
        self.flags
            .extend(flags.iter().map(|flag| flag.as_ref().to_owned()));
        self
    }

    pub fn timeout(mut self, timeout: &'static str) -> Guest {
        self.timeout = timeout;
        self
    }

    /// The file, or a copy of it that anybody may read.
    fn copied(&self, file: &Path) -> PathBuf {
        if !self.for_anybody {
            return file.to_owned();
        }
        let copy = self.scratch.path().join(file.file_name().unwrap());
        fs::copy(file, &copy).unwrap();
        copy
    }

    fn start(&mut self, stdin: Stdio, stdout: Stdio) -> Child {
        let mut archive = Vec::new();
        entry(&mut archive, "etc", 0o040_755, b"");
        let script = format!("{PRELUDE}{}", self.script);
        entry(&mut archive, "etc/rc", 0o100_755, script.as_bytes());
        entry(&mut archive, "TRAILER!!!", 0, b"");
        let rc = self.scratch.path().join("rc.cpio");
        fs::write(&rc, archive).unwrap();
        let mut initrds = vec![self.copied(&asset("SARANG_INITRD"))];
        if self.modules {
            initrds.extend(self.kernel.modules().map(|modules| self.copied(&modules)));
        }
        initrds.push(rc);
        let kernel = self.copied(&self.kernel.image());
        let command = &mut self.command;
        command.args(["run", "--timeout", self.timeout, "-p", "quiet", "-k"]);
        command.arg(kernel);
        for initrd in initrds {
            command.arg("-i").arg(initrd);
        }
        command
            .args(&self.flags)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(File::create(self.scratch.path().join("err")).unwrap())
            .spawn()
            .unwrap()
    }

    fn messages(&self) -> String {
        fs::read_to_string(self.scratch.path().join("err")).unwrap()
    }

    /// Boots the guest and waits for its end: the exit code and what it printed.
    ///
    /// Its words go into a file, and the kernel prints few: where the machine is emulated, every wake-up of a reader is
    /// one more chance for it to go wrong.
    pub fn run(mut self) -> (Option<i32>, String) {
        let out = self.scratch.path().join("out");
        let stdout = File::create(&out).unwrap();
        let status = self.start(Stdio::null(), stdout.into()).wait().unwrap();
        let text = String::from_utf8_lossy(&fs::read(&out).unwrap()).into_owned();
        if status.code() != Some(0) {
            eprintln!("{text}\n{}", self.messages());
        }
        (status.code(), text)
    }

    /// Boots a guest that is expected to power off, and gives what it printed.
    pub fn output(self) -> String {
        let (code, text) = self.run();
        assert_eq!(code, Some(0), "{text}");
        text
    }

    /// Boots the guest and stays with it, line by line.
    pub fn running(mut self) -> Running {
        let mut child = self.start(Stdio::piped(), Stdio::piped());
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Running {
            child,
            lines,
            seen: String::new(),
            guest: self,
        }
    }
}

/// A guest that runs. Killed when dropped.
pub struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    seen: String,
    guest: Guest,
}

impl Running {
    /// Waits for the guest to print a line with these words, and gives the line.
    pub fn wait_for(&mut self, words: &str) -> String {
        for line in self.lines.by_ref() {
            let line = line.unwrap_or_default();
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(words) {
                return line;
            }
        }
        panic!(
            "the guest never said `{words}`:\n{}\n{}",
            self.seen,
            self.guest.messages()
        );
    }

    /// Types on the guest's console.
    pub fn write(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
    }

    /// KiB of the host's memory that it takes.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Ends it as a power cut would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for it to power off, and gives what it has printed since the last line that was waited for.
    pub fn finish(mut self) -> String {
        let rest: Vec<String> = self.lines.by_ref().map_while(Result::ok).collect();
        let status = self.child.wait().unwrap();
        let (seen, messages) = (&self.seen, self.guest.messages());
        let rest = rest.join("\n");
        assert_eq!(status.code(), Some(0), "{seen}{rest}\n{messages}");
        rest
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for something of the host to become true, for at most a minute.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a program of the host that must succeed, and gives what it printed.
pub fn host(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
