//! vCPU threads: each runs one virtual CPU, and all of them can be paused, resumed and stopped together.
//!
//! A vCPU spends its life inside the `KVM_RUN` ioctl. To get it out, another thread sets the vCPU's
//! `immediate_exit` flag, so that the *next* entry returns at once, and sends the thread a signal, so that the
//! *current* stay in the guest ends. Whichever of the two comes first, none is lost.

mod gate;
mod run_loop;

pub use run_loop::{CrashCause, CrashSite, VcpuEnd};

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::hv::{self, Kick, Vcpu};
use gate::Gate;

/// Called once for each vCPU, on its own thread, when it will not run again.
pub type OnEnd = Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>;

/// The running vCPUs of one machine.
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<VcpuThread>,
}

struct VcpuThread {
    kick: Arc<dyn Kick>,
    join: JoinHandle<()>,
}

/// Real-time signals are for applications; the first one kicks vCPUs.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// The handler has nothing to do: what counts is that the signal interrupts `KVM_RUN`.
extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuThreads {
    /// Starts a thread for each vCPU. They stay outside the guest until [`resume`](Self::resume).
    ///
    /// # Errors
    /// When the host gives no thread or signal.
    pub fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        bus: &Arc<Bus>,
        on_end: &OnEnd,
    ) -> hv::Result<VcpuThreads> {
        register_signal_handler(kick_signal(), ignore)
            .map_err(|error| hv::Error::new("install the signal that stops vCPUs", error))?;
        let gate = Arc::new(Gate::new(vcpus.len()));
        let mut threads = VcpuThreads {
            gate: Arc::clone(&gate),
            threads: Vec::new(),
        };
        for (index, mut vcpu) in (0..).zip(vcpus) {
            let kick = vcpu.kick_handle()?;
            let (bus, gate, on_end) = (Arc::clone(bus), Arc::clone(&gate), Arc::clone(on_end));
            let join = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    let end = run_loop::run(&mut *vcpu, index, &bus, &gate);
                    gate.leave();
                    on_end(index, end);
                })
                .map_err(|error: io::Error| hv::Error::new("start a vCPU's thread", error))?;
            threads.threads.push(VcpuThread { kick, join });
        }
        Ok(threads)
    }

    /// Lets all vCPUs into the guest.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Returns when no vCPU is in the guest or in a device any more.
    pub fn pause(&self) {
        self.gate.close();
        self.kick();
        self.gate.wait_until_all_parked();
    }

    /// Ends all threads. No vCPU runs again.
    pub fn stop(&mut self) {
        self.gate.stop();
        self.kick();
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has said so already; there is nothing left to join.
            let _ = thread.join.join();
        }
    }

    fn kick(&self) {
        for thread in &self.threads {
            thread.kick.request_exit();
            // Fails only when the thread has ended already.
            let _ = thread.join.kill(kick_signal());
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
