//! The entropy device (virtio 1.3 §5.4): random bytes of the host for a guest that has no noise of its own.
//!
//! One queue, `requestq`. The driver makes empty buffers available, and the device fills them with bytes of the host's
//! `getrandom(2)`. It may fill less than all of a buffer, and the used ring says how much.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::bus::{RestoreError, SavedState};
use crate::mem::GuestRam;
use crate::virtio::queue::{Chain, VirtQueue};
use crate::virtio::{Activation, Malformed, VirtioDevice};
use crate::worker::{Interest, Readiness};

/// Device type, §5.
const DEVICE_ID: u32 = 4;
const QUEUE_SIZES: &[u16] = &[64];
/// The most bytes that one request gets.
const REQUEST_LIMIT: u32 = 64 << 10;
/// The most bytes that one turn gives, so that a driver who asks for more and more does not keep the event loop from
/// other devices: about a millisecond.
const TURN_LIMIT: u32 = 256 << 10;
/// A request counts for at least as many bytes, as small ones take their time too.
const REQUEST_COST: u32 = 256;
/// Bytes asked of the host at once. Up to 256, `getrandom` is neither cut short nor interrupted.
const PIECE: usize = 256;

/// The entropy device.
pub struct Rng {
    /// Readable at all times. Waiting for it is waiting for another turn.
    turn: Arc<OwnedFd>,
    /// A turn ended before the requests did.
    unfinished: bool,
    queue: Option<VirtQueue>,
}

impl Rng {
    /// A device that waits for its driver.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new() -> std::io::Result<Rng> {
        Ok(Rng {
            turn: Arc::new(eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
            unfinished: false,
            queue: None,
        })
    }
}

/// Fills a request, and gives the number of bytes.
fn fill(chain: &Chain, ram: &GuestRam) -> Result<u32, Malformed> {
    if chain.writable_len() == 0 {
        return Err(Malformed::Request);
    }
    let mut writer = chain.writer(ram);
    let mut left = usize::try_from(REQUEST_LIMIT.min(writer.left())).unwrap_or(0);
    let mut piece = [0; PIECE];
    while left > 0 {
        let (wanted, _) = piece.split_at_mut(left.min(PIECE));
        let random = match getrandom(&mut *wanted, GetRandomFlags::empty()) {
            Ok(random) => random,
            Err(Errno::INTR) => continue,
            // The host has no entropy device itself; the guest gets what there is.
            Err(_) => break,
        };
        let (random, _) = wanted.split_at(random.min(wanted.len()));
        writer.write_all(random).map_err(|_| Malformed::Address)?;
        left = left.saturating_sub(random.len());
    }
    Ok(writer.written())
}

/// Serves requests until there are none or the turn is over. The result says whether there are more.
fn serve(queue: &mut VirtQueue) -> Result<bool, Malformed> {
    let mut given = 0_u32;
    loop {
        queue.disable_notification()?;
        while let Some(chain) = queue.pop()? {
            let filled = fill(&chain, queue.ram())?;
            queue.push_used(chain.head(), filled)?;
            given = given.saturating_add(filled.max(REQUEST_COST));
            if given >= TURN_LIMIT {
                queue.notify()?;
                return Ok(true);
            }
        }
        queue.notify()?;
        if !queue.enable_notification()? {
            return Ok(false);
        }
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        "RNG0"
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queues.into_iter().next().flatten();
        self.unfinished = false;
    }

    fn process(&mut self, _queue: usize) -> Result<(), Malformed> {
        self.unfinished = match &mut self.queue {
            Some(queue) => serve(queue)?,
            None => false,
        };
        Ok(())
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![Arc::clone(&self.turn)]
    }

    fn interests(&self) -> Vec<Interest> {
        vec![if self.unfinished {
            Interest::READ
        } else {
            Interest::NONE
        }]
    }

    fn ready(&mut self, _source: usize, _readiness: Readiness) -> Result<(), Malformed> {
        self.process(0)
    }

    fn reset(&mut self) {
        self.queue = None;
        self.unfinished = false;
    }

    /// The device has no state: requests that are not finished are in the queue.
    fn save(&self) -> SavedState {
        SavedState::of(&())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.to(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::{Driver, Used};
    use crate::virtio::{F_EVENT_IDX, F_VERSION_1};

    fn start() -> (Rng, Driver) {
        let mut rng = Rng::new().unwrap();
        let driver = Driver::start(&mut rng, F_VERSION_1);
        (rng, driver)
    }

    #[test]
    fn a_request_is_filled_to_its_last_byte_with_one_interrupt() {
        let (mut rng, mut driver) = start();
        let head = driver.send(0, &[], &[1, 300, 4099]);
        rng.process(0).unwrap();
        assert_eq!(driver.used(0), Some(Used { head, len: 4400 }));
        assert_eq!(driver.line.edges(), 1);
        let bytes = driver.written(0, head);
        assert_eq!(bytes.len(), 4400);
        // A run of 16 zeroes in so many random bytes comes once in 2^116 tries.
        assert!(!bytes.windows(16).any(|run| run == [0; 16]));
    }

    #[test]
    fn two_requests_get_different_bytes() {
        let (mut rng, mut driver) = start();
        let first = driver.send(0, &[], &[64]);
        let second = driver.send(0, &[], &[64]);
        rng.process(0).unwrap();
        assert_ne!(driver.written(0, first), driver.written(0, second));
    }

    #[test]
    fn a_huge_request_gets_a_part_of_what_it_asks_for() {
        let (mut rng, mut driver) = start();
        let head = driver.send(0, &[], &[16 << 20]);
        rng.process(0).unwrap();
        let len = REQUEST_LIMIT;
        assert_eq!(driver.used(0), Some(Used { head, len }));
        let bytes = driver.written(0, head);
        assert!(
            bytes[REQUEST_LIMIT as usize..]
                .iter()
                .all(|byte| *byte == 0)
        );
    }

    #[test]
    fn a_greedy_driver_waits_for_its_turn_and_is_served_in_the_end() {
        let (mut rng, mut driver) = start();
        for _ in 0..6 {
            driver.send(0, &[], &[REQUEST_LIMIT]);
        }
        rng.process(0).unwrap();
        let served = |driver: &mut Driver| std::iter::from_fn(|| driver.used(0)).count();
        assert_eq!(served(&mut driver), 4);
        assert_eq!(rng.interests(), [Interest::READ]);
        rng.ready(0, Interest::READ).unwrap();
        assert_eq!(served(&mut driver), 2);
        assert_eq!(rng.interests(), [Interest::NONE]);
    }

    #[test]
    fn a_driver_that_gives_indices_of_events_is_served_again_and_again() {
        let mut rng = Rng::new().unwrap();
        let mut driver = Driver::start(&mut rng, F_VERSION_1 | F_EVENT_IDX);
        for _ in 0..200 {
            let head = driver.send(0, &[], &[8]);
            rng.process(0).unwrap();
            assert_eq!(driver.used(0), Some(Used { head, len: 8 }));
        }
    }

    #[test]
    fn a_request_with_nothing_to_fill_breaks_the_rules() {
        let (mut rng, mut driver) = start();
        driver.send(0, &[b"seed"], &[]);
        assert_eq!(rng.process(0), Err(Malformed::Request));
    }

    #[test]
    fn without_a_queue_nothing_happens() {
        let (mut rng, mut driver) = start();
        driver.send(0, &[], &[8]);
        rng.reset();
        rng.process(0).unwrap();
        assert_eq!(driver.used(0), None);
    }
}
