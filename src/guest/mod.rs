//! What sarang puts into a guest: the bare-metal guests of `guest-kernels/`, embedded by the build.
//!
//! They are lessons to read, tests to run, and the probes by which `sarang doctor` measures a host.

pub mod plan;
pub mod protocol;

include!(concat!(env!("OUT_DIR"), "/guest_kernels.rs"));

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
    }
}
