//! Spots a Linux panic in what the guest prints.
//!
//! A kernel told to reboot on panic resets the machine just as `reboot` does, and a stock kernel has no
//! pvpanic driver built in. What tells the two apart is the line that `panic()` prints first:
//! `Kernel panic - not syncing: …`, with an optional `[    1.234567] ` before it.

const MARK: &str = "Kernel panic - not syncing: ";
/// Longer lines are cut; a panic message has at most 1024 bytes.
const LINE_MAX: usize = 2048;

/// Takes console output in pieces of any size, and keeps the first panic message.
#[derive(Default)]
pub(super) struct PanicWatch {
    line: Vec<u8>,
    message: Option<String>,
}

impl PanicWatch {
    pub(super) fn see(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_line();
            } else if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
        }
    }

    /// The message, also when its line has not ended yet.
    pub(super) fn message(&mut self) -> Option<String> {
        self.end_line();
        self.message.clone()
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if self.message.is_some() || !line.windows(MARK.len()).any(|part| part == MARK.as_bytes()) {
            return;
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        // Only printk's time stamp may stand before it, or else it is somebody quoting a panic.
        let text = match text
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("] "))
        {
            Some((stamp, rest)) if stamp.trim().chars().all(|c| c.is_ascii_digit() || c == '.') => {
                rest
            }
            _ => text,
        };
        self.message = text.strip_prefix(MARK).map(str::to_owned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(pieces: &[&str]) -> Option<String> {
        let mut watch = PanicWatch::default();
        for piece in pieces {
            watch.see(piece.as_bytes());
        }
        watch.message()
    }

    #[test]
    fn a_panic_is_seen_with_and_without_time_stamp_and_in_pieces() {
        let expected = Some("VFS: Unable to mount root fs".to_owned());
        for pieces in [
            &["[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"][..],
            &[
                "x\nKernel pan",
                "ic - not syncing: VFS: Unable to mount",
                " root fs",
            ][..],
        ] {
            assert_eq!(watch(pieces), expected);
        }
    }

    #[test]
    fn a_user_who_quotes_a_panic_is_not_one() {
        assert_eq!(watch(&["# echo Kernel panic - not syncing: no\n"]), None);
        assert_eq!(watch(&["all is well\n"]), None);
    }

    #[test]
    fn a_line_without_end_takes_no_memory_without_end() {
        let mut watch = PanicWatch::default();
        (0..1000).for_each(|_| watch.see(&[b'x'; 4096]));
        assert!(watch.line.len() <= LINE_MAX);
    }
}
