//! Frames as bytes: the header, what kinds there are, and the payloads of those that are not data.

use super::super::plan::WindowSize;
use super::{CommandId, End, Exit, NEWEST, OLDEST, Phase, Stream, Violation, violation};

/// Bytes before the payload.
pub(super) const HEADER: usize = 12;
const MAGIC: &[u8; 8] = b"sarangX\n";
/// Most bytes of the words in an EXIT or ERROR frame, and of the name in a PHASE frame; longer ones are cut.
const MOST_WORDS: usize = 1024;
const MOST_NAME: usize = 64;
/// Most bytes of an EXEC frame. Linux takes 2 MiB of arguments and variables at its usual limits.
pub(super) const MAX_EXEC: usize = 4 << 20;
/// The id in an ACK that answers ERROR.
pub(super) const NO_COMMAND: CommandId = CommandId(u32::MAX);

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Hello = 1,
    Exec = 2,
    Started = 3,
    Exit = 4,
    Ack = 5,
    Data = 6,
    Eof = 7,
    Credit = 8,
    Closed = 9,
    Signal = 10,
    Window = 11,
    Phase = 12,
    Error = 13,
    Shutdown = 14,
    Stopping = 15,
    Interrupted = 16,
}

/// Each kind, by its number less one, with the fewest and the most bytes of its payload.
const KINDS: [(Kind, usize, usize); 16] = [
    (Kind::Hello, 12, 12),
    (Kind::Exec, 0, MAX_EXEC),
    (Kind::Started, 4, 4),
    (Kind::Exit, 3, 3 + MOST_WORDS),
    (Kind::Ack, 0, 0),
    (Kind::Data, 1, super::MAX_DATA),
    (Kind::Eof, 0, 0),
    (Kind::Credit, 4, 4),
    (Kind::Closed, 0, 0),
    (Kind::Signal, 4, 4),
    (Kind::Window, 4, 4),
    (Kind::Phase, 8, 8 + MOST_NAME),
    (Kind::Error, 0, MOST_WORDS),
    (Kind::Shutdown, 0, 0),
    (Kind::Stopping, 0, 0),
    (Kind::Interrupted, 0, 0),
];

/// A header that keeps the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub stream: Stream,
    pub id: CommandId,
    pub len: usize,
}

impl Header {
    /// Reads a header from the start of `bytes`; `None` when it is not all there yet.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Header>, Violation> {
        let Some(&[kind, stream, zero, zero_too, a, b, c, d, e, f, g, h]) =
            bytes.first_chunk::<HEADER>()
        else {
            return Ok(None);
        };
        let known = usize::from(kind)
            .checked_sub(1)
            .and_then(|at| KINDS.get(at));
        let Some((kind, fewest, most)) = known else {
            return violation(format!("a frame of the unknown kind {kind}"));
        };
        let (id, len) = (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]) as usize,
        );
        if len < *fewest || len > *most {
            return violation(format!("a {kind:?} frame of {len} bytes"));
        }
        let Some(stream) = Stream::ALL.get(usize::from(stream)) else {
            return violation(format!("a frame of the unknown stream {stream}"));
        };
        if (zero, zero_too) != (0, 0) {
            return violation("a frame whose reserved bytes are not zero");
        }
        Ok(Some(Header {
            kind: *kind,
            stream: *stream,
            id: CommandId(id),
            len,
        }))
    }
}

/// A frame without data, as it is sent.
pub(super) fn control(kind: Kind, id: CommandId, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER.saturating_add(payload.len()));
    put_header(&mut frame, kind, Stream::Stdin, id, payload.len());
    frame.extend_from_slice(payload);
    frame
}

/// Appends a header.
pub(super) fn put_header(out: &mut Vec<u8>, kind: Kind, stream: Stream, id: CommandId, len: usize) {
    out.extend_from_slice(&[kind as u8, stream as u8, 0, 0]);
    out.extend_from_slice(&id.0.to_le_bytes());
    out.extend_from_slice(&(len as u32).to_le_bytes());
}

pub(super) fn hello() -> Vec<u8> {
    let versions = [OLDEST.to_le_bytes(), NEWEST.to_le_bytes()].concat();
    control(
        Kind::Hello,
        CommandId(0),
        &[MAGIC.as_slice(), &versions].concat(),
    )
}

