//! A console and a port with a name, between a hostile driver and a host that types, opens and closes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::virtio::hostile::{attack, targets};

fuzz_target!(|steps: &[u8]| attack(&targets::CONSOLE, steps));
