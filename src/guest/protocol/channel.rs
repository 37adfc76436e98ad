//! What both ends have in common: frames in and out, and the streams of all commands.

use std::collections::{BTreeMap, VecDeque};

use super::flow::{Incoming, Next, Outgoing};
use super::frame::{self, HEADER, Header, Kind};
use super::{CommandId, Stream, Violation, violation};

/// So many bytes are made ready to be sent at a time. What comes later may still go ahead of the data behind them.
const AHEAD: usize = 64 << 10;

/// The streams of one command.
pub(super) struct Streams {
    outgoing: [Option<Outgoing>; 3],
    incoming: [Option<Incoming>; 3],
    /// A frame that goes out when everything else about the command has.
    farewell: Option<Vec<u8>>,
}

impl Streams {
    /// `outgoing` and `incoming` as seen from this end.
    pub(super) fn new(outgoing: &[Stream], incoming: &[Stream]) -> Streams {
        Streams {
            outgoing: Stream::ALL.map(|stream| outgoing.contains(&stream).then(Outgoing::new)),
            incoming: Stream::ALL.map(|stream| incoming.contains(&stream).then(Incoming::new)),
            farewell: None,
        }
    }

    pub(super) fn outgoing(&mut self, stream: Stream) -> Option<&mut Outgoing> {
        self.outgoing.get_mut(stream as usize)?.as_mut()
    }

    pub(super) fn incoming(&mut self, stream: Stream) -> Option<&mut Incoming> {
        self.incoming.get_mut(stream as usize)?.as_mut()
    }

    #[cfg(any(test, fuzzing))]
    fn held(&self) -> usize {
        let outgoing = self.outgoing.iter().flatten().map(Outgoing::held);
        let incoming = self.incoming.iter().flatten().map(Incoming::held);
        let farewell = self.farewell.iter().map(Vec::len);
        outgoing.chain(incoming).chain(farewell).sum()
    }

    fn all_sent(&self) -> bool {
        self.outgoing.iter().flatten().all(Outgoing::is_over)
    }

    /// Ends all streams of this end, and sends `frame` behind what they still hold.
    pub(super) fn say_farewell(&mut self, frame: Vec<u8>) {
        self.outgoing
            .iter_mut()
            .flatten()
            .for_each(Outgoing::finish);
        self.farewell = Some(frame);
    }

    /// The other end has said its farewell: its streams have ended.
    pub(super) fn end_incoming(&mut self) {
        for incoming in self.incoming.iter_mut().flatten() {
            let _ = incoming.finish();
        }
    }
}

/// A frame that this file does not deal with.
pub(super) struct Control {
    pub kind: Kind,
    pub id: CommandId,
    pub payload: Vec<u8>,
}

/// One end of the channel.
pub(super) struct Channel {
    input: Vec<u8>,
    /// How much of `input` has been read.
    read: usize,
    output: Vec<u8>,
    /// How much of `output` has been sent.
    sent: usize,
    control: VecDeque<Vec<u8>>,
    /// The version spoken, once the other end's HELLO is here.
    pub version: Option<u16>,
    broken: Option<Violation>,
    pub commands: BTreeMap<CommandId, Streams>,
    /// The stream whose turn it was last.
    turn: (CommandId, Stream),
    /// Whether frames about commands that are not known are dropped, not a violation.
    forgiving: bool,
}

impl Channel {
    pub(super) fn new(forgiving: bool) -> Channel {
        Channel {
            input: Vec::new(),
            read: 0,
            output: frame::hello(),
            sent: 0,
            control: VecDeque::new(),
            version: None,
            broken: None,
            commands: BTreeMap::new(),
            turn: (CommandId(0), Stream::Stdin),
            forgiving,
        }
    }

    pub(super) fn send(&mut self, frame: Vec<u8>) {
        self.control.push_back(frame);
    }

