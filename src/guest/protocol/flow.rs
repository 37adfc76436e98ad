//! The two ends of one stream: what may be sent, what has come, and the credit between them.

use std::collections::VecDeque;

use super::{MAX_DATA, Violation, WINDOW, violation};

/// Credit is given back in pieces of at least this many bytes, so that few frames go back for many that come.
const PIECE: u32 = WINDOW / 4;

/// What the sending end does next for a stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Nothing,
    /// A DATA frame of so many bytes.
    Data(usize),
    Eof,
}

/// The sending end.
#[derive(Debug)]
pub(super) struct Outgoing {
    buffer: VecDeque<u8>,
    /// How many bytes the other end takes. It is the other end that counts it up, so nothing is allocated by it.
    credit: u64,
    /// No more is coming, and the EOF has been sent.
    last: bool,
    over: bool,
    /// The other end has no use for this stream.
    refused: bool,
}

impl Outgoing {
    pub(super) fn new() -> Outgoing {
        Outgoing {
            buffer: VecDeque::new(),
            credit: u64::from(WINDOW),
            last: false,
            over: false,
            refused: false,
        }
    }

    /// How many bytes [`Outgoing::push`] takes.
    pub(super) fn room(&self) -> usize {
        if self.last || self.refused {
            return 0;
        }
        let most = self.credit.min(u64::from(WINDOW)) as usize;
        most.saturating_sub(self.buffer.len())
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.buffer.extend(bytes.iter().take(taken));
        taken
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn held(&self) -> usize {
        self.buffer.len()
    }

    /// No more is coming.
    pub(super) fn finish(&mut self) {
        self.last = true;
    }

    pub(super) fn refuse(&mut self) {
        self.refused = true;
        self.buffer = VecDeque::new();
    }

    pub(super) fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether all is sent that ever will be.
    pub(super) fn is_over(&self) -> bool {
        self.over || self.refused
    }

    pub(super) fn add_credit(&mut self, more: u32) {
        self.credit = self.credit.saturating_add(u64::from(more));
    }

    pub(super) fn next(&self) -> Next {
        let len = self.buffer.len().min(MAX_DATA);
        let len = usize::try_from(self.credit).map_or(len, |credit| len.min(credit));
        if self.is_over() {
            Next::Nothing
        } else if len > 0 {
            Next::Data(len)
        } else if self.last && self.buffer.is_empty() {
            Next::Eof
        } else {
            Next::Nothing
        }
    }

    /// Moves the first `len` bytes to `out`.
    pub(super) fn take(&mut self, len: usize, out: &mut Vec<u8>) {
        let len = len.min(self.buffer.len());
        self.credit = self.credit.saturating_sub(len as u64);
        out.extend(self.buffer.drain(..len));
    }

    pub(super) fn set_over(&mut self) {
        self.over = true;
    }
}

/// The receiving end.
#[derive(Debug)]
pub(super) struct Incoming {
    buffer: VecDeque<u8>,
    /// How many bytes the other end may yet send, and how many have been passed on since it was last told.
    granted: u32,
    owed: u32,
    /// The EOF has come.
    over: bool,
    /// The other end is to be told, and has been told, that nobody reads this.
    refused: bool,
    refusal_sent: bool,
}

impl Incoming {
    pub(super) fn new() -> Incoming {
        Incoming {
            buffer: VecDeque::new(),
            granted: WINDOW,
            owed: 0,
            over: false,
            refused: false,
            refusal_sent: false,
        }
    }

    pub(super) fn accept(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        let left = u32::try_from(bytes.len())
            .ok()
            .and_then(|len| self.granted.checked_sub(len));
        let Some(left) = left else {
            return violation("more data than it was given credit for");
        };
        if self.over {
            return violation("data behind the end of its stream");
        }
        self.granted = left;
        if !self.refused {
            self.buffer.extend(bytes);
        }
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), Violation> {
        if self.over {
            return violation("two ends of one stream");
        }
        self.over = true;
        Ok(())
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn held(&self) -> usize {
        self.buffer.len()
    }

    /// What has come, from the front, as far as it lies in one piece.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.as_slices().0
    }

    pub(super) fn consume(&mut self, count: usize) {
        let count = count.min(self.buffer.len());
        self.buffer.drain(..count);
        self.owed = self.owed.saturating_add(count as u32);
    }

    /// Nothing is left, and nothing comes.
    pub(super) fn is_over(&self) -> bool {
        self.refused || (self.over && self.buffer.is_empty())
    }

    pub(super) fn refuse(&mut self) {
        self.refused = true;
        self.buffer = VecDeque::new();
    }

    /// The credit to give now, if it is worth a frame.
    pub(super) fn take_credit(&mut self) -> Option<u32> {
        if self.refused || self.over || self.owed < PIECE {
            return None;
        }
        let credit = std::mem::take(&mut self.owed);
        self.granted = self.granted.saturating_add(credit);
        Some(credit)
    }

    /// Whether the other end has to be told now that nobody reads this.
    pub(super) fn take_refusal(&mut self) -> bool {
        let now = self.refused && !self.refusal_sent && !self.over;
        self.refusal_sent |= now;
        now
    }
}
