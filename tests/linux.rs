//! Linux in sarang, through the binary. These need a full KVM, and the kernels that `scripts/guest-assets`
//! fetches and `scripts/build-guest-kernel` builds. So they run only when asked for: `scripts/test` does, inside
//! `scripts/kvm-anywhere` if need be.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

fn asset(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; see scripts/guest-assets"))
}

fn binary() -> String {
    std::env::var("SARANG_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_sarang").to_owned())
}

/// A file of a cpio archive in the "newc" format, which Linux unpacks into its first root file system.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let header = [
        1,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
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

/// Boots a kernel whose init runs `script` and powers off.
fn boot(kernel: &str, script: &str, flags: &[&str]) -> (Option<i32>, String) {
    boot_by(Command::new(binary()), kernel, script, flags)
}

/// The same, by a command that ends in the binary.
fn boot_by(
    mut command: Command,
    kernel: &str,
    script: &str,
    flags: &[&str],
) -> (Option<i32>, String) {
    let scratch = tempfile::tempdir().unwrap();
    let mut archive = Vec::new();
    entry(&mut archive, "etc", 0o040_755, b"");
    entry(&mut archive, "etc/rc", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, b"");
    let rc = scratch.path().join("rc.cpio");
    fs::write(&rc, archive).unwrap();
    // Into files and with few words: where the machine is emulated, every wake-up of a reader is one more chance for it
    // to go wrong.
    let (out, err) = (scratch.path().join("out"), scratch.path().join("err"));
    let status = command
        .args(["run", "--timeout", "60s", "-p", "quiet", "-k", kernel])
        .args(["-i", &asset("SARANG_INITRD"), "-i"])
        .arg(&rc)
        .args(flags)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(&err).unwrap())
        .status()
        .unwrap();
    let text = String::from_utf8_lossy(&fs::read(&out).unwrap()).into_owned();
    if status.code() != Some(0) {
        eprintln!("{text}\n{}", fs::read_to_string(&err).unwrap());
    }
    (status.code(), text)
}

fn sees_processors(kernel: &str, cpus: &str) {
    let script = "echo cpus=$(nproc) cores=$(grep -m1 'cpu cores' /proc/cpuinfo)";
    let (code, text) = boot(&asset(kernel), script, &["-c", cpus, "-m", "256M"]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains(&format!("cpus={cpus} cores=cpu cores : {cpus}")),
        "{text}"
    );
}

/// One boot a test: where the machine itself is emulated, what can be repeated alone can be judged alone.
macro_rules! processors {
    ($($name:ident: $kernel:literal, $cpus:literal;)*) => {$(
        #[test]
        #[ignore = "needs a full KVM"]
        fn $name() {
            sees_processors($kernel, $cpus);
        }
    )*};
}

processors! {
    debian_6_1_sees_one_processor: "SARANG_KERNEL_61", "1";
    debian_6_1_sees_two_processors: "SARANG_KERNEL_61", "2";
    debian_6_1_sees_four_processors: "SARANG_KERNEL_61", "4";
    debian_6_12_sees_one_processor: "SARANG_KERNEL_612", "1";
    debian_6_12_sees_two_processors: "SARANG_KERNEL_612", "2";
    debian_6_12_sees_four_processors: "SARANG_KERNEL_612", "4";
}

#[test]
#[ignore = "needs a full KVM"]
fn an_elf_vmlinux_boots_and_reads_its_command_line() {
    let kernel = asset("SARANG_GUEST_KERNEL");
    let (code, text) = boot(
        &kernel,
        "echo cpus=$(nproc); cat /proc/cmdline",
        &["-c", "2", "-p", "spice=1"],
    );
    assert_eq!(code, Some(0));
    assert!(
        text.contains("cpus=2") && text.contains("spice=1"),
        "{text}"
    );
}

