//! The 8042 keyboard controller, of which only the reset line is left.
//!
//! On the first PC/AT the controller had pins to spare, and one of them was wired to the CPU's reset (IBM PC/AT
//! Technical Reference, "Keyboard Controller"). Kernels still pulse it to reboot: command FE at port 0x64.
//! There is no keyboard; both buffers read as empty, so nobody waits for it.

use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::trace::{Direction, Field, Register};

/// Status register, read at the command port. All bits zero: both buffers are empty.
const STATUS: Register = Register {
    name: "STATUS",
    fields: &[
        Field {
            mask: 1,
            name: "OBF",
        },
        Field {
            mask: 2,
            name: "IBF",
        },
    ],
};
const COMMAND: Register = Register::plain("COMMAND");
const DATA: Register = Register::plain("DATA");

/// Pulse output lines: a zero among the low four bits selects a line, and line 0 is reset.
const PULSE: u8 = 0xf0;
const RESET_LINE: u8 = 1;

/// Which of its two ports this is; they do not lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Data,
    Command,
}

/// One port of the controller. It has no state.
pub struct I8042 {
    port: Port,
}

impl I8042 {
    /// The given port.
    pub fn new(port: Port) -> I8042 {
        I8042 { port }
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "I8042"
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        match (self.port, data.first()) {
            (Port::Command, Some(command))
                if command & PULSE == PULSE && command & RESET_LINE == 0 =>
            {
                Action::Reset
            }
            _ => Action::Continue,
        }
    }

    fn register(&self, _offset: u64, direction: Direction) -> Option<&'static Register> {
        Some(match (self.port, direction) {
            (Port::Data, _) => &DATA,
            (Port::Command, Direction::Read) => &STATUS,
            (Port::Command, Direction::Write) => &COMMAND,
        })
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
    fn a_pulse_on_the_reset_line_restarts_the_machine() {
        for (port, command, action) in [
            (Port::Command, 0xfe, Action::Reset),
            (Port::Command, 0xff, Action::Continue),
            (Port::Command, 0xaa, Action::Continue),
            (Port::Data, 0xfe, Action::Continue),
        ] {
            assert_eq!(
                I8042::new(port).write(0, &[command]),
                action,
                "{command:#x}"
            );
        }
    }
}
