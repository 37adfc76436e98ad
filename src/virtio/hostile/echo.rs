//! The device behind the target `mmio`, which sees to it that the transport keeps the contract of [`VirtioDevice`].

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::bus::{RestoreError, SavedState};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{Activation, F_VERSION_1, Malformed, VirtioDevice};
use crate::worker::{Interest, Readiness};

const ECHO_SIZES: [u16; 2] = [256, 8];

/// A device that copies what is readable to what is writable, has eight bytes of configuration that can be written, and
/// waits for its source if the first of them is odd.
pub(super) struct Echo {
    queues: Vec<Option<VirtQueue>>,
    /// Between `activate` and `reset`.
    live: bool,
    config: [u8; 8],
    source: Arc<OwnedFd>,
}

impl Echo {
    pub(super) fn new() -> Echo {
        let source = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Echo {
            queues: Vec::new(),
            live: false,
            config: [0; 8],
            source: Arc::new(source.expect("an eventfd")),
        }
    }
}

impl VirtioDevice for Echo {
    fn name(&self) -> &str {
        "ECHO"
    }

    fn device_id(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        1 << 3 | 1 << 50
    }

    fn queue_sizes(&self) -> &[u16] {
        &ECHO_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!(data.iter().all(|byte| *byte == 0));
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in self.config.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) {
        assert!(!self.live, "activated without a reset between");
        assert_ne!(activation.features & F_VERSION_1, 0);
        assert_eq!(activation.queues.len(), ECHO_SIZES.len());
        for (queue, max) in activation.queues.iter().zip(ECHO_SIZES) {
            assert!(queue.as_ref().is_none_or(|queue| queue.size() <= max));
        }
        self.queues = activation.queues;
        self.live = true;
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        assert!(self.live, "called while not active");
        let Some(queue) = &mut self.queues[queue] else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return queue.notify();
            };
            let mut bytes = [0; 256];
            let room = bytes.len().min(chain.writable_len() as usize);
            let mut reader = chain.reader(queue.ram());
            let read = reader
                .read(&mut bytes[..room])
                .map_err(|_| Malformed::Address)?;
            let mut writer = chain.writer(queue.ram());
            let written = writer.write_all(&bytes[..read]);
            written.map_err(|_| Malformed::Address)?;
            let written = writer.written();
            queue.push_used(chain.head(), written)?;
        }
        queue.call_again();
        queue.notify()
    }

    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        vec![Arc::clone(&self.source)]
    }

    fn interests(&self) -> Vec<Interest> {
        let waits = self.config[0] % 2 == 1;
        vec![if waits {
            Interest::READ
        } else {
            Interest::NONE
        }]
    }

    fn ready(&mut self, source: usize, readiness: Readiness) -> Result<(), Malformed> {
        assert!(self.live, "called while not active");
        assert_eq!((source, readiness), (0, Interest::READ));
        self.config[0] &= !1;
        match self.config[1] {
            0 => Ok(()),
            _ => Err(Malformed::Request),
        }
    }

    fn reset(&mut self) {
        assert!(self.live, "reset while not active");
        self.live = false;
        self.queues.clear();
        self.config = [0; 8];
    }

    fn save(&self) -> SavedState {
        SavedState::of(&self.config)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        assert!(!self.live, "restored while active");
        self.config = state.to("ECHO")?;
        Ok(())
    }
}
