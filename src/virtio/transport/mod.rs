//! How a driver finds a virtio device, negotiates with it and rings its bell (virtio 1.3 §4).

pub mod mmio;
