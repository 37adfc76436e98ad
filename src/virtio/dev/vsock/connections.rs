//! All connections of a guest: which packet belongs to which, and whose turn it is to send to the guest.
//!
//! A connection is known to the guest by its pair of ports, and to the host by the token of its [`Stream`]. It may also
//! have only one of these ends: a program that has not said yet which port it wants, or one that has yet to read what a
//! guest's connection, now gone, sent it.
//!
//! Everything has a bound. There are at most [`CONNECTIONS_MAX`] connections, each of which keeps at most
//! [`BUF_ALLOC`](super::connection::BUF_ALLOC) bytes and knows by itself what it has to tell the guest. Only an RST may
//! be due where there is no connection. These are kept in a list, and while it is full, no packet of the guest is looked
//! at: the "additional resources" of virtio 1.3 §5.10.6.1, without which two full queues would wait for each other.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::connection::{Connection, Due, Reaction};
use super::packet::{
    HEADER_LEN, HOST_CID, Header, OP_REQUEST, OP_RST, OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::backend::net::Piece;
use crate::backend::vsock::{Change, Greeting, Host, Received, Stream};
use crate::mem::{Buffer, GuestRam};
use crate::virtio::Malformed;
use crate::virtio::queue::{Chain, Writer};

/// So many connections there may be at once. Further ones are refused.
pub(super) const CONNECTIONS_MAX: usize = 1024;
/// While so many RSTs wait, no packet of the guest is taken.
const REPLIES_MAX: usize = 256;
/// Programs that are accepted in one turn of the event loop.
const ACCEPTED_AT_ONCE: usize = 64;
/// The ports of the host from which its programs connect: 2^30 up to, and without, 2^31.
const FIRST_PORT: u32 = 1 << 30;
const PORTS_END: u32 = 1 << 31;

/// Port of the host, port of the guest.
type Pair = (u32, u32);

struct Entry {
    stream: Stream,
    /// The stream may have bytes, or their end.
    readable: bool,
    /// The program has been told that the guest sends no more.
    ended: bool,
    /// It stands in `turns`.
    queued: bool,
    stage: Stage,
}

enum Stage {
    /// A program has connected, and has not said to which port.
    Greeting(Greeting),
    Linked {
        pair: Pair,
        connection: Connection,
    },
    /// The guest has forgotten the connection; what it sent before is still being passed on.
    Draining,
}

/// The connections, with the sockets behind them.
pub(super) struct Connections {
    guest_cid: u32,
    pub(super) limit: usize,
    host: Host,
    /// By token.
    entries: BTreeMap<u64, Entry>,
    pairs: BTreeMap<Pair, u64>,
    /// Who has something for the guest, in order; each once.
    turns: VecDeque<u64>,
    /// RSTs for the guest.
    replies: VecDeque<Header>,
    next_token: u64,
    pub(super) next_port: u32,
    /// Programs may wait to be accepted.
    acceptable: bool,
    warned: bool,
}

impl Connections {
    pub fn new(guest_cid: u32, host: Host) -> Connections {
        Connections {
            guest_cid,
            limit: CONNECTIONS_MAX,
            host,
            entries: BTreeMap::new(),
            pairs: BTreeMap::new(),
            turns: VecDeque::new(),
            replies: VecDeque::new(),
            next_token: 0,
            next_port: FIRST_PORT,
            acceptable: true,
            warned: false,
        }
    }

    pub fn descriptor(&self) -> Arc<OwnedFd> {
        self.host.descriptor()
    }

    /// Closes all connections. Programs that connect from now on wait to be accepted.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.pairs.clear();
        self.turns.clear();
        self.replies.clear();
        self.acceptable = true;
    }

    /// Whether a packet of the guest may be taken.
    pub fn has_room(&self) -> bool {
        self.replies.len() < REPLIES_MAX
    }

    /// Whether there is, or may be, something for the guest.
    pub fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.turns.is_empty()
    }

    /// A packet of the guest. `data` is where its data lie, as many bytes as the header says.
    pub fn packet(&mut self, header: &Header, ram: &GuestRam, data: &[Buffer]) {
        if header.src_cid != u64::from(self.guest_cid) {
            // Nobody could answer the guest under a name that is not its own.
            return;
        }
        let pair = (header.dst_port, header.src_port);
        let known = self.pairs.get(&pair).copied();
        match known {
            _ if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM => self.refuse(header),
            Some(token) => self.packet_for(token, header, ram, data),
            None if header.op == OP_REQUEST => self.connect(pair, header),
            None => self.refuse(header),
        }
    }

    fn refuse(&mut self, header: &Header) {
        self.replies.extend(header.reset());
    }

    /// The guest wants to connect to a port of the host.
    fn connect(&mut self, pair: Pair, header: &Header) {
        if !self.make_room() {
            return self.refuse(header);
        }
        let token = self.take_token();
        match self.host.connect(pair.0, token) {
            Ok(stream) => {
                let connection = Connection::requested_by_guest(header);
                self.link(token, stream, pair, connection);
            }
            Err(error) => {
                log::debug!("vsock: port {} of the host: {error}", pair.0);
                self.refuse(header);
            }
        }
    }

    fn link(&mut self, token: u64, stream: Stream, pair: Pair, connection: Connection) {
        self.pairs.insert(pair, token);
        let entry = Entry {
            stream,
            readable: false,
            ended: false,
            queued: false,
            stage: Stage::Linked { pair, connection },
        };
        self.entries.insert(token, entry);
        self.settle(token);
    }

    fn packet_for(&mut self, token: u64, header: &Header, ram: &GuestRam, data: &[Buffer]) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let Stage::Linked { pair, connection } = &mut entry.stage else {
            return;
        };
        match connection.packet(header) {
            Reaction::Nothing => {
                if header.op == OP_SHUTDOWN && connection.guest_receives_no_more() {
                    entry.stream.end_receiving();
                }
            }
            Reaction::Accepted => {
                if entry.stream.say(&format!("OK {}\n", pair.0)).is_err() {
                    entry.stream.hang_up();
                }
            }
            Reaction::Data => {
                let sent = entry.stream.send(ram, &pieces(data));
                connection.forward(sent);
            }
            Reaction::Reset => return self.reset(token),
            Reaction::Gone => {
                // A guest that has waited long enough for the end of its own SHUTDOWN sends RST too.
                if entry.stream.unsent() == 0 {
                    return self.remove(token);
                }
                self.pairs.remove(pair);
                entry.stage = Stage::Draining;
            }
        }
        self.settle(token);
    }

    /// Sees to what has changed on the host, or part of it.
    pub fn host_changed(&mut self) {
        for change in self.host.changes() {
            match change.token {
                None => self.acceptable = true,
                Some(token) => self.stream_changed(token, change),
            }
        }
    }

    /// Accepts programs that wait. `true` when more may wait.
    pub fn accept(&mut self) -> bool {
        for _ in 0..ACCEPTED_AT_ONCE {
            if !self.acceptable {
                return false;
            }
            let token = self.take_token();
            match self.host.accept(token) {
                Ok(Some(stream)) if self.make_room() => {
                    let entry = Entry {
                        stream,
                        readable: true,
                        ended: false,
                        queued: false,
                        stage: Stage::Greeting(Greeting::default()),
                    };
                    self.entries.insert(token, entry);
                    self.greet(token);
                }
                // Dropping it tells the program.
                Ok(Some(_)) => {}
                Ok(None) => self.acceptable = false,
                Err(error) => {
                    // Tried again when a connection ends, or somebody else connects.
                    self.acceptable = false;
                    if !std::mem::replace(&mut self.warned, true) {
                        log::warn!("vsock: cannot accept a connection: {error}");
                    }
                }
            }
        }
        self.acceptable
    }

    fn stream_changed(&mut self, token: u64, change: Change) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        entry.readable |= change.readable;
        match &mut entry.stage {
            // It will not read the answer.
            Stage::Greeting(_) if change.hung_up => return self.remove(token),
            Stage::Greeting(_) => return self.greet(token),
            Stage::Linked { connection, .. } => {
                if change.hung_up {
                    if !connection.is_established() {
                        return match connection.is_unknown_to_guest() {
                            true => self.remove(token),
                            false => self.reset(token),
                        };
                    }
                    connection.forward(entry.stream.hang_up());
                } else if change.writable {
                    connection.forward(entry.stream.flush());
                }
            }
            Stage::Draining if change.hung_up => return self.remove(token),
            Stage::Draining => {
                entry.stream.flush();
            }
        }
        self.settle(token);
    }

    /// Reads which port of the guest a program wants.
    fn greet(&mut self, token: u64) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let Stage::Greeting(greeting) = &mut entry.stage else {
            return;
        };
        match greeting.read(&entry.stream) {
            Ok(None) => entry.readable = false,
            Ok(Some(port)) => {
                let pair = (free_port(&self.pairs, &mut self.next_port), port);
                self.pairs.insert(pair, token);
                entry.stage = Stage::Linked {
                    pair,
                    connection: Connection::requested_by_host(),
                };
                self.settle(token);
            }
            Err(error) => {
                log::debug!("vsock: a program did not say CONNECT and a port: {error:?}");
                self.remove(token);
            }
        }
    }

    /// Does what follows from the state of a connection: ends a half that is done, ends it altogether, or has it wait for
    /// its turn to send to the guest.
    fn settle(&mut self, token: u64) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let drained = entry.stream.unsent() == 0;
        let Stage::Linked { connection, .. } = &mut entry.stage else {
            if drained && matches!(entry.stage, Stage::Draining) {
                self.remove(token);
            }
            return;
        };
        if entry.stream.is_broken() {
            // If the guest takes nothing either, what the program may have sent before has nobody to read it.
            connection.host_shuts_down(match connection.guest_receives_no_more() {
                true => SHUTDOWN_BOTH,
                false => SHUTDOWN_RECEIVE,
            });
        }
        if drained && connection.is_closed_by_guest() {
            return self.reset(token);
        }
        if drained && connection.guest_sends_no_more() && !entry.ended {
            entry.ended = true;
            entry.stream.end_sending();
        }
        if !entry.queued && connection.due(entry.readable).is_some() {
            entry.queued = true;
            self.turns.push_back(token);
        }
    }

    /// Fills a buffer of the guest with the next packet. `None` when there is none after all; otherwise its length in
    /// bytes.
    ///
    /// # Errors
    /// When a packet does not fit the buffer.
    pub fn deliver(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Option<u32>, Malformed> {
        if chain.writable_len() < HEADER_LEN {
            return Err(Malformed::Request);
        }
        let header = chain.writer(ram);
        let mut room = chain.writer(ram);
        room.take_buffers(HEADER_LEN);
        if let Some(reply) = self.replies.pop_front() {
            return write(header, &reply).map(Some);
        }
        while let Some(token) = self.turns.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else {
                continue;
            };
            entry.queued = false;
            let Stage::Linked { pair, connection } = &mut entry.stage else {
                continue;
            };
            let next = next_packet(connection, &entry.stream, &mut entry.readable, ram, &room)?;
            let Some((due, len)) = next else {
                continue;
            };
            let packet = addressed(self.guest_cid, *pair, connection.header(due, len));
            connection.done(due, len);
            self.settle(token);
            return write(header, &packet).map(|header| Some(header.saturating_add(len)));
        }
        Ok(None)
    }

    /// Sends RST for a connection, and forgets it.
    fn reset(&mut self, token: u64) {
        if let Some(Entry {
            stage: Stage::Linked { pair, .. },
            ..
        }) = self.entries.get(&token)
        {
            let rst = Header {
                op: OP_RST,
                ..Header::default()
            };
            self.replies
                .push_back(addressed(self.guest_cid, *pair, rst));
        }
        self.remove(token);
    }

    /// Closes a connection's socket, and forgets it.
    fn remove(&mut self, token: u64) {
        let Some(entry) = self.entries.remove(&token) else {
            return;
        };
        if let Stage::Linked { pair, .. } = &entry.stage {
            self.pairs.remove(pair);
        }
        if entry.queued {
            self.turns.retain(|turn| *turn != token);
        }
        // There is a descriptor more for somebody who waits.
        self.acceptable = true;
    }

    /// Whether there may be one more connection. If need be, one makes room that the host has closed and the guest knows
    /// to be closed.
    fn make_room(&mut self) -> bool {
        if self.entries.len() < self.limit {
            return true;
        }
        let over = self.entries.iter().find(|(_, entry)| {
            matches!(&entry.stage, Stage::Linked { connection, .. } if connection.awaits_reset())
        });
        match over.map(|(token, _)| *token) {
            Some(token) => {
                self.reset(token);
                true
            }
            None => false,
        }
    }

    fn take_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token = self.next_token.wrapping_add(1);
        token
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.replies.len().saturating_add(self.turns.len())
    }
}

