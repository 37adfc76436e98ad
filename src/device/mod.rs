//! The devices of the board that are not virtio: what is left of a PC when history is taken away.

pub mod exit_port;
pub mod i8042;
pub mod pm;
pub mod pvpanic;
pub mod rtc;
pub mod uart;
