//! What a run came to, as the library's caller and `--json` get it.

use super::{CommandReport, ConsoleDevice, Outcome, ScriptReport};
use crate::bus::ExitCounts;
use crate::virtio::dev::balloon;

/// What a run came to.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub outcome: Outcome,
    pub exit_code: u8,
    pub name: String,
    pub console: ConsoleDevice,
    /// Time from the run's beginning to its end.
    pub wall_ms: u64,
    pub exits: ExitCounts,
    /// CPU time of this process, vCPUs and devices.
    pub cpu_ms: u64,
    /// The most memory that this process had, guest RAM included.
    pub peak_memory_kib: u64,
    /// What came of the command, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandReport>,
    /// How far the steps have come, if there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<ScriptReport>,
    /// The last that came from the console.
    #[serde(skip)]
    pub log: Vec<u8>,
    /// How the balloon stood at the end, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<balloon::Report>,
}
