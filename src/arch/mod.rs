//! Pure encodings of the processor architecture: bytes and bits in, bytes and bits out, no I/O.

pub mod x86_64;
