//! Signals as readable events (signalfd(2)), so that they are served by the event loop like any device.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

/// A set of signals that no longer interrupt, but wait to be read.
pub struct Signals {
    fd: OwnedFd,
}

/// Keeps all signals from this thread: they are for the one that waits for them, and this one may be older than its asking
/// for them.
pub fn block_all() {
    // SAFETY: a signal set is plain data, which sigfillset fills before it is read.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
}

impl Signals {
    /// Blocks `numbers` for this thread and all that it starts from now on, and collects them instead.
    ///
    /// # Errors
    /// When a number is no signal, or the host gives no signalfd.
    pub fn block(numbers: &[i32]) -> io::Result<Signals> {
        for &number in numbers {
            block_signal(number).map_err(|error| io::Error::other(error.to_string()))?;
        }
        let set = create_sigset(numbers).map_err(io::Error::from)?;
        // SAFETY: `set` is a valid signal set, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Signals {
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    /// A descriptor that is readable while signals wait.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// The number of the next waiting signal.
    pub fn take(&mut self) -> Option<i32> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let len = std::mem::size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer has room for the one record of `len` bytes that is asked for.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        // SAFETY: the kernel writes whole records only, and it wrote one.
        let info = (usize::try_from(read) == Ok(len)).then(|| unsafe { info.assume_init() })?;
        i32::try_from(info.ssi_signo).ok()
    }
}
