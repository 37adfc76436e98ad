//! The virtio devices, one file each. None knows by which transport it is reached.

pub mod rng;
