//! Doing something in the name of the guest's user.
//!
//! What a guest creates should belong to the user who creates it there. Only root can give files to others, so:
//!
//! * as **root**, this thread takes the user's numbers on for the one system call that creates something. Linux keeps
//!   credentials by thread and only the C library makes them look like the process's, so the raw system calls change
//!   nothing for other threads. The capability to pass over file permissions is kept meanwhile: the guest's kernel has
//!   checked them, and knows of groups that the request does not name.
//! * as **anybody else**, everything belongs to whoever runs sarang, whatever the guest's user.

use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::{
    CapabilitySet, capabilities, set_capabilities, set_thread_res_gid, set_thread_res_uid,
};

use super::wire::Caller;

/// Who this process is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    uid: Uid,
    gid: Gid,
}

impl Host {
    /// As things stand for this thread.
    pub fn current() -> Host {
        Host {
            uid: geteuid(),
            gid: getegid(),
        }
    }

    /// Whether this is root, who may pass over the host's permissions.
    pub fn is_root(self) -> bool {
        self.uid.is_root()
    }

    /// Does something as `caller` if this is root, else as this process. A number that the host does not allow, as in a
    /// container that maps only some, counts as the process's own.
    pub fn create_as<T>(self, caller: Caller, create: impl FnOnce() -> T) -> T {
        if !self.is_root() {
            return create();
        }
        let gid = Gid::from_raw_unchecked(caller.gid);
        let uid = Uid::from_raw_unchecked(caller.uid);
        // -1 would leave them as they are.
        let change_gid = gid != self.gid && caller.gid != u32::MAX;
        let change_uid = uid != self.uid && caller.uid != u32::MAX;
        // The group first, since that needs the user; back the other way round.
        let changed_gid = change_gid && set_thread_res_gid(None, gid, None).is_ok();
        let changed_uid = change_uid && set_thread_res_uid(None, uid, None).is_ok();
        if changed_uid && let Ok(mut sets) = capabilities(None) {
            sets.effective = sets.permitted & CapabilitySet::DAC_OVERRIDE;
            // Without, permissions are checked against the one group that is known.
            let _ = set_capabilities(None, sets);
        }
        let result = create();
        // Back to a saved identity: that is always allowed, and brings the capabilities back.
        if changed_uid {
            let _ = set_thread_res_uid(None, self.uid, None);
        }
        if changed_gid {
            let _ = set_thread_res_gid(None, self.gid, None);
        }
        result
    }
}
