//! The loop that init sleeps in: the exec channel, the commands, and the signals that tell of processes' ends.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use crate::Failure;
use crate::job::Job;
use crate::news::wait_until;
use crate::plan::Command;
use crate::protocol::guest::{Event, Guest};
use crate::protocol::{CommandId, End, MAIN, PORT};
use crate::sys::{self, PollFd, Reaped};

/// How long the port may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a port is looked at that the host has let go of, and one that it has not opened yet.
const TICK: Duration = Duration::from_millis(100);
const FIRST_TICK: Duration = Duration::from_millis(5);
/// How long processes have to end after SIGTERM.
const GRACE: Duration = Duration::from_millis(500);
/// How long the host has to take init's last words.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Init once it serves.
pub struct Server {
    guest: Guest,
    port: Option<File>,
    /// The channel was handed over, and its end is the end.
    handed_over: bool,
    hung_up: bool,
    jobs: BTreeMap<CommandId, Job>,
    stop: bool,
    error_seen: bool,
}

impl Server {
    /// With the channel on descriptor `fd`, or on the port that is still to be found.
    pub fn new(fd: Option<RawFd>) -> Server {
        let port = fd.and_then(|fd| sys::inherited(fd).ok());
        let port = port.filter(|port| sys::set_nonblocking(port).is_ok());
        Server {
            guest: Guest::new(),
            port,
            handed_over: fd.is_some(),
            hung_up: false,
            jobs: BTreeMap::new(),
            stop: false,
            error_seen: false,
        }
    }

    /// Tells the host, at the next occasion, what has been done.
    pub fn done(&mut self, what: &str) {
        self.guest.phase(&crate::phase(what));
    }

    /// Opens the channel's port if it is there by now.
    pub fn look_for_port(&mut self) {
        if self.port.is_none() && !self.handed_over {
            self.port = find_port().filter(|port| sys::set_nonblocking(port).is_ok());
        }
    }

    /// Waits for the channel's port.
    fn wait_for_port(&mut self, longest: Duration) -> bool {
        wait_until(longest, || {
            self.look_for_port();
            self.port.is_some().then_some(())
        })
        .is_some()
    }

    /// Runs `main` and what the host asks for, until the host has all of `main`, or wants an end.
    pub fn serve(&mut self, main: Option<&Command>) -> Result<(), Failure> {
        let watched = [sys::SIGCHLD, sys::SIGTERM, sys::SIGINT, sys::SIGPWR];
        let signals = sys::signals(&watched)
            .map_err(|error| format!("the kernel does not tell of ended processes: {error}"))?;
        if let Some(main) = main {
            self.guest.open(MAIN, main.terminal.is_some());
            self.start(MAIN, main);
        }
        if !self.wait_for_port(PATIENCE) {
            return Err(format!("there is no console port \"{PORT}\""));
        }
        while !self.stop {
            self.pump();
            self.flush();
            self.wait(&signals)?;
            self.read_signals(&signals);
            self.reap();
            self.read_port()?;
        }
        self.end_processes(&signals);
        Ok(())
    }

    /// Tells the host that it may switch the machine off: nothing is left to write.
    pub fn stopping(&mut self) {
        self.guest.stopping();
        self.flush();
    }

    fn start(&mut self, id: CommandId, command: &Command) {
        match Job::start(id, command) {
            Ok(job) => {
                self.guest.started(id, job.pid());
                self.jobs.insert(id, job);
            }
            Err(end) => self.guest.exit(id, &end.into()),
        }
    }

    fn pump(&mut self) {
        let guest = &mut self.guest;
        self.jobs.retain(|_, job| !job.pump(guest));
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, signals: &OwnedFd) -> Result<(), Failure> {
        let guest = &mut self.guest;
        let mut fds = vec![PollFd::new(signals.as_fd(), sys::POLLIN)];
        // Which command each of the rest is about, and whether it is its input; the port comes last.
        let mut owners = Vec::new();
        for (id, job) in &self.jobs {
            for (fd, is_input) in job.interests(guest) {
                fds.push(fd);
                owners.push((*id, is_input));
            }
        }
        if let (Some(port), false) = (&self.port, self.hung_up) {
            let events = if guest.output().is_empty() {
                sys::POLLIN
            } else {
                sys::POLLIN | sys::POLLOUT
            };
            fds.push(PollFd::new(port.as_fd(), events));
        }
        let tick = if guest.version().is_some() {
            TICK
        } else {
            FIRST_TICK
        };
        let timeout = self.hung_up.then_some(tick);
        sys::wait_for(&mut fds, timeout)
            .map_err(|error| format!("waiting for the host fails: {error}"))?;
        for (fd, (id, is_input)) in fds.iter().skip(1).zip(&owners) {
            if let Some(job) = self.jobs.get_mut(id) {
                job.found(guest, (fd.found(), *is_input));
            }
        }
        Ok(())
    }

