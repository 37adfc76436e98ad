//! The exec channel: how the VMM runs commands in a guest, over one stream of bytes in each direction.
//!
//! The stream is a virtio-console port called [`PORT`] (virtio 1.3 §5.3.6.2); init is at the guest's end of it. Each
//! end is a pure state machine, [`host::Host`] and [`guest::Guest`]: bytes in, bytes out, events. Neither opens
//! anything, and neither waits.
//!
//! # Frames
//!
//! Everything on the stream is a frame: 12 bytes of header, then the payload. All numbers are little-endian.
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 1 | kind, see below |
//! | 1 | 1 | stream: 0 standard input, 1 standard output, 2 standard error; 0 in frames without a stream |
//! | 2 | 2 | zero |
//! | 4 | 4 | the command's id; 0 is the plan's own command, the host picks others; 0 in frames without a command |
//! | 8 | 4 | length of the payload in bytes, at most what the kind allows |
//!
//! | kind | from | payload |
//! | --- | --- | --- |
//! | 1 HELLO | both | `sarangX\n`, oldest version (2 bytes), newest version (2 bytes) |
//! | 2 EXEC | host | a command, as `plan` encodes it |
//! | 3 STARTED | guest | its process id in the guest (4 bytes) |
//! | 4 EXIT | guest | how it ended (1 byte), status or signal (1 byte), flags (1 byte), words |
//! | 5 ACK | host | none; the guest may forget the command. With id 2³²−1 it answers ERROR |
//! | 6 DATA | both | 1 to [`MAX_DATA`] bytes of a stream |
//! | 7 EOF | both | none; the stream ends here |
//! | 8 CREDIT | both | how many more bytes of the stream the sender of this frame takes (4 bytes) |
//! | 9 CLOSED | both | none; the stream's reader is gone: send no more of it, and no EOF |
//! | 10 SIGNAL | host | the signal's number (4 bytes) for the command's process group |
//! | 11 WINDOW | host | rows (2 bytes), columns (2 bytes) |
//! | 12 PHASE | guest | microseconds since the guest's kernel started (8 bytes), the name of what init has done |
//! | 13 ERROR | guest | words: why init gives up; it waits for an ACK and powers off |
//! | 14 SHUTDOWN | host | none; end all commands and power off |
//! | 15 STOPPING | guest | none; everything is written to where it is kept, and init powers off |
//! | 16 INTERRUPTED | guest | none; the interrupt key of the command's terminal was pressed twice, in vain |
//!
//! # How a conversation goes
//!
//! Each end sends HELLO first, and nothing else before it has the other's. The version spoken is the newest that
//! both know. The plan's command runs by itself, any other after its EXEC. STARTED comes before its first output; a
//! command that could not be started has none. EXIT comes after the last byte of its output, and the host may still
//! take its time to write that out: it answers EXIT with ACK when it has. Frames about a command that cross its EXIT are
//! dropped by the guest. With the ACK for the plan's command, init powers off.
//!
//! # Flow control
//!
//! Each stream has a credit of [`WINDOW`] bytes, known to both ends from the start. DATA uses it up, and CREDIT adds to
//! it once the receiver has passed bytes on. So a receiver never has to hold more than that for a stream, it always
//! takes what is on the channel, and a stream whose reader sleeps holds up no other. Frames other than DATA, EOF
//! and EXIT go ahead of all data that waits, and streams with data take turns.
//!
//! A frame that breaks these rules is a [`Violation`], after which nothing more is read: it takes no more than a
//! sentence to say what the other end did, and it cannot make this end's memory grow.
//!
//! These files are compiled into the VMM and into init, so they use nothing but the standard library.

mod channel;
mod flow;
mod frame;
pub mod guest;
pub mod host;

#[cfg(test)]
mod tests;

use std::fmt;

/// The name of the channel's virtio-console port.
pub const PORT: &str = "sarang.exec";
/// The id of the plan's own command.
pub const MAIN: CommandId = CommandId(0);
/// The bytes that one end of a stream may send before the other has to ask for more.
pub const WINDOW: u32 = 256 << 10;
/// Most bytes in a DATA frame: with its header it fills 32 KiB, which Linux hands to a console port at a time.
pub const MAX_DATA: usize = (32 << 10) - frame::HEADER;
/// How every line begins that init writes to the console when it cannot say a thing over the channel.
pub const CONSOLE_PREFIX: &str = "sarang-init: ";

/// The versions of this protocol that this build speaks.
const OLDEST: u16 = 1;
const NEWEST: u16 = 1;

/// One command of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u32);

impl fmt::Display for CommandId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "command {}", self.0)
    }
}

/// One stream of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
}

impl Stream {
    const ALL: [Stream; 3] = [Stream::Stdin, Stream::Stdout, Stream::Stderr];
}

impl fmt::Display for Stream {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Stream::Stdin => "standard input",
            Stream::Stdout => "standard output",
            Stream::Stderr => "standard error",
        })
    }
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this status.
    Exited(u8),
    /// This signal killed it.
    Killed(u8),
    /// There is no such program; says so in a sentence.
    NotFound(String),
    /// There is, and it cannot be executed; says why.
    NotExecutable(String),
    /// Something else kept it from starting; says what.
    CouldNotStart(String),
}

impl End {
    /// The status by which a shell, or `sarang run`, reports this: 0 to 255.
    pub fn exit_code(&self) -> u8 {
        match self {
            End::Exited(status) => *status,
            End::Killed(signal) => 128_u8.saturating_add(*signal),
            End::NotFound(_) => 127,
            End::NotExecutable(_) => 126,
            End::CouldNotStart(_) => 125,
        }
    }
}

/// How a command ended, and what is known beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub end: End,
    /// The guest's kernel killed it because memory ran out, as far as init can tell.
    pub out_of_memory: bool,
}

impl From<End> for Exit {
    fn from(end: End) -> Exit {
        Exit {
            end,
            out_of_memory: false,
        }
    }
}

/// Something that init has done, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Microseconds since the guest's kernel started.
    pub microseconds: u64,
    pub name: String,
}

/// What the other end did that the protocol does not allow, in words. The channel is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "the exec channel broke: {}", self.0)
    }
}

impl std::error::Error for Violation {}

fn violation<T>(what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(what.into()))
}
