//! The exporter behind `--trace FILE`: one line of text for each event.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::{Event, Sink};

/// Writes events as lines, buffered. What a full disk swallows is reported once.
pub struct TextFile {
    writer: Mutex<State>,
}

struct State {
    file: BufWriter<File>,
    failed: bool,
}

impl TextFile {
    /// Creates or truncates `path`.
    ///
    /// # Errors
    /// Whatever `open(2)` says.
    pub fn create(path: &Path) -> io::Result<TextFile> {
        let file = BufWriter::with_capacity(64 << 10, File::create(path)?);
        Ok(TextFile {
            writer: Mutex::new(State {
                file,
                failed: false,
            }),
        })
    }

    fn with_writer(&self, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) {
        let mut state = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write(&mut state.file)
            && !state.failed
        {
            state.failed = true;
            log::warn!("the trace is incomplete: {error}");
        }
    }
}

impl Sink for TextFile {
    fn emit(&self, event: &Event<'_>) {
        self.with_writer(|file| writeln!(file, "{event}"));
    }

    fn flush(&self) {
        self.with_writer(BufWriter::flush);
    }
}
