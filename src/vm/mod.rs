//! The library's front door: a [`Spec`] in, a running [`Machine`], a typed [`Outcome`] out.
//!
//! ```no_run
//! use std::path::Path;
//! use sarang::backend::console::{Console, Kind};
//! use sarang::hv::kvm::Kvm;
//! use sarang::vm::{Image, Machine, Spec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let host = Kvm::open(Path::new("/dev/kvm"))?;
//! let spec = Spec::new(Image::read(Path::new("hello.elf"))?);
//! let report = Machine::new(&host, spec, Console::open(&Kind::Stdio)?)?.run()?;
//! println!("{}", report.outcome);
//! # Ok(())
//! # }
//! ```

mod boot;
mod command;
mod crash;
mod handle;
mod log_tail;
mod outcome;
mod panic_watch;
mod pattern;
mod report;
mod script;
mod spec;
mod wiring;

pub use command::{CommandReport, PhaseReport};
pub use handle::MachineHandle;
pub use outcome::{Outcome, StoppedBy};
pub use pattern::{Match, Pattern, PatternError};
pub use report::Report;
pub use script::{MATCH_MAX, ScriptReport, Step};
pub use spec::{ConsoleDevice, Image, Spec};

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::arch::x86_64::layout;
use crate::backend::console::{self, Console, Key};
use crate::backend::pmem;
use crate::backend::port::{self, Port};
use crate::board::{self, Board};
use crate::bus::{Action, Bus, Device};
use crate::cpu::{OnEnd, VcpuEnd, VcpuThreads};
use crate::guest::exec;
use crate::hv::{self, Hypervisor, Vcpu};
use crate::loader;
use crate::mem::{self, GuestAddress, GuestRam};
use crate::virtio::dev::balloon;
use crate::virtio::dev::console as virtio_console;
use crate::virtio::dev::pmem::Pmem;
use crate::virtio::transport::mmio::MmioTransport;
use crate::worker::signals::Signals;
use crate::worker::threads::{OnFailure, Threads};
use crate::worker::{self, EventLoop};
use handle::Message;
use log_tail::LogTail;
use panic_watch::PanicWatch;
use script::Talk;
use wiring::Wiring;

/// How long a guest has between the power button and the hard stop.
pub const GRACE: Duration = Duration::from_secs(5);

