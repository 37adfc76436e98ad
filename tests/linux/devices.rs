//! The other devices: shared directories, vsock, balloon, and all of them at once.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use crate::guest::{Guest, Kernel, eventually, on_each_kernel};

fn a_program_is_built_on_a_shared_directory(kernel: Kernel) {
    let shared = tempfile::tempdir().unwrap();
    fs::write(
        shared.path().join("Makefile"),
        "answer: answer.c\n\tcc -o $@ $<\n",
    )
    .unwrap();
    fs::write(
        shared.path().join("answer.c"),
        "#include <stdio.h>\nint main(void) { puts(\"forty-two\"); return 0; }\n",
    )
    .unwrap();
    let script = "mount_host
        mkdir -p /host/tmp/build; mount -t virtiofs build /host/tmp/build
        on_host make -C /tmp/build && on_host /tmp/build/answer
        cd /host/tmp/build; ln -s answer link; mv Makefile Renamed; rm answer.c; mkdir sub; echo text >sub/file";
    let build = format!("{},tag=build", shared.path().display());
    let text = Guest::new(kernel, script)
        .with_modules()
        .flags(&[
            "-c",
            "2",
            "-m",
            "1G",
            "--share",
            "/,tag=host,ro",
            "--share",
            &build,
        ])
        .output();
    assert!(text.contains("forty-two"), "{text}");
    let path = |name: &str| shared.path().join(name);
    let built = Command::new(path("link")).output().unwrap();
    assert_eq!(built.stdout, b"forty-two\n");
    assert!(path("Renamed").exists() && !path("Makefile").exists() && !path("answer.c").exists());
    assert_eq!(fs::read_to_string(path("sub/file")).unwrap(), "text\n");
}

#[test]
#[ignore = "needs a full KVM"]
fn shared_directories_are_mounted_read_and_written() {
    let scratch = tempfile::tempdir().unwrap();
    let (work, data) = (scratch.path().join("work"), scratch.path().join("data"));
    for directory in [&work, &data] {
        fs::create_dir(directory).unwrap();
        fs::write(directory.join("greeting"), "from the host\n").unwrap();
    }
    let script = "mkdir /mine /theirs; mount -t virtiofs work /mine; mount -t virtiofs d /theirs
        cat /mine/greeting; touch /theirs/new || echo refused=$(cat /theirs/greeting)
        head -c 10000000 /dev/urandom >/mine/random; sum=$(sha256sum </mine/random)
        mkdir /mine/many; for i in $(seq 200); do echo $i >/mine/many/$i; done
        ln -s ../many /mine/many/link; mkfifo /mine/fifo; echo through >/mine/fifo & cat /mine/fifo
        umount /mine; echo 3 >/proc/sys/vm/drop_caches; mount -t virtiofs work /mine
        [ \"$sum\" = \"$(sha256sum </mine/random)\" ] && echo same=yes
        echo files=$(ls /mine/many | wc -l); rm -r /mine/many; echo done >/mine/result";
    let text = Guest::new(Kernel::Small, script)
        .flags(&["-c", "2", "--share", work.to_str().unwrap()])
        .flags(&["--share", &format!("{},tag=d,ro", data.display())])
        .output();
    for words in [
        "from the host",
        "refused=from the host",
        "through",
        "same=yes",
        "files=201",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert_eq!(fs::read_to_string(work.join("result")).unwrap(), "done\n");
    assert_eq!(fs::read(work.join("random")).unwrap().len(), 10_000_000);
    assert!(!work.join("many").exists() && !data.join("new").exists());
}

fn vsock_connects_both_ways(kernel: Kernel) {
    let script = r#"mount_host
        cat >/host/tmp/vsock.py <<'END'
import socket
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.connect((2, 5000))
s.sendall(b"from the guest")
s.shutdown(socket.SHUT_WR)
print("echoed:", s.makefile("rb").read().decode())
l = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
l.bind((socket.VMADDR_CID_ANY, 5001))
l.listen()
print("guest is listening", flush=True)
c, peer = l.accept()
while data := c.recv(65536):
    c.sendall(data)
c.close()
END
        on_host python3 /tmp/vsock.py"#;
    let sockets = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(sockets.path().join("vsock_5000")).unwrap();
    let mut guest = Guest::new(kernel, script)
        .with_modules()
        .flags(&["-c", "2", "-m", "1G", "--share", "/,tag=host,ro"])
        .flags(&["--vsock", &format!("7,path={}", sockets.path().display())])
        .running();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
    });
    guest.wait_for("echoed: from the guest");
    echo.join().unwrap();
    guest.wait_for("guest is listening");
    let mut stream = UnixStream::connect(sockets.path().join("vsock")).unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    stream.write_all(b"CONNECT 5001\n").unwrap();
    let writer = {
        let (mut stream, sent) = (stream.try_clone().unwrap(), sent.clone());
        std::thread::spawn(move || {
            stream.write_all(&sent).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        })
    };
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    let line = received.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let (answer, echoed) = received.split_at(line);
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    assert!(echoed == sent, "{} of {} bytes", echoed.len(), sent.len());
    guest.finish();
}

fn the_balloon_gives_memory_back(kernel: Kernel) {
    let script = "mount -t tmpfs -o size=90% none /root
        head -c 64m /dev/zero >/root/file; echo memory is full; read line
        rm /root/file; echo memory is free
        read line";
    let mut guest = Guest::new(kernel, script)
        .with_modules()
        .flags(&["-m", "256M", "--balloon", "32M", "--json"])
        .running();
    guest.wait_for("memory is full");
    let full = guest.memory();
    guest.write("\n");
    guest.wait_for("memory is free");
    eventually("the host's memory comes back", || {
        guest.memory() + (48 << 10) < full
    });
    guest.write("\n");
    let json = guest.finish();
    assert!(json.contains("\"actual_mib\":32"), "{json}");
}

on_each_kernel! {
    a_program_is_built_on_a_shared_directory;
    vsock_connects_both_ways;
    the_balloon_gives_memory_back;
}
