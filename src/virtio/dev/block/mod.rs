//! A disk (virtio 1.3 §5.2).
//!
//! The driver puts requests (read these sectors, write those, flush) on a queue; the device starts each as an operation
//! of the host on the very memory that the request names, and hands the requests back in the order in which the
//! operations end. Several queues let several vCPUs work on the disk without sharing a ring; here they all lead to
//! one image and one event loop.
//!
//! Whether a write lasts when the driver hears of its end depends on the *writeback* byte of the configuration space: 1,
//! as long as the driver says so by FLUSH requests; 0 (write-through), always, for which the device flushes after each
//! write before it answers.

mod request;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Poll;

use slab::Slab;

use crate::backend::disk::{Completion, Disk, Operation, SECTOR};
use crate::backend::rate::Limits;
use crate::bus::{RestoreError, SavedState};
use crate::mem::{Buffer, Bytes, GuestAddress, GuestRam};
use crate::virtio::dev::throttle::Throttle;
use crate::virtio::queue::{Chain, VirtQueue};
use crate::virtio::{Activation, Malformed, VirtioDevice, copy_config};
use crate::worker::{Interest, Readiness};
use request::{DISCARD_SECTORS_MAX, Request, Shape, Status, WRITE_ZEROES_SECTORS_MAX, Work};

/// The device type (§5.2.1).
const DEVICE_ID: u32 = 2;

/// `VIRTIO_BLK_F_SEG_MAX`: the configuration says how many segments a request may have.
const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`: writes fail.
const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`: the configuration has the block size.
const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`: there is a cache, and a request that writes it back.
const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_CONFIG_WCE`: the driver may switch the cache.
const F_CONFIG_WCE: u64 = 1 << 11;
/// `VIRTIO_BLK_F_MQ`: several queues.
const F_MQ: u64 = 1 << 12;
/// `VIRTIO_BLK_F_DISCARD`
const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Descriptors of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// A disk can have this many queues.
pub const QUEUES_MAX: u16 = 16;
/// Bytes of a serial number (§5.2.6, GET_ID).
pub const SERIAL_LEN: usize = 20;

/// Bytes that may be moved before others have their turn, some 200 µs. Those that the host moves meanwhile do not count.
const BYTES_PER_TURN: u64 = 1 << 20;

/// Where the `writeback` byte is in the configuration space (§5.2.4).
const CONFIG_WRITEBACK: u64 = 32;
/// Discards work best on multiples of this many sectors: a page of the host.
const DISCARD_ALIGNMENT: u32 = 8;

/// How a disk presents itself.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// In traces and messages: `BLK0`.
    pub name: String,
    /// What the guest reads as the disk's serial number; cut off after 20 bytes.
    pub serial: String,
    /// 1 to 16; other numbers count as the nearest of these.
    pub queues: u16,
    pub limits: Limits,
    /// An event loop of its own, on a thread of its own.
    pub own_worker: bool,
}

/// A block device on a disk image.
pub struct Block {
    // Fixed configuration.
    name: String,
    serial: [u8; SERIAL_LEN],
    sizes: Vec<u16>,
    own_worker: bool,

    // Runtime glue.
    disk: Disk,
    throttle: Option<Throttle>,
    active: Option<Active>,
    /// Kinds of operations whose failure has been logged.
    warned: BTreeSet<&'static str>,

    // Volatile state.
    state: State,
}

/// What there is between `activate` and `reset`.
struct Active {
    features: u64,
    ram: GuestRam,
    queues: Vec<Option<VirtQueue>>,
    /// By queue, how many requests the host is at work on.
    running: Vec<u16>,
    /// By token.
    pending: Slab<Pending>,
}

/// A request that the host is at work on.
struct Pending {
    queue: usize,
    head: u16,
    status: GuestAddress,
    /// What is under way, as messages call it.
    what: &'static str,
    /// Bytes in the request's buffers if all goes well, without the status.
    written: u32,
    /// A write that must be flushed before it is answered.
    flush: bool,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct State {
    writeback: bool,
}

impl Block {
    /// A device for `disk`, which has been opened with a depth of `queues` times [`QUEUE_SIZE`].
    ///
    /// # Errors
    /// When there is a limit and the host has no timer for it.
    pub fn new(disk: Disk, settings: Settings) -> io::Result<Block> {
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(settings.serial.bytes()) {
            *to = from;
        }
        let queues = settings.queues.clamp(1, QUEUES_MAX);
        Ok(Block {
            name: settings.name,
            serial,
            sizes: vec![QUEUE_SIZE; queues.into()],
            own_worker: settings.own_worker,
            disk,
            throttle: Throttle::new(settings.limits)?,
            active: None,
            warned: BTreeSet::new(),
            state: State { writeback: true },
        })
    }

