//! All devices at once, under load for two minutes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use crate::guest::{Guest, Kernel, host};
use crate::net::in_a_network;

const DISKS: usize = 8;
const NETS: usize = 4;

/// Each worker repeats its work until the time is up, and says how often it did and whether all of it was right. The work
/// of each moves data through one device and compares it with what went in.
const SCRIPT: &str = r#"
    mount_host
    repeat() { # NAME COMMAND…
        name=$1 rounds=0 wrong=0; shift
        while [ "$(date +%s)" -lt $end ]; do
            "$@" || wrong=$((wrong + 1))
            rounds=$((rounds + 1))
        done
        echo "$name: rounds=$rounds wrong=$wrong"
    }
    same() { [ "$(sha256sum <"$1")" = "$(sha256sum <"$2")" ]; }
    disk() {
        head -c 4m /dev/urandom >/tmp/$1.in && cp /tmp/$1.in /disk/$1/file && sync
        echo 1 >/proc/sys/vm/drop_caches
        same /tmp/$1.in /disk/$1/file
    }
    share() { cp /tmp/payload /share/file.$n && n=$((n + 1)) && same /tmp/payload /share/file.$((n - 1)) && rm /share/file.$((n - 1)); }
    net() { wget -q -O /tmp/net.$1 http://10.55.$1.1:8123/payload && same /tmp/payload /tmp/net.$1; }
    entropy() { [ "$(head -c 65536 /dev/hwrng | wc -c)" = 65536 ]; }
    talk() { echo "a line for the console, and one more look at the clock: $(date)"; }
    mkdir -p /tmp /share /disk; mount -t tmpfs tmp /tmp; mount -t virtiofs work /share
    cp /share/payload /tmp/payload
    for i in 0 1 2 3; do ip addr add 10.55.$i.2/24 dev eth$i; ip link set eth$i up; done
    # The guest may be faster than the host's server.
    for i in 0 1 2 3; do until_true wget -q -O /dev/null http://10.55.$i.1:8123/payload; done
    end=$(($(date +%s) + 120))
    cat >/host/tmp/vsock.py <<'END'
import hashlib, os, socket, time
rounds = wrong = 0
while time.time() < float(os.environ["END"]):
    sent = os.urandom(1 << 20)
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.connect((2, 5000))
    s.sendall(sent)
    s.shutdown(socket.SHUT_WR)
    answer = s.makefile("rb").read().decode()
    s.close()
    wrong += answer != hashlib.sha256(sent).hexdigest()
    rounds += 1
print(f"vsock: rounds={rounds} wrong={wrong}")
END
    for d in a b c d e f g h; do
        mkdir -p /disk/$d; mount -t ext4 /dev/vd$d /disk/$d
        repeat disk-$d disk $d &
    done
    for i in 0 1 2 3; do repeat net-$i net $i & done
    n=0; repeat share share &
    repeat entropy entropy &
    repeat console talk >/tmp/talk &
    END=$end on_host python3 /tmp/vsock.py &
    wait
    tail -n 1 /tmp/talk
    for d in a b c d e f g h; do umount /disk/$d; done
    umount /share
"#;

#[test]
#[ignore = "needs a full KVM"]
fn all_devices_work_at_once_under_load() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("work")).unwrap();
    let mut payload = vec![0; 2 << 20];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut payload)
        .unwrap();
    fs::write(path("work/payload"), payload).unwrap();

    let mut setup = String::new();
    let mut flags = Vec::new();
    for net in 0..NETS {
        setup += &format!(
            "ip tuntap add mode tap name wire{net}; ip addr add 10.55.{net}.1/24 dev wire{net}; ip link set wire{net} up\n"
        );
        flags.extend(["--net".to_owned(), format!("tap=wire{net}")]);
    }
    setup += &format!(
        "(cd {} && exec timeout 300 python3 -m http.server 8123 >/dev/null 2>&1) &",
        path("work")
    );
    for disk in 0..DISKS {
        let image = path(&format!("disk{disk}"));
        File::create(&image).unwrap().set_len(32 << 20).unwrap();
        host("mke2fs", &["-q", "-t", "ext4", &image]);
        flags.extend(["--disk".to_owned(), image]);
    }
    flags.extend([
        "--share=/,tag=host,ro".to_owned(),
        format!("--share={},tag=work", path("work")),
        format!("--vsock=9,path={}", scratch.path().display()),
        "--balloon=64M".to_owned(),
        "--console=virtio".to_owned(),
    ]);
    let listener = UnixListener::bind(path("vsock_5000")).unwrap();
    // Ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let sum = sha256(&mut stream);
            let _ = stream.write_all(sum.as_bytes());
        }
    });

    let binary = crate::guest::binary();
    let text = Guest::new(Kernel::Small, SCRIPT)
        .by(in_a_network(&setup, &[binary.to_str().unwrap()]))
        .flags(&["-c", "4", "-m", "1G"])
        .flags(&flags)
        .timeout("400s")
        .output();
    for worker in [
        "disk-a", "disk-h", "net-0", "net-3", "share", "entropy", "console", "vsock",
    ] {
        assert!(
            text.contains(&format!("{worker}: rounds=")),
            "{worker}: {text}"
        );
    }
    assert_eq!(text.matches("wrong=0").count(), DISKS + NETS + 4, "{text}");
    assert!(!text.contains("rounds=0"), "{text}");
    for disk in 0..DISKS {
        host("e2fsck", &["-f", "-n", &path(&format!("disk{disk}"))]);
    }
}

/// The digest of all that comes, as `sha256sum` prints it.
fn sha256(stream: &mut impl Read) -> String {
    let mut child = std::process::Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::copy(stream, &mut child.stdin.take().unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned()
}
