//! `sarang run`: boots a guest and stays with it to its end.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use super::command::{self, Root};
use super::console;
use super::kernels::{Found, Places};
use super::net::{self, Cards, Network};
use super::share::{self, Share};
use super::talk::Talk;
use super::{Result, USAGE, quantity, say, vsock};
use crate::backend::console::{Console, Kind};
use crate::guest::modules::Need;
use crate::hv::kvm::Kvm;
use crate::trace::{Sink, TextFile};
use crate::virtio::VirtioDevice;
use crate::virtio::dev::rng::Rng;
use crate::vm::{Image, Machine, Outcome, Report, Spec};

/// After the words about the console: the guest reboots by the ACPI reset register (on hardware-reduced machines Linux
/// would ask EFI otherwise, which is not there), and a panic ends the run rather than hang it.
const COMMAND_LINE: &str = "reboot=a panic=-1";

/// Lines of the guest's console that are shown when a run fails.
const LOG_LINES: usize = 40;
/// The same, when it fails because a step was not done.
const LAST_LINES: usize = 10;
/// Characters of each of these.
const LINE_MAX: usize = 200;

/// Run a command in a guest, or boot a guest, and stay with it until it ends
#[derive(Args)]
#[command(after_help = "\
With a command, the guest has the host's own files, and what it writes is gone afterwards, except in the current
directory. The command has this terminal or these pipes, and its status is the status of the run. Ctrl-C
interrupts it; a second Ctrl-C ends the guest, on a terminal only if the command did not answer the first.

Without --kernel, the first of these is booted: $SARANG_KERNEL, ./vmlinux, ./bzImage,
./arch/x86/boot/bzImage, sarang's cache, /boot/vmlinuz-$(uname -r), the newest /boot/vmlinuz*.

On a terminal: Ctrl-a x quits, Ctrl-a Ctrl-a sends one Ctrl-a, Ctrl-a h lists the keys.
SIGTERM and SIGINT press the power button; a second one, or 5 seconds, end the guest.

The guest's console is its serial port, ttyS0; with --console virtio it is a virtio device,
hvc0, which is faster and knows the size of the terminal. The kernel command line then has
`console=hvc0 earlyprintk=ttyS0`: the kernel prints to the serial port until it has found the
virtio device. Both print to the same place; keys go to hvc0 alone.

A network card is given with --net, once for each; without it, there is none:
  user[,hostfwd=HOST:GUEST]...             through the program passt, which needs no privileges;
                                           hostfwd leads a TCP port of the host to one of the guest
  tap=NAME[,queues=N]                      on a tap; one that is not there is made, which needs
                                           CAP_NET_ADMIN, and stays down until `ip` sets it up
  none                                     no card
Each card also takes [,mac=MAC][,bw=RATE][,iops=N][,worker=own]. Without mac=, its address follows
from --name and its place, and is always the same; bw (bytes a second: 500K, 100M) and iops (frames
a second) limit each direction; worker=own gives it a thread of its own.

A test talks to a guest over its console, in steps that are done in the order of the command line:
  --expect 'login: ' --send 'root\\n' --expect '# ' --send 'poweroff\\n'
If the last step is an --expect, the guest is switched off when that is seen, and the code is 0. If it
is a --send, the guest has standard input from there on, and ends the run itself. A guest that ends
before all steps are done fails: the code is 1 where it would be 0, and standard error has the step and
the last lines of the console.
An --expect looks at what was printed after the last match, the guest's echo of what was typed
included. It matches as soon as it can: [0-9]+ takes one digit, [0-9]+$ the number at the end of a line.
^ and $ are the borders of lines, to whose ends a carriage return belongs. --json has what matched, up
to its last 64 KiB, and the groups. A guest that does not read its console yet may lose what is typed,
as on hardware: expect a prompt first.

A directory is shared with --share and mounted in the guest: mount -t virtiofs TAG /mnt

