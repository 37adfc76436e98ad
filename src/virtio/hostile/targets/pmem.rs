//! Persistent memory, in a file without a name.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::{Probe, Subject, Target};
use super::{request, served};
use crate::backend::pmem::{self, Options, SIZE_UNIT};
use crate::mem::GuestAddress;
use crate::virtio::dev::pmem::Pmem;

/// Where the guest would find the memory: behind all its RAM.
const START: GuestAddress = GuestAddress(8 << 30);

/// The smallest persistent memory that there is.
pub static PMEM: Target = Target {
    name: "pmem",
    make: || {
        let file = memfd_create("pmem", MemfdFlags::CLOEXEC).expect("a file in memory");
        let file = File::from(file);
        file.set_len(SIZE_UNIT).expect("room in memory");
        let file = pmem::File::open(&Options {
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            read_only: false,
        });
        Subject {
            device: Box::new(Pmem::new(0, file.expect("a file in memory"), START)),
            host: Box::new(|_| {}),
        }
    },
    probe: || Probe {
        queue: 0,
        readable: FLUSH.to_vec(),
        writable: vec![4],
        host: Vec::new(),
        right: |len, bytes| len == 4 && bytes == [0; 4],
    },
    seeds: || {
        let flush = || request(0, &FLUSH, &[4]);
        vec![
            ("flush", served(0, vec![flush()])),
            (
                "flush-many-times",
                [
                    served(0, vec![flush(), flush(), flush()]),
                    served(0, vec![flush()]),
                ]
                .concat(),
            ),
            ("unknown-type", served(0, vec![request(0, &[1; 4], &[4])])),
            ("no-answer", served(0, vec![request(0, &FLUSH, &[3])])),
            (
                "short-request",
                served(0, vec![flush(), request(0, &[0; 3], &[4])]),
            ),
        ]
    },
};

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (virtio 1.3 §5.19.6).
const FLUSH: [u8; 4] = [0; 4];
