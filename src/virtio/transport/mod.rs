//! Transports: how a driver finds a virtio device, negotiates with it and notifies it (virtio 1.3 §4).

pub mod mmio;
