//! Kernel images from anywhere: ELF files, bzImages and what is packed inside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sarang::loader::{Entry, Request, load};
use sarang::mem::{GuestAddress, GuestMemory, allocate};

const RAM: u64 = 32 << 20;

fuzz_target!(|image: &[u8]| {
    let ram = allocate(&[(GuestAddress(0), RAM)]).expect("address space");
    let loaded = load(
        &ram,
        &Request {
            kernel: image,
            kernel_name: "kernel",
            initrds: &[("initrd", b"070701")],
            command_line: "console=ttyS0",
            ram_bytes: RAM,
            rsdp: 0xe_0000,
        },
    );
    match loaded {
        Ok(state) => {
            let (Entry::Linux64 { rip, .. } | Entry::Pvh { rip, .. }) = state.entry;
            assert!(
                ram.address_in_range(GuestAddress(rip)),
                "it begins at {rip:#x}"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