/// Boots with `flag` of memory; what the kernel keeps for itself may be missing from it, but no more.
fn memory_arrives(flag: &str, low: u32, high: u32) {
    let script = "echo total=$(free -m | awk '/Mem:/ { print $2 }') end";
    let (code, text) = boot(&asset("SARANG_KERNEL_61"), script, &["-m", flag]);
    assert_eq!(code, Some(0));
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
    let (_, text) = boot(&asset("SARANG_KERNEL_61"), "echo now=$(date +%s) end", &[]);
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
    let flags = ["--json", "--console", "off"];
    boot(&asset("SARANG_KERNEL_61"), script, &flags)
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
        .args([
            "run",
            "--timeout",
            "60s",
            "-p",
            "quiet",
            "-k",
            &asset("SARANG_KERNEL_61"),
        ])
        .args(["-i", &asset("SARANG_INITRD")])
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

#[test]
#[ignore = "needs a full KVM"]
fn a_virtio_console_has_what_was_printed_before_it_was_there_and_after() {
    let kernel = asset("SARANG_GUEST_KERNEL");
    let script = "echo consoles=$(cat /proc/consoles | cut -d ' ' -f 1) end
        echo tty=$(cat /sys/class/tty/console/active)";
    let (code, text) = boot(
        &kernel,
        script,
        &["--console", "virtio", "-p", "loglevel=7"],
    );
    assert_eq!(code, Some(0));
    // The kernel's first line, which only the serial port can have had, and what a program printed to /dev/console.
    for expected in ["Linux version", "consoles=hvc0 end", "tty=hvc0"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
#[ignore = "needs a full KVM"]
fn a_kernel_panic_ends_the_run_as_such_whether_or_not_there_is_a_virtio_console_yet() {
    let flags = ["--json", "--console", "virtio,off"];
    let script = "echo c > /proc/sysrq-trigger";
    // Debian's kernel has the driver in a module, which this initrd does not bring.
    for (kernel, message) in [("SARANG_GUEST_KERNEL", "sysrq"), ("SARANG_KERNEL_61", "")] {
        let (code, json) = boot(&asset(kernel), script, &flags);
        assert_eq!(code, Some(80), "{kernel}");
        assert!(
            json.contains("\"panicked\"") && json.contains(message),
            "{json}"
        );
    }
}

/// Runs `setup` and then the binary in a network namespace of its own.
fn in_a_network(setup: &str) -> Command {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let script = format!("set -e; ip link set lo up\n{setup}\nexec \"$0\" \"$@\"");
    command.args(["--net", "sh", "-c", &script]).arg(binary());
    command
}

#[test]
#[ignore = "needs a full KVM"]
fn a_guest_gets_random_bytes_and_reaches_the_host_over_a_tap() {
    let command = in_a_network(
        "ip tuntap add mode tap name wire; ip addr add 10.55.0.1/24 dev wire; ip link set wire up",
    );
    let script = "echo random=$(head -c 1000 /dev/hwrng | wc -c)
        ip addr add 10.55.0.2/24 dev eth0; ip link set eth0 up
        ping -c 3 10.55.0.1
        echo mac=$(cat /sys/class/net/eth0/address)";
    let flags = ["-c", "2", "--net", "tap=wire,mac=52:54:00:12:34:56"];
    let (code, text) = boot_by(command, &asset("SARANG_GUEST_KERNEL"), script, &flags);
    assert_eq!(code, Some(0));
    for expected in ["random=1000", "3 packets received", "mac=52:54:00:12:34:56"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
#[ignore = "needs a full KVM"]
fn a_guest_reaches_a_server_on_the_hosts_loopback_through_passt() {
    // An interface with a route is what passt takes its addresses from.
    let command = in_a_network(
        "ip tuntap add mode tap name uplink; ip addr add 192.0.2.2/24 dev uplink; ip link set uplink up; \
         ip route add default via 192.0.2.1; \
         (cd /usr/share/common-licenses && exec timeout 150 python3 -m http.server 8123 >/dev/null 2>&1) &",
    );
    let script = "ip link set eth0 up; udhcpc -i eth0 -n -q -s /bin/true
        ip addr add 192.0.2.2/24 dev eth0; ip route add default via 192.0.2.1
        for try in 1 2 3 4 5 6 7 8 9; do
            wget -q -O - http://192.0.2.1:8123/GPL-2 >/licence && break; sleep 1
        done
        head -n 1 /licence";
    let (code, text) = boot_by(
        command,
        &asset("SARANG_GUEST_KERNEL"),
        script,
        &["-c", "2", "--net", "user"],
    );
    assert_eq!(code, Some(0));
    assert!(text.contains("GNU GENERAL PUBLIC LICENSE"), "{text}");
}

#[test]
#[ignore = "needs a full KVM"]
fn a_file_system_on_a_disk_survives_with_what_the_guest_wrote() {
    let scratch = tempfile::tempdir().unwrap();
    let tree = scratch.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("greeting"), "from the host\n").unwrap();
    let image = scratch.path().join("disk.ext4");
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .arg(&image)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", tree.to_str().unwrap()],
    );
    let script = "mount -t ext4 /dev/vda /root; cat /root/greeting
        head -c 10000000 /dev/urandom >/root/random; sum=$(sha256sum </root/random)
        mkdir /root/many; for i in $(seq 1000); do echo $i >/root/many/$i; done
        umount /root; echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /root
        [ \"$sum\" = \"$(sha256sum </root/random)\" ] && echo same=yes
        sync; umount /root";
    let disk = image.to_str().unwrap().to_owned();
    let flags = ["-c", "2", "--disk", &disk];
    let (code, text) = boot(&asset("SARANG_GUEST_KERNEL"), script, &flags);
    assert_eq!(code, Some(0));
    assert!(text.contains("from the host"), "{text}");
    assert!(text.contains("same=yes"), "{text}");
    run("e2fsck", &["-f", "-n"]);
    let names = run("debugfs", &["-R", "ls -p /many"]);
    assert!(names.contains("/1000/"), "{names}");
}
