//! `sarang run`: boots a guest and stays with it to its end.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::kernels::{Found, Places};
use super::net::{self, Cards, Network};
use super::{Result, USAGE, quantity, say};
use crate::backend::console::{Console, Kind};
use crate::hv::kvm::Kvm;
use crate::trace::{Sink, TextFile};
use crate::virtio::VirtioDevice;
use crate::virtio::dev::rng::Rng;
use crate::vm::{Image, Machine, Report, Spec};

/// The guest's console goes to COM1; it reboots by the ACPI reset register (on hardware-reduced machines Linux would
/// ask EFI otherwise, which is not there); and a panic ends the run rather than hang it.
const COMMAND_LINE: &str = "console=ttyS0 reboot=a panic=-1";

/// Boot a guest and stay with it until it ends
#[derive(Args)]
#[command(after_help = "\
Without --kernel, the first of these is booted: $SARANG_KERNEL, ./vmlinux, ./bzImage,
./arch/x86/boot/bzImage, sarang's cache, /boot/vmlinuz-$(uname -r), the newest /boot/vmlinuz*.

On a terminal: Ctrl-a x quits, Ctrl-a Ctrl-a sends one Ctrl-a, Ctrl-a h lists the keys.
SIGTERM and SIGINT press the power button; a second one, or 5 seconds, end the guest.

A network card is given with --net, once for each; without it, there is none:
  user[,hostfwd=HOST:GUEST]...             through the program passt, which needs no privileges;
                                           hostfwd leads a TCP port of the host to one of the guest
  tap=NAME[,queues=N]                      on a tap; one that is not there is made, which needs
                                           CAP_NET_ADMIN, and stays down until `ip` sets it up
  none                                     no card
Each card also takes [,mac=MAC][,bw=RATE][,iops=N][,worker=own]. Without mac=, its address follows
from --name and its place, and is always the same; bw (bytes a second: 500K, 100M) and iops (frames
a second) limit each direction; worker=own gives it a thread of its own.

Exit codes: 0 powered off or rebooted, 80 kernel panic, 81 triple fault, 82 KVM could not go on,
124 timeout, 125 sarang failed, 130/143 stopped; a guest may choose its own by the exit port.

Examples:
  sarang run -k vmlinuz -i initrd.img -c 2 -m 1G
  sarang run -k bzImage -p 'root=/dev/ram0 quiet' --timeout 30s --json
  sarang run -k vmlinuz -i initrd.img --net user,hostfwd=2222:22
  sarang run -k vmlinuz --root-disk root.img --disk data.qcow2,format=qcow2
  sarang run -k vmlinuz --root-disk root.img,ro --disk /dev/sdb,direct,queues=2,bw=100M
  sarang run -k hello.elf --trace exits.txt")]
pub(super) struct Arguments {
    /// Kernel: an ELF vmlinux, a bzImage, or any ELF with a PVH note
    #[arg(short, long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; several are concatenated
    #[arg(short, long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Number of vCPUs, 1 to 64
    #[arg(short, long, value_name = "N", default_value = "1", value_parser = quantity::cpus)]
    cpus: u32,
    /// Guest memory
    #[arg(short, long, value_name = "SIZE", default_value = "512M", value_parser = quantity::ram)]
    mem: u64,
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
    /// Words to add to the kernel command line, after sarang's own
    #[arg(short = 'p', long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Name of the machine
    #[arg(long, value_name = "NAME", default_value = "sarang")]
    name: String,
    /// End the run with code 124 after this long: 500ms, 30s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    timeout: Option<Duration>,
    /// Where the serial console goes: off, stdio, pty or file=PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = console_kind)]
    console: Kind,
    /// Network card: user[,hostfwd=HOST:GUEST], tap=NAME or none; see below. Several make several cards
    #[arg(long, value_name = "NET", value_parser = net::parse)]
    net: Vec<Network>,
    /// Write one line for every exit of the guest to userspace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print the outcome as one line of JSON on standard output when the run has ended
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// All disks, in the guest's order.
    fn disks(&self) -> impl Iterator<Item = &super::disk::Disk> {
        self.root_disk.iter().chain(&self.disk)
    }
}