    /// The configuration space (§5.2.4), without the fields of features that are never offered.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let queues = u16::try_from(self.sizes.len()).unwrap_or(QUEUES_MAX);
        let fields: [(usize, &[u8]); 10] = [
            (0, &(self.disk.capacity() / u64::from(SECTOR)).to_le_bytes()),
            // Two descriptors are for the header and the status.
            (12, &u32::from(QUEUE_SIZE - 2).to_le_bytes()),
            (20, &self.disk.sector().to_le_bytes()),
            (32, &[u8::from(self.state.writeback)]),
            (34, &queues.to_le_bytes()),
            (36, &DISCARD_SECTORS_MAX.to_le_bytes()),
            // max_discard_seg, discard_sector_alignment
            (40, &1_u32.to_le_bytes()),
            (44, &DISCARD_ALIGNMENT.to_le_bytes()),
            (48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes()),
            // max_write_zeroes_seg, write_zeroes_may_unmap
            (52, &[1, 0, 0, 0, 1]),
        ];
        for (at, field) in fields {
            for (to, from) in config.iter_mut().skip(at).zip(field) {
                *to = *from;
            }
        }
        config
    }

    /// Starts the requests of one queue, as many as may be under way, and no more than are fair to others.
    fn start_all(&mut self, index: usize) -> Result<(), Malformed> {
        let Some(queue) = self.queue(index) else {
            return Ok(());
        };
        queue.disable_notification()?;
        let (mut requests, mut bytes) = (queue.size(), BYTES_PER_TURN);
        while requests > 0 && bytes > 0 {
            // A driver that looks for answers itself has its next request ready in no time. It is not asked to notify
            // before the event loop has come round once, which costs less than a notification.
            if bytes < BYTES_PER_TURN
                && let Some(queue) = self.queue(index)
                && !queue.has_requests()
                && !queue.wants_interrupt()?
            {
                break;
            }
            match self.start_next(index)? {
                Next::Started { ended } => bytes = bytes.saturating_sub(ended),
                // The driver notifies of more; who waits for a completion or the timer need not be told.
                Next::Empty | Next::Wait => return Ok(()),
            }
            requests -= 1;
        }
        if let Some(queue) = self.queue(index) {
            queue.call_again();
        }
        Ok(())
    }

    fn start_next(&mut self, index: usize) -> Result<Next, Malformed> {
        let shape = self.shape();
        let Some(active) = &mut self.active else {
            return Ok(Next::Empty);
        };
        let (Some(Some(queue)), Some(running)) =
            (active.queues.get_mut(index), active.running.get(index))
        else {
            return Ok(Next::Empty);
        };
        // A driver that hands over a request twice must not be able to have any number of them under way.
        if *running >= queue.size() {
            return Ok(Next::Wait);
        }
        let Some(chain) = queue.pop()? else {
            return Ok(Next::Empty);
        };
        let request = Request::parse(&chain, &active.ram, shape)?;
        if let (Some(throttle), Work::Host(operation)) = (&mut self.throttle, &request.work)
            && !throttle.admits(moved(operation))
        {
            queue.unpop();
            return Ok(Next::Wait);
        }
        let ended = self.start(index, &chain, request)?;
        Ok(Next::Started { ended })
    }

