//! Init's end of the exec channel.

use super::super::plan::{Command, Invalid, WindowSize};
use super::channel::{Channel, Streams};
use super::frame::{self, Kind, NO_COMMAND};
use super::{CommandId, Exit, Phase, Stream, Violation, violation};

/// What the host wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A command is to be run. Its streams are open already.
    Exec {
        id: CommandId,
        command: Result<Command, Invalid>,
    },
    /// The host has all of a command that has ended.
    Acknowledged {
        id: CommandId,
    },
    /// The host knows why init gives up.
    ErrorSeen,
    Signal {
        id: CommandId,
        signal: u32,
    },
    Resize {
        id: CommandId,
        size: WindowSize,
    },
    Shutdown,
}

/// Init's end.
pub struct Guest {
    channel: Channel,
}

impl Default for Guest {
    fn default() -> Guest {
        Guest::new()
    }
}

impl Guest {
    pub fn new() -> Guest {
        Guest {
            channel: Channel::new(true),
        }
    }

    /// Opens the streams of a command: of [`super::MAIN`], before anything else; init does it for no other.
    pub fn open(&mut self, id: CommandId, terminal: bool) {
        let outputs: &[Stream] = if terminal {
            &[Stream::Stdout]
        } else {
            &[Stream::Stdout, Stream::Stderr]
        };
        let streams = Streams::new(outputs, &[Stream::Stdin]);
        self.channel.commands.insert(id, streams);
    }

    /// The version that both ends speak, once the host has said hello.
    pub fn version(&self) -> Option<u16> {
        self.channel.version
    }

    /// Takes bytes that came from the host. [`Guest::next_event`] is to be called until it has none before more are fed.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.channel.feed(bytes);
    }

    /// The next thing that the host wants.
    ///
    /// # Errors
    /// When the host broke the protocol, now or before.
    pub fn next_event(&mut self) -> Result<Option<Event>, Violation> {
        while let Some(control) = self.channel.next_control()? {
            let id = control.id;
            let known = self.channel.commands.contains_key(&id);
            let event = match control.kind {
                Kind::Exec if !known => {
                    let command = Command::decode(&control.payload);
                    let terminal = matches!(&command, Ok(command) if command.terminal.is_some());
                    self.open(id, terminal);
                    Event::Exec { id, command }
                }
                Kind::Ack if id == NO_COMMAND => Event::ErrorSeen,
                Kind::Ack if known => {
                    self.channel.commands.remove(&id);
                    Event::Acknowledged { id }
                }
                Kind::Signal if known => Event::Signal {
                    id,
                    signal: frame::read_u32(&control.payload),
                },
                Kind::Window if known => Event::Resize {
                    id,
                    size: frame::read_window(&control.payload),
                },
                Kind::Signal | Kind::Window => continue,
                Kind::Shutdown => Event::Shutdown,
                kind => {
                    let broken = Violation(format!("a {kind:?} frame out of turn"));
                    self.channel.break_off(&broken);
                    return violation(broken.0);
                }
            };
            return Ok(Some(event));
        }
        Ok(None)
    }

    fn streams(&mut self, id: CommandId) -> Option<&mut Streams> {
        self.channel.commands.get_mut(&id)
    }

    /// The command runs under this process id.
    pub fn started(&mut self, id: CommandId, pid: u32) {
        let frame = frame::control(Kind::Started, id, &pid.to_le_bytes());
        self.channel.send(frame);
    }

    /// The command has ended, and all of its output has been written. Its streams end here.
    pub fn exit(&mut self, id: CommandId, exit: &Exit) {
        let frame = frame::exit(id, exit);
        if let Some(streams) = self.streams(id) {
            streams.say_farewell(frame);
        }
    }

    /// Standard input that has come, from the front; more may follow once this is consumed.
    pub fn bytes(&mut self, id: CommandId) -> &[u8] {
        self.streams(id)
            .and_then(|streams| streams.incoming(Stream::Stdin))
            .map_or(&[], |incoming| incoming.bytes())
    }

    /// The first `count` of [`Guest::bytes`] have been passed on.
    pub fn consume(&mut self, id: CommandId, count: usize) {
        let streams = self.streams(id);
        if let Some(incoming) = streams.and_then(|streams| streams.incoming(Stream::Stdin)) {
            incoming.consume(count);
        }
    }

    /// Whether standard input has ended and all of it has been consumed.
    pub fn is_over(&mut self, id: CommandId) -> bool {
        self.streams(id)
            .and_then(|streams| streams.incoming(Stream::Stdin))
            .is_none_or(|incoming| incoming.is_over())
    }

    /// The command does not read its standard input any more.
    pub fn refuse(&mut self, id: CommandId) {
        let streams = self.streams(id);
        if let Some(incoming) = streams.and_then(|streams| streams.incoming(Stream::Stdin)) {
            incoming.refuse();
        }
    }

    /// How many bytes of output [`Guest::write`] takes now.
    pub fn room(&mut self, id: CommandId, stream: Stream) -> usize {
        self.streams(id)
            .and_then(|streams| streams.outgoing(stream))
            .map_or(0, |outgoing| outgoing.room())
    }

    /// Sends output, and says how many of `bytes` were taken.
    pub fn write(&mut self, id: CommandId, stream: Stream, bytes: &[u8]) -> usize {
        self.streams(id)
            .and_then(|streams| streams.outgoing(stream))
            .map_or(0, |outgoing| outgoing.push(bytes))
    }

    /// Ends an output stream, behind what was written.
    pub fn close(&mut self, id: CommandId, stream: Stream) {
        let streams = self.streams(id);
        if let Some(outgoing) = streams.and_then(|streams| streams.outgoing(stream)) {
            outgoing.finish();
        }
    }

    /// Whether the host has no use for an output stream any more.
    pub fn is_refused(&mut self, id: CommandId, stream: Stream) -> bool {
        self.streams(id)
            .and_then(|streams| streams.outgoing(stream))
            .is_none_or(|outgoing| outgoing.is_refused())
    }

    /// Tells what init has done.
    pub fn phase(&mut self, phase: &Phase) {
        self.channel.send(frame::phase(phase));
    }

    /// Tells why init gives up.
    pub fn error(&mut self, words: &str) {
        self.channel.send(frame::error(words));
    }

    /// Tells that somebody presses the interrupt key of a command's terminal, and the command does not answer.
    pub fn interrupted(&mut self, id: CommandId) {
        self.channel
            .send(frame::control(Kind::Interrupted, id, &[]));
    }

    /// Tells that nothing is left to write, and that init powers off.
    pub fn stopping(&mut self) {
        let frame = frame::control(Kind::Stopping, CommandId(0), &[]);
        self.channel.send(frame);
    }

    /// The bytes for the host. Empty when there is nothing to send.
    pub fn output(&mut self) -> &[u8] {
        self.channel.output()
    }

    /// The first `count` bytes of [`Guest::output`] are on their way.
    pub fn sent(&mut self, count: usize) {
        self.channel.sent(count);
    }
}
