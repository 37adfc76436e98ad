//! The device between a driver, which is the test, and real unix sockets, at whose other ends the test is as well.

mod closing;
mod connecting;
mod data;
mod hostile;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::RwLockReadGuard;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::BUF_ALLOC;
use super::packet::*;
use super::*;
use crate::backend::vsock::Place;
use crate::virtio::driver::Driver;
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};
use crate::worker::children;

const CID: u32 = 7;
/// Ports of the guest's sockets in these tests.
const GUEST: u32 = 5000;
/// What the guest says that it can keep.
const GUEST_BUF: u32 = 64 << 10;
/// Buffers that the guest keeps posted.
const POSTED: usize = 16;

/// A guest with its host.
struct Guest {
    device: Vsock,
    driver: Driver,
    /// Packets that have arrived and not been looked at.
    arrived: std::collections::VecDeque<(Header, Vec<u8>)>,
    /// Bytes of data that one posted buffer holds, and how many are posted.
    room: u32,
    posted: usize,
    /// Whether buffers are posted as they are needed.
    posts: bool,
    directory: tempfile::TempDir,
    /// What either side closes is closed at once.
    _closing: RwLockReadGuard<'static, ()>,
}

impl Guest {
    fn new() -> Guest {
        Guest::with_room(4096)
    }

    /// A guest whose buffers hold `room` bytes of data.
    fn with_room(room: u32) -> Guest {
        let directory = tempfile::tempdir().unwrap();
        let host = Host::open(&Place::Given(directory.path().to_owned())).unwrap();
        let mut device = Vsock::new(0, CID, host);
        let driver = Driver::start(&mut device, F_VERSION_1 | F_EVENT_IDX | F_STREAM);
        Guest {
            device,
            driver,
            arrived: Default::default(),
            room,
            posted: 0,
            posts: true,
            directory,
            _closing: children::none(),
        }
    }

    /// The driver starts anew.
    fn restart(&mut self) {
        self.device.reset();
        self.driver = Driver::start(&mut self.device, F_VERSION_1 | F_STREAM);
        self.posted = 0;
        self.arrived.clear();
    }

    fn port(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("vsock_{port}"))
    }

    fn listen(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.port(port)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// A program connects to the listening socket and says `line`.
    fn program(&self, line: &str) -> UnixStream {
        let mut program = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        program.write_all(line.as_bytes()).unwrap();
        program.set_nonblocking(true).unwrap();
        program
    }

    /// Whether the device waits for the event loop to call it.
    fn is_ready(&self) -> bool {
        assert_eq!(self.device.interests(), [Interest::READ]);
        let source = &self.device.sources()[0];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(
            &mut [PollFd::new(&source.as_fd(), PollFlags::IN)],
            Some(&now),
        )
        .unwrap()
            > 0
    }

    /// Calls the device until it has nothing to do, and takes what arrives.
    fn pump(&mut self) {
        loop {
            while self.posts && self.posted < POSTED {
                self.driver.send(RX, &[], &[HEADER_LEN + self.room]);
                self.posted += 1;
            }
            let ready = self.is_ready();
            if ready {
                self.device.ready(0, Interest::READ).unwrap();
            }
            for queue in [TX, RX, EVENT] {
                self.device.process(queue).unwrap();
            }
            if !self.collect() && !ready {
                return;
            }
        }
    }

    /// Takes what arrived; `false` when that is nothing.
    fn collect(&mut self) -> bool {
        let before = self.arrived.len();
        while let Some(used) = self.driver.used(RX) {
            self.posted -= 1;
            let mut bytes = self.driver.written(RX, used.head);
            bytes.truncate(used.len as usize);
            let data = bytes.split_off(HEADER_LEN as usize);
            let header = Header::parse(&bytes.try_into().unwrap());
            assert_eq!(header.len as usize, data.len());
            assert_eq!((header.src_cid == 2, header.dst_cid), (true, CID.into()));
            self.arrived.push_back((header, data));
        }
        while self.driver.used(TX).is_some() {}
        self.arrived.len() > before
    }

    /// Makes a packet available, without telling the device.
    fn queue(&mut self, header: Header, data: &[u8]) {
        self.driver.send(TX, &[&header.bytes(), data], &[]);
    }

    /// Sends a packet and lets everything happen that follows.
    fn send(&mut self, header: Header, data: &[u8]) {
        self.queue(header, data);
        self.pump();
    }

    /// The next packet that has arrived, which must have this operation and lead from `local` to `peer`.
    #[track_caller]
    fn expect(&mut self, op: u16, local: u32, peer: u32) -> (Header, Vec<u8>) {
        let (header, data) = self.arrived.pop_front().expect("a packet");
        let got = (header.op, header.src_port, header.dst_port);
        assert_eq!(got, (op, local, peer), "{header:?}");
        (header, data)
    }

    /// The same from any port of the host, which is the result.
    #[track_caller]
    fn expect_any(&mut self, op: u16, peer: u32) -> u32 {
        let (header, _) = self.arrived.pop_front().expect("a packet");
        assert_eq!((header.op, header.dst_port), (op, peer), "{header:?}");
        header.src_port
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        self.pump();
        assert!(self.arrived.is_empty(), "{:?}", self.arrived);
    }

    /// A connection from the guest's port `GUEST` to `port`, and the program that has accepted it.
    #[track_caller]
    fn connected(&mut self, port: u32) -> UnixStream {
        let listener = self.listen(port);
        self.send(packet(OP_REQUEST, port), b"");
        let (response, _) = self.expect(OP_RESPONSE, port, GUEST);
        assert_eq!((response.buf_alloc, response.fwd_cnt), (BUF_ALLOC, 0));
        let (program, _) = listener.accept().unwrap();
        program.set_nonblocking(true).unwrap();
        program
    }

    /// A program that has connected to the guest's port `GUEST`, and its own port.
    #[track_caller]
    fn connected_by_host(&mut self) -> (UnixStream, u32) {
        let mut program = self.program(&format!("CONNECT {GUEST}\n"));
        self.pump();
        let port = self.expect_any(OP_REQUEST, GUEST);
        assert_eq!(available(&mut program), b"", "not before the guest accepts");
        self.send(packet(OP_RESPONSE, port), b"");
        assert_eq!(available(&mut program), format!("OK {port}\n").as_bytes());
        (program, port)
    }
}

