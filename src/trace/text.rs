//! The exporter behind `--trace FILE`: one line of text for each event.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{Event, Sink};

/// Writes events as lines, buffered. What a full disk swallows is reported once.
pub struct TextFile {
    writer: Mutex<State>,
}

struct State {
    file: BufWriter<File>,
    path: PathBuf,
    /// The file was not there before.
    is_new: bool,
    /// The first event came.
    begun: bool,
    failed: bool,
}

impl TextFile {
    /// Opens or creates `path`. What it held is kept until the first event, and a new file that gets none is removed:
    /// a guest that never started has no trace.
    ///
    /// # Errors
    /// Whatever `open(2)` says.
    pub fn create(path: &Path) -> io::Result<TextFile> {
        let is_new = !path.exists();
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        Ok(TextFile {
            writer: Mutex::new(State {
                file: BufWriter::with_capacity(64 << 10, file),
                path: path.to_owned(),
                is_new,
                begun: false,
                failed: false,
            }),
        })
    }

    fn with_writer(&self, write: impl FnOnce(&mut State) -> io::Result<()>) {
        let mut state = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write(&mut state)
            && !state.failed
        {
            state.failed = true;
            log::warn!("the trace is incomplete: {error}");
        }
    }
}

impl Sink for TextFile {
    fn emit(&self, event: &Event<'_>) {
        self.with_writer(|state| {
            if !std::mem::replace(&mut state.begun, true) && !state.is_new {
                // A pipe or a terminal has no length to cut.
                let _ = state.file.get_ref().set_len(0);
            }
            writeln!(state.file, "{event}")
        });
    }

    fn flush(&self) {
        self.with_writer(|state| state.file.flush());
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.is_new && !self.begun {
            let _ = fs::remove_file(&self.path);
        }
    }
}
