//! A machine that is made for one command in its guest.

use std::io;

use serde::Serialize;

use super::log_tail::LogTail;
use super::{GRACE, MachineHandle, Message, Outcome, StoppedBy};
use crate::guest::exec::{Handle, News, Progress, Session};
use crate::guest::plan::WindowSize;
use crate::guest::protocol::{CONSOLE_PREFIX, End};
use crate::worker::signals::Signals;
use crate::worker::{EventLoop, Interest};

/// What came of the command, in the report. How it ended is the run's outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CommandReport {
    /// Whether it got so far as to run.
    pub started: bool,
    /// What init did until then and afterwards.
    pub phases: Vec<PhaseReport>,
}

/// Something that init has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PhaseReport {
    pub name: String,
    /// Milliseconds since the guest's kernel started.
    pub ms: u64,
}

impl CommandReport {
    pub(super) fn of(progress: Progress) -> CommandReport {
        CommandReport {
            started: progress.started,
            phases: progress
                .phases
                .into_iter()
                .map(|phase| PhaseReport {
                    name: phase.name,
                    ms: phase.microseconds / 1000,
                })
                .collect(),
        }
    }
}

/// Connects the command with this process's streams.
pub(super) fn attach(
    session: Session,
    worker: &mut EventLoop,
    handle: &MachineHandle,
) -> io::Result<Handle> {
    let handle = handle.clone();
    session.attach(
        worker,
        Box::new(move |worker, news| match news {
            News::Quit => handle.stop(StoppedBy::Interrupt),
            // The way through the kernel's own power-off is long, and nothing happens on it.
            News::Stopping => handle.send(Message::CommandOver),
            // The guest powers off by itself, or else it is not waited for much longer.
            News::Over => {
                let handle = handle.clone();
                worker.after(GRACE, Box::new(move |_| handle.send(Message::CommandOver)));
            }
        }),
    )
}

/// Lets the command's terminal have the size of the one on standard output, whenever SIGWINCH says that it has changed.
pub(super) fn follow_terminal(session: Handle, worker: &mut EventLoop) -> Result<(), super::Error> {
    let mut signals = Signals::block(&[libc::SIGWINCH])?;
    worker.add(
        signals.fd()?,
        Interest::READ,
        Box::new(move |worker, _, _| {
            while signals.take().is_some() {}
            session.resize(worker, window_size());
        }),
    )?;
    Ok(())
}

/// The size of the terminal on standard output; 0 by 0 when it does not say.
fn window_size() -> WindowSize {
    rustix::termios::tcgetwinsize(io::stdout())
        .map(|size| WindowSize {
            rows: size.ws_row,
            columns: size.ws_col,
        })
        .unwrap_or_default()
}

/// What the end of a machine means for its command. Whatever the guest did against its will stays what it is.
pub(super) fn outcome(ended: Outcome, progress: &Progress, log: &LogTail) -> Outcome {
    if !matches!(ended, Outcome::PoweredOff | Outcome::Rebooted) {
        return ended;
    }
    match (&progress.exit, &progress.failure) {
        (Some(exit), _) => match &exit.end {
            End::Exited(status) => Outcome::CommandExited { status: *status },
            End::Killed(signal) => Outcome::CommandKilled {
                signal: *signal,
                out_of_memory: exit.out_of_memory,
            },
            End::NotFound(message) => Outcome::CommandNotFound {
                message: message.clone(),
            },
            End::NotExecutable(message) => Outcome::CommandNotExecutable {
                message: message.clone(),
            },
            End::CouldNotStart(message) => Outcome::GuestFailed {
                message: message.clone(),
            },
        },
        (None, Some(failure)) => Outcome::GuestFailed {
            message: failure.clone(),
        },
        // A command that powers its machine off has not failed.
        (None, None) if progress.started => ended,
        (None, None) => Outcome::GuestFailed {
            message: log
                .last_line_after(CONSOLE_PREFIX)
                .unwrap_or_else(|| "it ended before it could run the command".to_owned()),
        },
    }
}

/// CPU time of this process so far.
pub(super) fn cpu_ms() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let (seconds, nanos) = (
        u64::try_from(time.tv_sec).unwrap_or(0),
        u64::try_from(time.tv_nsec).unwrap_or(0),
    );
    seconds * 1000 + nanos / 1_000_000
}

/// The most memory that this process has had (proc(5), `VmHWM`); 0 where the host does not say.
pub(super) fn peak_memory_kib() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.split_whitespace().next()?.parse().ok()
        })
        .unwrap_or(0)
}
