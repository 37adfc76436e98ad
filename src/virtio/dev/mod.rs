//! The virtio devices, one a file or folder. Each implements [`super::VirtioDevice`] and knows no transport.

pub mod net;
pub mod rng;
