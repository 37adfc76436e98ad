//! The host's side of a device.
//!
//! A device model speaks registers to the guest; a backend speaks system calls to the host. They
//! meet in a queue: [`ByteQueue`] for the serial port and the [`console`] behind it, and for a [`port`]. The device's
//! half never waits (the serial port's runs on vCPU threads); the backend's half runs on the event loop.
//!
//! A virtio device runs on the event loop altogether, so its backend mostly needs no queue of bytes: [`net`] moves
//! frames when it is called; [`disk`] starts an operation on guest RAM and hears of its end through a descriptor, and
//! [`share`] does so with messages; [`pmem`] gives the guest a file as memory; [`vsock`] has a socket for each of a guest's
//! connections. [`rate`] says how much of it a guest may have. [`image`] makes a root disk of a directory, a tar or a
//! container image.

mod byte_queue;
pub mod cache;
pub mod console;
pub mod disk;
pub mod image;
pub mod net;
pub mod pmem;
pub mod port;
pub mod rate;
pub mod share;
pub mod vsock;

pub use byte_queue::{ByteQueue, INPUT_CAPACITY, OUTPUT_CAPACITY};

/// The guest's end of a line, as its backend sees it. Called on the event loop's thread.
pub trait SerialEnd: Send + Sync {
    /// The input queue has got bytes.
    fn input_arrived(&self);
    /// The output queue was full and has room again.
    fn output_drained(&self);
}
