//! A shared directory that the guest may write to.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, open};
use tempfile::TempDir;

use super::super::operation::Operation;
use super::super::{Probe, Seed, Subject, Target};
use super::{request, scratch, served};
use crate::backend::share::opcode::*;
use crate::backend::share::{Budget, Options, Share};
use crate::virtio::dev::fs::Fs;

/// Descriptors that the guest may hold.
const DESCRIPTORS: usize = 64;
/// Attempts to remove the directory, in which a last request may be at work.
const ATTEMPTS: usize = 1000;

/// The directory itself, and what the first LOOKUP and the first OPEN give.
const ROOT: u64 = 1;
const NODE: u64 = 2;
const HANDLE: u64 = 1;

/// The shared directory, and one beside it that nobody may touch. Dropped after the device.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Scratch {
        let scratch = Scratch(scratch());
        fs::create_dir(scratch.shared()).expect("a directory");
        fs::write(scratch.0.path().join("outside"), OUTSIDE).expect("a file");
        fs::write(scratch.shared().join("file"), b"content").expect("a file");
        fs::write(scratch.shared().join("hidden"), b"secret").expect("a file");
        symlink("../outside", scratch.shared().join("link")).expect("a link");
        scratch
    }

    fn shared(&self) -> PathBuf {
        self.0.path().join("shared")
    }

    /// A program of the host writes to the file, if it is one: the guest may have put anything in its place.
    fn write(&self, bytes: &[u8]) {
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let path = self.shared().join("file");
        if let Ok(file) = open(path, flags | OFlags::CLOEXEC, Mode::empty()) {
            let _ = fs::File::from(file).write_all(bytes);
        }
    }
}

/// What is in the file outside of the share.
const OUTSIDE: &[u8] = b"not for the guest";

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let outside = fs::read(self.0.path().join("outside"));
            assert_eq!(outside.expect("the file"), OUTSIDE, "the guest got out");
        }
        for _ in 0..ATTEMPTS {
            let _ = fs::set_permissions(self.shared(), fs::Permissions::from_mode(0o700));
            if fs::remove_dir_all(self.shared()).is_ok() {
                break;
            }
            std::thread::yield_now();
        }
    }
}

/// A share.
pub static FS: Target = Target {
    name: "fs",
    make: || {
        let scratch = Scratch::new();
        let share = Share::open(&Options {
            path: scratch.shared(),
            read_only: false,
            hidden: vec![scratch.shared().join("hidden")],
            budget: Budget::new(DESCRIPTORS),
        });
        Subject {
            device: Box::new(Fs::new(0, "hostile", share.expect("a directory"))),
            host: Box::new(move |bytes| {
                if !bytes.is_empty() {
                    scratch.write(bytes);
                }
            }),
        }
    },
    probe: || Probe {
        queue: 1,
        readable: init(),
        writable: vec![16, 64],
        host: Vec::new(),
        right: |len, bytes| {
            len == 80 && bytes.starts_with(&[80, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0])
        },
    },
    seeds,
};

