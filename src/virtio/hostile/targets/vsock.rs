//! A socket device whose host has a program that listens, and others that connect.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use tempfile::TempDir;

use super::super::operation::Operation;
use super::super::{Probe, Subject, Target};
use super::{request, scratch, served};
use crate::backend::vsock::{Host, Place};
use crate::virtio::dev::vsock::Vsock;

/// The guest's CID, and a port of the guest and of the host where something is.
const CID: u32 = 3;
const GUEST_PORT: u32 = 1000;
const HOST_PORT: u32 = 52;
/// The first port from which programs of the host connect.
const FIRST_PORT: u32 = 1 << 30;

// Operations of packets (virtio 1.3 §5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

// What the first of the host's bytes says that it does, modulo 6.
/// All programs send the rest.
const SENDS: u8 = 0;
/// A program connects and sends the rest.
const CONNECTS: u8 = 1;
/// The oldest connection is closed.
const CLOSES: u8 = 2;
/// The youngest one's program sends nothing more.
const ENDS_SENDING: u8 = 3;
/// The youngest one's program receives nothing more.
const ENDS_RECEIVING: u8 = 4;
/// Nobody reads what has come; otherwise it is read first.
const SLEEPS: u8 = 5;

/// The host's programs may have so many connections.
const STREAMS: usize = 16;

