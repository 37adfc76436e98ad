//! The network card (virtio 1.3 §5.1).
//!
//! Queues come in pairs: in one the driver posts empty buffers for frames to arrive in, in the other full ones to be
//! sent. A card with several pairs lets each vCPU have its own, and has one more queue for control. Before each frame
//! goes a header of 12 bytes that says what is left to do for it: with the features for *offloads*, a frame may be a
//! TCP packet of 64 KiB whose segments and checksums are made by the host's stack, its hardware, or nobody at all if it
//! stays on this host.
//!
//! This card only negotiates and queues. The header passes through to the backend (see [`crate::backend::net`]), which
//! offers offloads if it knows what to do with them. `receive` and `transmit` have a half of the data path each.
//!
//! A card may have rate limits, the same for each direction. A frame that may not pass yet waits where it is, in the
//! driver's queue or the host's, and is not lost.
//!
//! Snapshots: between calls the card holds no requests, so the positions of its queues are all there is to save of
//! them. A frame that waits for buffers is lost, as frames on a wire are.

mod control;
mod mac;
mod receive;
mod transmit;

pub use mac::Mac;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::backend::net::{self as host, NetBackend, Offloads};
use crate::backend::rate::Limits;
use crate::bus::{RestoreError, SavedState};
use crate::virtio::dev::throttle::Throttle;
use crate::virtio::queue::VirtQueue;
use crate::virtio::{
    Activation, INTERRUPT_CONFIG, Interrupt, Malformed, VirtioDevice, copy_config,
};
use crate::worker::{Interest, Readiness};
use receive::{Manner, Receive};
use transmit::Transmit;

/// The device type (§5.1.1).
const DEVICE_ID: u32 = 1;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue, whose driver sends one request at a time.
const CONTROL_SIZE: u16 = 64;

// Feature bits (§5.1.3).
/// The driver may send frames with partial checksums.
pub const VIRTIO_NET_F_CSUM: u64 = 1 << 0;
/// The driver takes frames with partial checksums.
pub const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
/// The configuration space has an address.
pub const VIRTIO_NET_F_MAC: u64 = 1 << 5;
/// The driver takes TCP over IPv4 uncut.
pub const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
/// The driver takes TCP over IPv6 uncut.
pub const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
/// The driver takes UDP over IPv4 uncut.
pub const VIRTIO_NET_F_GUEST_UFO: u64 = 1 << 10;
/// The driver may send TCP over IPv4 uncut.
pub const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
/// The driver may send TCP over IPv6 uncut.
pub const VIRTIO_NET_F_HOST_TSO6: u64 = 1 << 12;
/// The driver may send UDP over IPv4 uncut.
pub const VIRTIO_NET_F_HOST_UFO: u64 = 1 << 14;
/// A received frame may take several buffers.
pub const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
/// The configuration space says whether the link is up.
pub const VIRTIO_NET_F_STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
/// There are several pairs of queues.
pub const VIRTIO_NET_F_MQ: u64 = 1 << 22;

/// `status`: the link is up (§5.1.4).
const VIRTIO_NET_S_LINK_UP: u16 = 1;

/// What the card has done, in frames since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// To the driver.
    pub received: u64,
    /// From the host, but longer than the driver's buffers, or than any frame.
    pub receive_dropped: u64,
    /// To the host.
    pub sent: u64,
    /// From the driver, but no frame, or one that the host refuses.
    pub transmit_dropped: u64,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct State {
    /// The driver uses so many pairs, 1 at first.
    pairs: u16,
    counters: Counters,
}

/// Why a queue could not be worked through.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Driver(#[from] Malformed),
    #[error(transparent)]
    Host(#[from] host::Error),
}

/// A network card.
pub struct Net {
    // Fixed configuration.
    name: String,
    mac: Mac,
    queue_sizes: Vec<u16>,
    own_worker: bool,

    // Runtime glue.
    backend: Box<dyn NetBackend>,
    throttles: Option<Throttles>,
    /// Down for good once the backend has failed.
    link_up: bool,
    active: Option<Active>,