/// Why sarang, not the guest, failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Hypervisor(#[from] hv::Error),
    #[error(transparent)]
    Loader(#[from] loader::Error),
    #[error(transparent)]
    Memory(#[from] mem::Error),
    #[error(transparent)]
    Board(#[from] board::Error),
    #[error(transparent)]
    Console(#[from] console::Error),
    #[error(transparent)]
    Port(#[from] port::Error),
    #[error(transparent)]
    Ports(#[from] virtio_console::Error),
    #[error(transparent)]
    Pmem(#[from] pmem::Error),
    #[error(
        "RAM and persistent memory reach up to guest address {end:#x}, but a guest of this host has addresses of \
         {bits} bits: use less memory or smaller files"
    )]
    TooHigh { end: u64, bits: u32 },
    #[error("the event loop failed: {0}")]
    Worker(#[from] io::Error),
    #[error("the event loop of {device} failed: {source}")]
    OwnWorker { device: String, source: io::Error },
    #[error("guest memory is too small for what must lie in its first megabyte")]
    NoLowMemory,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine that is ready to run: RAM filled, vCPUs at the kernel's entry.
pub struct Machine {
    // Fixed configuration.
    name: String,
    console_device: ConsoleDevice,
    since: Instant,
    timeout: Option<Duration>,
    // Runtime glue.
    balloon: Option<balloon::Handle>,
    vcpus: Vec<Box<dyn Vcpu>>,
    _vm: Arc<dyn hv::Vm>,
    ram: GuestRam,
    bus: Arc<Bus>,
    board: Board,
    console: Console,
    /// The console's end in the guest, if it is virtio.
    console_port: Option<Arc<Port>>,
    /// For all devices that do not want their own, and the console.
    worker: EventLoop,
    /// For those that do.
    own_workers: Vec<(Arc<MmioTransport>, EventLoop)>,
    handle: MachineHandle,
    panic_watch: Arc<Mutex<PanicWatch>>,
    log: Arc<Mutex<LogTail>>,
    session: Option<exec::Handle>,
    /// The steps and how far they have come, if there are any.
    talk: Option<Talk>,
    /// The files that the guest has as memory.
    pmem: Vec<pmem::Mapping>,
}

impl Machine {
    /// Makes a machine on `hypervisor` and loads what it boots.
    ///
    /// # Errors
    /// One sentence on the image, the memory, the console or the hypervisor.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        mut spec: Spec,
        mut console: Console,
    ) -> Result<Machine, Error> {
        let vm = hypervisor.create_vm()?;
        let ranges: Vec<(GuestAddress, u64)> = layout::ram_ranges(spec.ram_bytes)
            .into_iter()
            .map(|(start, len)| (GuestAddress(start), len))
            .collect();
        let ram = mem::allocate(&ranges)?;
        mem::attach(&ram, &*vm)?;
        let files = std::mem::take(&mut spec.pmem);
        let pmem: Vec<pmem::Mapping> = files.iter().map(|file| file.mapping().clone()).collect();
        let places = boot::place(hypervisor, spec.ram_bytes, &files)?;
        for ((index, mapping), start) in (ranges.len()..).zip(&pmem).zip(&places) {
            let slot = u32::try_from(index).unwrap_or(u32::MAX);
            mem::attach_file(mapping.region(), *start, slot, &*vm)?;
        }
        vm.create_interrupt_controllers()?;
        let wiring = Wiring::new(&console, spec.console, std::mem::take(&mut spec.ports))?;
        let mut devices = wiring.devices;
        devices.append(&mut spec.devices);
        for ((index, file), start) in files.into_iter().enumerate().zip(places) {
            devices.push(Box::new(Pmem::new(index, file, start)));
        }
        let board = Board::new(&vm, &ram, wiring.com1, devices)?;
        let entry = boot::fill(&ram, &spec, &board)?;
        let vcpus = boot::make_vcpus(hypervisor, &*vm, spec.cpus, entry)?;
        let bus = Arc::new(Bus::new(board.io.clone(), board.mmio.clone(), spec.trace));

        let (mut worker, mut own_workers) = (EventLoop::new()?, Vec::new());
        for transport in &board.virtio {
            if transport.wants_own_worker() {
                let mut own = EventLoop::new()?;
                transport.attach(&mut own)?;
                own_workers.push((Arc::clone(transport), own));
            } else {
                transport.attach(&mut worker)?;
            }
        }
        let handle = MachineHandle::new(worker.handle());
        for mapping in &pmem {
            watch_file(mapping, &mut worker, &handle)?;
        }
        let session = match spec.session.take() {
            Some(session) => Some(command::attach(session, &mut worker, &handle)?),
            None => None,
        };
        let panic_watch = Arc::new(Mutex::new(PanicWatch::default()));
        let log = Arc::new(Mutex::new(LogTail::default()));
        let (watch, tail, keys) = (Arc::clone(&panic_watch), Arc::clone(&log), handle.clone());
        let steps = std::mem::take(&mut spec.steps);
        let talk = (!steps.is_empty()).then(|| Talk::new(steps, console.typist(), handle.clone()));
        let listener = talk.clone();
        console.attach(
            &mut worker,
            wiring::end(&board.com1, wiring.port.as_ref()),
            Box::new(move |bytes| {
                lock(&watch).see(bytes);
                lock(&tail).see(bytes);
                if let Some(talk) = &listener {
                    talk.see(bytes);
                }
            }),
            Box::new(move |key| {
                if key == Key::Quit {
                    keys.stop(StoppedBy::Interrupt);
                }
            }),
        )?;
        Ok(Machine {
            name: spec.name,
            console_device: spec.console,
            since: spec.since,
            timeout: spec.timeout,
            balloon: spec.balloon,
            vcpus,
            _vm: vm,
            ram,
            bus,
            board,
            console,
            console_port: wiring.port,
            worker,
            own_workers,
            handle,
            panic_watch,
            log,
            session,
            talk,
            pmem,
        })
    }

    /// A handle for other threads and signal handlers.
    pub fn handle(&self) -> MachineHandle {
        self.handle.clone()
    }

    /// Makes SIGTERM and SIGINT press the power button; a second one, or [`GRACE`], stops the guest hard. A command in the
    /// guest gets the first one itself, if it runs already, and may take its time. To be called before other threads are
    /// started, as these inherit which signals are blocked.
    ///
    /// # Errors
    /// When the host gives no signalfd.
    pub fn stop_on_signals(&mut self) -> Result<(), Error> {
        let mut signals = Signals::block(&[libc::SIGTERM, libc::SIGINT])?;
        let handle = self.handle();
        let session = self.session.clone();
        let mut pressed = false;
        self.worker.add(
            signals.fd()?,
            worker::Interest::READ,
            Box::new(move |worker, _, _| {
                while let Some(signal) = signals.take() {
                    let by = match signal {
                        libc::SIGINT => StoppedBy::Interrupt,
                        _ => StoppedBy::Terminate,
                    };
                    if std::mem::replace(&mut pressed, true) {
                        handle.stop(by);
                    } else if let Some(session) = &session {
                        if !session.signal(worker, signal) {
                            handle.stop(by);
                        }
                    } else {
                        handle.power_button();
                        let handle = handle.clone();
                        worker.after(GRACE, Box::new(move |_| handle.stop(by)));
                    }
                }
            }),
        )?;
        Ok(())
    }

    /// Lets a virtio console, or a command's terminal, have the size of the terminal it is on, now and whenever SIGWINCH
    /// says that it has changed. To be called before other threads are started, as these inherit which signals are blocked.
    ///
    /// # Errors
    /// When the host gives no signalfd.
    pub fn follow_terminal(&mut self) -> Result<(), Error> {
        if let Some(session) = self.session.clone() {
            return command::follow_terminal(session, &mut self.worker);
        }
        let (Some(port), Some(display)) = (self.console_port.clone(), self.console.display())
        else {
            return Ok(());
        };
        let mut signals = Signals::block(&[libc::SIGWINCH])?;
        port.resize(display.size());
        self.worker.add(
            signals.fd()?,
            worker::Interest::READ,
            Box::new(move |_, _, _| {
                while signals.take().is_some() {}
                port.resize(display.size());
            }),
        )?;
        Ok(())
    }

    /// Runs the machine to its end on this thread, which becomes the devices' event loop.
    ///
    /// # Errors
    /// When KVM or the host fails; whatever the guest does is an [`Outcome`].
    pub fn run(mut self) -> Result<Report, Error> {
        if let Some(timeout) = self.timeout {
            let handle = self.handle();
            self.worker.after(
                timeout.saturating_sub(self.since.elapsed()),
                Box::new(move |_| handle.send(Message::TimeoutPassed)),
            );
        }
        let (mut workers, stop_devices) = self.start_own_workers()?;
        let handle = self.handle();
        let on_end: OnEnd = Arc::new(move |vcpu, end| handle.send(Message::VcpuEnded(vcpu, end)));
        let mut threads = VcpuThreads::start(std::mem::take(&mut self.vcpus), &self.bus, &on_end)?;
        threads.resume();
        let ended = self.wait(&threads, &workers);
        threads.stop();
        let balloon = self.balloon.as_ref().map(balloon::Handle::report);
        // On their own threads, since Linux gives up what a thread has under way in an io_uring when the thread ends.
        stop_devices();
        workers.stop();
        self.board.virtio.iter().for_each(|device| device.stop());
        // A stopped guest's last words are worth waiting for, but a reader who never comes is not.
        let patience = matches!(
            ended,
            Ok(Outcome::TimedOut { .. } | Outcome::Stopped { .. } | Outcome::Expected)
        )
        .then_some(Duration::from_secs(1));
        self.console.finish(patience);
        self.bus.flush_trace();
        // A guest that lost a part of its memory has nothing to say for itself.
        self.check_files()?;
        let outcome = self.with_panic(ended?);
        let progress = self.session.as_ref().map(exec::Handle::progress);
        let outcome = match &progress {
            Some(progress) => command::outcome(outcome, progress, &lock(&self.log)),
            None => outcome,
        };
        let (outcome, script) = match &self.talk {
            Some(talk) => {
                let (outcome, script) = talk.finish(outcome);
                (outcome, Some(script))
            }
            None => (outcome, None),
        };
        Ok(Report {
            exit_code: outcome.exit_code(),
            outcome,
            name: self.name.clone(),
            console: self.console_device,
            wall_ms: u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            exits: self.bus.exit_counts(),
            cpu_ms: command::cpu_ms(),
            peak_memory_kib: command::peak_memory_kib(),
            command: progress.map(CommandReport::of),
            script,
            log: lock(&self.log).bytes(),
            balloon,
        })
    }

    /// Starts the threads of the devices that have their own, with what ends the devices on these threads.
    fn start_own_workers(&mut self) -> Result<(Threads, impl FnOnce() + use<>), Error> {
        let (mut loops, mut devices) = (Vec::new(), Vec::new());
        for (transport, events) in self.own_workers.drain(..) {
            let name = transport.name().to_owned();
            devices.push((transport, events.handle()));
            loops.push((name, events));
        }
        let handle = self.handle();
        let on_failure: OnFailure = Arc::new(move |device, error| {
            handle.send(Message::WorkerFailed(device.to_owned(), error));
        });
        let threads = Threads::start(loops, &on_failure)?;
        let stop_devices = move || {
            for (transport, events) in devices {
                events.post(Box::new(move |_| transport.stop()));
            }
        };
        Ok((threads, stop_devices))
    }

    /// Serves the devices and the handle until something ends the run.
    fn wait(&mut self, threads: &VcpuThreads, workers: &Threads) -> Result<Outcome, Error> {
        loop {
            while let Some(message) = self.handle.next() {
                match message {
                    Message::VcpuEnded(vcpu, end) => {
                        if let Some(outcome) = self.outcome_of(vcpu, end)? {
                            return Ok(outcome);
                        }
                    }
                    Message::PowerButton => self.board.power.press_power_button(),
                    Message::Stop(by) => return Ok(Outcome::Stopped { by }),
                    Message::CommandOver => return Ok(Outcome::PoweredOff),
                    Message::Expected => return Ok(Outcome::Expected),
                    Message::FileCut => self.check_files()?,
                    // The devices after the vCPUs, which might still ask something of them.
                    Message::Pause => {
                        threads.pause();
                        workers.pause();
                    }
                    Message::Resume => {
                        workers.resume();
                        threads.resume();
                    }
                    Message::WorkerFailed(device, source) => {
                        return Err(Error::OwnWorker { device, source });
                    }
                    Message::TimeoutPassed => {
                        let limit = self.timeout.unwrap_or_default().as_millis();
                        let limit_ms = u64::try_from(limit).unwrap_or(u64::MAX);
                        return Ok(Outcome::TimedOut { limit_ms });
                    }
                }
            }
            self.worker.run()?;
        }
    }

    /// Whether the guest still has all of the files that are its memory.
    fn check_files(&self) -> Result<(), Error> {
        Ok(self.pmem.iter().try_for_each(pmem::Mapping::check)?)
    }

    fn outcome_of(&self, vcpu: u32, end: VcpuEnd) -> Result<Option<Outcome>, Error> {
        Ok(Some(match end {
            VcpuEnd::Action(Action::PowerOff) => Outcome::PoweredOff,
            VcpuEnd::Action(Action::Reset) => Outcome::Rebooted,
            VcpuEnd::Action(Action::Exit(code)) => Outcome::Exited { code },
            VcpuEnd::Action(Action::Panic) => Outcome::Panicked { message: None },
            VcpuEnd::TripleFault => Outcome::TripleFaulted,
            VcpuEnd::Crash(site) => Outcome::InternalError {
                report: crash::report(vcpu, &site, &self.ram),
            },
            VcpuEnd::Failed(error) => return Err(error.into()),
            VcpuEnd::Action(Action::Continue) | VcpuEnd::Stopped => return Ok(None),
        }))
    }

    /// A reset or triple fault after a panic message *is* the panic.
    fn with_panic(&self, outcome: Outcome) -> Outcome {
        let message = lock(&self.panic_watch).message();
        match outcome {
            Outcome::Rebooted | Outcome::TripleFaulted if message.is_some() => {
                Outcome::Panicked { message }
            }
            Outcome::Panicked { message: None } => Outcome::Panicked { message },
            other => other,
        }
    }
}

/// Has the machine end when the file is cut.
fn watch_file(
    mapping: &pmem::Mapping,
    worker: &mut EventLoop,
    handle: &MachineHandle,
) -> io::Result<()> {
    let Some(changes) = mapping.changes().cloned() else {
        return Ok(());
    };
    // What happened before the file was watched is not told.
    if mapping.check().is_err() {
        handle.send(Message::FileCut);
    }
    let (mapping, handle) = (mapping.clone(), handle.clone());
    let look = move |_: &mut EventLoop, _, _| {
        mapping.acknowledge();
        if mapping.check().is_err() {
            handle.send(Message::FileCut);
        }
    };
    worker.add(changes, worker::Interest::READ, Box::new(look))?;
    Ok(())
}

#[cfg(test)]
mod tests;
