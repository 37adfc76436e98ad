//! Unpacked modules, kept so that a second guest starts sooner: unpacking xz takes tens of milliseconds.
//!
//! A file's name has a fingerprint of the packed module, so a new kernel package makes new files, and its first bytes
//! have one of the unpacked. What does not match is unpacked again; what cannot be written is not kept.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::PathBuf;

use crate::backend::cache;

/// A directory for unpacked modules, or none.
#[derive(Clone, Debug, Default)]
pub(super) struct Cache {
    pub directory: Option<PathBuf>,
}

fn fingerprint(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

impl Cache {
    /// This user's: `modules` in sarang's cache, if the user has a home.
    pub(super) fn of_user() -> Cache {
        Cache {
            directory: cache::directory().map(|cache| cache.join("modules")),
        }
    }

    fn path(&self, name: &str, packed: &[u8]) -> Option<PathBuf> {
        let directory = self.directory.as_ref()?;
        Some(directory.join(format!("{name}-{:016x}", fingerprint(packed))))
    }

    pub(super) fn get(&self, name: &str, packed: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(name, packed)?).ok()?;
        let (seal, content) = bytes.split_first_chunk::<8>()?;
        if u64::from_le_bytes(*seal) != fingerprint(content) {
            return None;
        }
        bytes.drain(..8);
        Some(bytes)
    }

    pub(super) fn put(&self, name: &str, packed: &[u8], content: &[u8]) {
        let Some(path) = self.path(name, packed) else {
            return;
        };
        // Another sarang may be doing the same: each writes a file of its own, and the last to rename it wins.
        let scratch = path.with_extension(std::process::id().to_string());
        let write = || {
            fs::create_dir_all(path.parent()?).ok()?;
            let mut file = fs::File::create(&scratch).ok()?;
            file.write_all(&fingerprint(content).to_le_bytes()).ok()?;
            file.write_all(content).ok()?;
            fs::rename(&scratch, &path).ok()
        };
        if write().is_none() {
            let _ = fs::remove_file(&scratch);
        }
    }
}
