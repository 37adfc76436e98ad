//! The interactive terminal: raw while the guest runs, as it was before whatever happens.
//!
//! A terminal's line discipline (termios(3)) echoes, edits lines and turns Ctrl-C into a signal. A
//! guest has a line discipline of its own, so ours must pass every byte on: *raw mode*. The mode
//! belongs to the terminal, not to the process, and outlives it; a process that dies without putting
//! it back leaves the user with a shell that does not echo. So it is put back when the guard is
//! dropped, by a panic hook, and by handlers of the signals that end a process.
//!
//! *Output processing* (`OPOST`) makes a line feed begin a new line as well. It stays on for a serial console, where a
//! small guest may print nothing but line feeds, and goes off where the guest has a terminal that does it: a full-screen
//! program there counts on a bare line feed to be one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};

/// The modes to put back; null when there is nothing to do. Whoever swaps the pointer out puts them
/// back, so it happens once. The memory behind it is never freed: a signal handler may be reading it.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(ptr::null_mut());
static TERMINAL: AtomicI32 = AtomicI32::new(-1);

/// Faults, whatever handled them before (Rust's own handler only prints a message on overflow of the stack).
const FAULTS: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGABRT,
    libc::SIGILL,
    libc::SIGFPE,
];
/// Requests to end, handled here only where nobody else does.
const REQUESTS: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// What becomes of a line feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// It begins a new line.
    Processed,
    /// It goes down one line, and nothing else.
    Exact,
}

/// Keeps the terminal raw until dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on standard input raw, for a guest whose own terminal processes its output.
    ///
    /// # Errors
    /// When there is none, or its modes cannot be changed.
    pub fn of_standard_input() -> io::Result<RawTerminal> {
        RawTerminal::enter(super::STDIN, Output::Exact)
    }

    /// Makes the terminal `fd` raw. One terminal at a time; `fd` must stay open until
    /// [`restore_terminal`].
    ///
    /// # Errors
    /// When `fd` is no terminal, or its modes cannot be changed.
    pub fn enter(fd: BorrowedFd<'static>, output: Output) -> io::Result<RawTerminal> {
        let raw_fd = fd.as_raw_fd();
        // SAFETY: `termios` is plain old data, for which all zeroes is a value.
        let mut modes: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `modes` is writable and of the type that tcgetattr fills.
        if unsafe { libc::tcgetattr(raw_fd, &raw mut modes) } != 0 {
            return Err(io::Error::last_os_error());
        }
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install_hooks);
        TERMINAL.store(raw_fd, Ordering::Release);
        SAVED.store(Box::into_raw(Box::new(modes)), Ordering::Release);
        let guard = RawTerminal(());
        // SAFETY: `modes` is a valid termios that tcgetattr filled.
        unsafe { libc::cfmakeraw(&raw mut modes) };
        if output == Output::Processed {
            modes.c_oflag |= libc::OPOST;
        }
        // SAFETY: `modes` is a valid termios.
        if unsafe { libc::tcsetattr(raw_fd, libc::TCSANOW, &raw const modes) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(guard)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Puts the terminal's modes back, if they are not back yet. Async-signal-safe: callable from a
/// signal handler, and right before `_exit`.
pub fn restore_terminal() {
    let saved = SAVED.swap(ptr::null_mut(), Ordering::AcqRel);
    if saved.is_null() {
        return;
    }
    // SAFETY: `saved` came from Box::into_raw and is never freed, so it is readable for ever. The
    // signal sets are plain old data on this stack. All four functions are async-signal-safe
    // (signal-safety(7); pthread_sigmask is on Linux).
    unsafe {
        // In a background process, tcsetattr would stop us with SIGTTOU.
        let (mut block, mut before): (libc::sigset_t, libc::sigset_t) =
            (std::mem::zeroed(), std::mem::zeroed());
        libc::sigemptyset(&raw mut block);
        libc::sigaddset(&raw mut block, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const block, &raw mut before);
        libc::tcsetattr(TERMINAL.load(Ordering::Acquire), libc::TCSANOW, saved);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
    }
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    restore_terminal();
    // SA_RESETHAND has put the default action back, and SA_NODEFER leaves the signal unblocked.
    // SAFETY: raise is async-signal-safe.
    unsafe { libc::raise(signal) };
}

fn install_hooks() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        previous(info);
    }));
    for signal in FAULTS {
        handle(signal);
    }
    for signal in REQUESTS {
        // SAFETY: `sigaction` is plain old data; a null new action only asks for the present one.
        let is_default = unsafe {
            let mut present: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, ptr::null(), &raw mut present) == 0
                && present.sa_sigaction == libc::SIG_DFL
        };
        if is_default {
            handle(signal);
        }
    }
}

fn handle(signal: libc::c_int) {
    // SAFETY: `sigaction` is plain old data, and all zeroes an empty mask. The handler is a function
    // with the signature that a handler without SA_SIGINFO has, and calls only async-signal-safe
    // functions. SA_ONSTACK lets it run after an overflow of the stack.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = restore_and_die as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigaction(signal, &raw const action, ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::children;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    const WAY_TO_END: &str = "SARANG_TEST_WAY_TO_END";

    /// Not a test by itself: the process that the next test starts on a terminal.
    #[test]
    fn a_process_that_ends_in_the_given_way() {
        let Ok(way) = std::env::var(WAY_TO_END) else {
            return;
        };
        for signal in REQUESTS {
            // A shell starts what runs in the background with some of them ignored.
            // SAFETY: the default action is no function of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        // SAFETY: standard input stays open to the end of the process.
        let stdin = unsafe { BorrowedFd::borrow_raw(0) };
        let guard = RawTerminal::enter(stdin, Output::Processed).unwrap();
        assert!(!cooked(stdin));
        match way.parse::<libc::c_int>() {
            // SAFETY: raise has no preconditions.
            Ok(signal) => unsafe {
                libc::raise(signal);
            },
            Err(_) if way == "panic" => panic!("as asked"),
            Err(_) => drop(guard),
        }
    }

    fn cooked(fd: BorrowedFd<'_>) -> bool {
        let modes = tcgetattr(fd).unwrap().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }

    #[test]
    fn the_terminal_is_put_back_however_the_process_ends() {
        use std::os::fd::AsFd;
        let signals = FAULTS.into_iter().chain(REQUESTS);
        let ways = signals
            .map(|signal| (signal.to_string(), Some(signal)))
            .chain([("panic".to_owned(), None), ("drop".to_owned(), None)]);
        for (way, signal) in ways {
            let _child = children::some();
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = openpt(flags).unwrap();
            grantpt(&master).unwrap();
            unlockpt(&master).unwrap();
            let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--test-threads=1"])
                .arg("backend::console::terminal::tests::a_process_that_ends_in_the_given_way")
                .env(WAY_TO_END, &way)
                .stdin(terminal.try_clone().unwrap())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let start = Instant::now();
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                assert!(start.elapsed() < Duration::from_secs(20), "{way}");
                std::thread::sleep(Duration::from_millis(2));
            };
            assert_eq!(status.signal(), signal, "{way}");
            assert_eq!(status.success(), way == "drop", "{way}");
            assert!(cooked(terminal.as_fd()), "{way}");
        }
    }
}
