//! The VMM's end of the exec channel.
//!
//! ```text
//! host.expect_main(terminal)                 for the plan's own command, and Host::exec for any other
//! loop:
//!     host.feed(bytes from the port); while let Some(event) = host.next_event()? { … }
//!     for each command: pass on host.bytes(id, stream), then host.consume(…)
//!                       host.write(id, up to host.room(id) bytes), and host.close(id) at their end
//!     write host.output() to the port, then host.sent(…)
//! after Event::Exit, when both outputs are over and written out: host.acknowledge(id)
//! ```

use std::collections::BTreeMap;

use super::super::plan::{Command, Invalid, WindowSize};
use super::channel::{Channel, Control, Streams};
use super::frame::{self, Kind, NO_COMMAND};
use super::{CommandId, Exit, MAIN, Phase, Stream, Violation, violation};

/// What came from the guest, beside the bytes of streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The command runs, under this process id in the guest.
    Started { id: CommandId, pid: u32 },
    /// It has ended. Its output may still have to be taken.
    Exit { id: CommandId, exit: Exit },
    /// Init has done something.
    Phase(Phase),
    /// Init gives up, for this reason, and powers off.
    Error(String),
    /// Somebody presses the interrupt key of the command's terminal, and the command does not answer.
    Interrupted { id: CommandId },
    /// Init has nothing left to write and powers off.
    Stopping,
}

/// How far a command is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Asked,
    Started,
    Ended,
}

/// The VMM's end.
pub struct Host {
    channel: Channel,
    stages: BTreeMap<CommandId, Stage>,
    next_id: u32,
    error_seen: bool,
}

impl Default for Host {
    fn default() -> Host {
        Host::new()
    }
}

impl Host {
    pub fn new() -> Host {
        Host {
            channel: Channel::new(false),
            stages: BTreeMap::new(),
            next_id: MAIN.0,
            error_seen: false,
        }
    }

    /// Awaits the plan's own command, [`MAIN`]. To be called before anything is fed, if the plan has one.
    pub fn expect_main(&mut self, terminal: bool) {
        self.add(MAIN, terminal);
    }

    /// Asks for `command` to be run, and says by which id it goes.
    ///
    /// # Errors
    /// When the command has a zero byte in it, or takes more than 4 MiB.
    pub fn exec(&mut self, command: &Command) -> Result<CommandId, Invalid> {
        let payload = command.encode()?;
        if payload.len() > frame::MAX_EXEC {
            let most = frame::MAX_EXEC >> 20;
            return Err(Invalid(format!(
                "its arguments and variables take more than {most} MiB"
            )));
        }
        let id = loop {
            self.next_id = self.next_id.wrapping_add(1);
            let id = CommandId(self.next_id);
            if id != MAIN && id != NO_COMMAND && !self.stages.contains_key(&id) {
                break id;
            }
        };
        self.add(id, command.terminal.is_some());
        self.channel.send(frame::control(Kind::Exec, id, &payload));
        Ok(id)
    }

    fn add(&mut self, id: CommandId, terminal: bool) {
        let outputs: &[Stream] = if terminal {
            &[Stream::Stdout]
        } else {
            &[Stream::Stdout, Stream::Stderr]
        };
        let streams = Streams::new(&[Stream::Stdin], outputs);
        self.channel.commands.insert(id, streams);
        self.stages.insert(id, Stage::Asked);
    }

    /// The version of the protocol that both ends speak, once init has said hello.
    pub fn version(&self) -> Option<u16> {
        self.channel.version
    }

