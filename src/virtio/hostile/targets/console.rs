//! A console, and a port with a name beside it, whose host reads all that comes when it has its turn.

use std::sync::Arc;

use super::super::operation::Operation;
use super::super::{Probe, Subject, Target};
use super::{request, served};
use crate::backend::port::{Port, Size};
use crate::backend::{ByteQueue, SerialEnd};
use crate::virtio::dev::console::VirtioConsole;

// Control messages (virtio 1.3 §5.3.6.2).
const DEVICE_READY: u8 = 0;
const PORT_READY: u8 = 3;
const PORT_OPEN: u8 = 6;

// What the first of the host's bytes says that it does, modulo 5.
const TYPES: u8 = 0;
const WRITES: u8 = 1;
const OPENS: u8 = 2;
const CLOSES: u8 = 3;
const RESIZES: u8 = 4;

/// A console and a port.
pub static CONSOLE: Target = Target {
    name: "console",
    make: || {
        let output = Arc::new(ByteQueue::output().expect("descriptors"));
        let input = Arc::new(ByteQueue::input().expect("descriptors"));
        let console = Port::of_console(Arc::clone(&output), Arc::clone(&input));
        let console = Arc::new(console.expect("descriptors"));
        let (port, end) = Port::channel("hostile").expect("a name");
        end.open();
        let device = VirtioConsole::new(0, Some(Arc::clone(&console)), vec![port]);
        Subject {
            device: Box::new(device.expect("two ports")),
            host: Box::new(move |bytes| {
                let mut buffer = [0; 4096];
                loop {
                    let (count, was_full) = output.take(&mut buffer);
                    if was_full {
                        console.output_drained();
                    }
                    if count == 0 && end.read(&mut buffer) == 0 {
                        break;
                    }
                }
                let Some((what, bytes)) = bytes.split_first() else {
                    return;
                };
                match what % 5 {
                    TYPES => {
                        input.push_slice(bytes);
                        console.input_arrived();
                    }
                    WRITES => {
                        end.write(bytes);
                    }
                    OPENS => end.open(),
                    CLOSES => end.close(),
                    _ => {
                        let number = |at: usize| bytes.get(at).copied().unwrap_or(0).into();
                        console.resize(Size {
                            columns: number(0),
                            rows: number(1),
                        });
                    }
                }
            }),
        }
    },
    probe: || Probe {
        queue: 1,
        readable: b"still here\n".to_vec(),
        writable: Vec::new(),
        host: Vec::new(),
        right: |len, _| len == 0,
    },
    seeds: || {
        let host = |what, bytes: &[u8]| Operation::Host {
            bytes: [&[what], bytes].concat(),
        };
        // What a driver says until both ports are open, and where it reads what the device says.
        let introduced = || {
            let mut steps = vec![request(3, &control(0, DEVICE_READY, 1), &[])];
            for id in 0..2 {
                steps.push(request(3, &control(id, PORT_READY, 1), &[]));
                steps.push(request(3, &control(id, PORT_OPEN, 1), &[]));
            }
            steps.extend((0..8).map(|_| request(2, &[], &[128])));
            steps
        };
        let with = |queue, steps: Vec<Operation>| {
            let notified = [Operation::Notify { queue: 3 }, Operation::Turn];
            served(queue, [introduced(), notified.into(), steps].concat())
        };
        vec![
            ("output", served(1, vec![request(1, b"hello\n", &[])])),
            (
                "input",
                with(
                    0,
                    vec![
                        host(TYPES, b"ls\n"),
                        request(0, &[], &[2]),
                        request(0, &[], &[64]),
                    ],
                ),
            ),
            (
                "into-no-room",
                with(0, vec![host(TYPES, b"ls\n"), request(0, &[], &[])]),
            ),
            (
                "port-output",
                with(5, vec![request(5, b"data", &[]), host(WRITES, b"")]),
            ),
            (
                "port-input",
                with(4, vec![host(WRITES, b"data"), request(4, &[], &[64])]),
            ),
            (
                "host-closes-and-opens",
                with(
                    2,
                    vec![
                        host(WRITES, b"last"),
                        host(CLOSES, b""),
                        Operation::Turn,
                        request(4, &[], &[64]),
                        Operation::Notify { queue: 4 },
                        Operation::Turn,
                        host(OPENS, b""),
                    ],
                ),
            ),
            (
                "guest-closes",
                with(3, vec![request(3, &control(1, PORT_OPEN, 0), &[])]),
            ),
            (
                "resize",
                with(2, vec![host(RESIZES, &[80, 24]), Operation::Turn]),
            ),
            (
                "control-of-ports-that-are-not-there",
                with(3, vec![request(3, &control(u32::MAX, PORT_OPEN, 1), &[])]),
            ),
            (
                "control-cut-short",
                served(3, vec![request(3, &[0; 7], &[]), request(2, &[], &[7])]),
            ),
            (
                "emergency-write",
                vec![Operation::Write {
                    at: 0x108,
                    width: 4,
                    value: u64::from(b'!'),
                }],
            ),
            (
                "saved-when-open",
                with(
                    1,
                    vec![Operation::SaveAndRestore, request(1, b"again", &[])],
                ),
            ),
        ]
    },
};

/// A control message: id, event, value.
fn control(id: u32, event: u8, value: u8) -> Vec<u8> {
    [&id.to_le_bytes()[..], &[event, 0, value, 0]].concat()
}