/// A packet of the guest from its port `GUEST` to `port`.
fn packet(op: u16, port: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: GUEST,
        dst_port: port,
        kind: TYPE_STREAM,
        op,
        buf_alloc: GUEST_BUF,
        ..Header::default()
    }
}

fn data(port: u32, len: usize) -> Header {
    Header {
        len: len as u32,
        ..packet(OP_RW, port)
    }
}

fn shutdown(port: u32, flags: u32) -> Header {
    Header {
        flags,
        ..packet(OP_SHUTDOWN, port)
    }
}

/// What a program can read without waiting.
fn available(program: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    match program.read(&mut bytes) {
        Ok(count) => bytes.truncate(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => bytes.clear(),
        Err(error) => panic!("{error}"),
    }
    bytes
}

/// Whether a program reads the end of the connection now.
fn is_closed(program: &mut UnixStream) -> bool {
    match program.read(&mut [0; 64]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index % 251) as u8).collect()
}

#[test]
fn the_device_has_three_queues_and_the_cid_in_its_configuration() {
    let guest = Guest::new();
    let device = &guest.device;
    assert_eq!((device.name(), device.device_id()), ("VSOCK0", 19));
    assert_eq!((device.features(), device.queue_sizes().len()), (1, 3));
    let mut space = [0; 12];
    device.read_config(0, &mut space);
    assert_eq!(space, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut past = [0; 4];
    device.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
}

#[test]
fn a_reset_closes_all_connections_and_the_next_driver_finds_the_host_as_it_was() {
    let mut guest = Guest::new();
    let mut first = guest.connected(52);
    let (mut second, _) = guest.connected_by_host();
    let mut greeting = guest.program("CONN");
    guest.pump();
    guest.device.reset();
    assert_eq!(guest.device.interests(), [Interest::NONE]);
    for program in [&mut first, &mut second, &mut greeting] {
        assert!(is_closed(program));
    }
    // Whoever connects between two drivers waits for the second.
    let mut patient = guest.program("CONNECT 9\n");
    guest.restart();
    guest.pump();
    guest.expect_any(OP_REQUEST, 9);
    assert_eq!(available(&mut patient), b"");
    guest.expect_nothing();
    std::fs::remove_file(guest.port(52)).unwrap();
    guest.connected(52);
}

#[test]
fn after_a_restore_the_driver_is_told_before_anybody_connects() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let state = guest.device.save();
    guest.device.restore(&state).unwrap();
    assert!(is_closed(&mut program));
    let _early = guest.program("CONNECT 9\n");
    guest.pump();
    assert!(guest.arrived.is_empty(), "the driver knows of nothing yet");
    let head = guest.driver.send(EVENT, &[], &[8]);
    guest.pump();
    let used = guest.driver.used(EVENT).unwrap();
    assert_eq!((used.head, used.len), (head, 4));
    assert_eq!(guest.driver.written(EVENT, head)[..4], [0; 4]);
    guest.expect_any(OP_REQUEST, 9);
    // Once is enough.
    guest.driver.send(EVENT, &[], &[8]);
    guest.pump();
    assert_eq!(guest.driver.used(EVENT), None);
    // The old connection is unknown.
    guest.send(data(52, 3), b"old");
    guest.expect(OP_RST, 52, GUEST);
}
