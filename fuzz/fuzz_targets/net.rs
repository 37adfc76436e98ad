//! A network card, between a hostile driver and a host that sends anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::virtio::hostile::{attack, targets};

fuzz_target!(|steps: &[u8]| attack(&targets::NET, steps));
