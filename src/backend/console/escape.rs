//! The keys that reach the VMM and not the guest.
//!
//! A raw terminal hands every key to the guest, Ctrl-C included. One prefix, Ctrl-a, is kept back,
//! as QEMU and GNU screen do it; the key after it says what is meant. An unknown key after the
//! prefix is dropped together with it, so that a slip of the finger does nothing.
//!
//! | keys | meaning |
//! | --- | --- |
//! | Ctrl-a x | end the run |
//! | Ctrl-a h | print these keys |
//! | Ctrl-a Ctrl-a | one Ctrl-a for the guest |

/// Ctrl-a, ASCII SOH.
const PREFIX: u8 = 0x01;

/// Printed for [`Key::Help`]; in CRLF, since the terminal may be raw.
pub const HELP: &str = "\r\nCtrl-a x       end the run\r\nCtrl-a h       print this\r\n\
    Ctrl-a Ctrl-a  send Ctrl-a to the guest\r\n";

/// A key for the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// End the run.
    Quit,
    /// Print the keys. The console has done so already when it reports this.
    Help,
}

/// What one typed byte turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// A byte for the guest.
    Guest(u8),
    /// A key for the VMM.
    Key(Key),
    /// Nothing, or nothing yet.
    Nothing,
}

/// The state machine: whether the last byte was the prefix.
#[derive(Debug, Default)]
pub struct Escape {
    after_prefix: bool,
}

impl Escape {
    /// Takes the next typed byte.
    pub fn next(&mut self, byte: u8) -> Typed {
        match (std::mem::take(&mut self.after_prefix), byte) {
            (false, PREFIX) => {
                self.after_prefix = true;
                Typed::Nothing
            }
            (false, byte) => Typed::Guest(byte),
            (true, PREFIX) => Typed::Guest(PREFIX),
            (true, b'x') => Typed::Key(Key::Quit),
            (true, b'h') => Typed::Key(Key::Help),
            (true, _) => Typed::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_after_the_prefix_is_kept_from_the_guest() {
        const CASES: &[(&[u8], &[u8], &[Key])] = &[
            (b"ls\x03\r", b"ls\x03\r", &[]),
            (b"\x01x", b"", &[Key::Quit]),
            (b"a\x01hb", b"ab", &[Key::Help]),
            (b"\x01\x01x", b"\x01x", &[]),
            (b"\x01\x01\x01x", b"\x01", &[Key::Quit]),
            (b"\x01qx", b"x", &[]),
            (b"x\x01", b"x", &[]),
        ];
        for (typed, guest, keys) in CASES {
            let (mut escape, mut bytes, mut pressed) = (Escape::default(), vec![], vec![]);
            for byte in *typed {
                match escape.next(*byte) {
                    Typed::Guest(byte) => bytes.push(byte),
                    Typed::Key(key) => pressed.push(key),
                    Typed::Nothing => {}
                }
            }
            assert_eq!((&bytes[..], &pressed[..]), (*guest, *keys), "{typed:?}");
        }
    }
}
