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

/// What a run comes to whose guest does `script` while the machine goes through `steps`.
fn talked(script: Vec<Step>, steps: &[(&str, &str)]) -> Report {
    let steps = steps.iter().map(|(kind, text)| match *kind {
        "expect" => script::Step::Expect(Pattern::new(text).unwrap()),
        _ => script::Step::Send(text.as_bytes().to_vec()),
    });
    let spec = Spec {
        steps: steps.collect(),
        timeout: Some(Duration::from_secs(60)),
        ..spec()
    };
    run(script, spec).0
}

#[test]
fn the_last_thing_that_was_waited_for_ends_a_run_that_would_not_end() {
    let report = talked(
        printed("one: 1\r\nthen two"),
        &[
            ("expect", r"^(\w+): (\d)$"),
            ("send", "x"),
            ("expect", "two"),
        ],
    );
    assert_eq!(report.outcome, Outcome::Expected);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["outcome"], "expected");
    let script = serde_json::json!({"steps": 3, "done": 3, "matches": [
        {"text": "one: 1", "groups": ["one", "1"]},
        {"text": "two", "groups": []},
    ]});
    assert_eq!(json["script"], script);
}

#[test]
fn how_the_guest_ends_does_not_matter_after_the_last_match_and_does_before_it() {
    let power_off = || Step::Out(board::PM, vec![5 << 2 | 1 << 5]);
    let not_expected = Outcome::NotExpected {
        guest: Box::new(Outcome::PoweredOff),
    };
    for (end, regex, outcome, code) in [
        (power_off(), "done", Outcome::Expected, 0),
        (Step::Shutdown, "done", Outcome::Expected, 0),
        (power_off(), "all done$", Outcome::Expected, 0),
        (power_off(), "all done!", not_expected, 1),
        (Step::Shutdown, "all done!", Outcome::TripleFaulted, 81),
    ] {
        let mut script = printed("all done");
        script.push(end);
        let report = talked(script, &[("expect", regex)]);
        assert_eq!(
            (report.outcome, report.exit_code),
            (outcome, code),
            "{regex}"
        );
        let waiting_for = (code != 0).then(|| regex.to_owned());
        assert_eq!(report.script.unwrap().waiting_for, waiting_for);
    }
    let mut script = printed("all done");
    script.push(power_off());
    let report = talked(script, &[("expect", "done"), ("send", "bye")]);
    assert_eq!(report.outcome, Outcome::PoweredOff);
}

/// A character by a virtio console's emergency register, at the machine's first window (virtio 1.3 §4.2.2, §5.3.4).
fn cried(text: &str) -> Vec<Step> {
    text.bytes()
        .map(|byte| Step::Write(board::VIRTIO_BASE + 0x100 + 8, vec![byte, 0, 0, 0]))
        .collect()
}

#[test]
fn a_panic_is_seen_on_a_virtio_console_and_on_the_serial_port_beside_it() {
    for print in [printed, cried] {
        let mut script = print("[ 1.0] Kernel panic - not syncing: out of ideas\r\n");
        script.push(Step::Out(board::PM + 2, vec![1]));
        let spec = Spec {
            console: ConsoleDevice::Virtio,
            ..spec()
        };
        let (report, _) = run(script, spec);
        let message = Some("out of ideas".to_owned());
        assert_eq!(report.outcome, Outcome::Panicked { message });
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""console":"virtio""#), "{json}");
    }
}

#[test]
fn a_virtio_console_and_the_ports_are_the_first_devices_and_their_names_differ() {
    let (port, end) = Port::channel("agent").unwrap();
    for (console, ports, expected) in [
        (ConsoleDevice::Serial, 0, [0, 0]),
        (ConsoleDevice::Virtio, 0, [3, 0]),
        (ConsoleDevice::Serial, 1, [3, 0]),
        (ConsoleDevice::Virtio, 1, [3, 3]),
    ] {
        // DeviceID of the first two windows (virtio 1.3 §4.2.2).
        let mut script: Vec<Step> = [0, 0x1000]
            .map(|window| Step::Read(board::VIRTIO_BASE + window + 8, 4))
            .into();
        script.push(Step::Shutdown);
        let spec = Spec {
            console,
            ports: vec![Arc::clone(&port); ports],
            ..spec()
        };
        let (_, transcript) = run(script, spec);
        let ids: Vec<u32> = transcript
            .answers()
            .iter()
            .map(|bytes| u32::from_le_bytes(bytes[..4].try_into().unwrap()))
            .map(|id| if id == u32::MAX { 0 } else { id })
            .collect();
        assert_eq!(ids, expected, "{console:?}, {ports}");
    }
    drop(end);
    let spec = Spec {
        ports: vec![Arc::clone(&port), port],
        ..spec()
    };
    let console = Console::open(&Kind::Off).unwrap();
    let host = FakeHypervisor::new(vec![]);
    let error = Machine::new(&host, spec, console).err().unwrap();
    assert_eq!(
        error.to_string(),
        "two ports are called `agent`, and each needs a name of its own"
    );
}

#[test]
fn what_is_printed_by_both_devices_of_a_virtio_console_goes_to_one_place() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut script = printed("early ");
    script.extend(cried("late"));
    script.push(Step::Shutdown);
    let spec = Spec {
        console: ConsoleDevice::Virtio,
        ..spec()
    };
    let console = Console::over(None, Some(writer.into())).unwrap();
    let machine = Machine::new(&FakeHypervisor::new(script), spec, console).unwrap();
    machine.run().unwrap();
    assert_eq!(io::read_to_string(reader).unwrap(), "early late");
}

