//! `sarang image`: root disks made of directories, tars and container images, and what there is to know of them.

use std::cell::Cell;
use std::ffi::OsString;
use std::io::{IsTerminal, stderr};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use super::{Result, print, quantity, say};
use crate::backend::image::{Build, Built, Error, ImageConfig, Progress, Source, Summary};
use crate::worker::signals::Signals;

/// Work that takes less time than this is not shown.
const PATIENCE: Duration = Duration::from_millis(300);
/// A signal has ended the work: its number is added.
const KILLED: u8 = 128;

/// Make root disks of directories, tars and container images
#[derive(Args)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "\
Examples:
  sarang image build ./rootfs root.ext4
  sarang image build alpine.tar:3.20 alpine.ext4 --size 2G
  sarang image show alpine.tar"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Build(BuildArguments),
    Show(ShowArguments),
}

/// Make a root disk: an ext4 image with the files of a directory, a tar or a container image
#[derive(Args)]
#[command(after_help = "\
Nothing is mounted and no privileges are needed. SOURCE is told by what is in it:
  a directory           its files; of other file systems mounted in it, only the empty directories
  a tar                 plain, or compressed with gzip, zstd, xz or bzip2
  an OCI image layout   a directory, or a tar of one (skopeo, buildah, docker buildx)
  a docker-archive      what `docker save` and `podman save` write
An image is chosen with :TAG or @DIGEST behind the path if there are several; its digests are verified.

Owners, modes, links, devices and extended attributes are those of the tar or image. Of a directory, the
caller's own files become root's, unless root makes the disk; other owners stay as they are.
How an image wants to be run (entrypoint, environment, user) is kept in the disk's /.sarang/config.json.

Without --size, the disk has room for a quarter more than it holds, and 64M. The file is sparse, and appears
under its name when it is complete. The same source always makes the same bytes.

Exit codes: 0 made, 2 wrong flags, 125 it cannot be made, 130/143 stopped.

Examples:
  sarang image build ./rootfs root.ext4
  sarang image build debian.tar.xz debian.ext4 --size 4G --label root
  docker save alpine -o alpine.tar && sarang image build alpine.tar alpine.ext4
  sarang image build ./layout:v1 app.ext4 --force --json | jq .config.entrypoint
  sarang run -k vmlinuz --root-disk root.ext4")]
struct BuildArguments {
    /// What the disk is made of: a directory, a tar, an OCI image layout or a docker-archive
    #[arg(value_name = "SOURCE[:TAG]")]
    source: OsString,
    /// The image to write
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Size of the file system, 16M to 15T; it also bounds what may be unpacked
    #[arg(long, value_name = "SIZE", value_parser = quantity::disk)]
    size: Option<u64>,
    /// Name of the file system, up to 16 bytes
    #[arg(long, value_name = "NAME", value_parser = label)]
    label: Option<String>,
    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,
    /// Print what was made as one line of JSON
    #[arg(long)]
    json: bool,
}

/// Say what something is: its kind, the images in it, how they want to be run
#[derive(Args)]
#[command(after_help = "\
Digests of the manifest and configuration are verified, those of the layers only by `sarang image build`.

Examples:
  sarang image show alpine.tar
  sarang image show ./layout:v1 --json | jq -r '.images[]'
  sarang image show root.ext4")]
struct ShowArguments {
    /// A directory, a tar, an OCI image layout, a docker-archive or a disk image
    #[arg(value_name = "SOURCE[:TAG]")]
    source: OsString,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// Runs the verb. The result is the exit code.
pub(super) fn main(arguments: &Arguments) -> Result<u8> {
    let mut waiting = Waiting::new()?;
    let done = match &arguments.verb {
        Verb::Build(arguments) => build(arguments, &mut waiting),
        Verb::Show(arguments) => show(arguments, &mut waiting),
    };
    waiting.end();
    match (waiting.signal.get(), done) {
        (Some(signal), Err(Error::Interrupted)) => {
            say(&format!("sarang: {}", Error::Interrupted));
            Ok(KILLED.saturating_add(signal))
        }
        (_, done) => print(done?.as_bytes()),
    }
}

fn build(arguments: &BuildArguments, waiting: &mut Waiting) -> std::result::Result<String, Error> {
    let source = Source::open(&arguments.source)?;
    let options = Build {
        size: arguments.size,
        label: arguments.label.as_deref(),
        replace: arguments.force,
    };
    let built = source.build(&arguments.out, &options, &mut |progress| {
        waiting.tell(progress)
    })?;
    Ok(if arguments.json {
        line(&built)
    } else {
        text_of_built(&built)
    })
}

fn show(arguments: &ShowArguments, waiting: &mut Waiting) -> std::result::Result<String, Error> {
    let source = Source::open(&arguments.source)?;
    let summary = source.summary(&mut |progress| waiting.tell(progress))?;
    Ok(if arguments.json {
        line(&summary)
    } else {
        text_of_summary(&source, &summary)
    })
}

fn line(value: &impl serde::Serialize) -> String {
    // Plain data has nothing that JSON could not say, but for paths that are no text.
    let text = serde_json::to_string(value);
    format!(
        "{}\n",
        text.unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    )
}

fn text_of_built(built: &Built) -> String {
    format!(
        "{}: {} with {} in {} files\n",
        built.path.display(),
        bytes(built.size),
        bytes(built.content),
        built.files
    )
}

fn text_of_summary(source: &Source, summary: &Summary) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        text.push_str(format!("{name:<12} {value}").trim_end());
        text.push('\n');
    };
    row("path", &summary.path.display().to_string());
    let kind = source.kind().name();
    match summary.compression {
        Some(compression) => row("kind", &format!("{kind}, compressed with {compression}")),
        None => row("kind", kind),
    }
    if let Some(size) = summary.size {
        row("size", &bytes(size));
    }
    for image in &summary.images {
        row("image", image);
    }
    if let Some(digest) = &summary.digest {
        row("digest", digest);
    }
    for layer in &summary.layers {
        let digest = layer.digest.as_deref().unwrap_or_default();
        row("layer", &format!("{} {digest}", bytes(layer.size)));
    }
    if let Some(config) = &summary.config {
        rows_of_config(config, &mut row);
    }
    text
}

