//! The contract between the bus and a device model.

use crate::trace::{Direction, Register};

/// What a guest's write asks of the machine. A device returns it; only the vCPU loop acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: run on.
    Continue,
    /// Switch the machine off (ACPI S5).
    PowerOff,
    /// Restart the machine.
    Reset,
    /// End the run with this code (the debug exit port).
    Exit(u8),
    /// The guest kernel reported that it panicked.
    Panic,
}

/// A device's volatile state in the form it is saved in.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedState(Vec<u8>);

/// Saved state that this device cannot take back.
#[derive(Debug, thiserror::Error)]
#[error("the saved state of {device} does not fit this version of it: {reason}")]
pub struct RestoreError {
    pub device: String,
    pub reason: String,
}

impl SavedState {
    /// Serializes a device's volatile state.
    pub fn of<T: serde::Serialize>(state: &T) -> SavedState {
        // Postcard into a vector fails only for types it cannot describe, which is a defect of the
        // state's type and shows in that device's own test; an empty state is refused on restore.
        SavedState(postcard::to_stdvec(state).unwrap_or_default())
    }

    /// The state back, for the device called `device`.
    ///
    /// # Errors
    /// When the bytes are not such a state.
    pub fn to<T: serde::de::DeserializeOwned>(&self, device: &str) -> Result<T, RestoreError> {
        postcard::from_bytes(&self.0).map_err(|error| RestoreError {
            device: device.to_owned(),
            reason: error.to_string(),
        })
    }
}

/// A device on one of the buses.
///
/// Offsets are in bytes from the start of the device's range. `data` is 1 to 8 bytes, little-endian,
/// and lies wholly inside the range; *which* offset, width and value a guest picks is up to the
/// guest, so an implementation answers all of them. Methods take `&self`: several vCPUs may call at
/// once, and a device guards its own volatile state.
pub trait Device: Send + Sync {
    /// The device's name in traces, as a PC's manual calls it: `COM1`, `RTC`.
    fn name(&self) -> &str;

    /// The guest reads; the device fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data`.
    fn write(&self, offset: u64, data: &[u8]) -> Action;

    /// The register at `offset` as things stand now (some registers share an address).
    fn register(&self, offset: u64, direction: Direction) -> Option<&'static Register> {
        let _ = (offset, direction);
        None
    }

    /// The volatile state. May be called only while all vCPUs are paused.
    fn save(&self) -> SavedState;

    /// Takes a saved state back. May be called only while all vCPUs are paused.
    ///
    /// # Errors
    /// When the state was not saved by this version of this device.
    fn restore(&self, state: &SavedState) -> Result<(), RestoreError>;
}