    /// Starts a request. The result is how many bytes it has moved already.
    fn start(&mut self, queue: usize, chain: &Chain, request: Request) -> Result<u64, Malformed> {
        let Some(active) = &mut self.active else {
            return Ok(0);
        };
        let Request { status, work } = request;
        let head = chain.head();
        match work {
            Work::Answer(answer) => self.answer(queue, head, status, answer, 0)?,
            Work::GetId(buffers) => {
                let written = copy(&active.ram, &self.serial, &buffers);
                self.answer(queue, head, status, Status::Ok, written)?;
            }
            Work::Host(operation) => {
                let (what, written, writes) = match &operation {
                    Operation::Read { buffers, .. } => ("read", total(buffers), false),
                    Operation::Write { .. } => ("write", 0, true),
                    Operation::Flush => ("flush", 0, false),
                    Operation::Discard { .. } => ("discard", 0, false),
                    Operation::WriteZeroes { .. } => ("write zeroes", 0, true),
                };
                let pending = Pending {
                    queue,
                    head,
                    status,
                    what,
                    written,
                    flush: writes && !self.state.writeback,
                };
                active.enter(queue);
                let moves = moved(&operation);
                if self.go_on(pending, operation)? {
                    return Ok(moves);
                }
            }
        }
        Ok(0)
    }

    /// Starts an operation for a request; if it has ended then, goes on with the request. The result is whether the
    /// request has been handed back.
    fn go_on(&mut self, pending: Pending, operation: Operation) -> Result<bool, Malformed> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let entry = active.pending.vacant_entry();
        let token = entry.key() as u64;
        match self.disk.submit(token, &active.ram, operation) {
            Poll::Ready(result) => self.end(pending, result),
            Poll::Pending => {
                entry.insert(pending);
                Ok(false)
            }
        }
    }

    /// Goes on with a request whose operation has ended. The result is whether it has been handed back.
    fn end(&mut self, mut pending: Pending, result: io::Result<()>) -> Result<bool, Malformed> {
        if result.is_ok() && std::mem::take(&mut pending.flush) {
            return self.go_on(pending, Operation::Flush);
        }
        if let Some(active) = &mut self.active {
            active.leave(pending.queue);
        }
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.warn(pending.what, &error);
                Status::IoErr
            }
        };
        self.answer(
            pending.queue,
            pending.head,
            pending.status,
            status,
            pending.written,
        )?;
        Ok(true)
    }

    /// Tells the host of what has been started, and goes on with all requests whose operations have ended.
    fn finish_all(&mut self) -> Result<(), Malformed> {
        loop {
            let completions = self.disk.proceed();
            if completions.is_empty() {
                break;
            }
            for Completion { token, result } in completions {
                let token = usize::try_from(token).unwrap_or(usize::MAX);
                let active = self.active.as_mut();
                if let Some(pending) = active.and_then(|active| active.pending.try_remove(token)) {
                    self.end(pending, result)?;
                }
            }
        }
        let queues = self.active.iter_mut().flat_map(|active| &mut active.queues);
        let mut queues = queues.flatten();
        if self.disk.is_stuck()
            && let Some(queue) = queues.next()
        {
            queue.call_again();
        }
        Ok(())
    }

    /// Hands a request back, with `written` bytes in its buffers if it succeeded.
    fn answer(
        &mut self,
        queue: usize,
        head: u16,
        address: GuestAddress,
        status: Status,
        written: u32,
    ) -> Result<(), Malformed> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        active
            .ram
            .write_obj(status as u8, address)
            .map_err(|_| Malformed::Address)?;
        let written = match status {
            Status::Ok => written.saturating_add(1),
            // What the buffers hold is undefined; only the status counts.
            Status::IoErr | Status::Unsupp => 1,
        };
        match active.queues.get_mut(queue) {
            Some(Some(queue)) => queue.push_used(head, written),
            _ => Ok(()),
        }
    }

    /// Interrupts the driver if it wants to know of what has been handed back.
    fn notify_all(&mut self) -> Result<(), Malformed> {
        let queues = self.active.iter_mut().flat_map(|active| &mut active.queues);
        queues.flatten().try_for_each(VirtQueue::notify)
    }

    fn queue(&mut self, index: usize) -> Option<&mut VirtQueue> {
        self.active.as_mut()?.queues.get_mut(index)?.as_mut()
    }

    fn shape(&self) -> Shape {
        let features = self.active.as_ref().map_or(0, |active| active.features);
        Shape {
            capacity: self.disk.capacity(),
            read_only: self.disk.is_read_only(),
            discard: features & F_DISCARD != 0,
            write_zeroes: features & F_WRITE_ZEROES != 0,
        }
    }

    /// One line for each kind of operation that fails, not one for each failure.
    fn warn(&mut self, what: &'static str, error: &io::Error) {
        if self.warned.insert(what) {
            log::warn!(
                "{}: cannot {what} on the disk image {}: {error}; the guest is told of this and of all that follow",
                self.name,
                self.disk.path().display()
            );
        }
    }
}

