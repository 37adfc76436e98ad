//! The virtio devices (virtio 1.3 §5), one a file or folder. Each implements [`super::VirtioDevice`] and knows no transport.

pub mod block;
pub mod net;
pub mod rng;
pub mod throttle;
pub mod vsock;
