//! Consoles and channels (virtio 1.3 §5.3).
//!
//! A device of this kind has *ports*, each a pair of queues through which bytes flow: the driver posts empty buffers
//! to receive into, and full ones to be sent. The first port may be a console, where Linux puts `hvc0`; it takes a
//! line at a time where a serial port takes a byte. The others are channels with a name, `/dev/virtio-ports/NAME`,
//! between programs of the guest and of this process (see [`crate::backend::port`]).
//!
//! With MULTIPORT a pair of control queues tells the driver which ports there are, and both sides when the other opens
//! or closes one; `control` has that protocol and `data` moves the bytes. Without it there is the first port alone,
//! which is always open. A device with nothing but a console does not offer MULTIPORT, since there is nothing to
//! negotiate; and since Linux has read the two halves of a RESIZE message in either order in its time, but those of
//! the configuration space never.
//!
//! Snapshots keep what the driver and the device know of each other. Bytes that have left the queues for the host, or
//! not come from there yet, belong to the host.

mod control;
mod data;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::port::{Port, Size};
use crate::bus::{RestoreError, SavedState};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{Activation, Interrupt, Malformed, VirtioDevice, copy_config};
use crate::worker::{Interest, Readiness};
use control::{Facts, Message, PortControl};

/// The device type (§5.3.1).
const DEVICE_ID: u32 = 3;

// Feature bits (§5.3.3).
/// The configuration space has the size of the console.
pub const VIRTIO_CONSOLE_F_SIZE: u64 = 1 << 0;
/// There are several ports, and queues for control messages.
pub const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 1 << 1;
/// A character can be written to the configuration space.
pub const VIRTIO_CONSOLE_F_EMERG_WRITE: u64 = 1 << 2;

/// Where `emerg_wr` lies in the configuration space, after `cols`, `rows` and `max_nr_ports` (§5.3.4).
const EMERG_WR: u64 = 8;

/// Descriptors of each queue of a port. Linux posts a page for each to receive into.
const QUEUE_SIZE: u16 = 64;
/// Descriptors of each control queue.
const CONTROL_SIZE: u16 = 32;
/// A device can have this many ports.
pub const PORTS_MAX: usize = 31;

/// Which queue is which (§5.3.2): the first port's pair, the control pair, and the other ports' pairs.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// Why there is no such device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("a console device can have 1 to {PORTS_MAX} ports, not {0}")]
    Count(usize),
    #[error("two ports are called `{0}`, and each needs a name of its own")]
    SameName(String),
}

/// A device with ports.
pub struct VirtioConsole {
    // Fixed configuration.
    name: String,
    ports: Vec<Arc<Port>>,
    /// The first port is a console.
    console: bool,
    queue_sizes: Vec<u16>,

    // Runtime glue.
    active: Option<Active>,

    // Volatile state.
    state: State,
}

/// What there is between `activate` and `reset`.
struct Active {
    features: u64,
    interrupt: Arc<Interrupt>,
    /// One for each port that the driver can use.
    lanes: Vec<Lane>,
    control_receive: Option<VirtQueue>,
    control_transmit: Option<VirtQueue>,
    /// Where bytes are on their way.
    piece: Box<[u8]>,
}

impl Active {
    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

/// The queues of a port.
struct Lane {
    receive: Option<VirtQueue>,
    transmit: Option<VirtQueue>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// As the configuration space says.
    size: Size,
    ports: Vec<PortState>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    control: PortControl,
    /// Bytes of the first request on the transmit queue that have gone to the host.
    done: u32,
}

impl VirtioConsole {
    /// The machine's `index`th, with a console, ports with names, or both.
    ///
    /// # Errors
    /// When there are too many ports or none, or two have the same name.
    pub fn new(
        index: u32,
        console: Option<Arc<Port>>,
        channels: Vec<Arc<Port>>,
    ) -> Result<VirtioConsole, Error> {
        let mut names: Vec<&str> = channels.iter().map(|port| port.name()).collect();
        names.sort_unstable();
        for pair in names.windows(2) {
            if let [one, other] = pair
                && one == other
            {
                return Err(Error::SameName((*one).to_owned()));
            }
        }
        let has_console = console.is_some();
        let ports: Vec<Arc<Port>> = console.into_iter().chain(channels).collect();
        if ports.is_empty() || ports.len() > PORTS_MAX {
            return Err(Error::Count(ports.len()));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; ports.len().saturating_mul(2)];
        if !(has_console && ports.len() == 1) {
            queue_sizes.splice(CONTROL_RECEIVE..CONTROL_RECEIVE, [CONTROL_SIZE; 2]);
        }
        Ok(VirtioConsole {
            name: format!("CON{index}"),
            state: State::new(&ports),
            ports,
            console: has_console,
            queue_sizes,
            active: None,
        })
    }

