//! The interactive console, under a pseudo-terminal: the keys, and the terminal as it was before on every way out.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

struct Session {
    child: Child,
    keyboard: File,
    terminal: OwnedFd,
    before: Termios,
    _scratch: tempfile::TempDir,
}

/// Starts `sarang run` with a guest on a new terminal, and waits until it has printed `ready`.
fn start(guest: &str, ready: &str) -> Session {
    start_with(guest, ready, &[])
}

fn start_with(guest: &str, ready: &str, flags_of_run: &[&str]) -> Session {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join(guest);
    fs::write(&kernel, sarang::guest::bare_metal(guest).unwrap()).unwrap();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let before = tcgetattr(&terminal).unwrap();
    let child = Command::new("env")
        // What a shell starts in the background has some signals ignored, and so would its children.
        .args([
            "--default-signal=HUP,INT,QUIT,TERM",
            env!("CARGO_BIN_EXE_sarang"),
        ])
        .args(["run", "--timeout", "120s"])
        .args(flags_of_run)
        .arg("-k")
        .arg(&kernel)
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut session = Session {
        child,
        keyboard: File::from(master),
        terminal,
        before,
        _scratch: scratch,
    };
    session.expect(ready);
    session
}

impl Session {
    fn expect(&mut self, words: &str) {
        let (mut seen, mut buffer) = (String::new(), [0; 256]);
        while !seen.contains(words) {
            let count = self.keyboard.read(&mut buffer).unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    }

    /// The exit code, after a check that the terminal is as it was.
    fn end(mut self) -> Option<i32> {
        let code = self.child.wait().unwrap().code();
        let after = tcgetattr(&self.terminal).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        code
    }
}

#[test]
fn the_keys_help_and_quit_work_and_ctrl_a_can_be_sent() {
    let mut session = start("echo", "echo: ready");
    assert!(session.is_raw());
    session.press(b"\x01h");
    session.expect("Ctrl-a x");
    session.press(b"typed");
    session.expect("typed");
    session.press(b"\x01\x01!");
    session.expect("\x01!");
    session.press(b"\x01x");
    assert_eq!(session.end(), Some(130));
}

#[test]
fn the_keys_work_on_a_virtio_console_and_what_the_serial_port_prints_is_seen() {
    let mut session = start_with("echo", "echo: ready", &["--console", "virtio"]);
    assert!(session.is_raw());
    session.press(b"typed into a console that the guest has no driver for");
    session.press(b"\x01h");
    session.expect("Ctrl-a x");
    session.press(b"\x01x");
    assert_eq!(session.end(), Some(130));
}

#[test]
fn the_keys_work_while_something_is_waited_for() {
    let mut session = start_with("echo", "echo: ready", &["--expect", "never"]);
    assert!(session.is_raw());
    session.press(b"kept for afterwards\x01h");
    session.expect("Ctrl-a x");
    session.press(b"\x01x");
    assert_eq!(session.end(), Some(130));
}

#[test]
fn the_terminal_is_restored_when_the_guest_ends() {
    let mut session = start("echo", "echo: ready");
    session.press(b"\x04");
    assert_eq!(session.end(), Some(0));
}

#[test]
fn the_terminal_is_restored_when_a_signal_ends_sarang() {
    for signal in [Signal::SEGV, Signal::ABORT, Signal::HUP, Signal::QUIT] {
        let session = start("spin", "spin: running");
        assert!(session.is_raw());
        kill_process(Pid::from_child(&session.child), signal).unwrap();
        assert_eq!(
            session.end(),
            None,
            "the signal is not hidden from the parent"
        );
    }
}
