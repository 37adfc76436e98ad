//! Persistent memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::virtio::hostile::{attack, targets};

fuzz_target!(|steps: &[u8]| attack(&targets::PMEM, steps));
