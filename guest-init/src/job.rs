//! One command: its process, and the pipes or the terminal between it and the exec channel.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use crate::plan::{Command, WindowSize};
use crate::program;
use crate::protocol::guest::Guest;
use crate::protocol::{CommandId, End, Exit, Stream};
use crate::sys::{self, Ended, PollFd};

/// What a terminal takes for the end of its input, as it is set up: control-D.
const END_OF_INPUT: u8 = 4;
/// Bytes that are read from a command at a time.
const PIECE: usize = 64 << 10;
/// How long a command has to answer the interrupt key before pressing it again counts as a second time.
const TO_ANSWER: Duration = Duration::from_millis(300);

/// A command that runs, or has ended and still has output.
pub struct Job {
    id: CommandId,
    pid: u32,
    input: Option<File>,
    outputs: [(Stream, Option<File>); 2],
    terminal: Option<File>,
    interrupts: Interrupts,
    ended: Option<Ended>,
    /// How many processes the kernel had killed for want of memory when this one started.
    killed_before: u64,
}

/// Whether somebody presses a terminal's interrupt key in vain.
#[derive(Default)]
struct Interrupts {
    /// When it was pressed first. `None` once something else was typed, or the command has printed something.
    pressed: Option<Instant>,
}

impl Interrupts {
    /// Takes note of what was typed; `true` when the key was pressed before, and the command had time to answer that and
    /// did not.
    fn typed(&mut self, key: Option<u8>, bytes: &[u8]) -> bool {
        if !bytes.iter().all(|byte| Some(*byte) == key) {
            self.pressed = None;
            return false;
        }
        let first = *self.pressed.get_or_insert_with(Instant::now);
        first.elapsed() >= TO_ANSWER
    }

    /// Takes note of what the command has printed. The terminal's echo of the key, `^C`, is no answer.
    fn printed(&mut self, bytes: &[u8]) {
        if !bytes.iter().all(|byte| b"^C\r\n".contains(byte)) {
            self.pressed = None;
        }
    }
}

/// The ends of a command's streams.
struct Ends {
    /// The command's: input, output, error.
    theirs: [OwnedFd; 3],
    ours: [Option<File>; 3],
    terminal: Option<File>,
}

impl Ends {
    fn pipes() -> io::Result<Ends> {
        let ((in_read, in_write), (out_read, out_write), (err_read, err_write)) =
            (sys::pipe()?, sys::pipe()?, sys::pipe()?);
        Ok(Ends {
            theirs: [in_read, out_write, err_write],
            ours: [in_write, out_read, err_read].map(|end| Some(File::from(end))),
            terminal: None,
        })
    }

    fn terminal(size: WindowSize) -> io::Result<Ends> {
        let ours = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/ptmx")?;
        let theirs = sys::open_terminal(&ours)?;
        sys::resize(&ours, size.rows, size.columns)?;
        Ok(Ends {
            theirs: [theirs.try_clone()?, theirs.try_clone()?, theirs],
            ours: [Some(ours.try_clone()?), Some(ours.try_clone()?), None],
            terminal: Some(ours),
        })
    }
}

