//! The virtio devices, one file or folder each (virtio 1.3 §5). None knows its transport.

pub mod block;
pub mod throttle;