/// Runs the verb. The result is the exit code.
pub(super) fn main(arguments: Arguments) -> Result<u8> {
    let found = match &arguments.kernel {
        Some(kernel) => Found {
            kernel: kernel.clone(),
            initrd: None,
        },
        None => Places::of_host().find()?,
    };
    let mut initrds = arguments.initrd.clone();
    if initrds.is_empty() {
        initrds.extend(found.initrd);
    }
    let networks = match net::resolve(&arguments.net, &arguments.name) {
        Ok(networks) => networks,
        Err(message) => {
            say(&format!("sarang: {message}"));
            return Ok(USAGE);
        }
    };
    say(&format!(
        "# {}",
        resolved(&arguments, &found.kernel, &initrds, &networks)
    ));
    // Before the images are read, so that passt starts meanwhile.
    let cards = Cards::open(&networks)?;
    // Before the hypervisor, so that a wrong path is told on any host.
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (index, disk) in arguments.disks().enumerate() {
        devices.push(disk.open(index)?);
    }
    let hypervisor = Kvm::open(&super::kvm_path())?;
    let trace =
        match &arguments.trace {
            Some(path) => Some(Arc::new(TextFile::create(path).map_err(|error| {
                format!("cannot write the trace to {}: {error}", path.display())
            })?) as Arc<dyn Sink>),
            None => None,
        };
    let mut command_line = COMMAND_LINE.to_owned();
    if let Some(disk) = &arguments.root_disk {
        command_line.push(' ');
        command_line.push_str(disk.root_words());
    }
    for words in &arguments.append {
        command_line.push(' ');
        command_line.push_str(words);
    }
    let kernel = Image::read(&found.kernel)?;
    let initrds: std::result::Result<Vec<Image>, _> =
        initrds.iter().map(|path| Image::read(path)).collect();
    let initrds = initrds?;
    devices.extend(cards.into_devices()?);
    devices.push(Box::new(Rng::new(0)));
    let spec = Spec {
        name: arguments.name,
        cpus: arguments.cpus,
        ram_bytes: arguments.mem,
        kernel,
        initrds,
        command_line,
        timeout: arguments.timeout,
        trace,
        devices,
    };
    let console = Console::open(&arguments.console)?;
    if let Some(path) = console.pty_path() {
        say(&format!("# console: {}", path.display()));
    }
    let mut machine = Machine::new(&hypervisor, spec, console)?;
    machine.stop_on_signals()?;
    let report = machine.run()?;
    finish(&report, arguments.json)
}

/// The command line with everything that was left open filled in.
fn resolved(
    arguments: &Arguments,
    kernel: &std::path::Path,
    initrds: &[PathBuf],
    networks: &[Network],
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
    flag("-c", &arguments.cpus.to_string());
    flag("-m", &quantity::show_ram(arguments.mem));
    for network in networks {
        flag("--net", &network.to_string());
    }
    if let Some(disk) = &arguments.root_disk {
        flag("--root-disk", disk.text());
    }
    for disk in &arguments.disk {
        flag("--disk", disk.text());
    }
    for append in &arguments.append {
        flag("-p", append);
    }
    words.join(" ")
}

/// Parses where the console goes.
fn console_kind(text: &str) -> std::result::Result<Kind, String> {
    match text {
        "off" => Ok(Kind::Off),
        "stdio" => Ok(Kind::Stdio),
        "pty" => Ok(Kind::Pty),
        _ => match text.strip_prefix("file=") {
            Some(path) if !path.is_empty() => Ok(Kind::File(path.into())),
            _ => Err("a console is off, stdio, pty or file=PATH".to_owned()),
        },
    }
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
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
    } else if code != 0 && !matches!(report.outcome, crate::vm::Outcome::Exited { .. }) {
        say(&format!("sarang: {}", report.outcome));
    }
    Ok(code)
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
            "--name=vm",
            "--net=user,hostfwd=2222:22",
            "--net=tap=t0,mac=02:00:00:00:00:07",
        ])
        .unwrap();
        let networks = net::resolve(&line.run.net, &line.run.name).unwrap();
        let shown = resolved(&line.run, std::path::Path::new("vmlinux"), &[], &networks);
        let first = crate::virtio::dev::net::Mac::of("vm", 0);
        assert_eq!(
            shown,
            format!(
                "sarang run -k vmlinux -c 1 -m 512M --net user,hostfwd=2222:22,mac={first} \
                 --net tap=t0,mac=02:00:00:00:00:07"
            )
        );
    }

    #[test]
    fn words_are_quoted_as_a_shell_needs_them() {
        assert_eq!(quoted("vmlinuz-6.1"), "vmlinuz-6.1");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