impl Job {
    /// Starts `command`.
    ///
    /// # Errors
    /// How it has ended before it began.
    pub fn start(id: CommandId, command: &Command) -> Result<Job, End> {
        let could_not =
            |what: &str, error: io::Error| End::CouldNotStart(format!("{what}: {error}"));
        let mut command = command.clone();
        if command.directory.is_empty() {
            command.directory = "/".into();
        }
        let directory = Path::new(&command.directory);
        if !directory.is_dir() {
            return Err(End::CouldNotStart(format!(
                "there is no directory {} in the guest",
                directory.display()
            )));
        }
        let path = program::find(&command)?;
        let ends = match command.terminal {
            Some(size) => Ends::terminal(size)
                .map_err(|error| could_not("there is no terminal for it", error))?,
            None => Ends::pipes().map_err(|error| could_not("there are no pipes for it", error))?,
        };
        let Ends {
            theirs: [input, output, errors],
            ours: [to_input, from_output, from_errors],
            terminal,
        } = ends;
        for end in [&to_input, &from_output, &from_errors]
            .into_iter()
            .flatten()
        {
            sys::set_nonblocking(end).map_err(|error| could_not("its pipes fail", error))?;
        }
        if terminal.is_some() {
            // Where it cannot be given away, the command still has it open.
            let _ = std::os::unix::fs::fchown(&input, Some(command.user), None);
        }
        let mut process = Process::new(&path);
        process
            .current_dir(directory)
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(errors));
        let variable = |(name, value): &(OsString, OsString)| {
            let mut variable = name.clone();
            variable.push("=");
            variable.push(value);
            variable
        };
        let start = sys::Start {
            program: path.as_os_str(),
            arguments: command.arguments.iter().map(OsString::as_os_str).collect(),
            environment: command.environment.iter().map(variable).collect(),
            terminal: terminal.is_some(),
            user: command.user,
            group: command.group,
            groups: &command.groups,
        };
        sys::prepare(&mut process, &start)
            .map_err(|error| could_not("it cannot be started", error))?;
        let killed_before = killed_for_memory();
        let child = process
            .spawn()
            .map_err(|error| program::explain(&directory.join(&path), &error))?;
        Ok(Job {
            id,
            pid: child.id(),
            input: to_input,
            outputs: [(Stream::Stdout, from_output), (Stream::Stderr, from_errors)],
            terminal,
            interrupts: Interrupts::default(),
            ended: None,
            killed_before,
        })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its process has ended, and its id may belong to another now.
    pub fn set_ended(&mut self, ended: Ended) {
        self.ended = Some(ended);
        self.input = None;
    }

    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, signal: u32) {
        if !self.has_ended() {
            // The command may be ending right now.
            let _ = sys::kill_group(self.pid, signal);
        }
    }

    pub fn resize(&self, size: WindowSize) {
        if let Some(terminal) = &self.terminal {
            let _ = sys::resize(terminal, size.rows, size.columns);
        }
    }

    /// Moves what can be moved now, both ways. `true` when the command has ended and all is said about it.
    pub fn pump(&mut self, guest: &mut Guest) -> bool {
        self.pump_input(guest);
        for (stream, source) in &mut self.outputs {
            let (interrupts, has_ended) = (&mut self.interrupts, self.ended.is_some());
            pump_output(guest, self.id, *stream, source, interrupts, has_ended);
        }
        let Some(ended) = self.ended else {
            return false;
        };
        if self.outputs.iter().any(|(_, source)| source.is_some()) {
            return false;
        }
        guest.exit(self.id, &self.exit(ended));
        true
    }

    fn exit(&self, ended: Ended) -> Exit {
        match ended {
            Ended::Exited(status) => End::Exited(status).into(),
            Ended::Killed(signal) => Exit {
                end: End::Killed(signal),
                out_of_memory: i32::from(signal) == sys::SIGKILL
                    && killed_for_memory() > self.killed_before,
            },
        }
    }

    fn pump_input(&mut self, guest: &mut Guest) {
        let Some(sink) = &mut self.input else {
            return;
        };
        loop {
            let bytes = guest.bytes(self.id);
            let over = bytes.is_empty() && guest.is_over(self.id);
            let bytes = match (guest.bytes(self.id), self.terminal.is_some()) {
                ([], true) if over => &[END_OF_INPUT],
                ([], _) if over => {
                    self.input = None;
                    return;
                }
                ([], _) => return,
                (bytes, _) => bytes,
            };
            match sink.write(bytes) {
                Ok(_) if over => {
                    self.input = None;
                    return;
                }
                Ok(count) => {
                    let key = self.terminal.as_ref().and_then(sys::interrupt_key);
                    let typed = bytes.get(..count).unwrap_or_default();
                    let in_vain = self.interrupts.typed(key, typed);
                    guest.consume(self.id, count);
                    if in_vain {
                        guest.interrupted(self.id);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.stop_input(guest),
            }
        }
    }

    /// Nothing reads the command's input any more.
    fn stop_input(&mut self, guest: &mut Guest) {
        self.input = None;
        guest.refuse(self.id);
    }

    /// What to wait for before the next [`Job::pump`], each with whether it is the input.
    pub fn interests(&self, guest: &mut Guest) -> Vec<(PollFd, bool)> {
        let mut interests = Vec::new();
        if let Some(input) = &self.input {
            // Even when nothing is to be written, poll tells that a pipe has lost its reader. A terminal cannot.
            let waits = !guest.bytes(self.id).is_empty() || guest.is_over(self.id);
            if waits || self.terminal.is_none() {
                let events = if waits { sys::POLLOUT } else { 0 };
                interests.push((PollFd::new(input.as_fd(), events), true));
            }
        }
        for (stream, source) in &self.outputs {
            // Without room, its end would be found again and again.
            if let Some(source) = source
                && guest.room(self.id, *stream) > 0
            {
                interests.push((PollFd::new(source.as_fd(), sys::POLLIN), false));
            }
        }
        interests
    }

    /// What came of one of the interests: a pipe without a reader is let go of.
    pub fn found(&mut self, guest: &mut Guest, (found, is_input): (i16, bool)) {
        if is_input && found & sys::POLLERR != 0 {
            self.stop_input(guest);
        }
    }
}

/// Moves what a command has written, and lets go of the stream at its end. A process that has ended has written all
/// it ever will; what others of its pipe's writers may write later is not waited for.
fn pump_output(
    guest: &mut Guest,
    id: CommandId,
    stream: Stream,
    source: &mut Option<File>,
    interrupts: &mut Interrupts,
    has_ended: bool,
) {
    let Some(file) = source else { return };
    let mut buffer = [0; PIECE];
    while !guest.is_refused(id, stream) {
        let room = guest.room(id, stream).min(PIECE);
        if room == 0 {
            return;
        }
        match file.read(buffer.get_mut(..room).unwrap_or_default()) {
            Ok(count) if count > 0 => {
                let bytes = buffer.get(..count).unwrap_or_default();
                interrupts.printed(bytes);
                guest.write(id, stream, bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !has_ended => return,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The end of a pipe is a read of nothing, that of a terminal an I/O error.
            _ => break,
        }
    }
    guest.close(id, stream);
    *source = None;
}

/// How many processes the kernel has killed for want of memory since it started.
fn killed_for_memory() -> u64 {
    fs::read_to_string("/proc/vmstat")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("oom_kill "))?;
            line.split_whitespace().nth(1)?.parse().ok()
        })
        .unwrap_or(0)
}
