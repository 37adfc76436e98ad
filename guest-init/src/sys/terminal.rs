//! Pseudo-terminals (pty(7), ioctl_tty(2)).

use std::ffi::{c_int, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{check, ioctl, owned};

/// `struct winsize`.
#[repr(C)]
struct WinSize {
    rows: u16,
    columns: u16,
    pixels: [u16; 2],
}

/// The kernel's `struct termios`.
#[repr(C)]
struct Termios {
    /// `c_iflag`, `c_oflag`, `c_cflag`, `c_lflag`.
    modes: [u32; 4],
    line: u8,
    /// `c_cc`.
    keys: [u8; 19],
}

/// The other end of the pseudo-terminal `ptmx`, unlocked.
pub fn open_terminal(ptmx: &File) -> io::Result<OwnedFd> {
    const TIOCSPTLCK: c_ulong = 0x4004_5431;
    const TIOCGPTPEER: c_ulong = 0x5441;
    const O_RDWR_NOCTTY_CLOEXEC: c_int = 0o2_000_402;
    let unlocked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads the number that it is given the address of.
    check(unsafe { ioctl(ptmx.as_raw_fd(), TIOCSPTLCK, &unlocked) })?;
    // SAFETY: TIOCGPTPEER takes flags and gives a new descriptor.
    owned(unsafe { ioctl(ptmx.as_raw_fd(), TIOCGPTPEER, O_RDWR_NOCTTY_CLOEXEC) })
}

/// Sets the size of a terminal, in characters.
pub fn resize(terminal: &File, rows: u16, columns: u16) -> io::Result<()> {
    const TIOCSWINSZ: c_ulong = 0x5414;
    let size = WinSize {
        rows,
        columns,
        pixels: [0; 2],
    };
    // SAFETY: TIOCSWINSZ reads a struct winsize.
    check(unsafe { ioctl(terminal.as_raw_fd(), TIOCSWINSZ, &size) }).map(drop)
}

/// The key that a terminal makes SIGINT of; `None` while it makes none of any, as programs want it that take all keys.
pub fn interrupt_key(terminal: &File) -> Option<u8> {
    const TCGETS: c_ulong = 0x5401;
    const ISIG: u32 = 1;
    const VINTR: usize = 0;
    /// In `c_cc`, that there is no such key.
    const DISABLED: u8 = 0;
    let mut state = Termios {
        modes: [0; 4],
        line: 0,
        keys: [DISABLED; 19],
    };
    // SAFETY: TCGETS writes the kernel's struct termios.
    check(unsafe { ioctl(terminal.as_raw_fd(), TCGETS, &mut state) }).ok()?;
    let [.., local] = state.modes;
    let key = *state.keys.get(VINTR)?;
    (local & ISIG != 0 && key != DISABLED).then_some(key)
}
