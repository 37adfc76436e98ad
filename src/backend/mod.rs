//! The host's side of a device.
//!
//! A device model speaks registers to the guest; a backend speaks system calls to the host. They
//! meet in a queue: [`ByteQueue`] for the serial port and the [`console`] behind it. The device's
//! half runs on vCPU threads and never waits; the backend's half runs on the event loop.
//!
//! A virtio device runs on the event loop altogether, so its backend needs no queue of bytes: [`net`] moves frames when it
//! is called, and [`disk`] starts an operation on guest RAM and hears of its end through a descriptor. [`vsock`] has a socket for each
//! of a guest's connections. [`rate`] says how much of it a guest may have.

mod byte_queue;
pub mod console;
pub mod disk;
pub mod net;
pub mod rate;
pub mod vsock;

pub use byte_queue::{ByteQueue, INPUT_CAPACITY, OUTPUT_CAPACITY};

/// The serial port, as its backend sees it. Called on the event loop's thread.
pub trait SerialEnd: Send + Sync {
    /// The input queue has got bytes.
    fn input_arrived(&self);
    /// The output queue was full and has room again.
    fn output_drained(&self);
}
