//! The last that the guest printed, kept for when a run fails.

use std::collections::VecDeque;

/// Bytes kept: a Linux boot with all its messages has some 30 KiB.
const KEPT: usize = 64 << 10;

/// A ring of the last bytes.
#[derive(Default)]
pub(super) struct LogTail(VecDeque<u8>);

impl LogTail {
    pub(super) fn see(&mut self, bytes: &[u8]) {
        let bytes = bytes
            .get(bytes.len().saturating_sub(KEPT)..)
            .unwrap_or_default();
        let too_many = (self.0.len() + bytes.len()).saturating_sub(KEPT);
        self.0.drain(..too_many);
        self.0.extend(bytes);
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.0.iter().copied().collect()
    }

    /// The last line that begins with `prefix`, without it.
    pub(super) fn last_line_after(&self, prefix: &str) -> Option<String> {
        let bytes = self.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().rev();
        lines
            .filter_map(|line| line.trim().strip_prefix(prefix))
            .map(str::to_owned)
            .next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_whatever_the_pieces() {
        let mut tail = LogTail::default();
        for number in 0..20_000 {
            tail.see(format!("{number:05}\n").as_bytes());
        }
        let bytes = tail.bytes();
        assert_eq!(bytes.len(), KEPT);
        assert!(bytes.ends_with(b"19998\n19999\n"));
        tail.see(&vec![b'x'; KEPT + 5]);
        assert_eq!(tail.bytes(), vec![b'x'; KEPT]);
    }

    #[test]
    fn a_line_is_found_by_how_it_begins() {
        let mut tail = LogTail::default();
        tail.see(b"init: one\r\nother\r\ninit: two\r\nmore");
        assert_eq!(tail.last_line_after("init: ").as_deref(), Some("two"));
        assert_eq!(tail.last_line_after("nobody: "), None);
    }
}
