//! The virtio devices (virtio 1.3 §5), one a file or folder. Each implements [`super::VirtioDevice`] and knows no transport.

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod throttle;
pub mod timer;
pub mod vsock;