/// The version that both ends speak, from the other end's HELLO.
pub(super) fn read_hello(payload: &[u8]) -> Result<u16, Violation> {
    let Some((MAGIC, &[a, b, c, d])) = payload.split_first_chunk::<8>() else {
        return violation("its first frame is not that of an exec channel");
    };
    let (oldest, newest) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    if oldest > newest || newest < OLDEST || oldest > NEWEST {
        return violation(format!(
            "the other end speaks its versions {oldest} to {newest}, this end {OLDEST} to {NEWEST}"
        ));
    }
    Ok(newest.min(NEWEST))
}

/// The number in a payload that [`Header::read`] knows to be of the right length.
pub(super) fn read_u32(payload: &[u8]) -> u32 {
    payload
        .first_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// How an [`End`] is written.
const EXITED: u8 = 1;
const KILLED: u8 = 2;
const NOT_FOUND: u8 = 3;
const NOT_EXECUTABLE: u8 = 4;
const COULD_NOT_START: u8 = 5;
/// The flags of an EXIT frame.
const OUT_OF_MEMORY: u8 = 1;

pub(super) fn exit(id: CommandId, exit: &Exit) -> Vec<u8> {
    let (how, number, words) = match &exit.end {
        End::Exited(status) => (EXITED, *status, ""),
        End::Killed(signal) => (KILLED, *signal, ""),
        End::NotFound(why) => (NOT_FOUND, 0, why.as_str()),
        End::NotExecutable(why) => (NOT_EXECUTABLE, 0, why.as_str()),
        End::CouldNotStart(why) => (COULD_NOT_START, 0, why.as_str()),
    };
    let flags = if exit.out_of_memory { OUT_OF_MEMORY } else { 0 };
    let words = cut(words, MOST_WORDS);
    control(Kind::Exit, id, &[&[how, number, flags], words].concat())
}

pub(super) fn read_exit(payload: &[u8]) -> Result<Exit, Violation> {
    let Some((&[how, number, flags], words)) = payload.split_first_chunk::<3>() else {
        return violation("a cut Exit frame");
    };
    let end = match how {
        EXITED => End::Exited(number),
        // Signals are numbered 1 to 64.
        KILLED if (1..=64).contains(&number) => End::Killed(number),
        NOT_FOUND => End::NotFound(clean(words)),
        NOT_EXECUTABLE => End::NotExecutable(clean(words)),
        COULD_NOT_START => End::CouldNotStart(clean(words)),
        _ => return violation(format!("an Exit frame that says {how} {number}")),
    };
    Ok(Exit {
        end,
        out_of_memory: flags & OUT_OF_MEMORY != 0,
    })
}

pub(super) fn window(id: CommandId, size: WindowSize) -> Vec<u8> {
    let payload = [size.rows.to_le_bytes(), size.columns.to_le_bytes()].concat();
    control(Kind::Window, id, &payload)
}

pub(super) fn read_window(payload: &[u8]) -> WindowSize {
    let number = read_u32(payload);
    WindowSize {
        rows: number as u16,
        columns: (number >> 16) as u16,
    }
}

pub(super) fn phase(phase: &Phase) -> Vec<u8> {
    let time = phase.microseconds.to_le_bytes();
    let payload = [&time, cut(&phase.name, MOST_NAME)].concat();
    control(Kind::Phase, CommandId(0), &payload)
}

pub(super) fn read_phase(payload: &[u8]) -> Phase {
    let (time, name) = payload
        .split_first_chunk::<8>()
        .unwrap_or((&[0; 8], payload));
    Phase {
        microseconds: u64::from_le_bytes(*time),
        name: clean(name),
    }
}

pub(super) fn error(words: &str) -> Vec<u8> {
    control(Kind::Error, CommandId(0), cut(words, MOST_WORDS))
}

/// The first bytes of `words`, at most `most`.
fn cut(words: &str, most: usize) -> &[u8] {
    words.as_bytes().get(..most).unwrap_or(words.as_bytes())
}

/// Words of the other end for a person to read: text in one line, with nothing in it that a terminal obeys.
pub(super) fn clean(words: &[u8]) -> String {
    String::from_utf8_lossy(words)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
