//! The socket device (virtio 1.3 §5.10): connections between programs of the guest and of the host, without a network.
//!
//! Each side has an address of two numbers, a *CID* for the machine and a *port*. The guest's programs use ordinary
//! sockets of the family `AF_VSOCK`; the guest's driver makes packets of what they do and puts them on the transmit
//! queue, and finds the host's packets on the receive queue (see `packet`). A packet of data lies in the guest's
//! own buffers and goes straight from there to the host's socket, and back.
//!
//! What a connection is for the guest is said in `connection`; which socket of the host it leads to, in
//! `connections` and [`crate::backend::vsock`].
//!
//! On the third queue, the device tells the driver that all connections are gone, because the machine has been restored
//! from a saved state, and their other ends are not in it (§5.10.6.7).

mod connection;
mod connections;
mod packet;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::backend::vsock::Host;
use crate::bus::{RestoreError, SavedState};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{Activation, Malformed, VirtioDevice, copy_config};
use crate::worker::{Interest, Readiness};
use connections::Connections;
use packet::{HEADER_LEN, Header, OP_RW};

/// The device type (§5.10.1).
const DEVICE_ID: u32 = 19;

// The queues (§5.10.2).
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Descriptors of the queues for packets, and of the one for events, of which there are few.
const SIZES: [u16; 3] = [256, 256, 16];

/// `VIRTIO_VSOCK_F_STREAM`: there are stream sockets (§5.10.3).
const F_STREAM: u64 = 1 << 0;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone, and the CID may have changed (§5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// The lowest and the highest CID that a guest can have (§5.10.4): 0 is reserved, 1 means the machine itself, 2 is the
/// host, and 2^32 - 1 stands for any.
pub const CID_MIN: u32 = 3;
pub const CID_MAX: u32 = u32::MAX - 1;

/// A socket device.
pub struct Vsock {
    // Fixed configuration.
    name: String,
    cid: u32,

    // Runtime glue.
    connections: Connections,
    active: Option<Active>,

    // Volatile state, of which nothing has to be saved: whoever takes it back has lost all connections.
    /// The driver has to be told that all connections are gone.
    transport_reset: bool,
}

/// What there is between `activate` and `reset`.
struct Active {
    receive: Option<VirtQueue>,
    transmit: Option<VirtQueue>,
    events: Option<VirtQueue>,
    /// Packets of the guest wait until RSTs have been delivered.
    stalled: bool,
}

impl Vsock {
    /// The machine's `index`th, for a guest with the given CID, [`CID_MIN`] to [`CID_MAX`].
    pub fn new(index: u32, cid: u32, host: Host) -> Vsock {
        Vsock {
            name: format!("VSOCK{index}"),
            cid,
            connections: Connections::new(cid, host),
            active: None,
            transport_reset: false,
        }
    }

    /// Accepts programs of the host and delivers packets, as part of each call.
    fn run(&mut self) -> Result<(), Malformed> {
        // Whoever connected before the driver knows of the reset would lose the connection to it.
        let more = !self.transport_reset && self.connections.accept();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if let Some(queue) = &mut active.receive {
            receive(queue, &mut self.connections)?;
        }
        let Some(queue) = &active.transmit else {
            return Ok(());
        };
        if more || (active.stalled && self.connections.has_room()) {
            queue.call_again();
        }
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), Malformed> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(queue) = &mut active.transmit else {
            return Ok(());
        };
        active.stalled = false;
        for _ in 0..queue.size() {
            if !self.connections.has_room() {
                active.stalled = true;
                return queue.notify();
            }
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            if chain.readable().len() > usize::from(queue.size()) {
                return Err(Malformed::Chain);
            }
            let ram = queue.ram();
            let mut reader = chain.reader(ram);
            let header = Header::parse(&reader.array::<{ HEADER_LEN as usize }>()?);
            let mut data = Vec::new();
            if header.op == OP_RW {
                if header.len > reader.left() {
                    return Err(Malformed::Request);
                }
                data = reader.take_buffers(header.len);
            }
            self.connections.packet(&header, ram, &data);
            queue.push_used(chain.head(), 0)?;
        }
        queue.call_again();
        queue.notify()
    }

    /// Tells the driver that all connections are gone, if it has to be told and has given a buffer for it.
    fn event(&mut self) -> Result<(), Malformed> {
        let queue = self
            .active
            .as_mut()
            .and_then(|active| active.events.as_mut());
        let Some(queue) = queue.filter(|_| self.transport_reset) else {
            return Ok(());
        };
        let Some(chain) = queue.pop()? else {
            return Ok(());
        };
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        chain
            .writer(queue.ram())
            .write_all(&event)
            .map_err(|_| Malformed::Request)?;
        queue.push_used(chain.head(), event.len() as u32)?;
        self.transport_reset = false;
        queue.notify()
    }
}

/// Fills the guest's buffers with packets for it, while there are both.
fn receive(queue: &mut VirtQueue, connections: &mut Connections) -> Result<(), Malformed> {
    for _ in 0..queue.size() {
        if !connections.has_packets() {
            return queue.notify();
        }
        let Some(chain) = queue.pop()? else {
            return queue.notify();
        };
        if chain.writable().len() > usize::from(queue.size()) {
            return Err(Malformed::Chain);
        }
        match connections.deliver(queue.ram(), &chain)? {
            Some(written) => queue.push_used(chain.head(), written)?,
            None => queue.unpop(),
        }
    }
    queue.call_again();
    queue.notify()
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    /// `guest_cid` (§5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        let mut queues = activation.queues.into_iter();
        self.active = Some(Active {
            receive: queues.next().flatten(),
            transmit: queues.next().flatten(),
            events: queues.next().flatten(),
            stalled: false,
        });
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        match queue {
            RX => {}
            TX => self.transmit()?,
            EVENT => self.event()?,
            _ => {}
        }
        self.run()
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![self.connections.descriptor()]
    }

    fn interests(&self) -> Vec<Interest> {
        vec![match self.active {
            Some(_) => Interest::READ,
            None => Interest::NONE,
        }]
    }

    fn ready(&mut self, _source: usize, _readiness: Readiness) -> Result<(), Malformed> {
        self.connections.host_changed();
        self.run()
    }

    fn reset(&mut self) {
        self.active = None;
        self.connections.clear();
        self.transport_reset = false;
    }

    fn save(&self) -> SavedState {
        let Vsock {
            name: _,
            cid: _,
            connections: _,
            active: _,
            transport_reset: _,
        } = self;
        SavedState::of(&())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.to::<()>(&self.name)?;
        self.connections.clear();
        self.transport_reset = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
