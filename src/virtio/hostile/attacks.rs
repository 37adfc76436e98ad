//! What can be wrong with a queue, one seed each, and whether the device must ask for a reset.

use super::Seed;
use super::operation::{
    Anchor::{self, *},
    Descriptor, INDIRECT, NEXT, Operation, Place, WRITE,
};
use crate::virtio::transport::mmio::core::offset;

/// What a device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It asks for a reset.
    NeedsReset,
    /// It goes on.
    GoesOn,
    /// One or the other: the driver has its own memory overwritten, and what comes of it is its own affair.
    Open,
}
use Outcome::{GoesOn, NeedsReset, Open};

fn place(from: Anchor, offset: i16) -> Place {
    Place { from, offset }
}

fn buffer(from: Anchor, offset: i16, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        at: place(from, offset),
        len,
        flags,
        next,
    }
}

/// Attacks on one queue of a device.
pub(super) fn on_queue(queue: u8) -> Vec<(Seed, Outcome)> {
    let start = || Operation::Start {
        features: 0,
        log: 3,
    };
    let notify = || Operation::Notify {
        queue: queue.into(),
    };
    let describe = |slot, descriptor| Operation::Describe {
        queue,
        slot,
        descriptor,
    };
    let offer = |head| Operation::Offer { queue, head };
    let write = |at: u64, value| Operation::Write {
        at: at as u16,
        width: 4,
        value,
    };
    let chain = |descriptors| Operation::Chain { queue, descriptors };
    let indirect = |slot, descriptor| Operation::DescribeIndirect { slot, descriptor };
    let at = |descriptors, available, used| Operation::StartAt {
        queue,
        size: 8,
        tables: [descriptors, available, used],
    };
    let (table, available, used) = (place(Data, 0), place(Data, 0x1000), place(Data, 0x2000));

    // Steps between bring-up and notification, after which the device has had its turn.
    let live: Vec<(&'static str, Vec<Operation>, Outcome)> = vec![
        (
            "descriptor-loop-of-one",
            vec![describe(0, buffer(Data, 0, 64, NEXT, 0)), offer(0)],
            NeedsReset,
        ),
        (
            "descriptor-loop-of-two",
            vec![
                describe(0, buffer(Data, 0, 64, NEXT, 1)),
                describe(1, buffer(Data, 0, 64, NEXT, 0)),
                offer(0),
            ],
            NeedsReset,
        ),
        (
            "next-out-of-range",
            vec![describe(0, buffer(Data, 0, 64, NEXT, 8)), offer(0)],
            NeedsReset,
        ),
        ("head-out-of-range", vec![offer(0xffff)], NeedsReset),
        (
            "length-overflows-the-address",
            vec![chain(vec![buffer(Top, -16, 64, WRITE, 0)])],
            NeedsReset,
        ),
        (
            "length-overflows-32-bits-in-sum",
            vec![chain(vec![
                buffer(Data, 0, 0x8000_0000, WRITE, 0),
                buffer(Data, 0, 0x8000_0000, WRITE, 0),
            ])],
            NeedsReset,
        ),
        (
            "length-of-4-gib",
            vec![chain(vec![buffer(Data, 0, u32::MAX, WRITE, 0)])],
            NeedsReset,
        ),
        (
            "address-in-the-hole",
            vec![chain(vec![buffer(Hole, 0, 64, WRITE, 0)])],
            NeedsReset,
        ),
        (
            "address-past-all-ram",
            vec![chain(vec![buffer(HighEnd, 0, 64, WRITE, 0)])],
            NeedsReset,
        ),
        (
            "from-ram-into-the-hole",
            vec![chain(vec![buffer(LowEnd, -32, 64, WRITE, 0)])],
            NeedsReset,
        ),
        (
            "from-the-hole-into-ram",
            vec![chain(vec![buffer(High, -32, 64, WRITE, 0)])],
            NeedsReset,
        ),
        (
            "readable-after-writable",
            vec![chain(vec![
                buffer(Data, 0, 64, WRITE, 0),
                buffer(Data, 64, 64, 0, 0),
            ])],
            NeedsReset,
        ),
        (
            "indirect-inside-indirect",
            vec![
                indirect(0, buffer(Table, 0x100, 16, INDIRECT, 0)),
                indirect(16, buffer(Data, 0, 64, WRITE, 0)),
                chain(vec![buffer(Table, 0, 16, INDIRECT, 0)]),
            ],
            NeedsReset,
        ),
        (
            "indirect-table-in-the-queue-itself",
            vec![chain(vec![buffer(Descriptors, 0, 128, INDIRECT, 0)])],
            NeedsReset,
        ),
        (
            "indirect-table-in-the-hole",
            vec![chain(vec![buffer(Hole, 0, 64, INDIRECT, 0)])],
            NeedsReset,
        ),
        (
            "indirect-table-of-odd-length",
            vec![chain(vec![buffer(Table, 0, 17, INDIRECT, 0)])],
            NeedsReset,
        ),
        (
            "indirect-table-without-length",
            vec![chain(vec![buffer(Table, 0, 0, INDIRECT, 0)])],
            NeedsReset,
        ),
        (
            "indirect-table-that-loops",
            vec![
                indirect(0, buffer(Data, 0, 1, NEXT | WRITE, 0)),
                chain(vec![buffer(Table, 0, 0xf_fff0, INDIRECT, 0)]),
            ],
            NeedsReset,
        ),
        (
            "more-available-than-the-queue-holds",
            vec![Operation::Skip { queue, by: 9 }],
            NeedsReset,
        ),
        (
            "available-index-goes-back",
            vec![Operation::Skip { queue, by: 0xffff }],
            NeedsReset,
        ),
    ];
    let mut attacks: Vec<(Seed, Outcome)> = live
        .into_iter()
        .map(|(name, steps, outcome)| {
            let all = std::iter::once(start()).chain(steps);
            let steps = all.chain([notify(), Operation::Turn]).collect();
            ((name, steps), outcome)
        })
        .collect();

    let bad = || chain(vec![buffer(Hole, 0, 64, WRITE, 0)]);
    let others: Vec<(&'static str, Vec<Operation>, Outcome)> = vec![
        (
            "notify-before-driver-ok",
            vec![bad(), notify(), Operation::Turn, notify(), Operation::Turn],
            GoesOn,
        ),
        (
            "notify-of-queues-that-are-not-there",
            vec![
                start(),
                Operation::Notify { queue: 0xffff },
                write(offset::QUEUE_NOTIFY, 0xffff_ffff),
                Operation::Turn,
            ],
            GoesOn,
        ),
        (
            "reset-between-notification-and-turn",
            vec![start(), bad(), notify(), Operation::Reset, Operation::Turn],
            GoesOn,
        ),
        (
            "started-anew-between-notification-and-turn",
            vec![start(), bad(), notify(), start(), Operation::Turn],
            GoesOn,
        ),
        (
            "registers-of-the-rings-change-while-live",
            vec![
                start(),
                write(offset::QUEUE_SEL, queue.into()),
                write(offset::QUEUE_DESC_LOW, 0xd000_0000),
                write(offset::QUEUE_DRIVER_HIGH, 0xffff_ffff),
                write(offset::QUEUE_DEVICE_LOW, 0x1f_fff0),
                write(offset::QUEUE_SIZE, 0x8000),
                write(offset::QUEUE_READY, 0),
                write(offset::QUEUE_READY, 1),
                notify(),
                Operation::Turn,
            ],
            GoesOn,
        ),
        (
            "rings-in-the-hole",
            vec![at(table, place(Hole, 0), used), notify(), Operation::Turn],
            NeedsReset,
        ),
        (
            "rings-past-all-ram",
            vec![at(place(HighEnd, -64), available, used)],
            NeedsReset,
        ),
        (
            "rings-at-the-end-of-all-addresses",
            vec![at(table, available, place(Top, -4))],
            NeedsReset,
        ),
        (
            "rings-not-aligned",
            vec![at(place(Data, 1), available, used)],
            NeedsReset,
        ),
        (
            "rings-on-one-another",
            vec![
                at(table, table, table),
                Operation::Request {
                    queue,
                    readable: vec![0; 64],
                    writable: vec![64],
                },
                notify(),
                Operation::Turn,
            ],
            Open,
        ),
        (
            "a-buffer-on-the-rings",
            vec![
                start(),
                chain(vec![buffer(Used, 0, 64, WRITE, 0)]),
                chain(vec![buffer(Available, 0, 64, WRITE, 0)]),
                chain(vec![buffer(Descriptors, 0, 128, WRITE, 0)]),
                notify(),
                Operation::Turn,
            ],
            Open,
        ),
        (
            "driver-ok-without-features",
            vec![
                write(offset::STATUS, 0),
                write(offset::STATUS, 1 | 2 | 4),
                notify(),
                Operation::Turn,
            ],
            NeedsReset,
        ),
        (
            "registers-in-all-widths",
            (0..=8)
                .flat_map(|width| {
                    [
                        Operation::Read { at: 0x70, width },
                        Operation::Read { at: 0x101, width },
                        Operation::Write {
                            at: 0x6f,
                            width,
                            value: u64::MAX,
                        },
                        Operation::Write {
                            at: 0xffd,
                            width,
                            value: u64::MAX,
                        },
                    ]
                })
                .collect(),
            GoesOn,
        ),
        (
            "saved-while-live",
            vec![
                start(),
                Operation::SaveAndRestore,
                notify(),
                Operation::Turn,
                Operation::SaveAndRestore,
                Operation::Reset,
                Operation::SaveAndRestore,
            ],
            GoesOn,
        ),
    ];
    attacks.extend(
        others
            .into_iter()
            .map(|(name, steps, outcome)| ((name, steps), outcome)),
    );
    attacks
}
