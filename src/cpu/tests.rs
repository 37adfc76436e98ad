//! The run loop and the gate, driven by scripted exits.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::bus::{Action, AddressMap, Device, RestoreError, SavedState};
use crate::hv::Hypervisor;
use crate::hv::fake::{FakeHypervisor, Step, Transcript};

/// Answers reads with its offset, and ends the run when 0x42 is written.
struct Echo;

impl Device for Echo {
    fn name(&self) -> &str {
        "ECHO"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        if data == [0x42] {
            Action::Exit(7)
        } else {
            Action::Continue
        }
    }

    fn save(&self) -> SavedState {
        SavedState::of(&())
    }

    fn restore(&self, _state: &SavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

fn start(
    script: Vec<Step>,
    vcpus: u32,
) -> (VcpuThreads, Receiver<VcpuEnd>, Arc<Transcript>, Arc<Bus>) {
    let mut io = AddressMap::new();
    io.insert(0x10, 4, Arc::new(Echo)).unwrap();
    let bus = Arc::new(Bus::new(io, AddressMap::new(), None));
    let host = FakeHypervisor::new(script);
    let vm = host.create_vm().unwrap();
    let vcpus = (0..vcpus)
        .map(|index| vm.create_vcpu(index).unwrap())
        .collect();
    let (sender, receiver) = channel();
    let on_end: OnEnd = Arc::new(move |_, end| drop(sender.send(end)));
    let threads = VcpuThreads::start(vcpus, &bus, &on_end).unwrap();
    (threads, receiver, host.transcript(), bus)
}

#[test]
fn reads_are_answered_by_the_owner_of_the_address_and_others_float_high() {
    let script = vec![
        Step::In(0x12, 1),
        Step::In(0x99, 2),
        Step::Read(0xd000_0000, 4),
        Step::Shutdown,
    ];
    let (threads, ends, transcript, bus) = start(script, 1);
    threads.resume();
    assert!(matches!(ends.recv().unwrap(), VcpuEnd::TripleFault));
    assert_eq!(
        transcript.answers(),
        [vec![2], vec![0xff; 2], vec![0xff; 4]]
    );
    assert_eq!(bus.exit_counts().unclaimed, 2);
}

#[test]
fn a_devices_action_ends_the_run() {
    let (threads, ends, _, _) = start(
        vec![Step::Out(0x10, vec![1]), Step::Out(0x10, vec![0x42])],
        1,
    );
    threads.resume();
    assert!(matches!(
        ends.recv().unwrap(),
        VcpuEnd::Action(Action::Exit(7))
    ));
}

#[test]
fn what_kvm_cannot_serve_is_reported_with_registers() {
    let error = InternalError {
        suberror: 1,
        instruction: vec![0xcc],
    };
    let (threads, ends, _, _) = start(vec![Step::InternalError(error.clone())], 1);
    threads.resume();
    let VcpuEnd::Crash(site) = ends.recv().unwrap() else {
        panic!("not a crash")
    };
    assert_eq!(site.cause, CrashCause::InternalError(error));
    assert!(site.registers.is_some());
}

#[test]
fn vcpus_wait_for_the_first_resume_and_pause_and_stop_together() {
    let (mut threads, ends, transcript, _) = start(vec![Step::In(0x11, 1)], 4);
    threads.pause();
    assert!(
        transcript.answers().is_empty(),
        "nothing runs before the gate opens"
    );
    for _ in 0..20 {
        threads.resume();
        threads.pause();
    }
    threads.resume();
    threads.stop();
    assert_eq!(
        ends.iter()
            .take(4)
            .filter(|end| matches!(end, VcpuEnd::Stopped))
            .count(),
        4
    );
}

use crate::hv::InternalError;
