//! Finds a command's program, and says why one does not start.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::plan::Command;
use crate::protocol::End;

/// Where programs are looked for when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The program of `command`: a path that works from its directory.
///
/// # Errors
/// How the command has ended before it began.
pub fn find(command: &Command) -> Result<PathBuf, End> {
    let name = command
        .arguments
        .first()
        .map_or(OsStr::new(""), |name| name);
    let directory = Path::new(&command.directory);
    if name.as_bytes().contains(&b'/') {
        return look(&directory.join(name)).map(|()| PathBuf::from(name));
    }
    let path = command
        .environment
        .iter()
        .rev()
        .find(|(variable, _)| variable == "PATH")
        .map_or(OsString::from(DEFAULT_PATH), |(_, path)| path.clone());
    let mut refused = None;
    for place in std::env::split_paths(&path) {
        if name.is_empty() {
            break;
        }
        // An empty place is the working directory.
        let place = if place.as_os_str().is_empty() {
            Path::new(".").into()
        } else {
            place
        };
        let program = place.join(name);
        match look(&directory.join(&program)) {
            Ok(()) => return Ok(program),
            Err(End::NotFound(_)) => {}
            // A place that may not be searched.
            Err(_) if !directory.join(&program).exists() => {}
            Err(why) => refused = refused.or(Some(why)),
        }
    }
    Err(refused.unwrap_or_else(|| {
        let (name, path) = (name.display(), path.display());
        End::NotFound(format!("there is no program \"{name}\" in {path}"))
    }))
}

/// Whether a program is at `path`.
fn look(path: &Path) -> Result<(), End> {
    let at = path.display();
    match fs::metadata(path) {
        Ok(file) if file.is_dir() => Err(End::NotExecutable(format!("{at} is a directory"))),
        Ok(file) if !file.is_file() => Err(End::NotExecutable(format!("{at} is not a file"))),
        Ok(file) if file.permissions().mode() & 0o111 == 0 => {
            Err(End::NotExecutable(format!("{at} may not be executed")))
        }
        Ok(_) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Err(End::NotFound(format!("there is no program {at}")))
        }
        Err(error) => Err(End::NotExecutable(format!("{at}: {error}"))),
    }
}

/// Why the kernel did not start `program`, which is there and may be executed.
pub fn explain(program: &Path, error: &io::Error) -> End {
    const E2BIG: i32 = 7;
    const ENOEXEC: i32 = 8;
    const EACCES: i32 = 13;
    let at = program.display();
    match error.raw_os_error() {
        _ if error.kind() == io::ErrorKind::NotFound => {
            End::NotExecutable(match interpreter(program) {
                Some(interpreter) => {
                    format!("{at} is a script for {interpreter}, which is not there")
                }
                None => format!("{at} needs a program loader that is not there"),
            })
        }
        Some(ENOEXEC) => End::NotExecutable(format!(
            "{at} is neither a program for this machine nor a script that begins with #!"
        )),
        Some(EACCES) => End::NotExecutable(format!("{at} may not be executed by this user")),
        Some(E2BIG) => {
            End::CouldNotStart("its arguments and variables are more than the kernel takes".into())
        }
        _ => End::CouldNotStart(format!("{at} could not be started: {error}")),
    }
}

/// What stands behind `#!`.
fn interpreter(program: &Path) -> Option<String> {
    let mut start = Vec::new();
    let file = File::open(program).ok()?;
    file.take(256).read_to_end(&mut start).ok()?;
    let line = start
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let line = String::from_utf8_lossy(line);
    Some(line.split_whitespace().next()?.to_owned())
}