With --vsock, a program of the host reaches the guest's port 52 through the socket DIR/vsock: it
writes the line `CONNECT 52` and reads `OK PORT`; the guest reaches port 52 of the host (CID 2) if a
program listens at the socket DIR/vsock_52. Without path=, DIR is made and removed, and is shown.

Exit codes: 0 powered off, rebooted, or the last --expect was seen; 1 ended before that, 80 kernel
panic, 81 triple fault, 82 KVM could not go on, 124 timeout, 125 sarang failed, 130/143 stopped; a guest
may choose its own by the exit port. With a command: its own, 128+N if signal N killed it, 126 if it
cannot be executed, 127 if it is not there.

Examples:
  sarang run -- uname -a
  sarang run -c 4 -m 2G -- make -j4 test
  sarang run -k ./bzImage -- ./selftest
  sarang run --root debian.ext4 -- apt list
  echo hi | sarang run -- tr a-z A-Z | cat
  sarang run -k vmlinuz -i initrd.img -c 2 -m 1G
  sarang run -k bzImage -p 'root=/dev/ram0 quiet' --timeout 30s --json
  sarang run -k vmlinuz -i initrd.img --net user,hostfwd=2222:22
  sarang run -k vmlinux --root-disk root.img --console virtio
  sarang run -k vmlinuz --root-disk root.img --disk data.qcow2,format=qcow2
  sarang run -k vmlinuz --root-disk root.img,ro --disk /dev/sdb,direct,queues=2,bw=100M
  sarang run -k vmlinuz -i initrd.img -m 4G --balloon 2G,stats=1s --json
  sarang run -k vmlinuz -i initrd.img --share src --share /srv/data,tag=data,ro
  sarang run -k vmlinuz --pmem root.ext4,ro -p 'root=/dev/pmem0 ro rootflags=dax'
  sarang run -k vmlinuz -i initrd.img --vsock 3,path=/run/vm1
  sarang run -k kernel.elf --timeout 30s --expect '^all tests passed$'
  sarang run -k vmlinuz --root-disk root.img --timeout 2m --json \\
    --expect 'login: ' --send 'root\\n' --expect '# ' --send 'uname -r\\n' --expect '^(\\d.*)$'
  sarang run -k hello.elf --trace exits.txt")]
