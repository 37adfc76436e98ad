//! The two buses of the machine: I/O ports and memory-mapped I/O.
//!
//! When a guest touches an address with no RAM behind it, the CPU leaves guest mode and KVM tells
//! the vCPU thread the address, the width and the direction (SDM Vol. 3C, 28.1.3 and 29.3.3). The bus
//! finds the device that owns the address and lets it answer. An address that nobody owns behaves
//! as on a PC: reads float high (all ones), writes vanish. Both are counted, neither is an error.
//!
//! Every access passes through [`Bus::read`] or [`Bus::write`], so this is also the one place where
//! accesses are traced, with the device's own name for the register.

mod device;
mod map;

pub use device::{Action, Device, RestoreError, SavedState};
pub use map::{AddressMap, Overlap};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::trace::{Direction, Event, Kind, Origin, Sink, Space};

/// Everything a guest's accesses can reach, shared by all vCPU threads.
pub struct Bus {
    io: AddressMap,
    mmio: AddressMap,
    counters: Counters,
    tracer: Option<Tracer>,
}

struct Tracer {
    sink: Arc<dyn Sink>,
    start: Instant,
}

/// How often the guest left guest mode, by reason. All relaxed: they are statistics.
#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    others: AtomicU64,
    unclaimed: AtomicU64,
}

/// A snapshot of the exit counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ExitCounts {
    /// Accesses in which the guest read from a device.
    pub reads: u64,
    /// Accesses in which the guest wrote to a device.
    pub writes: u64,
    /// Exits that were no accesses.
    pub others: u64,
    /// Accesses, among the reads and writes, that no device owned.
    pub unclaimed: u64,
}

impl Bus {
    /// A bus over the two finished address maps. `sink` receives every exit, timed from now.
    pub fn new(io: AddressMap, mmio: AddressMap, sink: Option<Arc<dyn Sink>>) -> Bus {
        let tracer = sink.map(|sink| Tracer {
            sink,
            start: Instant::now(),
        });
        Bus {
            io,
            mmio,
            counters: Counters::default(),
            tracer,
        }
    }

    /// Whether exits are being traced, and so whether [`Origin::rip`] is worth finding out.
    pub fn is_traced(&self) -> bool {
        self.tracer.is_some()
    }

    /// The guest reads `data.len()` bytes at `address`.
    pub fn read(&self, origin: Origin, space: Space, address: u64, data: &mut [u8]) {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        let found = self.map(space).find(address, data.len());
        // The register is looked up first: reading may change which register the address means.
        let register = self
            .tracer
            .as_ref()
            .and(found.as_ref())
            .and_then(|(device, offset)| device.register(*offset, Direction::Read));
        match &found {
            Some((device, offset)) => device.read(*offset, data),
            None => {
                self.counters.unclaimed.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
        self.trace(origin, || Kind::Access {
            space,
            direction: Direction::Read,
            address,
            data,
            device: found.as_ref().map(|(device, _)| device.name()),
            register,
        });
    }

    /// The guest writes `data` at `address`; the answer says what the vCPU loop must do.
    pub fn write(&self, origin: Origin, space: Space, address: u64, data: &[u8]) -> Action {
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        let found = self.map(space).find(address, data.len());
        self.trace(origin, || Kind::Access {
            space,
            direction: Direction::Write,
            address,
            data,
            device: found.as_ref().map(|(device, _)| device.name()),
            register: found
                .as_ref()
                .and_then(|(device, offset)| device.register(*offset, Direction::Write)),
        });
        match found {
            Some((device, offset)) => device.write(offset, data),
            None => {
                self.counters.unclaimed.fetch_add(1, Ordering::Relaxed);
                Action::Continue
            }
        }
    }

    /// An exit that was no access.
    pub fn note(&self, origin: Origin, name: &str) {
        self.counters.others.fetch_add(1, Ordering::Relaxed);
        self.trace(origin, || Kind::Other { name });
    }

    /// The counters as they stand.
    pub fn exit_counts(&self) -> ExitCounts {
        let Counters {
            reads,
            writes,
            others,
            unclaimed,
        } = &self.counters;
        ExitCounts {
            reads: reads.load(Ordering::Relaxed),
            writes: writes.load(Ordering::Relaxed),
            others: others.load(Ordering::Relaxed),
            unclaimed: unclaimed.load(Ordering::Relaxed),
        }
    }

    /// Pushes buffered trace events out.
    pub fn flush_trace(&self) {
        if let Some(tracer) = &self.tracer {
            tracer.sink.flush();
        }
    }

    fn map(&self, space: Space) -> &AddressMap {
        match space {
            Space::Io => &self.io,
            Space::Mmio => &self.mmio,
        }
    }

    fn trace<'a>(&self, origin: Origin, kind: impl FnOnce() -> Kind<'a>) {
        if let Some(tracer) = &self.tracer {
            tracer.sink.emit(&Event {
                at: tracer.start.elapsed(),
                origin,
                kind: kind(),
            });
        }
    }
}
