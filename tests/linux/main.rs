//! Linux in sarang, through the binary. These need a full KVM, and the kernels that `scripts/guest-assets`
//! fetches and `scripts/build-guest-kernel` builds. So they run only when asked for: `scripts/test` does, inside
//! `scripts/kvm-anywhere` if need be.

mod boot;
mod command;
mod console;
mod devices;
mod disk;
mod everything;
mod guest;
mod net;
#[path = "../pty/mod.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod pty;
mod terminal;
