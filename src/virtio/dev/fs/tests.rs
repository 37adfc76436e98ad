//! A guest's kernel at work in a shared directory, in raw messages.

mod confined;
mod descriptors;
mod files;
mod hidden;
mod hostile;
mod owners;

use std::fs;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use tempfile::TempDir;

use super::*;
use crate::backend::share::opcode::*;
use crate::backend::share::{Budget, Options};
use crate::virtio::TRANSPORT_FEATURES;
use crate::virtio::driver::{Driver, Used};

const ROOT: u64 = 1;
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
/// Room for an answer unless said otherwise.
const ROOM: u32 = 2048;

const RDONLY: u32 = libc::O_RDONLY as u32;
const RDWR: u32 = libc::O_RDWR as u32;

/// A field of a message.
macro_rules! bytes {
    ($($part:expr),* $(,)?) => {
        [$(&$part.to_le_bytes()[..]),*].concat()
    };
}
use bytes;

/// A name with its NUL.
fn name(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What the guest is told of a file.
#[derive(Debug)]
struct Attr {
    ino: u64,
    size: u64,
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
}

impl Attr {
    fn parse(bytes: &[u8]) -> Attr {
        Attr {
            ino: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            mode: u32_at(bytes, 60),
            links: u32_at(bytes, 64),
            uid: u32_at(bytes, 68),
            gid: u32_at(bytes, 72),
        }
    }
}

/// A mounted share.
struct Rig {
    device: Fs,
    driver: Driver,
    budget: Budget,
    /// The shared directory, in another one.
    path: PathBuf,
    caller: (u32, u32),
    _scratch: TempDir,
}

impl Rig {
    fn unmounted(read_only: bool, budget: usize) -> Rig {
        Rig::sharing(tempfile::tempdir().unwrap(), read_only, budget)
    }

    fn sharing(scratch: TempDir, read_only: bool, budget: usize) -> Rig {
        fs::create_dir(scratch.path().join("shared")).unwrap();
        Rig::hiding(scratch, read_only, budget, &[])
    }

    /// With `hidden` names below the shared directory, or paths.
    fn hiding(scratch: TempDir, read_only: bool, budget: usize, hidden: &[&str]) -> Rig {
        Rig::drawing_on(&Budget::new(budget), scratch, read_only, hidden)
    }

    fn drawing_on(budget: &Budget, scratch: TempDir, read_only: bool, hidden: &[&str]) -> Rig {
        let path = scratch.path().join("shared");
        let share = Share::open(&Options {
            path: path.clone(),
            read_only,
            hidden: hidden.iter().map(|name| path.join(name)).collect(),
            budget: budget.clone(),
        });
        let mut device = Fs::new(0, "tag", share.unwrap());
        let driver = Driver::start(&mut device, TRANSPORT_FEATURES);
        Rig {
            device,
            driver,
            budget: budget.clone(),
            path,
            caller: (0, 0),
            _scratch: scratch,
        }
    }

    fn new() -> Rig {
        let mut rig = Rig::unmounted(false, 1000);
        rig.mount();
        rig
    }

    fn read_only() -> Rig {
        let mut rig = Rig::unmounted(true, 1000);
        rig.mount();
        rig
    }

    fn mount(&mut self) -> Vec<u8> {
        let body = bytes!(7_u32, 38_u32, 0x2_0000_u32, u32::MAX, 0_u32);
        self.ask(INIT, 0, &[&body, &[0; 44]]).unwrap()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn write_file(&self, name: &str, content: &[u8]) {
        fs::write(self.at(name), content).unwrap();
    }

    fn message(&self, opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        let len = 40 + body.len() as u32;
        let (uid, gid) = self.caller;
        let mut message = bytes!(len, opcode, 77_u64, node, uid, gid, 4321_u32, 0_u32);
        message.extend(body);
        message
    }

    /// Waits until requests are done, and tells the device.
    fn wait(&mut self) -> Result<(), Malformed> {
        let sources = self.device.sources();
        let mut fds = [PollFd::new(&sources[0], PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "lost request");
        self.device.ready(0, Interest::READ)
    }

    fn used(&mut self, queue: usize) -> Used {
        loop {
            if let Some(used) = self.driver.used(queue) {
                return used;
            }
            self.wait().unwrap();
        }
    }

    /// A request from beginning to end, whatever its bytes: what was written.
    fn ask_raw(&mut self, message: &[u8], room: u32) -> Vec<u8> {
        let head = self.driver.send(REQUESTS, &[message], &[room]);
        self.device.process(REQUESTS).unwrap();
        let used = self.used(REQUESTS);
        assert_eq!(used.head, head);
        let mut bytes = self.driver.written(REQUESTS, head);
        bytes.truncate(used.len as usize);
        bytes
    }

    fn ask_with_room(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[&[u8]],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let message = self.message(opcode, node, body);
        let answer = self.ask_raw(&message, room);
        assert_eq!(u32_at(&answer, 0) as usize, answer.len());
        assert_eq!(u64_at(&answer, 8), 77);
        match u32_at(&answer, 4) as i32 {
            0 => Ok(answer[16..].to_vec()),
            error => {
                assert_eq!(answer.len(), 16, "an error has no more to say");
                Err(-error)
            }
        }
    }

    /// A request: what follows the header of its answer, or the error number.
    fn ask(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, i32> {
        self.ask_with_room(opcode, node, body, ROOM)
    }

    /// A message without an answer, on hiprio.
    fn tell(&mut self, opcode: u32, node: u64, body: &[&[u8]]) {
        let message = self.message(opcode, node, body);
        self.driver.send(HIPRIO, &[&message], &[]);
        self.device.process(HIPRIO).unwrap();
        assert_eq!(self.used(HIPRIO).len, 0);
    }

    fn lookup(&mut self, node: u64, text: &str) -> Result<(u64, Attr), i32> {
        let entry = self.ask(LOOKUP, node, &[&name(text)])?;
        assert_eq!(entry.len(), 128);
        match u64_at(&entry, 0) {
            0 => Err(libc::ENOENT),
            number => Ok((number, Attr::parse(&entry[40..]))),
        }
    }

    fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        let answer = self.ask(GETATTR, node, &[&[0; 16]])?;
        Ok(Attr::parse(&answer[16..]))
    }

    fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        let answer = self.ask(OPEN, node, &[&bytes!(flags, 0_u32)])?;
        Ok(u64_at(&answer, 0))
    }

    /// Node and handle.
    fn create(&mut self, node: u64, text: &str, flags: u32, mode: u32) -> Result<(u64, u64), i32> {
        let body = bytes!(flags, mode, 0_u32, 0_u32);
        let answer = self.ask(CREATE, node, &[&body, &name(text)])?;
        Ok((u64_at(&answer, 0), u64_at(&answer, 128)))
    }

    fn mkdir(&mut self, node: u64, text: &str) -> Result<u64, i32> {
        let answer = self.ask(MKDIR, node, &[&bytes!(0o755_u32, 0_u32), &name(text)])?;
        Ok(u64_at(&answer, 0))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = bytes!(handle, offset, size, 0_u32, 0_u64, 0_u32, 0_u32);
        self.ask_with_room(READ, node, &[&body], 16 + size)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let size = data.len() as u32;
        let body = bytes!(handle, offset, size, 0_u32, 0_u64, 0_u32, 0_u32);
        let answer = self.ask(WRITE, node, &[&body, data])?;
        Ok(u32_at(&answer, 0))
    }

    fn setattr(&mut self, node: u64, set: &Set) -> Result<Attr, i32> {
        let mut body = bytes!(set.valid, 0_u32, set.handle, set.size, 0_u64);
        body.extend(bytes!(set.time, set.time, 0_u64, 5_u32, 6_u32, 0_u32));
        body.extend(bytes!(set.mode, 0_u32, set.uid, set.gid, 0_u32));
        let answer = self.ask(SETATTR, node, &[&body])?;
        Ok(Attr::parse(&answer[16..]))
    }
}

/// Fields of SETATTR.
#[derive(Default)]
struct Set {
    valid: u32,
    handle: u64,
    size: u64,
    time: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// An entry of a directory: node, inode, where it goes on, kind, name.
type Listed = (u64, u64, u64, u32, String);

/// Takes an answer to READDIR or READDIRPLUS apart.
fn entries(mut bytes: &[u8], plus: bool) -> Vec<Listed> {
    let mut entries = Vec::new();
    while !bytes.is_empty() {
        let mut node = 0;
        if plus {
            node = u64_at(bytes, 0);
            bytes = &bytes[128..];
        }
        let len = u32_at(bytes, 16) as usize;
        let name = std::str::from_utf8(&bytes[24..24 + len]).unwrap();
        entries.push((
            node,
            u64_at(bytes, 0),
            u64_at(bytes, 8),
            u32_at(bytes, 20),
            name.to_owned(),
        ));
        bytes = &bytes[(24 + len).next_multiple_of(8)..];
    }
    entries
}

#[test]
fn the_configuration_space_has_the_tag_and_the_number_of_queues() {
    let rig = Rig::unmounted(false, 0);
    let mut config = [0xff; 48];
    rig.device.read_config(0, &mut config[..44]);
    assert_eq!(&config[..3], b"tag");
    assert_eq!(config[3..36], [0; 33]);
    assert_eq!(config[36..40], [1, 0, 0, 0]);
    let mut past = [0; 4];
    rig.device.read_config(40, &mut past);
    rig.device.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
    assert_eq!(rig.device.queue_sizes().len(), 2);
    assert_eq!(rig.device.device_id(), 26);
}

#[test]
fn init_agrees_on_a_version_and_on_what_both_can_do() {
    let mut rig = Rig::unmounted(false, 0);
    assert_eq!(rig.lookup(ROOT, "a").unwrap_err(), libc::ENOTCONN);
    let answer = rig.mount();
    assert_eq!(answer.len(), 64);
    assert_eq!((u32_at(&answer, 0), u32_at(&answer, 4)), (7, 33));
    let flags = u32_at(&answer, 12);
    assert_eq!(flags & (1 << 1 | 1 << 10), 0, "locks stay with the guest");
    assert_eq!(flags & (1 << 16), 0, "no write-back cache");
    assert_ne!(flags & (1 << 12), 0, "the guest sees what the host writes");
    assert_eq!(u32_at(&answer, 20), 1 << 20, "the most that is written");
    // A guest that offers little gets no more.
    let plain = bytes!(7_u32, 31_u32, 0_u32, 0_u32);
    assert_eq!(u32_at(&rig.ask(INIT, 0, &[&plain]).unwrap(), 12), 0);
    // One of another time is told so, and has not begun anything.
    for (major, minor, expected) in [
        (6_u32, 0_u32, Err(libc::EPROTO)),
        (7, 12, Err(libc::EPROTO)),
        (8, 0, Ok(7)),
    ] {
        let mut rig = Rig::unmounted(false, 0);
        let body = bytes!(major, minor, 0_u32, 0_u32);
        let answer = rig.ask(INIT, 0, &[&body]);
        assert_eq!(answer.map(|answer| u32_at(&answer, 0)), expected);
        assert_eq!(rig.getattr(ROOT).unwrap_err(), libc::ENOTCONN);
    }
}

#[test]
fn a_mount_that_ends_gives_everything_back_and_another_may_begin() {
    let mut rig = Rig::new();
    rig.write_file("a", b"x");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    rig.open(node, RDONLY).unwrap();
    assert_eq!(rig.budget.left(), 998);
    rig.ask(DESTROY, 0, &[]).unwrap();
    assert_eq!(rig.budget.left(), 1000);
    assert_eq!(rig.getattr(ROOT).unwrap_err(), libc::ENOTCONN);
    rig.mount();
    assert_eq!(rig.getattr(node).unwrap_err(), libc::ESTALE);
    assert_ne!(rig.lookup(ROOT, "a").unwrap().0, node);
}

#[test]
fn nodes_are_counted_until_they_are_forgotten() {
    let mut rig = Rig::new();
    rig.write_file("a", b"");
    rig.write_file("b", b"");
    let (a, _) = rig.lookup(ROOT, "a").unwrap();
    let (b, _) = rig.lookup(ROOT, "b").unwrap();
    assert_eq!(rig.lookup(ROOT, "a").unwrap().0, a, "the same file");
    assert_eq!(rig.budget.left(), 998);
    rig.tell(FORGET, a, &[&1_u64.to_le_bytes()]);
    rig.getattr(a).unwrap();
    // The last of `a`, all of `b` and more, what was never there, and the root, which stays.
    let all = bytes!(
        4_u32,
        0_u32,
        a,
        1_u64,
        b,
        u64::MAX,
        999_u64,
        1_u64,
        ROOT,
        5_u64
    );
    rig.tell(BATCH_FORGET, 0, &[&all]);
    assert_eq!(rig.budget.left(), 1000);
    for node in [a, b, 999, 0, u64::MAX] {
        assert_eq!(rig.getattr(node).unwrap_err(), libc::ESTALE);
    }
    rig.getattr(ROOT).unwrap();
    // A list that says that it is longer than it is.
    let (a, _) = rig.lookup(ROOT, "a").unwrap();
    rig.tell(BATCH_FORGET, 0, &[&bytes!(u32::MAX, 0_u32, a, 1_u64)]);
    rig.tell(INTERRUPT, 0, &[&[0; 8]]);
    rig.tell(FORGET, a, &[]);
    assert_eq!(rig.budget.left(), 1000);
}

#[test]
fn a_reset_forgets_requests_and_never_writes_to_the_guest_again() {
    let mut rig = Rig::new();
    rig.write_file("a", b"content");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    let handle = rig.open(node, RDONLY).unwrap();
    let body = bytes!(handle, 0_u64, 7_u32, 0_u32, 0_u64, 0_u32, 0_u32);
    let message = rig.message(READ, node, &[&body]);
    let heads: Vec<u16> = (0..20)
        .map(|_| rig.driver.send(REQUESTS, &[&message], &[23]))
        .collect();
    rig.device.process(REQUESTS).unwrap();
    rig.device.reset();
    assert_eq!(rig.device.interests(), [Interest::NONE]);
    let features = TRANSPORT_FEATURES;
    let before = std::mem::replace(&mut rig.driver, Driver::start(&mut rig.device, features));
    // The new life does not know the old one's files, and all requests of the old one are over when it has been served.
    assert_eq!(rig.getattr(ROOT).unwrap_err(), libc::ENOTCONN);
    rig.mount();
    assert_eq!(rig.getattr(node).unwrap_err(), libc::ESTALE);
    assert_eq!(rig.read(node, handle, 0, 7).unwrap_err(), libc::EBADF);
    for head in heads {
        assert_eq!(before.written(REQUESTS, head), [0; 23]);
    }
}

#[test]
fn more_requests_than_are_taken_at_once_are_all_answered() {
    let mut rig = Rig::new();
    let message = rig.message(GETATTR, ROOT, &[&[0; 16]]);
    let mut sent = 0;
    for _ in 0..2 {
        for _ in 0..31 {
            rig.driver.send(REQUESTS, &[&message], &[ROOM]);
            sent += 1;
        }
        rig.device.process(REQUESTS).unwrap();
    }
    for _ in 0..31 {
        rig.driver.send(HIPRIO, &[&message], &[ROOM]);
    }
    rig.device.process(HIPRIO).unwrap();
    for _ in 0..sent {
        assert_eq!(rig.used(REQUESTS).len, 16 + 16 + 88);
    }
    for _ in 0..31 {
        assert_eq!(rig.used(HIPRIO).len, 16 + 16 + 88);
    }
    assert!(rig.driver.line.edges() > 0);
}