    /// Takes bytes that came.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        if self.broken.is_none() {
            self.input.drain(..self.read);
            self.read = 0;
            self.input.extend_from_slice(bytes);
        }
    }

    /// The next frame that is not about a stream. `None` when more bytes are needed.
    pub(super) fn next_control(&mut self) -> Result<Option<Control>, Violation> {
        if let Some(violation) = &self.broken {
            return Err(violation.clone());
        }
        let result = self.read_frames();
        if let Err(violation) = &result {
            self.break_off(violation);
        }
        result
    }

    /// Reads no more after `violation`.
    pub(super) fn break_off(&mut self, violation: &Violation) {
        self.broken = Some(violation.clone());
        self.input = Vec::new();
        self.read = 0;
    }

    fn read_frames(&mut self) -> Result<Option<Control>, Violation> {
        loop {
            let rest = self.input.get(self.read..).unwrap_or_default();
            let Some(header) = Header::read(rest)? else {
                return Ok(None);
            };
            if self.version.is_none() && header.kind != Kind::Hello {
                return violation("its first frame is not HELLO");
            }
            let end = HEADER.saturating_add(header.len);
            let Some(payload) = rest.get(HEADER..end) else {
                return Ok(None);
            };
            self.read = self.read.saturating_add(end);
            let Header {
                kind, stream, id, ..
            } = header;
            match kind {
                Kind::Hello if self.version.is_some() => {
                    return violation("a second HELLO");
                }
                Kind::Hello => self.version = Some(frame::read_hello(payload)?),
                Kind::Data | Kind::Eof | Kind::Credit | Kind::Closed => {
                    let Some(streams) = self.commands.get_mut(&id) else {
                        if self.forgiving {
                            continue;
                        }
                        return violation(format!("a {kind:?} frame of {id}, which does not run"));
                    };
                    let about_outgoing = matches!(kind, Kind::Credit | Kind::Closed);
                    let known = if about_outgoing {
                        let outgoing = streams.outgoing(stream);
                        outgoing.map(|outgoing| match kind {
                            Kind::Credit => outgoing.add_credit(frame::read_u32(payload)),
                            _ => outgoing.refuse(),
                        })
                    } else {
                        let incoming = streams.incoming(stream);
                        let result = incoming.map(|incoming| match kind {
                            Kind::Data => incoming.accept(payload),
                            _ => incoming.finish(),
                        });
                        result.transpose()?
                    };
                    if known.is_none() {
                        return violation(format!("a {kind:?} frame for the {stream} of {id}"));
                    }
                }
                _ => {
                    return Ok(Some(Control {
                        kind,
                        id,
                        payload: payload.to_vec(),
                    }));
                }
            }
        }
    }

    /// Bytes that are kept, in all places.
    #[cfg(any(test, fuzzing))]
    pub(super) fn held(&self) -> usize {
        let frames: usize = self.control.iter().map(Vec::len).sum();
        let streams: usize = self.commands.values().map(Streams::held).sum();
        self.input.len() + self.output.len() + frames + streams
    }

    /// The bytes to send next. Empty when there is nothing to send.
    pub(super) fn output(&mut self) -> &[u8] {
        if self.version.is_some() && self.output.len().saturating_sub(self.sent) < AHEAD {
            self.output.drain(..self.sent);
            self.sent = 0;
            self.fill();
        }
        self.output.get(self.sent..).unwrap_or_default()
    }

    /// The first `count` bytes of [`Channel::output`] are on their way.
    pub(super) fn sent(&mut self, count: usize) {
        self.sent = self.sent.saturating_add(count).min(self.output.len());
    }

    fn fill(&mut self) {
        while self.output.len() < AHEAD {
            let Some(frame) = self.control.pop_front() else {
                break;
            };
            self.output.extend(frame);
        }
        for (id, streams) in &mut self.commands {
            for (stream, incoming) in Stream::ALL.iter().zip(&mut streams.incoming) {
                let Some(incoming) = incoming else { continue };
                if let Some(credit) = incoming.take_credit() {
                    frame::put_header(&mut self.output, Kind::Credit, *stream, *id, 4);
                    self.output.extend_from_slice(&credit.to_le_bytes());
                }
                if incoming.take_refusal() {
                    frame::put_header(&mut self.output, Kind::Closed, *stream, *id, 0);
                }
            }
        }
        while self.output.len() < AHEAD && self.fill_by_turns() {}
    }

    /// Appends a frame of the stream whose turn it is; `false` when no stream has one.
    fn fill_by_turns(&mut self) -> bool {
        let behind = |(id, stream, _): &(CommandId, Stream, Next)| (*id, *stream) > self.turn;
        let next = self.ready().find(behind).or_else(|| self.ready().next());
        if let Some((id, stream, next)) = next {
            self.turn = (id, stream);
            let streams = self.commands.get_mut(&id);
            let Some(outgoing) = streams.and_then(|streams| streams.outgoing(stream)) else {
                return false;
            };
            if let Next::Data(len) = next {
                frame::put_header(&mut self.output, Kind::Data, stream, id, len);
                outgoing.take(len, &mut self.output);
            } else {
                frame::put_header(&mut self.output, Kind::Eof, stream, id, 0);
                outgoing.set_over();
            }
            return true;
        }
        let farewell = self.commands.values_mut().find_map(|streams| {
            let ready = streams.all_sent();
            streams.farewell.take_if(|_| ready)
        });
        match farewell {
            Some(frame) => {
                self.output.extend(frame);
                true
            }
            None => false,
        }
    }

    /// The streams that have something to send, in the order of their turns, and what.
    fn ready(&self) -> impl Iterator<Item = (CommandId, Stream, Next)> {
        self.commands.iter().flat_map(|(id, streams)| {
            let ends = Stream::ALL.iter().zip(&streams.outgoing);
            ends.filter_map(|(stream, outgoing)| {
                let next = outgoing.as_ref()?.next();
                (next != Next::Nothing).then_some((*id, *stream, next))
            })
        })
    }
}