/// Programs of the host. Dropped after the device, they remove the directory.
struct Programs {
    scratch: TempDir,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Programs {
    fn new() -> Programs {
        let scratch = scratch();
        let listener = UnixListener::bind(scratch.path().join(format!("vsock_{HOST_PORT}")));
        let listener = listener.expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        Programs {
            scratch,
            listener,
            streams: Vec::new(),
        }
    }

    fn directory(&self) -> PathBuf {
        self.scratch.path().to_owned()
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket");
        if self.streams.len() < STREAMS {
            self.streams.push(stream);
        }
    }

    fn act(&mut self, bytes: &[u8]) {
        let (what, bytes) = bytes.split_first().unwrap_or((&SENDS, &[]));
        if what % 6 == SLEEPS {
            return;
        }
        while let Ok((stream, _)) = self.listener.accept() {
            self.keep(stream);
        }
        let mut buffer = [0; 4096];
        for stream in &mut self.streams {
            while stream.read(&mut buffer).is_ok_and(|count| count > 0) {}
        }
        match what % 6 {
            CONNECTS => {
                if let Ok(mut stream) = UnixStream::connect(self.scratch.path().join("vsock")) {
                    let _ = stream.write_all(bytes);
                    self.keep(stream);
                }
            }
            CLOSES if !self.streams.is_empty() => drop(self.streams.remove(0)),
            CLOSES => {}
            ENDS_SENDING | ENDS_RECEIVING => {
                if let Some(stream) = self.streams.last() {
                    let half = match what % 6 {
                        ENDS_SENDING => Shutdown::Write,
                        _ => Shutdown::Read,
                    };
                    // The other end may be gone.
                    let _ = stream.shutdown(half);
                }
            }
            _ => {
                for stream in &mut self.streams {
                    let _ = stream.write_all(bytes);
                }
            }
        }
    }
}

/// A socket device.
pub static VSOCK: Target = Target {
    name: "vsock",
    make: || {
        let mut programs = Programs::new();
        let host = Host::open(&Place::Given(programs.directory())).expect("a directory");
        Subject {
            device: Box::new(Vsock::new(0, CID, host)),
            host: Box::new(move |bytes| programs.act(bytes)),
        }
    },
    probe: || Probe {
        queue: 1,
        readable: packet(RW, HOST_PORT, b"for nobody").bytes(),
        writable: Vec::new(),
        host: Vec::new(),
        right: |len, _| len == 0,
    },
    seeds,
};

fn seeds() -> Vec<super::super::Seed> {
    let host = |what: u8, bytes: &[u8]| Operation::Host {
        bytes: [&[what], bytes].concat(),
    };
    let send = |packet: Packet| request(1, &packet.bytes(), &[]);
    let turns = || {
        vec![
            Operation::Notify { queue: 1 },
            Operation::Turn,
            Operation::Notify { queue: 0 },
            Operation::Turn,
        ]
    };
    let room = || (0..4).map(|_| request(0, &[], &[44, 300]));
    // The guest is connected to the host's program.
    let connected = |steps: Vec<Operation>| {
        let mut all: Vec<Operation> = room().collect();
        all.push(send(packet(REQUEST, HOST_PORT, &[])));
        all.extend(turns());
        all.push(host(SENDS, b""));
        all.extend(steps);
        served(1, all)
    };
    // A program of the host is connected to the guest.
    let accepted = |steps: Vec<Operation>| {
        let mut all: Vec<Operation> = room().collect();
        all.push(host(CONNECTS, b"CONNECT 1000\nhello"));
        all.extend(turns());
        all.push(send(packet(RESPONSE, FIRST_PORT, &[])));
        all.extend(turns());
        all.extend(steps);
        served(1, all)
    };
    let shutdown = |flags| Packet {
        flags,
        ..packet(SHUTDOWN, HOST_PORT, &[])
    };
    let no_credit = Packet {
        buf_alloc: 0,
        ..packet(CREDIT_UPDATE, HOST_PORT, &[])
    };
    let lies = Packet {
        len: Some(u32::MAX),
        ..packet(RW, HOST_PORT, b"data")
    };
    let absurd = Packet {
        fwd_cnt: u32::MAX,
        ..packet(CREDIT_UPDATE, HOST_PORT, &[])
    };
    vec![
        ("guest-connects", connected(vec![])),
        (
            "guest-sends",
            connected(vec![send(packet(RW, HOST_PORT, b"data"))]),
        ),
        (
            "host-sends",
            connected(vec![host(SENDS, b"data"), Operation::Turn]),
        ),
        (
            "host-sends-without-credit",
            connected([vec![send(no_credit), host(SENDS, b"data")], turns()].concat()),
        ),
        (
            "credit-is-asked-for",
            connected(vec![send(packet(CREDIT_REQUEST, HOST_PORT, &[]))]),
        ),
        ("credit-makes-no-sense", connected(vec![send(absurd)])),
        ("guest-shuts-down", connected(vec![send(shutdown(3))])),
        (
            "guest-shuts-down-in-halves",
            connected([vec![send(shutdown(1))], turns(), vec![send(shutdown(2))]].concat()),
        ),
        (
            "guest-breaks-off",
            connected(vec![send(packet(RST, HOST_PORT, &[]))]),
        ),
        (
            "guest-connects-twice",
            connected(vec![send(packet(REQUEST, HOST_PORT, &[]))]),
        ),
        ("host-closes", connected(vec![host(CLOSES, b"")])),
        (
            "host-closes-in-halves",
            connected(vec![
                host(ENDS_SENDING, b""),
                Operation::Turn,
                host(ENDS_RECEIVING, b""),
            ]),
        ),
        (
            "host-sleeps",
            connected(vec![
                send(packet(RW, HOST_PORT, &[7; 200])),
                host(SLEEPS, b""),
            ]),
        ),
        ("host-connects", accepted(vec![])),
        (
            "host-connects-and-closes",
            accepted(vec![host(CLOSES, b""), Operation::Turn]),
        ),
        (
            "host-says-nonsense",
            served(0, vec![host(CONNECTS, b"GET / HTTP/1.1\n")]),
        ),
        ("length-lies", served(1, vec![send(lies)])),
        (
            "header-cut-short",
            served(1, vec![request(1, &[0; 43], &[])]),
        ),
        (
            "no-room-for-a-header",
            served(
                0,
                vec![
                    request(0, &[], &[43]),
                    send(packet(RW, 9, &[])),
                    Operation::Notify { queue: 1 },
                    Operation::Turn,
                ],
            ),
        ),
        (
            "no-room-for-data",
            connected(vec![
                request(0, &[], &[44]),
                request(0, &[], &[44]),
                host(SENDS, b"data"),
                Operation::Turn,
            ]),
        ),
        (
            "saved-when-connected",
            connected(vec![
                Operation::SaveAndRestore,
                request(2, &[], &[4]),
                Operation::Notify { queue: 2 },
                Operation::Turn,
            ]),
        ),
    ]
}

/// A packet of the guest.
struct Packet {
    op: u16,
    port: u32,
    flags: u32,
    /// Unless it is the true one.
    len: Option<u32>,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

/// One as it should be, to a port of the host.
fn packet(op: u16, port: u32, data: &[u8]) -> Packet {
    Packet {
        op,
        port,
        flags: 0,
        len: None,
        buf_alloc: 64 << 10,
        fwd_cnt: 0,
        data: data.to_vec(),
    }
}

impl Packet {
    /// `struct virtio_vsock_hdr` and data (virtio 1.3 §5.10.6).
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = u64::from(CID).to_le_bytes().to_vec();
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(GUEST_PORT.to_le_bytes());
        bytes.extend(self.port.to_le_bytes());
        let len = self.data.len() as u32;
        bytes.extend(self.len.unwrap_or(len).to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.data);
        bytes
    }
}
