//! What sarang puts into a guest, embedded by the build.
//!
//! The bare-metal guests of `guest-kernels/` are lessons to read, tests to run, and the probes by which `sarang doctor`
//! measures a host.
//!
//! For a command in a Linux guest there is the program of `guest-init/`, its first process. [`initramfs`] packs it
//! together with the kernel [`modules`] that the guest needs and with the [`plan`] of what it is to do, and
//! [`protocol`] is how the VMM talks with it then.

pub mod exec;
#[cfg(any(test, fuzzing))]
pub mod hostile;
pub mod initramfs;
pub mod modules;
pub mod plan;
pub mod protocol;

include!(concat!(env!("OUT_DIR"), "/guest_kernels.rs"));
include!(concat!(env!("OUT_DIR"), "/guest_init.rs"));

/// The ELF image of the bare-metal guest called `name`.
pub fn bare_metal(name: &str) -> Option<&'static [u8]> {
    GUEST_KERNELS
        .iter()
        .find(|(guest, _)| *guest == name)
        .map(|(_, image)| *image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_guest_is_an_elf_image() {
        assert!(bare_metal("hello").is_some());
        assert!(bare_metal("no such guest").is_none());
        assert!(
            GUEST_KERNELS
                .iter()
                .all(|(_, image)| image.starts_with(b"\x7fELF"))
        );
        assert!(GUEST_INIT.starts_with(b"\x7fELF"));
    }
}
