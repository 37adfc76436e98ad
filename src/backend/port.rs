//! A channel between this process and a port of a guest: what a virtio-console device has at its host end.
//!
//! A [`Port`] is two [`ByteQueue`]s, one for each direction, and for each side whether it is open. The device has the
//! `Port`; code of this process that wants to talk to the guest has the [`PortEnd`]:
//!
//! ```
//! use sarang::backend::port::{Port, PortEnd};
//!
//! # fn main() -> Result<(), sarang::backend::port::Error> {
//! // The port goes into `vm::Spec::ports`, and is /dev/virtio-ports/agent in a guest with udev.
//! let (port, end): (_, PortEnd) = Port::channel("agent")?;
//! end.open();
//! assert_eq!(end.write(b"hello"), 5);
//! let mut buffer = [0; 4096];
//! assert_eq!(end.read(&mut buffer), 0, "nobody answers before the guest runs");
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here waits. Who wants to wait watches the eventfds [`PortEnd::readable`] and [`PortEnd::writable`], on an
//! event loop or with poll(2). They say that something is new, not what: clear the eventfd first, then read until
//! nothing comes, or write until nothing is taken.
//!
//! * What the guest writes while the end is closed is discarded. While it is open and nobody reads, [`CAPACITY`] bytes
//!   wait here, and then the guest's writers wait.
//! * What is written here waits, [`CAPACITY`] bytes of it, until the guest has opened its side; and what the guest
//!   leaves unread when it closes waits until it opens again.
//! * When the end is closed, the guest reads what has been written before, and then the end of the file. A guest that
//!   has not come so far when the end is opened again sees no end.
//! * When the guest closes its side, [`PortEnd::is_guest_open`] says so only after the last byte has come in.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use super::{ByteQueue, SerialEnd};

/// Bytes that wait in each direction of a channel.
pub const CAPACITY: usize = 256 << 10;
/// Bytes of a port's name.
pub const NAME_MAX: usize = 64;

/// Why there is no channel. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "a port's name is 1 to {NAME_MAX} letters, digits, dots, dashes and underscores, not `{0}`"
    )]
    Name(String),
    #[error("cannot make the queues of a port: {0}")]
    Queue(io::Error),
}

/// The size of a terminal, in characters. 0 is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// The device's side of a channel.
pub struct Port {
    // Fixed configuration.
    name: String,
    // Runtime glue.
    output: Arc<ByteQueue>,
    input: Arc<ByteQueue>,
    /// Wakes the device.
    bell: Arc<OwnedFd>,
    // Volatile state.
    host_open: AtomicBool,
    guest_open: AtomicBool,
    /// Columns, and rows in the upper half.
    size: AtomicU32,
}

impl Port {
    /// A channel with its two sides. The host's is closed at first.
    ///
    /// # Errors
    /// When the name is none, or the host has no file descriptors left.
    pub fn channel(name: &str) -> Result<(Arc<Port>, PortEnd), Error> {
        let fits = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        let dots = name.chars().all(|c| c == '.');
        if dots || name.len() > NAME_MAX || !name.chars().all(fits) {
            return Err(Error::Name(name.to_owned()));
        }
        let queues = || -> io::Result<_> {
            let (output, input) = (
                ByteQueue::output_of(CAPACITY)?,
                ByteQueue::input_of(CAPACITY)?,
            );
            Ok((Arc::new(output), Arc::new(input)))
        };
        let (output, input) = queues().map_err(Error::Queue)?;
        output.discard(true);
        let port = Arc::new(Port::new(name, output, input, false)?);
        Ok((Arc::clone(&port), PortEnd(port)))
    }