    fn read_signals(&mut self, signals: &OwnedFd) {
        // struct signalfd_siginfo: 128 bytes, first the signal's number.
        let mut info = [0; 128];
        let Ok(signals) = signals.try_clone() else {
            return;
        };
        let mut signals = File::from(signals);
        while signals.read(&mut info).is_ok_and(|count| count > 0) {
            let number = info
                .first_chunk()
                .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
            self.stop |= number != sys::SIGCHLD;
        }
    }

    fn reap(&mut self) -> bool {
        loop {
            match sys::reap() {
                Reaped::NothingNew => return true,
                Reaped::NoneLeft => return false,
                Reaped::Process(pid, ended) => {
                    let mut running = self.jobs.values_mut().filter(|job| !job.has_ended());
                    if let Some(job) = running.find(|job| job.pid() == pid) {
                        job.set_ended(ended);
                    }
                }
            }
        }
    }

    /// Takes what has come from the host, and does what it says.
    fn read_port(&mut self) -> Result<(), Failure> {
        let Some(port) = &mut self.port else {
            return Ok(());
        };
        let mut buffer = [0; 64 << 10];
        match port.read(&mut buffer) {
            Ok(0) => {
                self.hung_up = true;
                self.stop |= self.handed_over;
                return Ok(());
            }
            Ok(count) => {
                self.hung_up = false;
                self.guest.feed(buffer.get(..count).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.hung_up = false;
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(_) if self.handed_over => {
                self.stop = true;
                return Ok(());
            }
            Err(error) => return Err(format!("the console port \"{PORT}\" fails: {error}")),
        }
        while let Some(event) = self.guest.next_event().map_err(|why| why.to_string())? {
            self.act(event);
        }
        Ok(())
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::Exec { id, command } => match command {
                Ok(command) => self.start(id, &command),
                Err(why) => {
                    let end = End::CouldNotStart(format!("the command cannot be used: {why}"));
                    self.guest.exit(id, &end.into());
                }
            },
            Event::Acknowledged { id } => self.stop |= id == MAIN,
            Event::ErrorSeen => self.error_seen = true,
            Event::Signal { id, signal } => {
                if let Some(job) = self.jobs.get(&id) {
                    job.signal(signal);
                }
            }
            Event::Resize { id, size } => {
                if let Some(job) = self.jobs.get(&id) {
                    job.resize(size);
                }
            }
            Event::Shutdown => self.stop = true,
        }
    }

    /// Writes to the port what it takes.
    fn flush(&mut self) {
        let Some(port) = &mut self.port else { return };
        loop {
            let output = self.guest.output();
            if output.is_empty() {
                return;
            }
            match port.write(output) {
                Ok(count) if count > 0 => self.guest.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }

    /// Ends all processes, with some time for those that have something to do before.
    fn end_processes(&mut self, signals: &OwnedFd) {
        if !sys::is_first() {
            self.jobs
                .values()
                .for_each(|job| job.signal(sys::SIGKILL as u32));
            return;
        }
        for (signal, patience) in [(sys::SIGTERM, GRACE), (sys::SIGKILL, GRACE)] {
            let start = Instant::now();
            if !self.reap() {
                return;
            }
            sys::kill_all(signal);
            while let Some(left) = patience.checked_sub(start.elapsed()) {
                if !self.reap() {
                    return;
                }
                let mut fds = [PollFd::new(signals.as_fd(), sys::POLLIN)];
                let _ = sys::wait_for(&mut fds, Some(left));
                self.read_signals(signals);
            }
        }
    }

    /// Tells the host why init gives up, and waits a while until it knows.
    pub fn give_up(&mut self, failure: &str) {
        if !self.wait_for_port(LAST_WORDS) {
            return;
        }
        self.guest.error(failure);
        let start = Instant::now();
        while !self.error_seen {
            if self.handed_over && self.hung_up {
                return;
            }
            let Some(left) = LAST_WORDS.checked_sub(start.elapsed()) else {
                return;
            };
            self.flush();
            let output = !self.guest.output().is_empty();
            let events = if output {
                sys::POLLIN | sys::POLLOUT
            } else {
                sys::POLLIN
            };
            let fds = self.port.iter().filter(|_| !self.hung_up);
            let mut fds: Vec<PollFd> = fds.map(|port| PollFd::new(port.as_fd(), events)).collect();
            let _ = sys::wait_for(&mut fds, Some(left.min(TICK)));
            if self.read_port().is_err() {
                return;
            }
        }
    }
}

/// The port that is called [`PORT`].
fn find_port() -> Option<File> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port = ports.flatten().find(|port| {
        let name = fs::read_to_string(port.path().join("name"));
        name.is_ok_and(|name| name.trim_end() == PORT)
    })?;
    let device = std::path::Path::new("/dev").join(port.file_name());
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .ok()
}