/// A port of the host that no connection has.
fn free_port(pairs: &BTreeMap<Pair, u64>, next: &mut u32) -> u32 {
    loop {
        let port = *next;
        *next = match port.saturating_add(1) {
            PORTS_END.. => FIRST_PORT,
            port => port,
        };
        // There are far fewer connections than ports.
        if pairs.range((port, 0)..=(port, u32::MAX)).next().is_none() {
            return port;
        }
    }
}

/// What a connection sends to the guest now; its data, if any, have been received into the buffers of `room`.
fn next_packet(
    connection: &mut Connection,
    stream: &Stream,
    readable: &mut bool,
    ram: &GuestRam,
    room: &Writer<'_>,
) -> Result<Option<(Due, u32)>, Malformed> {
    while let Some(due) = connection.due(*readable) {
        let Due::Data(most) = due else {
            return Ok(Some((due, 0)));
        };
        let pieces = pieces(&room.clone().take_buffers(most));
        if pieces.is_empty() {
            return Err(Malformed::Request);
        }
        match stream.receive(ram, &pieces) {
            Received::Bytes(len) => return Ok(Some((due, len))),
            Received::Nothing => *readable = false,
            Received::End => connection.host_shuts_down(SHUTDOWN_SEND),
        }
    }
    Ok(None)
}

fn pieces(buffers: &[Buffer]) -> Vec<Piece> {
    buffers
        .iter()
        .map(|buffer| (buffer.address, buffer.len))
        .collect()
}

fn addressed(guest_cid: u32, (local, peer): Pair, header: Header) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid.into(),
        src_port: local,
        dst_port: peer,
        kind: TYPE_STREAM,
        ..header
    }
}

/// Writes a header at the start of a buffer; the result is its length.
fn write(mut writer: Writer<'_>, header: &Header) -> Result<u32, Malformed> {
    writer
        .write_all(&header.bytes())
        .map_err(|_| Malformed::Request)?;
    Ok(HEADER_LEN)
}
