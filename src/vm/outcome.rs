//! How a run ended: one type that is the exit code, the JSON and the sentence.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// The one honest answer to "what happened to the guest?".
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest restarted the machine; there is nothing to restart into.
    Rebooted,
    /// The guest wrote this code to the debug exit port.
    Exited { code: u8 },
    /// The time limit passed.
    TimedOut { limit_ms: u64 },
    /// The guest kernel panicked, with its own words if they were seen on the console.
    Panicked { message: Option<String> },
    /// The guest triple-faulted.
    TripleFaulted,
    /// KVM could not go on; the text is a report of several lines.
    InternalError { report: String },
    /// The command in the guest ended with this status.
    CommandExited { status: u8 },
    /// A signal killed the command in the guest.
    CommandKilled {
        signal: u8,
        /// The guest's kernel did it, because memory ran out.
        out_of_memory: bool,
    },
    /// The guest has no such program.
    CommandNotFound { message: String },
    /// The guest has the program and cannot execute it.
    CommandNotExecutable { message: String },
    /// The guest did not get as far as to run the command.
    GuestFailed { message: String },
    /// What the last of the steps waited for was seen on the console, which ends the run.
    Expected,
    /// The guest ended in order, but before all steps were done.
    NotExpected { guest: Box<Outcome> },
    /// Someone on the host ended the run before the guest did.
    Stopped { by: StoppedBy },
}

/// Who ended a run from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoppedBy {
    /// Ctrl-a x on the console, or SIGINT.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

impl Outcome {
    /// The exit code of the process.
    ///
    /// | code | outcome |
    /// | --- | --- |
    /// | 0 | powered off, or rebooted with nothing to reboot into |
    /// | 0 | `--expect`, the last step, was seen |
    /// | 1 | the guest ended with 0, but before all of `--expect` and `--send` were done |
    /// | N | the guest wrote N to the exit port |
    /// | 80, 81, 82 | kernel panic, triple fault, KVM could not go on |
    /// | N, 128+N | the command ended with status N, was killed by signal N |
    /// | 124 | the time limit passed |
    /// | 125 | the guest could not run the command |
    /// | 126, 127 | the command cannot be executed, is not found |
    /// | 130, 143 | stopped from the host, as a shell reports SIGINT and SIGTERM |
    pub fn exit_code(&self) -> u8 {
        match self {
            Outcome::PoweredOff | Outcome::Rebooted | Outcome::Expected => 0,
            Outcome::NotExpected { .. } => 1,
            Outcome::Exited { code } => *code,
            Outcome::CommandExited { status } => *status,
            Outcome::CommandKilled { signal, .. } => 128_u8.saturating_add(*signal),
            Outcome::GuestFailed { .. } => 125,
            Outcome::CommandNotExecutable { .. } => 126,
            Outcome::CommandNotFound { .. } => 127,
            Outcome::Panicked { .. } => 80,
            Outcome::TripleFaulted => 81,
            Outcome::InternalError { .. } => 82,
            Outcome::TimedOut { .. } => 124,
            Outcome::Stopped {
                by: StoppedBy::Interrupt,
            } => 130,
            Outcome::Stopped {
                by: StoppedBy::Terminate,
            } => 143,
        }
    }
}

impl Outcome {
    /// Whether a program in the guest has chosen how the run ended, and has said what there was to say.
    pub fn is_programs_own(&self) -> bool {
        match self {
            Outcome::Exited { .. } | Outcome::CommandExited { .. } => true,
            Outcome::CommandKilled { out_of_memory, .. } => !out_of_memory,
            _ => false,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PoweredOff => f.write_str("the guest powered off"),
            Outcome::Rebooted => f.write_str("the guest rebooted"),
            Outcome::Exited { code } => write!(f, "the guest ended the run with code {code}"),
            Outcome::CommandExited { status } => write!(f, "the command ended with status {status}"),
            Outcome::CommandKilled {
                signal,
                out_of_memory: false,
            } => write!(f, "signal {signal} killed the command"),
            Outcome::CommandKilled { .. } => f.write_str(
                "the guest's kernel killed the command because memory ran out; give the guest more with --mem",
            ),
            Outcome::CommandNotFound { message } | Outcome::CommandNotExecutable { message } => {
                f.write_str(message)
            }
            Outcome::GuestFailed { message } => write!(f, "the guest could not run the command: {message}"),
            Outcome::TimedOut { limit_ms } => {
                let limit = Duration::from_millis(*limit_ms);
                write!(f, "the guest did not end within {limit:?}")
            }
            Outcome::Panicked {
                message: Some(message),
            } => {
                write!(f, "the guest kernel panicked: {message}")
            }
            Outcome::Panicked { message: None } => f.write_str("the guest kernel panicked"),
            Outcome::TripleFaulted => f.write_str("the guest triple-faulted"),
            Outcome::InternalError { report } => f.write_str(report),
            Outcome::Expected => f.write_str("what was waited for was seen"),
            Outcome::NotExpected { guest } => {
                write!(f, "{guest}, which was not expected yet")
            }
            Outcome::Stopped {
                by: StoppedBy::Interrupt,
            } => f.write_str("the guest was stopped by an interrupt"),
            Outcome::Stopped {
                by: StoppedBy::Terminate,
            } => f.write_str("the guest was stopped by a termination signal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_has_its_exit_code_and_its_name_in_json() {
        let table = [
            (Outcome::PoweredOff, 0, r#"{"outcome":"powered-off"}"#),
            (Outcome::Rebooted, 0, r#"{"outcome":"rebooted"}"#),
            (
                Outcome::Exited { code: 42 },
                42,
                r#"{"outcome":"exited","code":42}"#,
            ),
            (
                Outcome::TimedOut { limit_ms: 5 },
                124,
                r#"{"outcome":"timed-out","limit_ms":5}"#,
            ),
            (
                Outcome::Panicked { message: None },
                80,
                r#"{"outcome":"panicked","message":null}"#,
            ),
            (
                Outcome::TripleFaulted,
                81,
                r#"{"outcome":"triple-faulted"}"#,
            ),
            (Outcome::Expected, 0, r#"{"outcome":"expected"}"#),
            (
                Outcome::NotExpected {
                    guest: Box::new(Outcome::Exited { code: 0 }),
                },
                1,
                r#"{"outcome":"not-expected","guest":{"outcome":"exited","code":0}}"#,
            ),
            (
                Outcome::Stopped {
                    by: StoppedBy::Terminate,
                },
                143,
                r#"{"outcome":"stopped","by":"terminate"}"#,
            ),
        ];
        for (outcome, code, json) in table {
            assert_eq!(outcome.exit_code(), code);
            assert_eq!(serde_json::to_string(&outcome).unwrap(), json);
        }
        assert_eq!(
            Outcome::InternalError {
                report: String::new()
            }
            .exit_code(),
            82
        );
    }
}
