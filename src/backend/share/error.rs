//! Why a directory cannot be shared: one sentence that names it and says what to do.

use std::io;
use std::path::PathBuf;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "there is no directory {} to share: check the path, or make one with `mkdir -p {}`",
        path.display(),
        path.display()
    )]
    Missing { path: PathBuf },
    #[error(
        "{} is not a directory, so it cannot be shared: name the directory that it is in",
        path.display()
    )]
    NotADirectory { path: PathBuf },
    #[error(
        "no permission to read the directory {}, which is to be shared: give it with chmod",
        path.display()
    )]
    Permission { path: PathBuf },
    #[error(
        "{} is the host's view of its processes, this one's memory among them: share another directory",
        path.display()
    )]
    Processes { path: PathBuf },
    #[error("cannot share the directory {}: {source}", path.display())]
    Host { path: PathBuf, source: io::Error },
}
