//! What a hostile driver does, one step at a time, and how steps are written down as bytes.
//!
//! A fuzzer changes bytes, and cares for what new code they reach. So that nearly every change is another sequence of
//! steps, any bytes can be read: a number that is too large counts modulo what there is, and what is missing at the end
//! is zeroes. Each step is a byte for its kind and then its fields, little-endian, in the order in which they are
//! declared; a list is a byte for its length, and then its elements.

#[cfg(test)]
mod encode;

#[cfg(test)]
pub(super) use encode::encode;

/// An address, relative to something that makes it interesting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub from: Anchor,
    /// Bytes.
    pub offset: i16,
}

/// Where addresses are counted from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Anchor {
    /// Address 0, where the first queue's tables are.
    #[default]
    Zero,
    /// Memory that is nothing but memory.
    Data,
    /// The table to which chains can lead by `INDIRECT`.
    Table,
    /// The end of RAM below the hole.
    LowEnd,
    /// In the hole, where the device's registers are.
    Hole,
    /// The beginning of RAM above the hole.
    High,
    /// The end of all RAM.
    HighEnd,
    /// The end of all addresses, 2^64: offsets below 0 are meant.
    Top,
    /// The rings of the queue at hand, or of the first.
    Descriptors,
    Available,
    Used,
}

const ANCHORS: [Anchor; 11] = [
    Anchor::Zero,
    Anchor::Data,
    Anchor::Table,
    Anchor::LowEnd,
    Anchor::Hole,
    Anchor::High,
    Anchor::HighEnd,
    Anchor::Top,
    Anchor::Descriptors,
    Anchor::Available,
    Anchor::Used,
];

/// The flags of a descriptor (virtio 1.3 §2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor: a buffer, and which follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub at: Place,
    /// Bytes.
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// One step of a driver. Queues are counted modulo the device's number of them, table slots modulo the queue's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Does all that the specification wants (§3.1.1), with rings of 2^`log` descriptors, or as many as there may be,
    /// and those of `features` that the device offers.
    Start {
        features: u64,
        log: u8,
    },
    /// The same, but for one queue only, of any size, and with its tables anywhere: descriptors, available, used.
    StartAt {
        queue: u8,
        size: u16,
        tables: [Place; 3],
    },
    /// Writes the status register with zero.
    Reset,
    /// Reads or writes registers, or what lies between them: `width` is 0 to 8 bytes.
    Read {
        at: u16,
        width: u8,
    },
    Write {
        at: u16,
        width: u8,
        value: u64,
    },
    /// Writes one descriptor of a queue's table.
    Describe {
        queue: u8,
        slot: u16,
        descriptor: Descriptor,
    },
    /// Writes one descriptor of the table for `INDIRECT`.
    DescribeIndirect {
        slot: u16,
        descriptor: Descriptor,
    },
    /// Puts a head on the available ring.
    Offer {
        queue: u8,
        head: u16,
    },
    /// Makes the available ring's index larger by this much.
    Skip {
        queue: u8,
        by: u16,
    },
    /// Writes the available ring's flags, and `used_event` behind it.
    Suppress {
        queue: u8,
        flags: u16,
        event: u16,
    },
    /// Writes guest memory.
    Poke {
        at: Place,
        bytes: Vec<u8>,
    },
    /// Writes a chain of these descriptors into free slots of the table, linked by `NEXT`, and offers it.
    Chain {
        queue: u8,
        descriptors: Vec<Descriptor>,
    },
    /// Offers a chain as it should be: these bytes to be read, and buffers of these lengths to be written.
    Request {
        queue: u8,
        readable: Vec<u8>,
        writable: Vec<u16>,
    },
    Notify {
        queue: u16,
    },
    /// The event loop has a turn.
    Turn,
    /// The host's side of the device is given these bytes.
    Host {
        bytes: Vec<u8>,
    },
    /// The device is saved, and restored from that.
    SaveAndRestore,
}

/// How many kinds there are.
const KINDS: u8 = 17;
/// At most so many elements in a list of descriptors or lengths.
const LIST: u8 = 9;

/// Reads steps.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn number(&mut self, len: usize) -> u64 {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now.iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = usize::from(self.u8());
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now.to_vec()
    }

    fn list<T>(&mut self, mut element: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let len = self.u8() % LIST;
        (0..len).map(|_| element(self)).collect()
    }

    fn place(&mut self) -> Place {
        Place {
            from: ANCHORS[usize::from(self.u8()) % ANCHORS.len()],
            offset: self.u16() as i16,
        }
    }

    fn descriptor(&mut self) -> Descriptor {
        Descriptor {
            at: self.place(),
            len: self.u32(),
            flags: self.u16(),
            next: self.u16(),
        }
    }

    fn operation(&mut self) -> Operation {
        match self.u8() % KINDS {
            0 => Operation::Start {
                features: self.number(8),
                log: self.u8(),
            },
            1 => Operation::StartAt {
                queue: self.u8(),
                size: self.u16(),
                tables: [self.place(), self.place(), self.place()],
            },
            2 => Operation::Reset,
            3 => Operation::Read {
                at: self.u16(),
                width: self.u8(),
            },
            4 => Operation::Write {
                at: self.u16(),
                width: self.u8(),
                value: self.number(8),
            },
            5 => Operation::Describe {
                queue: self.u8(),
                slot: self.u16(),
                descriptor: self.descriptor(),
            },
            6 => Operation::DescribeIndirect {
                slot: self.u16(),
                descriptor: self.descriptor(),
            },
            7 => Operation::Offer {
                queue: self.u8(),
                head: self.u16(),
            },
            8 => Operation::Skip {
                queue: self.u8(),
                by: self.u16(),
            },
            9 => Operation::Suppress {
                queue: self.u8(),
                flags: self.u16(),
                event: self.u16(),
            },
            10 => Operation::Poke {
                at: self.place(),
                bytes: self.bytes(),
            },
            11 => Operation::Chain {
                queue: self.u8(),
                descriptors: self.list(Source::descriptor),
            },
            12 => Operation::Request {
                queue: self.u8(),
                readable: self.bytes(),
                writable: self.list(Source::u16),
            },
            13 => Operation::Notify { queue: self.u16() },
            14 => Operation::Turn,
            15 => Operation::Host {
                bytes: self.bytes(),
            },
            _ => Operation::SaveAndRestore,
        }
    }
}

/// The steps that `bytes` stand for.
pub fn decode(bytes: &[u8]) -> impl Iterator<Item = Operation> {
    let mut source = Source(bytes);
    std::iter::from_fn(move || (!source.0.is_empty()).then(|| source.operation()))
}
