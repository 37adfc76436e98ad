//! A network card's speed over a tap in a network namespace, with iperf3 at both ends: TCP in either direction and the
//! time of a ping, sarang and `qemu-system-x86_64 -M microvm` (virtio-net behind memory-mapped registers, no vhost),
//! alternately in one run. Run it with `cargo bench --bench net`; the guests run inside `scripts/kvm-anywhere`.

#[allow(dead_code)]
mod machines;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machines::{Comparison, RUNS, Vmm};

const SETUP: &str = "set -e; ip link set lo up
    ip tuntap add mode tap name wire vnet_hdr; ip addr add 10.55.0.1/24 dev wire; ip link set wire up
    for port in 5201 5202; do iperf3 --server --port $port >/dev/null 2>&1 & servers=\"$servers $!\"; done
    \"$0\" \"$@\" || true
    kill $servers";

/// Pings' average comes in milliseconds, the streams' speed from iperf3's JSON in bits a second.
const SCRIPT: &str = r#"
ip link set lo up; ip addr add 10.55.0.2/24 dev eth0; ip link set eth0 up
ping -c 3 10.55.0.1 >/dev/null
ping -c 100 -i 0.01 10.55.0.1 | awk -F/ '/round-trip/ { print "result ping " $4 * 1000 }'
speed() { awk -v what="$1" '/"sum_received"/ { found = 1 } found && /bits_per_second/ { gsub(/[^0-9.e+]/, "", $2); print "result " what " " $2 / 1e6; exit }'; }
LD_LIBRARY_PATH=/lib iperf3 -J -c 10.55.0.1 -p 5201 -n 60M | speed "TCP to the host"
LD_LIBRARY_PATH=/lib iperf3 -J -c 10.55.0.1 -p 5202 -n 60M -R | speed "TCP from the host"
"#;

fn main() {
    if let Some((vmm, assets)) = machines::this_turn() {
        return guest(vmm, &assets);
    }
    let mut figures = [
        Comparison::new("TCP to the host", "Mbit/s", true),
        Comparison::new("TCP from the host", "Mbit/s", true),
        Comparison::new("ping", "µs", false),
    ];
    machines::take_turns(
        &mut figures,
        &[
            machines::asset("build-guest-kernel", "SARANG_GUEST_KERNEL"),
            machines::asset("guest-assets", "SARANG_INITRD"),
        ],
    );
    println!("a tap, 2 vCPUs, median of {RUNS}, and how many times better sarang is:");
    figures.iter_mut().for_each(Comparison::print);
}

/// An archive with iperf3 and the libraries it needs.
fn iperf3(scratch: &Path) -> PathBuf {
    let root = scratch.join("iperf3");
    fs::create_dir_all(root.join("bin")).expect("room");
    let copy = "set -e; program=$(command -v iperf3); cp \"$program\" \"$0/bin\"
        ldd \"$program\" | grep -o '/[^ ]*' | while read -r file; do
            mkdir -p \"$0$(dirname \"$file\")\"; cp -L \"$file\" \"$0$file\"
        done";
    let status = Command::new("sh").args(["-c", copy]).arg(&root).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "iperf3 is not installed"
    );
    let archive = scratch.join("iperf3.cpio");
    fs::write(&archive, machines::pack(&root)).expect("room");
    archive
}

/// Inside: one guest, which prints its figures.
fn guest(vmm: Vmm, assets: &[PathBuf]) {
    let [kernel, busybox] = assets else {
        panic!("a kernel and an initramfs");
    };
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let parts = [busybox.clone(), iperf3(scratch.path())];
    let initrd = machines::initrd(scratch.path(), &parts, SCRIPT);
    let mut line = ["unshare", "--net", "sh", "-c", SETUP]
        .map(str::to_owned)
        .to_vec();
    line.extend(vmm.linux(kernel, &initrd, 2));
    let flags: &[&str] = match vmm {
        Vmm::Sarang => &["--net", "tap=wire"],
        Vmm::Qemu => &[
            "-netdev",
            "tap,id=n,ifname=wire,script=no,downscript=no,vhost=off",
            "-device",
            "virtio-net-device,netdev=n",
        ],
    };
    line.extend(flags.iter().map(|flag| (*flag).to_owned()));
    machines::show(&line);
}