    /// Takes bytes that came from the guest. [`Host::next_event`] is to be called until it has none before more are fed.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.channel.feed(bytes);
    }

    /// The next thing that the bytes so far tell.
    ///
    /// # Errors
    /// When the guest broke the protocol, now or before.
    pub fn next_event(&mut self) -> Result<Option<Event>, Violation> {
        let Some(control) = self.channel.next_control()? else {
            return Ok(None);
        };
        let event = self.event(&control);
        if let Err(violation) = &event {
            self.channel.break_off(violation);
        }
        event.map(Some)
    }

    fn event(&mut self, control: &Control) -> Result<Event, Violation> {
        let Control { kind, id, payload } = control;
        let id = *id;
        match kind {
            Kind::Started => {
                self.advance(id, Stage::Asked, Stage::Started)?;
                let pid = frame::read_u32(payload);
                Ok(Event::Started { id, pid })
            }
            Kind::Exit => {
                let exit = frame::read_exit(payload)?;
                let from = self.stages.get(&id).copied().unwrap_or(Stage::Asked);
                self.advance(id, from, Stage::Ended)?;
                if let Some(streams) = self.channel.commands.get_mut(&id) {
                    streams.end_incoming();
                }
                Ok(Event::Exit { id, exit })
            }
            Kind::Phase => Ok(Event::Phase(frame::read_phase(payload))),
            Kind::Error if !self.error_seen => {
                self.error_seen = true;
                self.channel
                    .send(frame::control(Kind::Ack, NO_COMMAND, &[]));
                Ok(Event::Error(frame::clean(payload)))
            }
            Kind::Stopping => Ok(Event::Stopping),
            Kind::Interrupted if self.stages.get(&id) == Some(&Stage::Started) => {
                Ok(Event::Interrupted { id })
            }
            kind => violation(format!("a {kind:?} frame out of turn")),
        }
    }

    /// Moves a command from one stage to a later one.
    fn advance(&mut self, id: CommandId, from: Stage, to: Stage) -> Result<(), Violation> {
        match self.stages.get_mut(&id) {
            Some(stage) if *stage == from && from != Stage::Ended => *stage = to,
            Some(_) => return violation(format!("{id} started or ended twice")),
            None => return violation(format!("news of {id}, which does not run")),
        }
        Ok(())
    }

    fn streams(&mut self, id: CommandId) -> Option<&mut Streams> {
        self.channel.commands.get_mut(&id)
    }

    /// What has come of an output stream, from the front; more may follow once this is consumed.
    pub fn bytes(&mut self, id: CommandId, stream: Stream) -> &[u8] {
        self.streams(id)
            .and_then(|streams| streams.incoming(stream))
            .map_or(&[], |incoming| incoming.bytes())
    }

    /// The first `count` of [`Host::bytes`] have been passed on.
    pub fn consume(&mut self, id: CommandId, stream: Stream, count: usize) {
        let streams = self.streams(id);
        if let Some(incoming) = streams.and_then(|streams| streams.incoming(stream)) {
            incoming.consume(count);
        }
    }

    /// Whether an output stream has ended and all of it has been consumed.
    pub fn is_over(&mut self, id: CommandId, stream: Stream) -> bool {
        self.streams(id)
            .and_then(|streams| streams.incoming(stream))
            .is_none_or(|incoming| incoming.is_over())
    }

    /// Nobody reads this output stream any more: what has come of it is dropped, and the command finds its pipe broken.
    pub fn refuse(&mut self, id: CommandId, stream: Stream) {
        let streams = self.streams(id);
        if let Some(incoming) = streams.and_then(|streams| streams.incoming(stream)) {
            incoming.refuse();
        }
    }

    /// How many bytes of standard input [`Host::write`] takes now.
    pub fn room(&mut self, id: CommandId) -> usize {
        self.streams(id)
            .and_then(|streams| streams.outgoing(Stream::Stdin))
            .map_or(0, |outgoing| outgoing.room())
    }

    /// Sends standard input, and says how many of `bytes` were taken.
    pub fn write(&mut self, id: CommandId, bytes: &[u8]) -> usize {
        self.streams(id)
            .and_then(|streams| streams.outgoing(Stream::Stdin))
            .map_or(0, |outgoing| outgoing.push(bytes))
    }

    /// Ends standard input, behind what was written. A terminal's end of input is a typed control-D.
    pub fn close(&mut self, id: CommandId) {
        let streams = self.streams(id);
        if let Some(outgoing) = streams.and_then(|streams| streams.outgoing(Stream::Stdin)) {
            outgoing.finish();
        }
    }

    /// Whether nothing reads standard input any more, so that none has to be fetched from wherever it comes.
    pub fn is_refused(&mut self, id: CommandId) -> bool {
        self.streams(id)
            .and_then(|streams| streams.outgoing(Stream::Stdin))
            .is_none_or(|outgoing| outgoing.is_refused())
    }

    /// Sends signal number `signal` to the command's process group.
    pub fn signal(&mut self, id: CommandId, signal: u32) {
        if self.runs(id) {
            let frame = frame::control(Kind::Signal, id, &signal.to_le_bytes());
            self.channel.send(frame);
        }
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&mut self, id: CommandId, size: WindowSize) {
        if self.runs(id) {
            self.channel.send(frame::window(id, size));
        }
    }

    fn runs(&self, id: CommandId) -> bool {
        self.stages
            .get(&id)
            .is_some_and(|stage| *stage != Stage::Ended)
    }

    /// All that there is to know of a command that has ended has been taken; its id is free again. For [`MAIN`], the
    /// guest powers off now.
    pub fn acknowledge(&mut self, id: CommandId) {
        if self.stages.get(&id) == Some(&Stage::Ended) {
            self.stages.remove(&id);
            self.channel.commands.remove(&id);
            self.channel.send(frame::control(Kind::Ack, id, &[]));
        }
    }

    /// Asks init to end all commands and to power off.
    pub fn shut_down(&mut self) {
        self.channel
            .send(frame::control(Kind::Shutdown, CommandId(0), &[]));
    }

    /// Bytes that are kept: of streams, frames that wait to be sent, and a frame that has come in part.
    #[cfg(any(test, fuzzing))]
    pub fn held(&self) -> usize {
        self.channel.held()
    }

    /// The bytes for the guest. Empty when there is nothing to send.
    pub fn output(&mut self) -> &[u8] {
        self.channel.output()
    }

    /// The first `count` bytes of [`Host::output`] are on their way.
    pub fn sent(&mut self, count: usize) {
        self.channel.sent(count);
    }
}
