//! The VMM's end of the exec channel, and a guest that writes anything to it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::guest::hostile::attack;

fuzz_target!(|bytes: &[u8]| attack(bytes));