fn rows_of_config(config: &ImageConfig, row: &mut impl FnMut(&str, &str)) {
    for (name, words) in [("entrypoint", &config.entrypoint), ("command", &config.cmd)] {
        if !words.is_empty() {
            let words: Vec<String> = words.iter().map(|word| super::run::quoted(word)).collect();
            row(name, &words.join(" "));
        }
    }
    for variable in &config.env {
        row("environment", variable);
    }
    let user = match (&config.user[..], &config.identity) {
        ("", None) => "root".to_owned(),
        (user, None) => user.to_owned(),
        (user, Some(identity)) => {
            let user = if user.is_empty() { "root" } else { user };
            format!("{user} ({}:{})", identity.uid, identity.gid)
        }
    };
    row("user", &user);
    let directory = &config.working_dir;
    row(
        "directory",
        if directory.is_empty() { "/" } else { directory },
    );
}

/// A number of bytes as a person would write it.
fn bytes(bytes: u64) -> String {
    const UNITS: &[(u32, &str)] = &[(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    for (shift, unit) in UNITS {
        let whole = bytes >> shift;
        if whole >= 10 || (whole > 0 && bytes.is_multiple_of(1 << shift)) {
            return format!("{whole}{unit}");
        }
        if whole > 0 {
            let tenths = (bytes >> (shift - 10)) * 10 / 1024 % 10;
            return format!("{whole}.{tenths}{unit}");
        }
    }
    format!("{bytes}B")
}

/// Parses the name of a file system.
fn label(text: &str) -> std::result::Result<String, String> {
    if (1..=16).contains(&text.len()) && !text.contains('\0') {
        Ok(text.to_owned())
    } else {
        Err("the name of an ext4 file system has 1 to 16 bytes".to_owned())
    }
}

/// Shows progress to a person who waits at a terminal, and looks out for the signal to stop.
struct Waiting {
    signals: Signals,
    /// The signal that came.
    signal: Cell<Option<u8>>,
    since: Instant,
    bar: Option<ProgressBar>,
    what: String,
}

impl Waiting {
    fn new() -> Result<Waiting> {
        let numbers = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
        let signals = Signals::block(&numbers)
            .map_err(|error| format!("cannot wait for signals: {error}"))?;
        Ok(Waiting {
            signals,
            signal: Cell::new(None),
            since: Instant::now(),
            bar: None,
            what: String::new(),
        })
    }

    fn tell(&mut self, progress: &Progress<'_>) -> ControlFlow<()> {
        if let Some(number) = self.signals.take() {
            self.signal
                .set(Some(u8::try_from(number).unwrap_or_default()));
            return ControlFlow::Break(());
        }
        if self.since.elapsed() >= PATIENCE && stderr().is_terminal() {
            self.show(progress);
        }
        ControlFlow::Continue(())
    }

    fn show(&mut self, progress: &Progress<'_>) {
        if self.what != progress.what {
            self.end();
            progress.what.clone_into(&mut self.what);
        }
        let bar = self.bar.get_or_insert_with(|| {
            let (bar, template) = match progress.total {
                0 => (ProgressBar::no_length(), "{spinner} {msg} ({human_pos})"),
                total => (
                    ProgressBar::new(total),
                    "{spinner} {msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}",
                ),
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.with_message(progress.what.to_owned())
        });
        bar.set_position(progress.done);
        bar.tick();
    }

    /// Takes the bar away.
    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_as_a_person_would_write_them() {
        for (number, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1K"),
            (1536, "1.5K"),
            (10 << 10, "10K"),
            ((10 << 10) + 900, "10K"),
            ((5 << 20) - 1, "4.9M"),
            (3 << 30, "3G"),
            (1 << 40, "1T"),
            (u64::MAX, "16777215T"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn a_label_has_room_in_a_superblock() {
        assert_eq!(label("root"), Ok("root".to_owned()));
        for bad in ["", "seventeen bytes!!", "ééééééééé"] {
            assert!(label(bad).is_err(), "{bad}");
        }
    }
}