fn seeds() -> Vec<Seed> {
    // Each is done before the next begins, as far as that can be told from here.
    let one_by_one = |messages: &[Vec<u8>]| {
        let mut steps = Vec::new();
        for message in messages {
            steps.push(request(1, message, &[16, 2048]));
            steps.push(Operation::Notify { queue: 1 });
            steps.push(Operation::Turn);
        }
        steps
    };
    let mounted = |messages: &[Vec<u8>]| served(1, one_by_one(&[&[init()][..], messages].concat()));
    let found = |name: &str, messages: &[Vec<u8>]| {
        let lookup = message(LOOKUP, ROOT, &[], &text(name));
        mounted(&[&[lookup][..], messages].concat())
    };
    // O_RDWR
    let opened = |messages: &[Vec<u8>]| {
        let open = message(OPEN, NODE, &[2], &[]);
        found("file", &[&[open][..], messages].concat())
    };
    let in_root =
        |opcode, numbers: &[u64], name: &[u8]| mounted(&[message(opcode, ROOT, numbers, name)]);
    let mode = |mode: u64, umask: u64| mode | umask << 32;
    let listed = |opcode| {
        let read = message(opcode, ROOT, &[HANDLE, 0, 1024, 0, 0], &[]);
        mounted(&[message(OPENDIR, ROOT, &[0], &[]), read])
    };
    let both = |first: &str, second: &str| [text(first), text(second)].concat();
    vec![
        ("getattr", in_root(GETATTR, &[0, 0], &[])),
        ("statfs", in_root(STATFS, &[], &[])),
        ("lookup", found("file", &[])),
        ("lookup-what-is-hidden", found("hidden", &[])),
        ("lookup-of-the-parent", found("..", &[])),
        ("lookup-of-a-path", found("../outside", &[])),
        (
            "open-a-link",
            found("link", &[message(OPEN, NODE, &[0], &[])]),
        ),
        (
            "readlink",
            found("link", &[message(READLINK, NODE, &[], &[])]),
        ),
        (
            "read",
            opened(&[message(READ, NODE, &[HANDLE, 0, 100, 0, 0], &[])]),
        ),
        (
            "write",
            opened(&[message(WRITE, NODE, &[HANDLE, 2, 4, 0, 0], b"data")]),
        ),
        ("fsync", opened(&[message(FSYNC, NODE, &[HANDLE, 0], &[])])),
        (
            "fallocate",
            opened(&[message(FALLOCATE, NODE, &[HANDLE, 0, 4096, 0], &[])]),
        ),
        (
            "lseek",
            opened(&[message(LSEEK, NODE, &[HANDLE, 0, 4], &[])]),
        ),
        (
            "copy-file-range",
            opened(&[message(
                COPY_FILE_RANGE,
                NODE,
                &[HANDLE, 0, NODE, HANDLE, 100, 4, 0],
                &[],
            )]),
        ),
        (
            "release-twice",
            opened(&[
                message(RELEASE, NODE, &[HANDLE, 0, 0], &[]),
                message(RELEASE, NODE, &[HANDLE, 0, 0], &[]),
            ]),
        ),
        (
            // valid: mode and size
            "setattr",
            found(
                "file",
                &[message(
                    SETATTR,
                    NODE,
                    &[1 | 8, 0, 3, 0, 0, 0, 0, 0, 0o4755 << 32, 0, 0],
                    &[],
                )],
            ),
        ),
        (
            "setxattr",
            found("file", &[message(SETXATTR, NODE, &[4], b"user.key\0data")]),
        ),
        (
            "getxattr",
            found("file", &[message(GETXATTR, NODE, &[64], b"user.key\0")]),
        ),
        (
            "listxattr",
            found("file", &[message(LISTXATTR, NODE, &[64], &[])]),
        ),
        (
            "forget-too-much",
            found(
                "file",
                &[
                    message(FORGET, NODE, &[u64::MAX], &[]),
                    message(GETATTR, NODE, &[0, 0], &[]),
                ],
            ),
        ),
        (
            "batch-forget",
            found(
                "file",
                &[message(
                    BATCH_FORGET,
                    0,
                    &[u64::from(u32::MAX), NODE, 1],
                    &[],
                )],
            ),
        ),
        ("mkdir", in_root(MKDIR, &[mode(0o755, 0o22)], &text("new"))),
        (
            "mknod-of-a-fifo",
            in_root(MKNOD, &[0o10644, 0], &text("new")),
        ),
        (
            "mknod-of-a-device",
            in_root(MKNOD, &[0o20644 | 0x0103 << 32, 0], &text("new")),
        ),
        (
            "symlink",
            in_root(SYMLINK, &[], &both("new", "/etc/passwd")),
        ),
        (
            "create",
            in_root(CREATE, &[mode(0o102, 0o644), 0], &text("new")),
        ),
        ("unlink", in_root(UNLINK, &[], &text("file"))),
        ("rename", in_root(RENAME, &[ROOT], &both("file", "other"))),
        (
            "rename-what-is-hidden",
            in_root(RENAME, &[ROOT], &both("hidden", "other")),
        ),
        (
            "exchange",
            in_root(RENAME2, &[ROOT, 2], &both("file", "link")),
        ),
        (
            "link",
            found("file", &[message(LINK, ROOT, &[NODE], &text("other"))]),
        ),
        ("readdir", listed(READDIR)),
        ("readdirplus", listed(READDIRPLUS)),
        (
            "unmounted",
            mounted(&[
                message(DESTROY, ROOT, &[], &[]),
                message(GETATTR, ROOT, &[0, 0], &[]),
            ]),
        ),
        (
            "before-init",
            served(1, one_by_one(&[message(GETATTR, ROOT, &[0, 0], &[])])),
        ),
        ("unknown", in_root(4096, &[], &[])),
        ("short-header", served(1, vec![request(1, &[0; 39], &[16])])),
        (
            "no-room-for-an-answer",
            served(1, vec![request(1, &init(), &[15])]),
        ),
        (
            "reset-under-way",
            [
                served(1, vec![request(1, &init(), &[80])]),
                vec![Operation::Reset, Operation::Turn],
            ]
            .concat(),
        ),
        (
            "hiprio",
            served(0, vec![request(0, &message(FORGET, NODE, &[1], &[]), &[])]),
        ),
    ]
}

/// A message: `struct fuse_in_header`, numbers, and what follows.
fn message(opcode: u32, node: u64, numbers: &[u64], rest: &[u8]) -> Vec<u8> {
    let len = 40 + 8 * numbers.len() + rest.len();
    let mut bytes = (len as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(5_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // User, group, process.
    bytes.extend([0; 16]);
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend(rest);
    bytes
}

/// INIT of version 7.31.
fn init() -> Vec<u8> {
    message(INIT, 0, &[7 | 31 << 32, 0], &[])
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}
