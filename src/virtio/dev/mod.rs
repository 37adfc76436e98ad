//! The virtio devices, one file each (virtio 1.3 §5). None of them knows how the driver reaches it.

pub mod rng;
