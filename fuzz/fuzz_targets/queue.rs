//! The queue walker alone, compared with a second reading of the specification.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::virtio::hostile::walker;

fuzz_target!(|bytes: &[u8]| walker::walk(bytes));