/// What became of the next request of a queue.
enum Next {
    /// So many bytes of it have been moved already.
    Started {
        ended: u64,
    },
    Empty,
    /// It is there, but may not start yet.
    Wait,
}

impl Active {
    /// One of the requests under way ends. A queue that had as many as it may is looked at again.
    fn leave(&mut self, index: usize) {
        if let (Some(Some(queue)), Some(running)) =
            (self.queues.get(index), self.running.get_mut(index))
        {
            if *running >= queue.size() {
                queue.call_again();
            }
            *running = running.saturating_sub(1);
        }
    }

    /// One more request is under way.
    fn enter(&mut self, index: usize) {
        if let Some(running) = self.running.get_mut(index) {
            *running = running.saturating_add(1);
        }
    }
}

/// Bytes that an operation moves, as a rate limit counts them.
fn moved(operation: &Operation) -> u64 {
    match operation {
        Operation::Read { buffers, .. } | Operation::Write { buffers, .. } => total(buffers).into(),
        _ => 0,
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        if self.sizes.len() > 1 {
            features |= F_MQ;
        }
        features
            | if self.disk.is_read_only() {
                F_RO
            } else {
                F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn wants_own_worker(&self) -> bool {
        self.own_worker
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // All other fields are read-only. Before DRIVER_OK, `activate` has the last word on whether it may be set.
        let settable = self.active.as_ref().is_none_or(|active| {
            active.features & (F_CONFIG_WCE | F_FLUSH) == F_CONFIG_WCE | F_FLUSH
        });
        if let (CONFIG_WRITEBACK, [value], true) = (offset, data, settable) {
            self.state.writeback = *value & 1 != 0;
        }
    }

    fn activate(&mut self, activation: Activation) {
        let features = activation.features;
        // Without FLUSH the driver cannot write a cache back, so there must be none; without CONFIG_WCE it cannot have
        // switched it off (§5.2.5.1, §5.2.6.2).
        self.state.writeback =
            features & F_FLUSH != 0 && (features & F_CONFIG_WCE == 0 || self.state.writeback);
        self.active = Some(Active {
            features,
            running: vec![0; activation.queues.len()],
            ram: activation.ram,
            queues: activation.queues,
            pending: Slab::new(),
        });
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        let result = self.start_all(queue);
        // Those before a malformed request were good.
        self.finish_all()?;
        result?;
        self.notify_all()
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        let timer = self.throttle.as_ref().map(Throttle::timer);
        std::iter::once(self.disk.event()).chain(timer).collect()
    }

    fn interests(&self) -> Vec<Interest> {
        let interest = match self.active {
            Some(_) => Interest::READ,
            None => Interest::NONE,
        };
        vec![interest; 1 + usize::from(self.throttle.is_some())]
    }

    fn ready(&mut self, source: usize, _: Readiness) -> Result<(), Malformed> {
        if source != 0 {
            if let Some(throttle) = &self.throttle {
                throttle.acknowledge();
            }
            return (0..self.sizes.len()).try_for_each(|queue| self.process(queue));
        }
        self.finish_all()?;
        self.notify_all()
    }

    fn reset(&mut self) {
        self.disk.drain();
        self.active = None;
        self.state.writeback = true;
        if let Some(throttle) = &self.throttle {
            throttle.stop();
        }
    }

    fn save(&self) -> SavedState {
        let State { writeback } = self.state;
        SavedState::of(&State { writeback })
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.state = state.to(&self.name)?;
        Ok(())
    }
}

fn total(buffers: &[Buffer]) -> u32 {
    buffers
        .iter()
        .fold(0, |sum, buffer| sum.saturating_add(buffer.len))
}

/// Copies as much of `bytes` as there is room for, and says how much.
fn copy(ram: &GuestRam, bytes: &[u8], buffers: &[Buffer]) -> u32 {
    let mut left = bytes;
    let mut copied: u32 = 0;
    for buffer in buffers {
        let (now, later) = left.split_at(left.len().min(buffer.len as usize));
        if ram.write_slice(now, buffer.address).is_err() {
            break;
        }
        copied = copied.saturating_add(u32::try_from(now.len()).unwrap_or(0));
        left = later;
    }
    copied
}

#[cfg(test)]
mod tests;
