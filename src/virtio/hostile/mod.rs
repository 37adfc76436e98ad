//! A hostile driver, for property tests and for the targets in `fuzz/`.
//!
//! A guest can do to a device whatever its processors can do to memory and registers. Here that is a list of steps
//! ([`Operation`]), read from arbitrary bytes: bring the device up rightly or wrongly, write tables and rings with
//! addresses in RAM, at its edges, in the hole and past it, notify, reset, and so on, in any order, with turns of the event
//! loop between them. [`attack`] takes the steps against a real device behind its real transport, and then sees that
//!
//! * nothing has panicked, and memory next to guest RAM was not touched (it cannot be accessed, see [`crate::mem`]);
//! * the event loop comes to rest once the driver does;
//! * after a reset the device answers a good request as if nothing had been.
//!
//! A device takes part by a [`Target`] in [`targets`]. The queue alone is walked by [`walker`], which compares what it
//! finds with a second reading of the specification.

#[cfg(test)]
mod attacks;
mod echo;
mod machine;
pub mod operation;
mod rings;
pub mod targets;
#[cfg(test)]
mod tests;
pub mod walker;

use super::VirtioDevice;
use machine::Machine;
use operation::Operation;

/// At most this many steps are taken: more reach nothing new and cost time.
const STEPS_MAX: usize = 512;

/// A device's other side: takes bytes for the guest, in a way that suits the backend. What comes from the guest is thrown
/// away here, so that the device is not kept waiting.
pub type Host = Box<dyn FnMut(&[u8])>;

/// A device that is to be attacked.
pub struct Subject {
    pub device: Box<dyn VirtioDevice>,
    pub host: Host,
}

/// A good request, by which a device shows that it works. Its driver has accepted no feature but VERSION_1.
pub struct Probe {
    pub queue: usize,
    pub readable: Vec<u8>,
    /// Lengths of the buffers to be written, in bytes.
    pub writable: Vec<u32>,
    /// What the host's side is given meanwhile; nothing, for most.
    pub host: Vec<u8>,
    /// Whether an answer is right: how many bytes the device says it wrote, and all bytes of the writable buffers.
    pub right: fn(u32, &[u8]) -> bool,
}

/// Steps with a name, as they are kept in `fuzz/corpus/`.
pub type Seed = (&'static str, Vec<Operation>);

/// A kind of device to attack.
pub struct Target {
    /// Of the program in `fuzz/fuzz_targets/` and of the directory in `fuzz/corpus/`.
    pub name: &'static str,
    /// Makes a fresh device.
    pub make: fn() -> Subject,
    /// The good request. Its queue is one whose chains are read as soon as the driver notifies.
    pub probe: fn() -> Probe,
    /// Requests of this kind of device, to start from.
    pub seeds: fn() -> Vec<Seed>,
}

/// Does to a device what `bytes` say, and sees that it works afterwards.
///
/// # Panics
/// When the device does not stand it.
pub fn attack(target: &'static Target, bytes: &[u8]) {
    let mut machine = Machine::new(target);
    for step in operation::decode(bytes).take(STEPS_MAX) {
        machine.apply(&step);
    }
    machine.settle();
    machine.probe();
}
