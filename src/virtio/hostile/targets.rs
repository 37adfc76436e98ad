//! The devices that are attacked: how each is made, what a good request is, and what to start from.
//!
//! A new device takes part with a constant here or in a file of its own, a line in [`ALL`], and a program of three lines in
//! `fuzz/fuzz_targets/`; `fuzz/README.md` says how.

mod balloon;
mod console;
mod fs;
mod pmem;
mod vsock;

pub use balloon::BALLOON;
pub use console::CONSOLE;
pub use fs::FS;
pub use pmem::PMEM;
pub use vsock::VSOCK;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;

use super::echo::Echo;
use super::operation::{Anchor, Descriptor, Operation, Place, WRITE};
use super::{Probe, Subject, Target};
use crate::backend::disk::{Disk, Format, Options};
use crate::backend::net::Passt;
use crate::backend::rate::Limits;
use crate::virtio::dev::block::{Block, QUEUE_SIZE, Settings};
use crate::virtio::dev::net::{Mac, Net};
use crate::virtio::dev::rng::Rng;

/// All of them.
pub const ALL: [&Target; 9] = [
    &MMIO, &RNG, &BLOCK, &NET, &BALLOON, &CONSOLE, &FS, &PMEM, &VSOCK,
];

/// A directory of its own, in memory where the host has a place for that: so no disk has to take its time.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let scratch = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    scratch.expect("a directory")
}

/// Bring-up with all features, requests, a notification and a turn: what most seeds are.
fn served(queue: u8, requests: Vec<Operation>) -> Vec<Operation> {
    let start = Operation::Start {
        features: u64::MAX,
        log: 4,
    };
    let notify = Operation::Notify {
        queue: queue.into(),
    };
    std::iter::once(start)
        .chain(requests)
        .chain([notify, Operation::Turn, Operation::Turn])
        .collect()
}

fn request(queue: u8, readable: &[u8], writable: &[u16]) -> Operation {
    Operation::Request {
        queue,
        readable: readable.to_vec(),
        writable: writable.to_vec(),
    }
}

/// The registers and the transport, with a device behind them that does as little as possible and sees to it that it is
/// called only when it may be.
pub static MMIO: Target = Target {
    name: "mmio",
    make: || Subject {
        device: Box::new(Echo::new()),
        host: Box::new(|_| {}),
    },
    probe: || Probe {
        queue: 1,
        readable: b"hear, hear".to_vec(),
        writable: vec![4, 20],
        host: Vec::new(),
        right: |len, bytes| len == 10 && bytes.starts_with(b"hear, hear"),
    },
    seeds: || {
        let config = |at: u16, width, value| Operation::Write {
            at: 0x100 + at,
            width,
            value,
        };
        vec![
            ("echo", served(0, vec![request(0, b"abc", &[2, 8])])),
            (
                "configuration",
                served(0, vec![config(0, 1, 1), config(4, 4, 7), config(8, 8, 1)]),
            ),
        ]
    },
};

/// The entropy device.
pub static RNG: Target = Target {
    name: "rng",
    make: || Subject {
        device: Box::new(Rng::new(0)),
        host: Box::new(|_| {}),
    },
    probe: || Probe {
        queue: 0,
        readable: Vec::new(),
        writable: vec![64],
        host: Vec::new(),
        right: |len, bytes| len == 64 && bytes != [0; 64],
    },
    seeds: || vec![("bytes", served(0, vec![request(0, &[], &[64, 1, 300])]))],
};

/// Bytes of the disk.
const DISK: u64 = 64 << 10;