    /// The guest's side of a [`Console`](super::console::Console), which is always open. The console calls it when
    /// there is news.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn of_console(output: Arc<ByteQueue>, input: Arc<ByteQueue>) -> Result<Port, Error> {
        Port::new("console", output, input, true)
    }

    fn new(
        name: &str,
        output: Arc<ByteQueue>,
        input: Arc<ByteQueue>,
        host_open: bool,
    ) -> Result<Port, Error> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::Queue(errno.into()))?;
        Ok(Port {
            name: name.to_owned(),
            output,
            input,
            bell: Arc::new(bell),
            host_open: AtomicBool::new(host_open),
            guest_open: AtomicBool::new(false),
            size: AtomicU32::new(0),
        })
    }

    /// By which a guest finds the port.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From the guest to the host.
    pub fn output(&self) -> &ByteQueue {
        &self.output
    }

    /// From the host to the guest.
    pub fn input(&self) -> &ByteQueue {
        &self.input
    }

    /// An eventfd that wakes the device: there is input, there is room for output, the host has opened or closed its
    /// side, or the terminal has another size.
    pub fn bell(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.bell)
    }

    /// Clears the bell. To be called *before* looking for what is new.
    pub fn acknowledge(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Whether the host's side is open.
    pub fn is_host_open(&self) -> bool {
        self.host_open.load(Ordering::Acquire)
    }

    /// The guest has opened or closed its side, and the output queue has all that it wrote before.
    pub fn set_guest_open(&self, open: bool) {
        if self.guest_open.swap(open, Ordering::AcqRel) != open {
            self.output.wake();
            self.input.wake();
        }
    }

    /// The size of the terminal at the host's side.
    pub fn size(&self) -> Size {
        let both = self.size.load(Ordering::Acquire);
        Size {
            columns: both as u16,
            rows: (both >> 16) as u16,
        }
    }

    /// The terminal at the host's side has this size from now on.
    pub fn resize(&self, size: Size) {
        let both = u32::from(size.columns) | u32::from(size.rows) << 16;
        if self.size.swap(both, Ordering::AcqRel) != both {
            self.ring();
        }
    }

    fn ring(&self) {
        // Fails only when the counter is at its maximum, and then the device has been woken already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

impl SerialEnd for Port {
    fn input_arrived(&self) {
        self.ring();
    }

    fn output_drained(&self) {
        self.ring();
    }
}

/// The host's side of a channel, for one thread or several. Dropping it closes it.
pub struct PortEnd(Arc<Port>);

impl PortEnd {
    /// Opens this side, which the guest is told.
    pub fn open(&self) {
        if !self.0.host_open.swap(true, Ordering::AcqRel) {
            self.0.output.discard(false);
            self.0.ring();
        }
    }

    /// Closes this side, which the guest is told when it has read what was written. What the guest wrote and was not
    /// read is discarded.
    pub fn close(&self) {
        if self.0.host_open.swap(false, Ordering::AcqRel) {
            self.0.output.discard(true);
            self.0.ring();
        }
    }

    /// Whether the guest has its side open. A reader asks *before* it reads: if the answer is no and nothing is left to
    /// read, the guest has said all that it had to say.
    pub fn is_guest_open(&self) -> bool {
        self.0.guest_open.load(Ordering::Acquire)
    }

    /// Takes the oldest bytes that the guest wrote, as many as there are and fit, and says how many.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        let (count, was_full) = self.0.output.take(buffer);
        if was_full {
            self.0.ring();
        }
        count
    }

    /// Copies the oldest bytes that the guest wrote and leaves them to be read.
    pub fn peek(&self, buffer: &mut [u8]) -> usize {
        self.0.output.see_all();
        self.0.output.peek(buffer)
    }

    /// Appends bytes for the guest to read, as many as there is room for, and says how many. None while this side is
    /// closed.
    pub fn write(&self, bytes: &[u8]) -> usize {
        if !self.0.is_host_open() {
            return 0;
        }
        let count = self.0.input.push_slice(bytes);
        if count > 0 {
            self.0.ring();
        }
        count
    }

    /// An eventfd, signalled when bytes have come in since the last [`PortEnd::read`] or [`PortEnd::peek`], and when
    /// the guest opens or closes its side.
    pub fn readable(&self) -> Arc<OwnedFd> {
        self.0.output.event()
    }

    /// Clears `readable`. To be called *before* reading.
    pub fn clear_readable(&self) {
        self.0.output.acknowledge();
    }

    /// An eventfd, signalled when there is room again after there was none, and when the guest opens or closes its
    /// side.
    pub fn writable(&self) -> Arc<OwnedFd> {
        self.0.input.event()
    }

    /// Clears `writable`. To be called *before* writing.
    pub fn clear_writable(&self) {
        self.0.input.acknowledge();
    }
}

impl Drop for PortEnd {
    fn drop(&mut self) {
        self.close();
    }
}