    /// Serves what notification of `queue` may be about.
    fn serve(&mut self, queue: usize) -> Result<(), Malformed> {
        match queue {
            0 | 1 => self.run_port(0)?,
            CONTROL_RECEIVE => {}
            CONTROL_TRANSMIT => {
                self.hear()?;
                // A port that has been opened can be given what waits for it.
                for id in 0..self.ports.len() {
                    self.run_port(id)?;
                }
            }
            _ => self.run_port((queue / 2).saturating_sub(1))?,
        }
        self.settle()
    }

    /// Moves what can be moved through a port, in both directions.
    fn run_port(&mut self, id: usize) -> Result<(), Malformed> {
        let (Some(active), Some(port), Some(state)) = (
            &mut self.active,
            self.ports.get(id),
            self.state.ports.get_mut(id),
        ) else {
            return Ok(());
        };
        // Linux throws away what arrives at a port that nobody has open.
        let open = !active.has(VIRTIO_CONSOLE_F_MULTIPORT) || state.control.is_guest_open();
        let Some(lane) = active.lanes.get_mut(id) else {
            return Ok(());
        };
        let drained = match &mut lane.transmit {
            Some(queue) => {
                data::transmit(queue, port.output(), &mut state.done, &mut active.piece)?
            }
            None => true,
        };
        if let Some(queue) = &mut lane.receive
            && open
        {
            data::receive(queue, port.input(), &mut active.piece)?;
        }
        if open || drained {
            port.set_guest_open(open);
        }
        Ok(())
    }

    /// Takes the driver's control messages. What is too short for one says nothing.
    fn hear(&mut self) -> Result<(), Malformed> {
        let Some(queue) = self
            .active
            .as_mut()
            .and_then(|active| active.control_transmit.as_mut())
        else {
            return Ok(());
        };
        let ram = queue.ram().clone();
        let states = &mut self.state.ports;
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            if let Ok(bytes) = chain.reader(&ram).array() {
                hear(states, Message::parse(bytes));
            }
            queue.push_used(chain.head(), 0)?;
        }
        queue.call_again();
        queue.notify()
    }

    /// Tells the driver what it does not know yet.
    fn settle(&mut self) -> Result<(), Malformed> {
        self.follow_size();
        let Some(queue) = self
            .active
            .as_mut()
            .and_then(|active| active.control_receive.as_mut())
        else {
            return Ok(());
        };
        let ram = queue.ram().clone();
        let mut left = queue.size();
        let ports = self.ports.iter().zip(&mut self.state.ports);
        for ((id, index), (port, state)) in (0_u32..).zip(0_usize..).zip(ports) {
            let facts = Facts {
                name: (index > 0 || !self.console).then_some(port.name()),
                size: self.state.size,
                // A close is told when the driver has had all that was written before.
                open: port.is_host_open()
                    || (state.control.believes_host_open() && !port.input().is_empty()),
            };
            while let Some((event, message)) = state.control.owed(id, facts) {
                if left == 0 {
                    queue.call_again();
                    return queue.notify();
                }
                left = left.saturating_sub(1);
                let Some(chain) = queue.pop()? else {
                    return queue.notify();
                };
                let mut writer = chain.writer(&ram);
                // A buffer that is too short comes back empty, and the message waits for another.
                if writer.left() as usize >= message.len() && writer.write_all(&message).is_ok() {
                    state.control.told(event, facts);
                }
                queue.push_used(chain.head(), writer.written())?;
            }
        }
        queue.notify()
    }

    /// Takes over the size of the terminal.
    fn follow_size(&mut self) {
        let (Some(active), Some(port), true) = (&self.active, self.ports.first(), self.console)
        else {
            return;
        };
        let size = port.size();
        if std::mem::replace(&mut self.state.size, size) != size
            && active.has(VIRTIO_CONSOLE_F_SIZE)
        {
            active.interrupt.config_changed();
        }
    }

    /// After a driver has broken the rules, nothing of it is looked at any more.
    fn conclude(&mut self, result: Result<(), Malformed>) -> Result<(), Malformed> {
        if result.is_err() {
            self.active = None;
        }
        result
    }
}

