//! A socket device, between a hostile driver and programs of the host that come and go.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::virtio::hostile::{attack, targets};

fuzz_target!(|steps: &[u8]| attack(&targets::VSOCK, steps));
