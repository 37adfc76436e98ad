//! The command line: one file a verb, and the words that a person reads.
//!
//! One table of flags, the clap structs here and in the verbs' files, makes the parser, the help, the completions
//! and the man page.

mod balloon;
mod command;
mod console;
mod disk;
mod doctor;
mod image;
mod kernels;
mod net;
mod options;
mod pmem;
mod quantity;
mod run;
mod share;
mod talk;
mod vsock;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

/// sarang itself failed: bad image, no KVM, lost device.
const FAILURE: u8 = 125;
/// The flags do not go together, which clap cannot know.
const USAGE: u8 = 2;

/// Boots guests on Linux KVM.
#[derive(Parser)]
#[command(
    name = "sarang",
    version,
    about = "Boots guests on Linux KVM",
    after_help = "Examples:\n  \
        sarang run -k vmlinuz -i initrd.img -c 2 -m 1G    boot Linux to a serial console\n  \
        sarang run                                        find a kernel by itself\n  \
        sarang image build ./rootfs root.ext4             make a root disk\n  \
        sarang doctor                                     can this host run guests?",
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Say more about what is being done; twice for details
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Verb {
    Run(Box<run::Arguments>),
    Image(image::Arguments),
    Doctor(doctor::Arguments),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  sarang completions bash > ~/.local/share/bash-completion/completions/sarang"
    )]
    Completions {
        shell: Shell,
    },
    /// Print the man page
    #[command(after_help = "Example:\n  sarang man | man -l -")]
    Man,
}

/// Parses the command line and does what it says. The result is the exit code of the process.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed standard output or error leaves nobody to tell.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
    };
    start_log(cli.verbose);
    let result = match cli.verb {
        Verb::Run(arguments) => run::main(*arguments, cli.verbose > 0),
        Verb::Image(arguments) => image::main(&arguments),
        Verb::Doctor(arguments) => doctor::main(&arguments),
        Verb::Completions { shell } => completions(shell),
        Verb::Man => man(),
    };
    result.unwrap_or_else(|error| {
        say(&format!("sarang: {error}"));
        FAILURE
    })
}

/// What goes wrong in a verb: one sentence for a person.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The KVM device: `$SARANG_KVM`, or `/dev/kvm`.
fn kvm_path() -> PathBuf {
    std::env::var_os("SARANG_KVM").map_or_else(|| PathBuf::from("/dev/kvm"), PathBuf::from)
}

/// Prints a line for the person at the terminal, if there still is one.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    env_logger::Builder::new()
        .filter_level(level)
        .format(|out, record| {
            let level = record.level().as_str().to_ascii_lowercase();
            // A guest's console may have the terminal in raw mode: begin and end the line properly.
            writeln!(out, "sarang: {level}: {}\r", record.args())
        })
        .init();
}

fn completions(shell: Shell) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sarang", &mut script);
    print(&script)
}

fn man() -> Result<u8> {
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    for verb in Cli::command().get_subcommands() {
        clap_mangen::Man::new(verb.clone()).render(&mut page)?;
    }
    print(&page)
}

/// Writes to standard output; a reader who has gone is no error.
fn print(bytes: &[u8]) -> Result<u8> {
    match io::stdout()
        .write_all(bytes)
        .and_then(|()| io::stdout().flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_flags_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_images_out_of_range_are_refused_with_a_sentence() {
        for (flag, value, words) in [
            ("--size", "12", "needs a unit"),
            ("--size", "big", "is not a size"),
            ("--size", "15M", "at least 16M"),
            ("--size", "16T", "at most 15T"),
            ("--size", "99999999999999999999G", "is not a size"),
            ("--label", "", "1 to 16 bytes"),
            ("--label", "a name that is too long", "1 to 16 bytes"),
        ] {
            let line = ["sarang", "image", "build", "a", "b", flag, value];
            let error = Cli::try_parse_from(line).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(words), "{flag} {value}: {error}");
        }
    }

    #[test]
    fn flags_out_of_range_are_refused_with_a_sentence() {
        for (flag, value, words) in [
            ("-m", "0", "at least 16M"),
            ("-m", "12", "needs a unit"),
            ("-m", "abc", "is not a size"),
            ("-m", "1T", "at most"),
            ("-c", "0", "1 to 64"),
            ("-c", "100000", "1 to 64"),
            ("--timeout", "soon", "is not a time"),
            ("--console", "tv", "off, stdio, pty or file=PATH"),
            ("--console", "virtio,tv", "off, stdio, pty or file=PATH"),
            ("--net", "bridge", "tap=NAME, user or none"),
            ("--net", "user,hostfwd=22", "two TCP ports"),
            ("--disk", "a.img,rw", "--disk does not know `rw`"),
            ("--vsock", "2", "is not a guest's CID"),
            ("--root-disk", "a.img,format=vmdk", "raw or qcow2"),
            ("--share", "dir,rw", "--share does not know `rw`"),
            ("--expect", "a(", "unclosed group, at character 2"),
            ("--expect", "x*", "nothing to wait for"),
            ("--send", "\\q", "\\q means nothing"),
        ] {
            let error = Cli::try_parse_from(["sarang", "run", flag, value])
                .err()
                .unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(words), "{flag} {value}: {error}");
        }
    }
}
