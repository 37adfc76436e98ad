//! A timer as a descriptor, which a device waits for as for any other of its
//! [`sources`](crate::virtio::VirtioDevice::sources): `timerfd(2)`.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A timer that is not set.
///
/// # Errors
/// When the host gives none.
pub fn idle() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    Ok(timerfd_create(TimerfdClockId::Monotonic, flags)?)
}

/// A timer that is due again and again, this long after the last time.
///
/// # Errors
/// When the host gives none.
pub fn every(interval: Duration) -> io::Result<OwnedFd> {
    let timer = idle()?;
    set(&timer, interval, interval);
    Ok(timer)
}

/// Has a timer be due once, `after` from now; zero stops it.
pub fn once(timer: &OwnedFd, after: Duration) {
    set(timer, after, Duration::ZERO);
}

/// The timer has been seen: it is not readable until it is due again.
pub fn acknowledge(timer: &OwnedFd) {
    let _ = rustix::io::read(timer, &mut [0; 8]);
}

fn set(timer: &OwnedFd, value: Duration, interval: Duration) {
    let timespec = |duration: Duration| Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    };
    let setting = Itimerspec {
        it_interval: timespec(interval),
        it_value: timespec(value),
    };
    // Cannot fail for a timerfd and times of this form.
    let _ = timerfd_settime(timer, TimerfdTimerFlags::empty(), &setting);
}