#[test]
fn a_virtio_console_has_the_size_of_its_terminal_and_follows_it() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use vmm_sys_util::signal::Killable;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let resize = |columns, rows| {
        let size = rustix::termios::Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
    };
    resize(80, 25);
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let (started, ready) = std::sync::mpsc::channel();
    // A thread of its own, which the signal can be sent to: it is blocked there and nowhere else.
    let thread = std::thread::spawn(move || {
        let console = Console::over(None, Some(terminal)).unwrap();
        let spec = Spec {
            console: ConsoleDevice::Virtio,
            ..spec()
        };
        let mut machine = Machine::new(&FakeHypervisor::new(vec![]), spec, console).unwrap();
        machine.follow_terminal().unwrap();
        let port = machine.console_port.clone().unwrap();
        started.send((machine.handle(), port)).unwrap();
        machine.run().unwrap();
    });
    let (handle, port) = ready.recv().unwrap();
    let size = |columns, rows| port::Size { columns, rows };
    assert_eq!(port.size(), size(80, 25));
    port.acknowledge();
    resize(132, 43);
    thread.kill(libc::SIGWINCH).unwrap();
    let bell = port.bell();
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&bell, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1);
    assert_eq!(port.size(), size(132, 43));
    handle.stop(StoppedBy::Terminate);
    thread.join().unwrap();
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
fn the_time_limit_counts_from_the_beginning_of_the_run() {
    let hour = Duration::from_secs(3600);
    let spec = Spec {
        since: Instant::now().checked_sub(hour).unwrap(),
        timeout: Some(hour),
        ..spec()
    };
    let (report, _) = run(vec![Step::Hlt], spec);
    assert_eq!(
        report.outcome,
        Outcome::TimedOut {
            limit_ms: 3_600_000
        }
    );
    assert!(report.wall_ms >= 3_600_000);
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

/// A file of `bytes` bytes, open as persistent memory.
fn persistent(scratch: &tempfile::TempDir, name: &str, bytes: u64, read_only: bool) -> pmem::File {
    let path = scratch.path().join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    pmem::File::open(&pmem::Options { path, read_only }).unwrap()
}

#[test]
fn files_are_memory_slots_above_ram_and_devices_after_the_others() {
    let scratch = tempfile::tempdir().unwrap();
    let window = |index: u64| board::VIRTIO_BASE + index * 0x1000;
    let spec = Spec {
        ram_bytes: 4 << 30,
        devices: vec![Box::new(crate::virtio::dev::rng::Rng::new(0))],
        pmem: vec![
            persistent(&scratch, "a", 2 << 20, false),
            persistent(&scratch, "b", 4 << 20, true),
        ],
        ..spec()
    };
    // DeviceID, and of the configuration space `start` and `size` (virtio 1.3 §4.2.2, §5.19.4).
    let reads = [
        (window(0) + 8, 4),
        (window(1) + 8, 4),
        (window(2) + 8, 4),
        (window(1) + 0x104, 1),
        (window(2) + 0x108, 4),
    ];
    let mut script: Vec<Step> = reads.map(|(at, len)| Step::Read(at, len)).to_vec();
    script.push(Step::Shutdown);
    let (_, transcript) = run(script, spec);
    let slots: Vec<_> = transcript
        .memory()
        .iter()
        .map(|slot| (slot.index, slot.guest >> 30, slot.len, slot.read_only))
        .collect();
    assert_eq!(
        slots,
        [
            (0, 0, 3 << 30, false),
            (1, 4, 1 << 30, false),
            (2, 5, 2 << 20, false),
            (3, 6, 4 << 20, true)
        ]
    );
    let answers = transcript.answers();
    assert_eq!(answers[..3], [[4, 0, 0, 0], [27, 0, 0, 0], [27, 0, 0, 0]]);
    assert_eq!(answers[3], [1], "5 GiB is 0x1_4000_0000");
    assert_eq!(answers[4], (4_u32 << 20).to_le_bytes());
}

#[test]
fn memory_past_the_cpus_addresses_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    // A host without CPUID leaf 8000_0008 has 36 bits: 64 GiB, of which the first 4 are taken.
    let file = persistent(&scratch, "large", 61 << 30, false);
    let host = FakeHypervisor::new(vec![]);
    let pmem = Spec {
        pmem: vec![file],
        ..spec()
    };
    let error = Machine::new(&host, pmem, Console::open(&Kind::Off).unwrap())
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("addresses of 36 bits"),
        "{error}"
    );
}

#[test]
fn a_machine_ends_when_its_memory_is_cut() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = Spec {
        pmem: vec![persistent(&scratch, "file", 2 << 20, false)],
        ..spec()
    };
    let host = FakeHypervisor::new(vec![Step::Hlt]);
    let machine = Machine::new(&host, spec, Console::open(&Kind::Off).unwrap()).unwrap();
    let path = scratch.path().join("file");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    file.set_len(1).unwrap();
    let error = machine.run().unwrap_err().to_string();
    assert!(error.contains("was cut from 2097152 to 1 bytes"), "{error}");
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

impl crate::virtio::VirtioDevice for Teller {
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
    let teller = |own| -> Box<dyn crate::virtio::VirtioDevice> {
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