    // Volatile state.
    state: State,
}

/// What there is between `activate` and `reset`. (The queues know their memory.)
struct Active {
    features: u64,
    interrupt: Arc<Interrupt>,
    pairs: Vec<Pair>,
    control: Option<VirtQueue>,
}

/// The limits of both directions.
struct Throttles {
    receive: Throttle,
    transmit: Throttle,
}

struct Pair {
    receive: Option<Receive>,
    transmit: Option<Transmit>,
}

impl Net {
    /// Card number `index` of a machine, `NET0` and so on.
    pub fn new(index: u32, mac: Mac, backend: Box<dyn NetBackend>) -> Net {
        let pairs = backend.pairs().max(1);
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(pairs).saturating_mul(2)];
        if pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        Net {
            name: format!("NET{index}"),
            mac,
            queue_sizes,
            own_worker: false,
            backend,
            throttles: None,
            link_up: true,
            active: None,
            state: State {
                pairs: 1,
                counters: Counters::default(),
            },
        }
    }

    /// Limits each direction to so many bytes and frames a second, in all pairs together. Headers do not count.
    ///
    /// # Errors
    /// When the host has no timers for it.
    pub fn limited(mut self, limits: Limits) -> io::Result<Net> {
        self.throttles = match (Throttle::new(limits)?, Throttle::new(limits)?) {
            (Some(receive), Some(transmit)) => Some(Throttles { receive, transmit }),
            _ => None,
        };
        Ok(self)
    }

    /// Whether the card shall have an event loop of its own, on a thread of its own.
    pub fn on_own_worker(mut self, own: bool) -> Net {
        self.own_worker = own;
        self
    }

    /// What the card has done so far.
    pub fn counters(&self) -> Counters {
        self.state.counters
    }

    /// Pairs of queues that the card has.
    fn pairs(&self) -> u16 {
        self.backend.pairs().max(1)
    }

    /// Whether the driver uses this pair.
    fn uses(&self, pair: u16) -> bool {
        pair < self.state.pairs
    }

    fn receive(&mut self, pair: u16) -> Result<(), Malformed> {
        if !self.uses(pair) || !self.link_up {
            return Ok(());
        }
        let result = match self.pair(pair) {
            (
                Some(Pair {
                    receive: Some(receive),
                    ..
                }),
                backend,
                counters,
                throttles,
            ) => receive.run(
                backend,
                pair,
                counters,
                throttles.map(|throttles| &mut throttles.receive),
            ),
            _ => Ok(()),
        };
        self.conclude(result)
    }

    fn transmit(&mut self, pair: u16) -> Result<(), Malformed> {
        if !self.uses(pair) {
            return Ok(());
        }
        let link_up = self.link_up;
        let result = match self.pair(pair) {
            (
                Some(Pair {
                    transmit: Some(transmit),
                    ..
                }),
                backend,
                counters,
                throttles,
            ) => transmit.run(
                link_up.then_some(backend),
                pair,
                counters,
                throttles.map(|throttles| &mut throttles.transmit),
            ),
            _ => Ok(()),
        };
        self.conclude(result)
    }

    fn pair(
        &mut self,
        pair: u16,
    ) -> (
        Option<&mut Pair>,
        &mut (dyn NetBackend + 'static),
        &mut Counters,
        Option<&mut Throttles>,
    ) {
        let found = self
            .active
            .as_mut()
            .and_then(|active| active.pairs.get_mut(usize::from(pair)));
        (
            found,
            &mut *self.backend,
            &mut self.state.counters,
            self.throttles.as_mut(),
        )
    }

    fn control(&mut self) -> Result<(), Malformed> {
        let Some(mut queue) = self
            .active
            .as_mut()
            .and_then(|active| active.control.take())
        else {
            return Ok(());
        };
        let result = self.requests(&mut queue);
        if let Some(active) = &mut self.active {
            active.control = Some(queue);
        }
        result
    }

    fn requests(&mut self, queue: &mut VirtQueue) -> Result<(), Malformed> {
        let ram = queue.ram().clone();
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            let before = self.state.pairs;
            let done = match control::pairs(&ram, &chain) {
                Some(pairs) => self.use_pairs(pairs),
                None => false,
            };
            let written = control::answer(&ram, &chain, done)?;
            queue.push_used(chain.head(), written)?;
            // What the driver did in queues that it did not use yet.
            for pair in before..self.state.pairs {
                self.receive(pair)?;
                self.transmit(pair)?;
            }
        }
        queue.call_again();
        queue.notify()
    }

    /// The driver uses `pairs` pairs from now on; `false` when it cannot.
    fn use_pairs(&mut self, pairs: u16) -> bool {
        let ready = self.active.as_ref().is_some_and(|active| {
            let used = active.pairs.get(..usize::from(pairs)).unwrap_or_default();
            !used.is_empty()
                && used
                    .iter()
                    .all(|pair| pair.receive.is_some() && pair.transmit.is_some())
        });
        if !ready {
            return false;
        }
        if let Err(error) = self.backend.use_pairs(pairs) {
            log::warn!("{}: {error}", self.name);
            return false;
        }
        self.state.pairs = pairs;
        true
    }

    /// The timer of a direction's limit has gone off.
    fn go_on(&mut self, receiving: bool) -> Result<(), Malformed> {
        if let Some(Throttles { receive, transmit }) = &self.throttles {
            let timer = if receiving { receive } else { transmit };
            timer.acknowledge();
        }
        (0..self.state.pairs).try_for_each(|pair| match receiving {
            true => self.receive(pair),
            false => self.transmit(pair),
        })
    }

    /// Passes on what the driver did wrong. If it was the host, the link goes down.
    fn conclude(&mut self, result: Result<(), Failure>) -> Result<(), Malformed> {
        match result {
            Ok(()) => return Ok(()),
            Err(Failure::Driver(malformed)) => return Err(malformed),
            Err(Failure::Host(error)) => log::warn!("{}: the link is down: {error}", self.name),
        }
        self.link_up = false;
        if let Some(active) = &self.active
            && active.features & VIRTIO_NET_F_STATUS != 0
        {
            active.interrupt.raise(INTERRUPT_CONFIG);
        }
        // The driver gets its buffers back.
        for pair in 0..self.state.pairs {
            self.transmit(pair)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let Offloads {
            checksum,
            tso4,
            tso6,
            ufo,
        } = self.backend.offloads();
        let mut features = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS | VIRTIO_NET_F_MRG_RXBUF;
        for (offered, bits) in [
            (checksum, VIRTIO_NET_F_CSUM | VIRTIO_NET_F_GUEST_CSUM),
            (tso4, VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_GUEST_TSO4),
            (tso6, VIRTIO_NET_F_HOST_TSO6 | VIRTIO_NET_F_GUEST_TSO6),
            (ufo, VIRTIO_NET_F_HOST_UFO | VIRTIO_NET_F_GUEST_UFO),
            (self.pairs() > 1, VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ),
        ] {
            if offered {
                features |= bits;
            }
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn wants_own_worker(&self) -> bool {
        self.own_worker
    }

    /// `mac`, `status`, `max_virtqueue_pairs` (§5.1.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.link_up {
            VIRTIO_NET_S_LINK_UP
        } else {
            0
        };
        let space = self
            .mac
            .bytes()
            .into_iter()
            .chain(status.to_le_bytes())
            .chain(self.pairs().to_le_bytes());
        copy_config(space, offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        let Activation {
            features,
            ram: _,
            queues,
            interrupt,
        } = activation;
        let has = |feature| features & feature != 0;
        let manner = Manner {
            merge: has(VIRTIO_NET_F_MRG_RXBUF),
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
        };
        // Without MQ, there is one pair, and the control queue follows it (§5.1.2).
        let count = if has(VIRTIO_NET_F_MQ) {
            self.pairs()
        } else {
            1
        };
        let mut queues = queues.into_iter();
        let pairs = (0..count)
            .map(|_| Pair {
                receive: queues
                    .next()
                    .flatten()
                    .map(|queue| Receive::new(queue, manner)),
                transmit: queues.next().flatten().map(Transmit::new),
            })
            .collect();
        self.active = Some(Active {
            features,
            interrupt,
            pairs,
            control: queues
                .next()
                .flatten()
                .filter(|_| has(VIRTIO_NET_F_CTRL_VQ)),
        });
        let accepted = Offloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
            ufo: has(VIRTIO_NET_F_GUEST_UFO),
        };
        let ready = self
            .backend
            .accept_offloads(accepted)
            .and_then(|()| self.backend.use_pairs(self.state.pairs));
        // The transmit queues are empty or not looked at yet, so nothing in them can be malformed.
        let _ = self.conclude(ready.map_err(Failure::Host));
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        let pairs = self.active.as_ref().map_or(0, |active| active.pairs.len());
        let pair = u16::try_from(queue / 2).unwrap_or(u16::MAX);
        if usize::from(pair) >= pairs {
            self.control()
        } else if queue.is_multiple_of(2) {
            self.receive(pair)
        } else {
            self.transmit(pair)
        }
    }

    /// The descriptors of all pairs, and the timers of the limits.
    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        let timers = self.throttles.iter().flat_map(|throttles| {
            let Throttles { receive, transmit } = throttles;
            [receive.timer(), transmit.timer()]
        });
        self.backend
            .descriptors()
            .into_iter()
            .chain(timers)
            .collect()
    }

    fn interests(&self) -> Vec<Interest> {
        let interest = |number| {
            let pair = self
                .active
                .as_ref()
                .and_then(|active| active.pairs.get(usize::from(number)))
                .filter(|_| self.link_up && self.uses(number));
            let Some(Pair { receive, transmit }) = pair else {
                return Interest::NONE;
            };
            let mut interest = Interest::NONE;
            if receive.as_ref().is_some_and(Receive::wants_frames) {
                interest = interest | Interest::READ;
            }
            if transmit.as_ref().is_some_and(Transmit::waits_for_room)
                || self.backend.has_unsent(number)
            {
                interest = interest | Interest::WRITE;
            }
            interest
        };
        let timer = match self.active {
            Some(_) => Interest::READ,
            None => Interest::NONE,
        };
        let timers = self.throttles.iter().flat_map(|_| [timer; 2]);
        (0..self.pairs()).map(interest).chain(timers).collect()
    }

    fn ready(&mut self, source: usize, readiness: Readiness) -> Result<(), Malformed> {
        let Ok(pair) = u16::try_from(source) else {
            return Ok(());
        };
        if pair >= self.pairs() {
            return self.go_on(pair == self.pairs());
        }
        if readiness.contains(Interest::WRITE) && self.link_up {
            let flushed = self.backend.flush(pair);
            self.conclude(flushed.map_err(Failure::Host))?;
            self.transmit(pair)?;
        }
        if readiness.contains(Interest::READ) {
            self.receive(pair)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.state.pairs = 1;
        // A backend that cannot go back to its beginnings cannot be started again either, and says so then.
        let _ = self.backend.accept_offloads(Offloads::default());
        let _ = self.backend.use_pairs(1);
        if let Some(Throttles { receive, transmit }) = &self.throttles {
            receive.stop();
            transmit.stop();
        }
    }

    fn save(&self) -> SavedState {
        let State { pairs, counters } = &self.state;
        SavedState::of(&State {
            pairs: *pairs,
            counters: *counters,
        })
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.to(&self.name)?;
        if state.pairs == 0 || state.pairs > self.pairs() {
            return Err(RestoreError {
                device: self.name.clone(),
                reason: format!("it had {} pairs of queues in use", state.pairs),
            });
        }
        self.state = state;
        if self.active.is_some() {
            let ready = self.backend.use_pairs(self.state.pairs);
            let _ = self.conclude(ready.map_err(Failure::Host));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
