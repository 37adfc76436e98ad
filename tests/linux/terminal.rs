//! `sarang run` on a terminal: a shell, and what Ctrl-C does to a command.

use std::io::Read;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Kernel, binary, eventually};
use crate::pty::Session;

/// `sarang run` with these arguments on a terminal.
fn start(arguments: &[&str]) -> Session {
    Session::start(binary().to_str().unwrap(), |command| {
        command
            .args(["run", "--timeout", "100s", "-c", "2", "-m", "1G"])
            .args(arguments)
            .env("SARANG_KERNEL", Kernel::Small.image())
            .env("SHELL", "/bin/sh")
            .env("PS1", "ready> ")
            .stderr(Stdio::null());
    })
}

#[test]
#[ignore = "needs a full KVM"]
fn without_a_command_there_is_a_shell_on_the_hosts_files() {
    let mut session = start(&[]);
    session.expect("ready> ");
    assert!(session.is_raw());
    session.press(b"stty size; tty; pwd; ls /etc/debian_version\n");
    let said = session.expect("ready> ");
    let here = std::env::current_dir().unwrap();
    let here = here.to_str().unwrap();
    for expected in [
        "\r\n30 100\r\n",
        "\r\n/dev/pts/",
        here,
        "\r\n/etc/debian_version\r\n",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    // The size of the window follows.
    session.press(b"trap 'stty size' WINCH\n");
    session.expect("ready> ");
    session.resize(44, 132);
    session.press(b"while [ \"$(stty size)\" != '44 132' ]; do :; done; echo fol''lowed\n");
    session.expect("followed");
    session.expect("ready> ");
    // The shell answers Ctrl-C, however often.
    for _ in 0..4 {
        session.press(b"\x03");
        session.expect("ready> ");
    }
    session.press(b"sleep 99\n");
    session.expect("sleep 99\r\n");
    session.press(b"\x03");
    session.expect("ready> ");
    session.press(b"exit 3\n");
    assert_eq!(session.end(), Some(3));
}

#[test]
#[ignore = "needs a full KVM"]
fn ctrl_c_ends_a_command_and_twice_a_deaf_one() {
    let mut session = start(&["--", "sh", "-c", "echo ready; exec sleep 99"]);
    session.expect("ready");
    session.press(b"\x03");
    assert_eq!(session.end(), Some(130));

    let mut session = start(&["--", "sh", "-c", "trap '' INT; echo ready; sleep 99"]);
    session.expect("ready");
    session.press_until_it_ends(b"\x03", "^C");
    assert_eq!(session.end(), Some(130));
}

/// As of a script that is interrupted: its terminal is not the command's.
#[test]
#[ignore = "needs a full KVM"]
fn sigint_ends_a_command_and_twice_a_deaf_one() {
    for script in [
        "echo ready; exec sleep 99",
        "trap '' INT; echo ready; sleep 99",
    ] {
        let mut child = Command::new("env")
            .args(["--default-signal=INT", binary().to_str().unwrap()])
            .args(["run", "--timeout", "100s", "-k"])
            .arg(Kernel::Small.image())
            .args(["--", "sh", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = [0; 6];
        child.stdout.take().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(&line, b"ready\n");
        let mut status = None;
        eventually("it ends", || {
            let _ = kill_process(Pid::from_child(&child), Signal::INT);
            status = child.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(130), "{script}");
    }
}
