//! Whole machines on the scripted hypervisor: what a guest does, and what the run comes to.

use super::*;
use crate::backend::console::Kind;
use crate::guest;
use crate::hv::fake::{FakeHypervisor, Step, Transcript};

fn spec() -> Spec {
    let bytes = guest::bare_metal("hello").unwrap().to_vec();
    Spec::new(Image {
        name: "hello".to_owned(),
        bytes,
    })
}

fn run(script: Vec<Step>, spec: Spec) -> (Report, Arc<Transcript>) {
    let host = FakeHypervisor::new(script);
    let transcript = host.transcript();
    let console = Console::open(&Kind::Off).unwrap();
    let report = Machine::new(&host, spec, console).unwrap().run().unwrap();
    (report, transcript)
}

fn outcome(script: Vec<Step>) -> Outcome {
    run(script, spec()).0.outcome
}

fn printed(text: &str) -> Vec<Step> {
    text.bytes()
        .map(|byte| Step::Out(board::COM1, vec![byte]))
        .collect()
}

#[test]
fn each_register_that_ends_a_run_does_so() {
    let cases = [
        (
            Step::Out(board::PM, vec![5 << 2 | 1 << 5]),
            Outcome::PoweredOff,
        ),
        (Step::Out(board::PM + 2, vec![1]), Outcome::Rebooted),
        (
            Step::Out(board::I8042_COMMAND, vec![0xfe]),
            Outcome::Rebooted,
        ),
        (Step::Out(board::EXIT, vec![3]), Outcome::Exited { code: 3 }),
        (
            Step::Out(board::PVPANIC, vec![1]),
            Outcome::Panicked { message: None },
        ),
        (Step::Shutdown, Outcome::TripleFaulted),
        (Step::SystemEvent(2), Outcome::Rebooted),
    ];
    for (step, expected) in cases {
        assert_eq!(outcome(vec![step.clone()]), expected, "{step:?}");
    }
}

#[test]
fn a_reset_after_a_panic_message_is_the_panic() {
    let mut script = printed("[ 1.0] Kernel panic - not syncing: out of ideas\r\n");
    script.push(Step::Out(board::PM + 2, vec![1]));
    let message = Some("out of ideas".to_owned());
    assert_eq!(outcome(script), Outcome::Panicked { message });
}

#[test]
fn a_guest_that_waits_for_ever_meets_its_time_limit() {
    let spec = Spec {
        timeout: Some(Duration::from_millis(20)),
        ..spec()
    };
    let (report, _) = run(vec![Step::Hlt], spec);
    assert_eq!(report.outcome, Outcome::TimedOut { limit_ms: 20 });
    assert_eq!(report.exit_code, 124);
}

#[test]
fn what_kvm_cannot_serve_ends_with_a_report() {
    let error = hv::InternalError {
        suberror: 1,
        instruction: vec![0xcc],
    };
    let Outcome::InternalError { report } = outcome(vec![Step::InternalError(error)]) else {
        panic!("not an internal error")
    };
    assert!(
        report.contains("int3") && report.contains("sarang doctor"),
        "{report}"
    );
}

#[test]
fn ram_registers_and_interrupt_lines_are_set_up_before_the_first_instruction() {
    let spec = Spec {
        cpus: 3,
        ram_bytes: 4 << 30,
        ..spec()
    };
    let (_, transcript) = run(vec![Step::Shutdown], spec);
    let memory = transcript.memory();
    assert_eq!(memory.iter().map(|slot| slot.len).sum::<u64>(), 4 << 30);
    assert_eq!(memory[1].guest, 4 << 30);
    let registers = transcript.registers();
    assert_eq!(
        registers.len(),
        1,
        "only the first vCPU is at an entry; the others wait for SIPI"
    );
    assert_eq!(registers[0].1.general.rbx, layout::PVH_START_INFO);
    let mut lines = transcript.interrupts();
    lines.sort_unstable();
    assert_eq!(lines, [4, 5]);
}

#[test]
fn a_machine_pauses_resumes_and_stops_from_another_thread() {
    let host = FakeHypervisor::new(vec![]);
    let console = Console::open(&Kind::Off).unwrap();
    let machine = Machine::new(&host, Spec { cpus: 4, ..spec() }, console).unwrap();
    let handle = machine.handle();
    let other = std::thread::spawn(move || {
        handle.pause();
        handle.resume();
        handle.power_button();
        handle.stop(StoppedBy::Interrupt);
    });
    let report = machine.run().unwrap();
    other.join().unwrap();
    assert_eq!(
        report.outcome,
        Outcome::Stopped {
            by: StoppedBy::Interrupt
        }
    );
}

/// A device without purpose, which tells on which thread it is called.
struct Teller {
    own: bool,
    called: std::sync::mpsc::Sender<(bool, Option<String>)>,
}

impl Teller {
    fn tell(&self) {
        let name = std::thread::current().name().map(str::to_owned);
        let _ = self.called.send((self.own, name));
    }
}

impl VirtioDevice for Teller {
    fn name(&self) -> &str {
        if self.own { "OWN0" } else { "SHARED0" }
    }

    fn device_id(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[1]
    }

    fn wants_own_worker(&self) -> bool {
        self.own
    }

    fn activate(&mut self, _: crate::virtio::Activation) {}

    fn process(&mut self, _: usize) -> Result<(), crate::virtio::Malformed> {
        self.tell();
        Ok(())
    }

    fn reset(&mut self) {
        self.tell();
    }

    fn save(&self) -> crate::bus::SavedState {
        crate::bus::SavedState::of(&())
    }

    fn restore(&mut self, _: &crate::bus::SavedState) -> Result<(), crate::bus::RestoreError> {
        Ok(())
    }
}

#[test]
fn a_device_that_asks_for_a_thread_of_its_own_runs_and_ends_on_it() {
    // Status is at 0x70, DriverFeaturesSel at 0x24 and DriverFeatures at 0x20: the guest accepts VERSION_1.
    let script = [0, 0x1000]
        .into_iter()
        .flat_map(|window| {
            [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)].map(|(at, value)| {
                Step::Write(board::VIRTIO_BASE + window + at, vec![value, 0, 0, 0])
            })
        })
        .collect();
    let host = FakeHypervisor::new(script);
    let console = Console::open(&Kind::Off).unwrap();
    let (called, calls) = std::sync::mpsc::channel();
    let teller = |own| -> Box<dyn VirtioDevice> {
        let called = called.clone();
        Box::new(Teller { own, called })
    };
    let devices = vec![teller(true), teller(false)];
    drop(called);
    let machine = Machine::new(&host, Spec { devices, ..spec() }, console).unwrap();
    let handle = machine.handle();
    let vm = std::thread::Builder::new()
        .name("vm".to_owned())
        .spawn(move || machine.run().unwrap())
        .unwrap();
    let first = [calls.recv().unwrap(), calls.recv().unwrap()];
    handle.pause();
    handle.resume();
    handle.stop(StoppedBy::Interrupt);
    vm.join().unwrap();
    let mut all: Vec<_> = first.into_iter().chain(calls).collect();
    all.sort();
    all.dedup();
    assert_eq!(
        all,
        [
            (false, Some("vm".to_owned())),
            (true, Some("OWN0".to_owned()))
        ]
    );
}
