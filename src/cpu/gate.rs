//! The gate in front of the guest: vCPU threads pass it, or park before it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    Open,
    Closed,
    Stopped,
}

struct State {
    position: Position,
    /// vCPUs that may be in the guest or in a device.
    running: usize,
}

/// The barrier that all vCPUs of a machine share. It starts closed.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn new(vcpus: usize) -> Gate {
        let state = State {
            position: Position::Closed,
            running: vcpus,
        };
        Gate {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Called by a vCPU that is outside the guest. Parks while the gate is closed; false means: end.
    pub(super) fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.position == Position::Closed {
            state.running -= 1;
            self.changed.notify_all();
            state = self.wait_while(state, |state| state.position == Position::Closed);
            state.running += 1;
        }
        state.position == Position::Open
    }

    /// Called by a vCPU that will not run again.
    pub(super) fn leave(&self) {
        self.lock().running -= 1;
        self.changed.notify_all();
    }

    pub(super) fn open(&self) {
        self.set(Position::Open);
    }

    pub(super) fn close(&self) {
        self.set(Position::Closed);
    }

    pub(super) fn stop(&self) {
        self.set(Position::Stopped);
    }

    pub(super) fn wait_until_all_parked(&self) {
        let state = self.lock();
        drop(self.wait_while(state, |state| state.running > 0));
    }

    fn set(&self, position: Position) {
        let mut state = self.lock();
        // A stopped machine stays stopped.
        if state.position != Position::Stopped {
            state.position = position;
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        condition: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_while(state, condition)
            .unwrap_or_else(PoisonError::into_inner)
    }
}
