//! The interactive console, under a pseudo-terminal: the keys, and the terminal as it was before on every way out.

#[allow(dead_code, reason = "not every test needs all of it")]
mod pty;

use std::fs;
use std::process::Stdio;

use pty::Session;
use rustix::process::{Pid, Signal, kill_process};

/// Starts `sarang run` with a guest on a new terminal, and waits until it has printed `ready`.
fn start(guest: &str, ready: &str) -> Session {
    start_with(guest, ready, &[])
}

fn start_with(guest: &str, ready: &str, flags_of_run: &[&str]) -> Session {
    let scratch = tempfile::tempdir().unwrap();
    let kernel = scratch.path().join(guest);
    fs::write(&kernel, sarang::guest::bare_metal(guest).unwrap()).unwrap();
    let mut session = Session::start(env!("CARGO_BIN_EXE_sarang"), |command| {
        command
            .args(["run", "--timeout", "120s"])
            .args(flags_of_run)
            .arg("-k")
            .arg(&kernel)
            .stderr(Stdio::null());
    });
    session.expect(ready);
    session
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
