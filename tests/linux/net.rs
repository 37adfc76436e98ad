//! Networks: a tap in a namespace of its own, and passt.

use std::path::Path;
use std::process::Command;

use crate::guest::{Guest, Kernel, binary, on_each_kernel};

/// Runs `setup` and then a program in a network namespace of its own.
pub fn in_a_network(setup: &str, program: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let script = format!("set -e; ip link set lo up\n{setup}\nexec \"$0\" \"$@\"");
    command.args(["--net", "sh", "-c", &script]).args(program);
    command
}

fn a_tap_carries_pings_and_streams_of_full_speed(kernel: Kernel) {
    let command = in_a_network(
        "ip tuntap add mode tap name wire; ip addr add 10.55.0.1/24 dev wire; ip link set wire up
         iperf3 --server --one-off --logfile /dev/null &
         iperf3 --server --one-off --port 5202 --logfile /dev/null &",
        &[binary().to_str().unwrap()],
    );
    let script = "echo random=$(head -c 1000 /dev/hwrng | wc -c)
        ip addr add 10.55.0.2/24 dev eth0; ip link set eth0 up
        ping -c 3 10.55.0.1
        echo mac=$(cat /sys/class/net/eth0/address)
        mount_host
        before=$(cat /sys/class/net/eth0/statistics/tx_packets)
        on_host iperf3 --client 10.55.0.1 --bytes 50M >/sent && echo sent=yes
        after=$(cat /sys/class/net/eth0/statistics/tx_packets)
        # Without segmentation offload, 50 MiB are 36,000 frames of 1,500 bytes.
        [ $((after - before)) -lt 20000 ] && echo segmented=by-the-host
        on_host iperf3 --client 10.55.0.1 --port 5202 --reverse --bytes 50M >/received && echo received=yes";
    let text = Guest::new(kernel, script)
        .by(command)
        .with_modules()
        .flags(&["-c", "2", "--net", "tap=wire,mac=52:54:00:12:34:56"])
        .flags(&["--share", "/,tag=host,ro"])
        .output();
    for expected in [
        "random=1000",
        "3 packets received",
        "mac=52:54:00:12:34:56",
        "sent=yes",
        "segmented=by-the-host",
        "received=yes",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

fn passt_reaches_the_hosts_loopback_without_privileges(kernel: Kernel) {
    // An interface with a route is what passt takes its addresses from.
    let setup = "ip tuntap add mode tap name uplink; ip addr add 192.0.2.2/24 dev uplink; ip link set uplink up
         ip route add default via 192.0.2.1
         (cd /usr/share/common-licenses && exec timeout 150 python3 -m http.server 8123 >/dev/null 2>&1) &";
    let anybody = |binary: &Path| {
        let mut program = vec![binary.to_str().unwrap()];
        if rustix::process::geteuid().is_root() {
            let nobody = [
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
            ];
            program.splice(
                0..0,
                nobody.into_iter().chain(["env", "HOME=/", "TMPDIR=/tmp"]),
            );
        }
        in_a_network(setup, &program)
    };
    let script = "ip link set eth0 up; udhcpc -i eth0 -n -q -s /bin/true
        ip addr add 192.0.2.2/24 dev eth0; ip route add default via 192.0.2.1
        until_true wget -q -O /licence http://192.0.2.1:8123/GPL-2
        head -n 1 /licence";
    let text = Guest::new(kernel, script)
        .by_anybody(anybody)
        .with_modules()
        .flags(&["-c", "2", "--net", "user"])
        .output();
    assert!(text.contains("GNU GENERAL PUBLIC LICENSE"), "{text}");
}

on_each_kernel! {
    a_tap_carries_pings_and_streams_of_full_speed;
    passt_reaches_the_hosts_loopback_without_privileges;
}