/// Brings a message of the driver to the port that it is about.
fn hear(states: &mut [PortState], message: Message) {
    if message.event == control::DEVICE_READY {
        // 0 says that the driver has failed; the id means nothing.
        if message.value != 0 {
            for state in states {
                state.control.device_ready();
            }
        }
        return;
    }
    let state = usize::try_from(message.id).ok();
    if let Some(state) = state.and_then(|id| states.get_mut(id)) {
        state.control.hear(message);
    }
}

impl State {
    /// What a device starts with, at first and after a reset.
    fn new(ports: &[Arc<Port>]) -> State {
        State {
            size: ports.first().map(|port| port.size()).unwrap_or_default(),
            ports: vec![PortState::default(); ports.len()],
        }
    }
}

impl VirtioDevice for VirtioConsole {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let mut features = 0;
        if self.console {
            features |= VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_EMERG_WRITE;
        }
        if self.queue_sizes.len() > CONTROL_RECEIVE {
            features |= VIRTIO_CONSOLE_F_MULTIPORT;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `cols`, `rows`, `max_nr_ports` and `emerg_wr` (§5.3.4), which reads as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Size { columns, rows } = self.state.size;
        let ports = u32::try_from(self.ports.len()).unwrap_or(u32::MAX);
        let space = columns
            .to_le_bytes()
            .into_iter()
            .chain(rows.to_le_bytes())
            .chain(ports.to_le_bytes());
        copy_config(space, offset, data);
    }

    /// The low byte of `emerg_wr` is printed, whatever state the device is in (§5.3.4.2). This may run on a vCPU's
    /// thread, and what the console has no room for is lost.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (true, EMERG_WR, Some(port), Some(byte)) =
            (self.console, offset, self.ports.first(), data.first())
        {
            port.output().push(*byte);
        }
    }

    fn activate(&mut self, activation: Activation) {
        let Activation {
            features,
            ram: _,
            queues,
            interrupt,
        } = activation;
        let mut queues = queues.into_iter();
        let mut next = || queues.next().flatten();
        let mut lanes = vec![Lane {
            receive: next(),
            transmit: next(),
        }];
        let (mut control_receive, mut control_transmit) = (None, None);
        if features & VIRTIO_CONSOLE_F_MULTIPORT != 0 {
            (control_receive, control_transmit) = (next(), next());
            lanes.extend((1..self.ports.len()).map(|_| Lane {
                receive: next(),
                transmit: next(),
            }));
        }
        self.active = Some(Active {
            features,
            interrupt,
            lanes,
            control_receive,
            control_transmit,
            piece: vec![0; data::PIECE].into_boxed_slice(),
        });
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        let result = self.serve(queue);
        self.conclude(result)
    }

    /// The bell of each port.
    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        self.ports.iter().map(|port| port.bell()).collect()
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::READ; self.ports.len()]
    }

    fn ready(&mut self, source: usize, _readiness: Readiness) -> Result<(), Malformed> {
        if let Some(port) = self.ports.get(source) {
            port.acknowledge();
        }
        let result = self.run_port(source).and_then(|()| self.settle());
        self.conclude(result)
    }

    /// What the driver has sent up to now goes to the host as far as there is room, so that a guest's last words before
    /// it powers off are not lost.
    fn reset(&mut self) {
        if let Some(mut active) = self.active.take() {
            let ports = self.ports.iter().zip(&mut self.state.ports);
            for ((port, state), lane) in ports.zip(&mut active.lanes) {
                if let Some(queue) = &mut lane.transmit {
                    // If the driver has broken the rules, it does not matter any more.
                    let _ =
                        data::transmit(queue, port.output(), &mut state.done, &mut active.piece);
                }
            }
        }
        for port in &self.ports {
            port.set_guest_open(false);
        }
        self.state = State::new(&self.ports);
    }

    fn save(&self) -> SavedState {
        let VirtioConsole {
            name: _,
            ports: _,
            console: _,
            queue_sizes: _,
            active: _,
            state,
        } = self;
        SavedState::of(state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let state: State = saved.to(&self.name)?;
        if state.ports.len() != self.ports.len() {
            return Err(RestoreError {
                device: self.name.clone(),
                reason: format!(
                    "it had {} ports, not {}",
                    state.ports.len(),
                    self.ports.len()
                ),
            });
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