pub(super) struct Arguments {
    /// Kernel: an ELF vmlinux, a bzImage, or any ELF with a PVH note
    #[arg(short, long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; several are concatenated
    #[arg(short, long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Number of vCPUs, 1 to 64
    ///
    /// Unless said, 1; with a command, as many as the host has, at most 8.
    #[arg(short, long, value_name = "N", value_parser = quantity::cpus)]
    cpus: Option<u32>,
    /// Guest memory
    ///
    /// Unless said, 512M; with a command, a quarter of the host's, from 512M to 4G. The host gives it as the guest uses it.
    #[arg(short, long, value_name = "SIZE", value_parser = quantity::ram)]
    mem: Option<u64>,
    /// Disk image or block device: PATH[,ro][,direct][,format=raw|qcow2][,serial=TEXT][,queues=N][,bw=RATE][,iops=N][,worker=own]
    ///
    /// It is /dev/vda in the guest, or /dev/vdb after a --root-disk, and so on in the order given. `ro` refuses writes;
    /// `direct` goes past the host's page cache; `format` is never guessed, and raw unless said; `serial` has up to 20
    /// characters; `queues` is 1 to 16; `bw` (bytes a second: 500K, 100M, 1G) and `iops` (requests a second) limit
    /// what the guest may use; `worker=own` gives the disk a thread of its own.
    #[arg(long, value_name = "PATH[,OPTION...]", value_parser = super::disk::data)]
    disk: Vec<super::disk::Disk>,
    /// The same, as the first disk and the root file system: adds root=/dev/vda and rw or ro to the kernel command line
    #[arg(long, value_name = "PATH[,OPTION...]", value_parser = super::disk::root)]
    root_disk: Option<super::disk::Disk>,
    /// Have the guest give SIZE of its memory back to the host, and what it frees as well: SIZE[,stats=TIME]
    ///
    /// SIZE may be 0. What the guest's kernel has free goes back by itself, a few seconds later. With `stats`, the guest is
    /// asked that often how it fares, and the last answer is in the outcome of --json.
    #[arg(long, value_name = "SIZE[,OPTION]", value_parser = super::balloon::parse)]
    balloon: Option<super::balloon::Flag>,
    /// File as persistent memory, /dev/pmem0 and so on in the guest: PATH[,ro]
    ///
    /// The guest has the file in its physical address space and uses it without a copy: ext4 and xfs do when mounted
    /// with `dax`. Its size is a multiple of 2 MiB (`truncate -s %2M PATH`). `ro` keeps the file as it is: what the
    /// guest writes is lost without an error, so it should mount it read-only.
    #[arg(long, value_name = "PATH[,ro]", value_parser = super::pmem::parse)]
    pmem: Vec<super::pmem::Pmem>,
    /// Words to add to the kernel command line, after sarang's own
    #[arg(short = 'p', long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Name of the machine
    #[arg(long, value_name = "NAME", default_value = "sarang")]
    name: String,
    /// End the run with code 124 this long after its start: 500ms, 30s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    timeout: Option<Duration>,
    /// Where the console goes: off, stdio, pty or file=PATH; after `virtio,` a virtio console, not a serial one. See
    /// below
    #[arg(long, value_name = "[virtio,]WHERE", default_value = console::DEFAULT, value_parser = console::parse)]
    console: console::Flag,
    #[command(flatten)]
    talk: Talk,
    /// Network card: user[,hostfwd=HOST:GUEST], tap=NAME or none; see below. Several make several cards
    #[arg(long, value_name = "NET", value_parser = net::parse)]
    net: Vec<Network>,
    /// Directory of the host that the guest can mount: DIR[,tag=TAG][,ro]. Several make several
    ///
    /// In the guest: mount -t virtiofs TAG /mnt. The tag has up to 36 bytes, and is DIR's last name unless said; `ro`
    /// refuses every change. The guest sees nothing outside of DIR. Run as root, sarang gives new files to the guest's
    /// user; otherwise they are yours.
    #[arg(long, value_name = "DIR[,OPTION...]", value_parser = share::parse)]
    share: Vec<Share>,
    /// What a command has as its root: host, a directory, a disk image, a tar or a container image; PATH,rw to change it
    ///
    /// The guest sees it read-only, with an overlay in its memory that takes all writes. `host` is the host's own root, with
    /// the current directory shared for writing (see --rw), and is the default. A container image is an OCI layout or what
    /// `docker save` writes, with `:TAG` behind it if it has several; its entrypoint, variables, user and directory hold.
    #[arg(long, value_name = "WHAT", value_parser = command::parse_root)]
    root: Option<Root>,
    /// Directory of the host that a command may change, at the same place in the guest. Several make several
    ///
    /// With --root=host it is the current directory unless said.
    #[arg(long, value_name = "DIR")]
    rw: Vec<PathBuf>,
    /// Who runs the command: root, or UID[:GID]. Unless said, whoever runs sarang, or whom a container image names
    #[arg(long, value_name = "USER", value_parser = command::parse_user)]
    user: Option<command::User>,
    /// Let a command have what is kept from it otherwise: keys, passwords and tokens in known files and in variables
    #[arg(long)]
    share_secrets: bool,
    /// Directory with the kernel's modules: lib/modules/VERSION, or what has that in it
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Sockets between guest and host (AF_VSOCK), the guest's address being CID, 3 to 4294967294; see below
    #[arg(long, value_name = "CID[,path=DIR]", value_parser = vsock::parse)]
    vsock: Option<vsock::Sockets>,
    /// Write one line for every exit of the guest to userspace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print the outcome as one line of JSON on standard output when the run has ended
    #[arg(long)]
    json: bool,
    /// Command to run in the guest, whose status is sarang's. Without one, a shell, if no kernel is named either
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl Arguments {
    /// Whether the guest is made for a command, and not booted as it is.
    fn is_for_command(&self) -> bool {
        let boots = self.kernel.is_some()
            || !self.initrd.is_empty()
            || self.root_disk.is_some()
            || !self.pmem.is_empty();
        !self.command.is_empty() || self.root.is_some() || !boots
    }

    /// vCPUs, and bytes of RAM: what was asked for, or what suits the host.
    fn size(&self) -> (u32, u64) {
        let (cpus, ram) = match self.is_for_command() {
            true => (quantity::host_cpus(), quantity::share_of_host_ram()),
            false => (1, 512 << 20),
        };
        (self.cpus.unwrap_or(cpus), self.mem.unwrap_or(ram))
    }

    /// All disks, in the guest's order.
    fn disks(&self) -> impl Iterator<Item = &super::disk::Disk> {
        self.root_disk.iter().chain(&self.disk)
    }
}

/// Runs the verb. The result is the exit code.
pub(super) fn main(arguments: Arguments, verbose: bool) -> Result<u8> {
    let since = Instant::now();
    let for_command = arguments.is_for_command();
    if for_command && arguments.root_disk.is_some() {
        say("sarang: --root-disk boots what is on a disk; a command takes its root by --root");
        return Ok(USAGE);
    }
    if for_command && !arguments.talk.is_empty() {
        say(
            "sarang: --expect and --send talk to a guest that is booted with --kernel and --initrd or --root-disk; \
             a command in a guest says by its status how it went",
        );
        return Ok(USAGE);
    }
    let (cpus, ram_bytes) = arguments.size();
    let found = match &arguments.kernel {
        Some(kernel) => Found {
            kernel: kernel.clone(),
            initrd: None,
        },
        None => Places::of_host().find()?,
    };
    let mut initrds = arguments.initrd.clone();
    if initrds.is_empty() && !for_command {
        initrds.extend(found.initrd);
    }
    let networks = match net::resolve(&arguments.net, &arguments.name) {
        Ok(networks) => networks,
        Err(message) => {
            say(&format!("sarang: {message}"));
            return Ok(USAGE);
        }
    };
    if let Some(balloon) = &arguments.balloon
        && let Err(message) = balloon.check(ram_bytes)
    {
        say(&format!("sarang: {message}"));
        return Ok(USAGE);
    }
    let shares = match share::resolve(&arguments.share) {
        Ok(shares) => shares,
        Err(message) => {
            say(&format!("sarang: {message}"));
            return Ok(USAGE);
        }
    };
    let root = arguments.root.clone().unwrap_or(Root::HOST);
    let rw = match for_command {
        true => command::writable(&root, &arguments.rw)?,
        false => Vec::new(),
    };
    let sockets = arguments
        .vsock
        .as_ref()
        .map(|sockets| sockets.resolve(&arguments.name));
    // A command's own messages are to be alone on standard error, where somebody reads them.
    if !for_command || verbose || std::io::stderr().is_terminal() {
        let mut line = resolved(
            &arguments,
            &found.kernel,
            &initrds,
            &networks,
            &shares,
            sockets.as_ref(),
        );
        if for_command {
            line.push_str(&resolved_command(&arguments, &root, &rw));
        }
        say(&format!("# {line}"));
    }
    // Before the images are read, so that passt starts meanwhile.
    let cards = Cards::open(&networks)?;
    // Before the hypervisor, so that a wrong path is told on any host.
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let kernel = Image::read(&found.kernel)?;
    let prepared = match for_command {
        true => Some(command::prepare(
            command::Request {
                kernel: &kernel,
                kernel_path: &found.kernel,
                modules: arguments.modules.as_deref(),
                root: &root,
                user: arguments.user.clone(),
                share_secrets: arguments.share_secrets,
                command: &arguments.command,
                name: &arguments.name,
                dhcp: matches!(networks.first(), Some(Network::User { .. })),
                needs: needs(&arguments, &networks),
            },
            &rw,
        )?),
        false => None,
    };
    let (mut session, mut ports, mut first_files) = (None, Vec::new(), None);
    if let Some(prepared) = prepared {
        devices.extend(prepared.devices);
        (session, first_files) = (Some(prepared.session), Some(prepared.initramfs));
        ports.push(prepared.port);
    }
    let before = devices
        .iter()
        .filter(|device| device.name().starts_with("BLK"))
        .count();
    for (index, disk) in arguments.disks().enumerate() {
        devices.push(disk.open(before + index)?);
    }
    let sockets = sockets.map(|sockets| sockets.open()).transpose()?;
    devices.extend(share::open(&shares)?);
    let pmem: Result<Vec<_>> = arguments.pmem.iter().map(|pmem| pmem.open()).collect();
    let pmem = pmem?;
    let hypervisor = Kvm::open(&super::kvm_path())?;
    let trace =
        match &arguments.trace {
            Some(path) => Some(Arc::new(TextFile::create(path).map_err(|error| {
                format!("cannot write the trace to {}: {error}", path.display())
            })?) as Arc<dyn Sink>),
            None => None,
        };
    let mut command_line = format!("{} {COMMAND_LINE}", arguments.console.kernel_words());
    if for_command && !verbose {
        command_line.push_str(" quiet");
    }
    if let Some(disk) = &arguments.root_disk {
        command_line.push(' ');
        command_line.push_str(disk.root_words());
    }
    for words in &arguments.append {
        command_line.push(' ');
        command_line.push_str(words);
    }
    let initrds: std::result::Result<Vec<Image>, _> =
        initrds.iter().map(|path| Image::read(path)).collect();
    let mut initrds = initrds?;
    initrds.extend(first_files);
    devices.extend(cards.into_devices()?);
    devices.extend(sockets);
    devices.push(Box::new(Rng::new(0)));
    let balloon = arguments
        .balloon
        .map(|balloon| balloon.open())
        .transpose()?;
    let balloon = balloon.map(|balloon| {
        let handle = balloon.handle();
        devices.push(Box::new(balloon));
        handle
    });
    let spec = Spec {
        name: arguments.name,
        cpus,
        ram_bytes,
        kernel,
        initrds,
        command_line,
        since,
        timeout: arguments.timeout,
        trace,
        devices,
        balloon,
        console: arguments.console.device,
        ports,
        pmem,
        session,
        steps: arguments.talk.steps(),
    };
    let console = match (&arguments.console.kind, for_command) {
        // The command has the streams. What the kernel says is kept for when the run fails.
        (Kind::Stdio, true) if verbose => Console::over(None, standard_error_copy())?,
        (Kind::Stdio, true) => Console::over(None, None)?,
        (kind, _) => Console::open(kind)?,
    };
    if let Some(path) = console.pty_path() {
        say(&format!("# console: {}", path.display()));
    }
    let mut machine = Machine::new(&hypervisor, spec, console)?;
    machine.stop_on_signals()?;
    machine.follow_terminal()?;
    let report = machine.run()?;
    if for_command && !verbose {
        show_log(&report);
    }
    let on_stdout = !for_command && arguments.console.kind == Kind::Stdio;
    if arguments.json && on_stdout && report.log.last().is_some_and(|byte| *byte != b'\n') {
        // The guest's last line, a prompt for example, has not ended; the JSON is a line of its own.
        let _ = writeln!(std::io::stdout());
    }
    finish(&report, arguments.json)
}

/// Standard error, to be written to by two.
fn standard_error_copy() -> Option<std::os::fd::OwnedFd> {
    std::io::stderr().as_fd().try_clone_to_owned().ok()
}

/// What the guest of a command has to have drivers for, beside what every such guest has.
fn needs(arguments: &Arguments, networks: &[Network]) -> Vec<Need> {
    let mut needs = vec![Need::Rng];
    if !networks.is_empty() {
        needs.push(Need::Net);
    }
    if !arguments.disk.is_empty() {
        needs.push(Need::Block("ext4".to_owned()));
    }
    if !arguments.share.is_empty() {
        needs.push(Need::Fs);
    }
    if arguments.vsock.is_some() {
        needs.push(Need::Vsock);
    }
    if arguments.balloon.is_some() {
        needs.push(Need::Balloon);
    }
    if !arguments.pmem.is_empty() {
        needs.push(Need::Pmem);
    }
    needs
}

/// Shows what the kernel said, when the guest and not the command failed.
fn show_log(report: &Report) {
    let failed = matches!(
        report.outcome,
        Outcome::GuestFailed { .. }
            | Outcome::Panicked { .. }
            | Outcome::TripleFaulted
            | Outcome::InternalError { .. }
    );
    let log = String::from_utf8_lossy(&report.log);
    let mut lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
    lines.reverse();
    if failed && !lines.is_empty() {
        say("sarang: the guest's console said last:");
        lines.iter().for_each(|line| say(&format!("  {line}")));
    }
}

/// The rest of the resolved command line for a command.
fn resolved_command(arguments: &Arguments, root: &Root, rw: &[PathBuf]) -> String {
    let mut words = vec![
        String::new(),
        "--root".to_owned(),
        quoted(&root.to_string()),
    ];
    for path in rw {
        words.extend(["--rw".to_owned(), quoted(&path.to_string_lossy())]);
    }
    if !arguments.command.is_empty() {
        words.push("--".to_owned());
        let command = arguments.command.iter();
        words.extend(command.map(|word| quoted(&word.to_string_lossy())));
    }
    words.join(" ")
}

/// The command line with everything that was left open filled in.
fn resolved(
    arguments: &Arguments,
    kernel: &std::path::Path,
    initrds: &[PathBuf],
    networks: &[Network],
    shares: &[Share],
    sockets: Option<&vsock::Resolved>,
) -> String {
    let mut words = vec!["sarang".to_owned(), "run".to_owned()];
    let mut flag = |flag: &str, value: &str| {
        words.push(flag.to_owned());
        words.push(quoted(value));
    };
    flag("-k", &kernel.to_string_lossy());
    for initrd in initrds {
        flag("-i", &initrd.to_string_lossy());
    }
    let (cpus, ram_bytes) = arguments.size();
    flag("-c", &cpus.to_string());
    flag("-m", &quantity::show_ram(ram_bytes));
    for network in networks {
        flag("--net", &network.to_string());
    }
    if let Some(disk) = &arguments.root_disk {
        flag("--root-disk", disk.text());
    }
    for disk in &arguments.disk {
        flag("--disk", disk.text());
    }
    if let Some(balloon) = &arguments.balloon {
        flag("--balloon", balloon.text());
    }
    for share in shares {
        flag("--share", &share.to_string());
    }
    let console = arguments.console.to_string();
    if console != console::DEFAULT {
        flag("--console", &console);
    }
    for (name, text) in arguments.talk.flags() {
        flag(name, text);
    }
    for pmem in &arguments.pmem {
        flag("--pmem", pmem.text());
    }
    if let Some(sockets) = sockets {
        flag("--vsock", &sockets.text());
    }
    for append in &arguments.append {
        flag("-p", append);
    }
    words.join(" ")
}

/// A word as a shell reads it back.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn finish(report: &Report, json: bool) -> Result<u8> {
    let code = report.outcome.exit_code();
    if json {
        let line = serde_json::to_string(report)?;
        // The reader may have gone; the exit code still tells the outcome.
        let _ = writeln!(std::io::stdout(), "{line}");
    } else if code != 0 && !report.outcome.is_programs_own() {
        say(&format!("sarang: {}", report.outcome));
    }
    if code != 0 {
        show_missing(report);
    }
    Ok(code)
}

