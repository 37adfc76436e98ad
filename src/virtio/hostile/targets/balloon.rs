//! A balloon whose host changes its mind.

use std::time::Duration;

use super::super::operation::Operation;
use super::super::{Probe, Subject, Target};
use super::{request, served};
use crate::virtio::dev::balloon::Balloon;

/// How often the device asks for statistics: seldom enough for the event loop to come to rest in between.
const STATISTICS: Duration = Duration::from_millis(1);

/// Pages of 4 KiB, which the guest has as memory for anything.
const PAGES: std::ops::Range<u32> = 0x100..0x110;

/// A balloon. The host's bytes are its new target, little-endian.
pub static BALLOON: Target = Target {
    name: "balloon",
    make: || {
        let device = Balloon::new(16 << 20, Some(STATISTICS)).expect("descriptors");
        let handle = device.handle();
        Subject {
            device: Box::new(device),
            host: Box::new(move |bytes| {
                let target = bytes.iter().rev().fold(0, |target: u64, byte| {
                    target.wrapping_shl(8) | u64::from(*byte)
                });
                handle.set_target(target);
                let report = handle.report();
                assert_eq!(
                    report.target_mib,
                    u64::from(u32::try_from(target >> 12).unwrap_or(u32::MAX)) >> 8
                );
            }),
        }
    },
    probe: || Probe {
        queue: 0,
        readable: pages(&[PAGES.start]),
        writable: Vec::new(),
        host: Vec::new(),
        right: |len, _| len == 0,
    },
    seeds: || {
        let config = |at: u16, width, value| Operation::Write {
            at: 0x100 + at,
            width,
            value,
        };
        let neighbours: Vec<u32> = PAGES.collect();
        let statistic = |tag: u8, value: u8| [tag, 0, value, 0, 0, 0, 0, 0, 0, 0];
        vec![
            (
                "inflate",
                served(0, vec![request(0, &pages(&[0x108, 0x100]), &[])]),
            ),
            (
                "inflate-neighbours",
                served(0, vec![request(0, &pages(&neighbours), &[])]),
            ),
            (
                "inflate-what-is-not-there",
                served(
                    0,
                    vec![request(0, &pages(&[0x1ff, 0x200, 0xd_0000, u32::MAX]), &[])],
                ),
            ),
            (
                "inflate-half-a-page-number",
                served(0, vec![request(0, &[0, 1, 0, 0, 0, 1], &[])]),
            ),
            (
                "inflate-the-rings",
                served(0, vec![request(0, &pages(&[0, 4, 5]), &[])]),
            ),
            (
                "deflate",
                served(1, vec![request(1, &pages(&[0x100]), &[])]),
            ),
            (
                "statistics",
                served(
                    2,
                    vec![
                        request(2, &[statistic(4, 7), statistic(99, 1)].concat(), &[]),
                        request(2, &[statistic(0, 1)].concat(), &[]),
                    ],
                ),
            ),
            (
                "report-free-pages",
                served(3, vec![request(3, &[], &[4096, 8192, 1])]),
            ),
            (
                "target-and-size",
                served(
                    0,
                    vec![
                        Operation::Host {
                            bytes: vec![0, 0, 0x20, 0],
                        },
                        Operation::Turn,
                        config(4, 4, 0x100),
                        config(0, 4, 1),
                        config(4, 2, 1),
                    ],
                ),
            ),
        ]
    },
};

/// Page numbers as a request has them (virtio 1.3 §5.5.6).
fn pages(numbers: &[u32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}
