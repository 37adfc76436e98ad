//! The debug exit port: a guest ends the run with a code of its own choice.
//!
//! No PC has one; it is for kernels under test, which write one byte and are done. QEMU's `isa-debug-exit` sits at
//! the same port, but turns N into the odd number 2N+1; here the byte *is* the exit code of the process.

use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::trace::{Direction, Register};

const CODE: Register = Register::plain("CODE");

/// One write-only port. It has no state.
#[derive(Default)]
pub struct ExitPort;

impl ExitPort {
    /// The port.
    pub fn new() -> ExitPort {
        ExitPort
    }
}

impl Device for ExitPort {
    fn name(&self) -> &str {
        "EXIT"
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        data.first()
            .map_or(Action::Continue, |code| Action::Exit(*code))
    }

    fn register(&self, _offset: u64, _direction: Direction) -> Option<&'static Register> {
        Some(&CODE)
    }

    fn save(&self) -> SavedState {
        SavedState::of(&())
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        state.to::<()>(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_that_is_written_is_the_exit_code() {
        for code in [0, 1, 42, 255] {
            assert_eq!(ExitPort::new().write(0, &[code]), Action::Exit(code));
        }
        let mut data = [0; 2];
        ExitPort::new().read(0, &mut data);
        assert_eq!(data, [0xff; 2]);
    }
}
