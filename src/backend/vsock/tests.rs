//! The host's sockets of a vsock, with real programs' ends: listening, greeting, and what a directory is left with.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::*;
use crate::worker::children;

fn host() -> (tempfile::TempDir, Host) {
    let scratch = tempfile::tempdir().unwrap();
    let host = Host::open(&Place::Given(scratch.path().to_owned())).unwrap();
    (scratch, host)
}

#[test]
fn a_program_that_connects_is_told_once_and_accepted() {
    let (_scratch, host) = host();
    assert_eq!(host.changes(), []);
    let mut program = UnixStream::connect(host.directory().socket()).unwrap();
    let changes = host.changes();
    assert_eq!((changes.len(), changes[0].token), (1, None));
    assert!(changes[0].readable);
    let mut stream = host.accept(7).unwrap().unwrap();
    assert!(host.accept(8).unwrap().is_none());
    stream.say("hello").unwrap();
    let mut text = [0; 5];
    program.read_exact(&mut text).unwrap();
    program.write_all(b"x").unwrap();
    let changes = host.changes();
    assert!(changes.iter().all(|change| change.token == Some(7)));
    assert!(changes.iter().any(|change| change.readable));
    assert_eq!(host.changes(), [], "each change is told once");
    let _closing = children::none();
    drop(program);
    assert!(host.changes().iter().all(|change| change.hung_up));
    drop(stream);
    assert_eq!(host.changes(), []);
}

#[test]
fn a_port_is_open_when_a_program_listens_at_its_socket() {
    let (_scratch, host) = host();
    assert!(host.connect(52, 1).is_err());
    std::fs::write(host.directory().port(53), "").unwrap();
    assert!(host.connect(53, 1).is_err());
    let listener = UnixListener::bind(host.directory().port(52)).unwrap();
    let mut stream = host.connect(52, 1).unwrap();
    stream.say("hello").unwrap();
    drop(stream);
    let mut text = String::new();
    let (mut program, _) = listener.accept().unwrap();
    program.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
}

#[test]
fn a_directory_that_cannot_be_written_to_is_refused_with_a_sentence() {
    // Nobody may make files there, not even root.
    let Err(error) = Host::open(&Place::Given("/proc/self".into())) else {
        panic!("a socket in /proc");
    };
    let text = error.to_string();
    assert!(
        text.contains("cannot make a socket in the directory /proc/self"),
        "{text}"
    );
}

#[test]
fn the_listening_socket_is_removed_in_the_end() {
    let (_scratch, host) = host();
    let path = host.directory().socket();
    assert!(path.exists());
    drop(host);
    assert!(!path.exists());
}