/// A disk in memory.
pub static BLOCK: Target = Target {
    name: "block",
    make: || {
        let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory");
        let file = File::from(file);
        file.set_len(DISK).expect("room in memory");
        file.write_all_at(&[0x5a; 512], 0).expect("room in memory");
        let disk = Disk::open(&Options {
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            read_only: false,
            direct: false,
            format: Format::Raw,
            depth: 2 * u32::from(QUEUE_SIZE),
        });
        let settings = Settings {
            name: "BLK0".to_owned(),
            serial: "serial".to_owned(),
            queues: 2,
            limits: Limits::default(),
            own_worker: false,
        };
        let device = Block::new(disk.expect("a disk in memory"), settings);
        Subject {
            device: Box::new(device.expect("no limits")),
            host: Box::new(|_| {}),
        }
    },
    probe: || Probe {
        queue: 0,
        // GET_ID
        readable: block_header(8, 0).to_vec(),
        writable: vec![20, 1],
        host: Vec::new(),
        right: |len, bytes| len == 21 && bytes.starts_with(b"serial\0") && bytes.ends_with(&[0]),
    },
    seeds: || {
        let ask = |kind, sector, data: &[u8], writable: &[u16]| {
            let readable = [&block_header(kind, sector)[..], data].concat();
            request(1, &readable, writable)
        };
        let segment = [&[1; 8][..], &[8, 0, 0, 0, 0, 0, 0, 0]].concat();
        vec![
            ("read", served(1, vec![ask(0, 0, &[], &[512, 1])])),
            (
                "read-off-the-disk",
                served(1, vec![ask(0, u64::MAX / 512, &[], &[512, 1])]),
            ),
            (
                "write",
                served(1, [write_sector(), vec![ask(4, 0, &[], &[1])]].concat()),
            ),
            ("get-id", served(1, vec![ask(8, 0, &[], &[20, 1])])),
            ("discard", served(1, vec![ask(11, 0, &segment, &[1])])),
            ("write-zeroes", served(1, vec![ask(13, 0, &segment, &[1])])),
            ("unknown-type", served(1, vec![ask(99, 0, &[], &[1])])),
            ("no-status", served(1, vec![ask(0, 0, &[], &[])])),
            (
                "short-header",
                served(1, vec![request(1, &[0; 15], &[512, 1])]),
            ),
            (
                "write-through",
                [
                    served(
                        1,
                        vec![Operation::Write {
                            at: 0x120,
                            width: 1,
                            value: 0,
                        }],
                    ),
                    served(1, write_sector()),
                ]
                .concat(),
            ),
        ]
    },
};

/// `struct virtio_blk_req` up to its data: type, reserved, sector (virtio 1.3 §5.2.6).
fn block_header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A request that writes 512 bytes to sector 2: more than a step can hold, so they come from memory.
fn write_sector() -> Vec<Operation> {
    let piece = |from, len, flags| Descriptor {
        at: Place { from, offset: 0 },
        len,
        flags,
        next: 0,
    };
    let header = Place {
        from: Anchor::High,
        offset: 0,
    };
    vec![
        Operation::Poke {
            at: header,
            bytes: block_header(1, 2).to_vec(),
        },
        Operation::Chain {
            queue: 1,
            descriptors: vec![
                piece(Anchor::High, 16, 0),
                piece(Anchor::Data, 512, 0),
                piece(Anchor::Data, 1, WRITE),
            ],
        },
    ]
}

/// A network card whose host is the other end of a socket.
pub static NET: Target = Target {
    name: "net",
    make: || {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        theirs.set_nonblocking(true).expect("a socket");
        let backend = Passt::over(ours).expect("a socket");
        Subject {
            device: Box::new(Net::new(0, Mac::of("hostile", 0), Box::new(backend))),
            host: Box::new(move |bytes| {
                while theirs.read(&mut [0; 65_536]).is_ok_and(|count| count > 0) {}
                // An even first byte: a frame that passt could have sent. An odd one: anything.
                let Some((first, bytes)) = bytes.split_first() else {
                    return;
                };
                if first % 2 == 0 {
                    let len = u32::try_from(bytes.len()).unwrap_or(0);
                    let _ = theirs.write_all(&len.to_be_bytes());
                }
                let _ = theirs.write_all(bytes);
            }),
        }
    },
    probe: || Probe {
        queue: 1,
        readable: vec![0; 12 + 60],
        writable: Vec::new(),
        host: Vec::new(),
        right: |len, _| len == 0,
    },
    seeds: || {
        let frame = |len: usize| Operation::Host {
            bytes: vec![0; 1 + len],
        };
        vec![
            ("send", served(1, vec![request(1, &[0; 12 + 60], &[])])),
            (
                "send-no-frame",
                served(1, vec![request(1, &[0; 12 + 13], &[])]),
            ),
            ("send-no-header", served(1, vec![request(1, &[0; 11], &[])])),
            (
                "receive",
                served(0, vec![frame(60), request(0, &[], &[2048])]),
            ),
            (
                "receive-into-many",
                served(
                    0,
                    vec![
                        request(0, &[], &[20]),
                        request(0, &[], &[20]),
                        frame(50),
                        request(0, &[], &[100]),
                    ],
                ),
            ),
            (
                "receive-into-nothing",
                served(0, vec![request(0, &[], &[11]), frame(60)]),
            ),
            (
                "host-breaks-off",
                served(
                    0,
                    vec![
                        request(0, &[], &[2048]),
                        Operation::Host {
                            bytes: vec![1, 0xff, 0xff, 0xff, 0xff],
                        },
                    ],
                ),
            ),
        ]
    },
};