/// Says which step was waited for in vain, and what there was instead.
fn show_missing(report: &Report) {
    let Some(script) = &report.script else {
        return;
    };
    let Some(regex) = &script.waiting_for else {
        return;
    };
    let (step, steps) = (script.done.saturating_add(1), script.steps);
    let lines = last_lines(&report.log);
    let quoted = quoted(regex);
    let until = if lines.is_empty() {
        "; the guest's console said nothing"
    } else {
        "; the guest's console said last:"
    };
    say(&format!(
        "sarang: step {step} of {steps}, --expect {quoted}, was not seen{until}"
    ));
    lines.iter().for_each(|line| say(&format!("  {line}")));
}

/// The last lines of what a guest printed, made safe for a terminal.
fn last_lines(log: &[u8]) -> Vec<String> {
    let log = String::from_utf8_lossy(log);
    let lines = log.lines().map(str::trim_end);
    let mut lines: Vec<String> = lines
        .rev()
        .skip_while(|line| line.is_empty())
        .take(LAST_LINES)
        .map(|line| {
            let shown = line.chars().take(LINE_MAX);
            shown.flat_map(visible).collect()
        })
        .collect();
    lines.reverse();
    lines
}

/// A character, or the escape that stands for one that would do something to a terminal.
fn visible(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    let plain = escaped.is_none().then_some(c);
    escaped.into_iter().flatten().chain(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: Arguments,
    }

    #[test]
    fn the_resolved_command_line_has_every_network_card_with_its_address() {
        let line = Line::try_parse_from([
            "run",
            "-k=vmlinux",
            "--name=vm",
            "--net=user,hostfwd=2222:22",
            "--net=tap=t0,mac=02:00:00:00:00:07",
            "--pmem=root.ext4,ro",
        ])
        .unwrap();
        let networks = net::resolve(&line.run.net, &line.run.name).unwrap();
        let shown = resolved(
            &line.run,
            std::path::Path::new("vmlinux"),
            &[],
            &networks,
            &[],
            None,
        );
        let first = crate::virtio::dev::net::Mac::of("vm", 0);
        assert_eq!(
            shown,
            format!(
                "sarang run -k vmlinux -c 1 -m 512M --net user,hostfwd=2222:22,mac={first} \
                 --net tap=t0,mac=02:00:00:00:00:07 --pmem root.ext4,ro"
            )
        );
    }

    #[test]
    fn the_resolved_command_line_has_a_console_that_is_not_the_ordinary_one() {
        for (flag, shown) in [
            ("--console=stdio", ""),
            ("--console=virtio", " --console virtio,stdio"),
            ("--console=file=a b", " --console 'file=a b'"),
        ] {
            let line = Line::try_parse_from(["run", "-k=vmlinux", flag]).unwrap();
            let shown = format!("sarang run -k vmlinux -c 1 -m 512M{shown}");
            assert_eq!(
                resolved(
                    &line.run,
                    std::path::Path::new("vmlinux"),
                    &[],
                    &[],
                    &[],
                    None
                ),
                shown
            );
        }
    }

    #[test]
    fn the_last_lines_of_a_console_do_nothing_to_a_terminal() {
        assert!(last_lines(b"").is_empty() && last_lines(b"\r\n\r\n").is_empty());
        assert_eq!(
            last_lines(b"one\r\ntwo \x1b[2J\x07\r\n\n"),
            ["one", "two \\u{1b}[2J\\u{7}"]
        );
        let many = "\u{e9}\n".repeat(100) + &"x".repeat(1000);
        let lines = last_lines(many.as_bytes());
        assert_eq!(lines.len(), LAST_LINES);
        assert_eq!(lines.last(), Some(&"x".repeat(LINE_MAX)));
    }

    #[test]
    fn words_are_quoted_as_a_shell_needs_them() {
        assert_eq!(quoted("vmlinuz-6.1"), "vmlinuz-6.1");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
