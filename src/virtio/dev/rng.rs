//! Entropy device (virtio 1.3 §5.4): the driver gives empty buffers, the device fills them with random bytes.
//!
//! A fresh guest has few unpredictable events of its own, and what needs keys waits for them at boot. The bytes come from
//! the host kernel's generator by `getrandom(2)`, which never blocks once the host is up.

use crate::bus::{RestoreError, SavedState};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{Activation, Malformed, VirtioDevice};

const DEVICE_ID: u32 = 4;
const QUEUE_SIZE: u16 = 64;
/// At most this many bytes for one request: it bounds what a guest can make the host compute at a time. A driver takes
/// a short answer for what it is (§5.4.6.1).
const MOST: u32 = 64 << 10;
/// Bytes drawn from the host at once; up to 256 `getrandom` is not interrupted by signals.
const PIECE: usize = 256;

/// The entropy device.
pub struct Rng {
    name: String,
    queue: Option<VirtQueue>,
}

impl Rng {
    /// The machine's `index`th.
    pub fn new(index: u32) -> Rng {
        Rng {
            name: format!("RNG{index}"),
            queue: None,
        }
    }
}

/// Fills `writer`'s next bytes with randomness, and says how many there are.
fn fill(mut writer: crate::virtio::queue::Writer<'_>) -> u32 {
    let mut piece = [0; PIECE];
    while writer.written() < MOST && writer.left() > 0 {
        let len = PIECE.min(writer.left() as usize);
        let (piece, _) = piece.split_at_mut(len);
        let got = rustix::rand::getrandom(&mut *piece, rustix::rand::GetRandomFlags::empty());
        let Ok(got) = got else { break };
        let bytes = piece.get(..got).unwrap_or_default();
        if std::io::Write::write_all(&mut writer, bytes).is_err() {
            break;
        }
    }
    writer.written()
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queues.into_iter().next().flatten();
    }

    fn process(&mut self, _queue: usize) -> Result<(), Malformed> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            let written = fill(chain.writer(queue.ram()));
            queue.push_used(chain.head(), written)?;
        }
        queue.call_again();
        queue.notify()
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn save(&self) -> SavedState {
        let Rng { name: _, queue: _ } = self;
        SavedState::of(&())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.to(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::Driver;

    #[test]
    fn buffers_come_back_full_of_bytes_that_differ() {
        let mut device = Rng::new(0);
        let mut driver = Driver::start(&mut device, 0);
        let first = driver.send(0, &[], &[100, 28]);
        let second = driver.send(0, &[], &[128]);
        device.process(0).unwrap();
        for head in [first, second] {
            let used = driver.used(0).unwrap();
            assert_eq!((used.head, used.len), (head, 128));
        }
        assert_ne!(driver.written(0, first), driver.written(0, second));
        assert_eq!(driver.line.edges(), 1);
        device.process(0).unwrap();
        assert_eq!(driver.line.edges(), 1, "no interrupt for nothing");
    }

    #[test]
    fn a_request_of_any_size_is_answered_in_part() {
        let mut device = Rng::new(0);
        let mut driver = Driver::start(&mut device, 0);
        driver.send_raw(0, &[(0x10_0000, 16 << 20, 2)]);
        driver.send(0, &[b"only readable"], &[]);
        device.process(0).unwrap();
        assert_eq!(driver.used(0).unwrap().len, MOST);
        assert_eq!(driver.used(0).unwrap().len, 0);
    }

    #[test]
    fn a_broken_chain_is_reported() {
        let mut device = Rng::new(0);
        let mut driver = Driver::start(&mut device, 0);
        driver.send_raw(0, &[(u64::MAX - 8, 64, 2)]);
        assert_eq!(device.process(0), Err(Malformed::Address));
    }
}
