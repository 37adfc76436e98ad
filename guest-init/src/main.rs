//! The first process of a Linux guest that sarang boots for a command.
//!
//! The kernel starts it from the initramfs. It reads the plan there, loads modules, mounts what the plan names, sets
//! up the network, runs the plan's command and any other that the host asks for over the exec channel, and powers off
//! when the plan's command has ended. It is one thread that sleeps in poll(2).
//!
//! What it cannot do it says in one sentence: over the channel if there is one, and on the console. It then powers
//! off; it never panics, since the kernel would with it.
//!
//! For tests, `init --channel FD PLAN` does the same with the channel on an open descriptor and the plan in a file, in
//! whatever namespaces it was started, and exits instead of powering off when it is not their first process.

mod boot;
mod dhcp;
mod job;
mod network;
mod news;
#[path = "../../src/guest/plan.rs"]
#[allow(dead_code, reason = "the VMM uses the other half of it")]
mod plan;
mod program;
#[path = "../../src/guest/protocol/mod.rs"]
#[allow(dead_code, reason = "the VMM uses the other half of it")]
mod protocol;
mod serve;
mod sys;

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::fd::RawFd;
use std::process::exit;

use plan::Plan;
use protocol::{CONSOLE_PREFIX, Phase};
use serve::Server;

/// Why init gives up: a sentence.
pub type Failure = String;

fn main() {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("init failed: {panic}"));
        end(1);
    }));
    let (channel, path) = match arguments() {
        Ok(arguments) => arguments,
        Err(usage) => {
            say(usage);
            end(2);
        }
    };
    let mut server = Server::new(channel);
    match run(&mut server, &path) {
        Ok(()) => end(0),
        Err(failure) => {
            say(&failure);
            server.give_up(&failure);
            boot::unmount_all();
            end(1);
        }
    }
}

/// Where the channel is, if it is not to be looked for, and where the plan is.
fn arguments() -> Result<(Option<RawFd>, OsString), &'static str> {
    let mut arguments = std::env::args_os().skip(1);
    // The kernel hands on words of its command line that it does not know.
    if arguments.next().is_none_or(|first| first != "--channel") {
        return Ok((None, plan::PATH.into()));
    }
    let channel = arguments.next().and_then(|fd| fd.to_str()?.parse().ok());
    match (channel, arguments.next()) {
        (Some(channel), Some(path)) => Ok((Some(channel), path)),
        _ => Err("usage: init --channel FD PLAN"),
    }
}

fn run(server: &mut Server, path: &OsString) -> Result<(), Failure> {
    sys::set_umask();
    server.done("init");
    let bytes = fs::read(path)
        .map_err(|error| format!("the plan {} cannot be read: {error}", path.display()))?;
    let plan = Plan::decode(&bytes).map_err(|why| format!("the plan cannot be used: {why}"))?;

    boot::load_modules(&plan.modules)?;
    server.done("modules");
    boot::mount_kernel_files()?;
    server.look_for_port();
    boot::switch_root(&plan)?;
    server.done("root");
    boot::set_clock_and_name(&plan)?;
    network::set_up(&plan.network)?;
    server.done("network");
    server.serve(plan.command.as_ref())?;
    boot::unmount_all();
    server.stopping();
    Ok(())
}

/// Says something on the console.
fn say(words: &str) {
    let line = format!("{CONSOLE_PREFIX}{words}\n");
    let console = fs::OpenOptions::new().write(true).open("/dev/console");
    let mut out: Box<dyn Write> = match console {
        Ok(console) if sys::is_first() => Box::new(console),
        _ => Box::new(std::io::stderr()),
    };
    let _ = out.write_all(line.as_bytes());
}

/// The end: of the machine, if this is its first process.
fn end(status: i32) -> ! {
    if sys::is_first() {
        sys::sync_all();
        sys::power_off();
    }
    exit(status);
}

/// What has just been done.
fn phase(name: &str) -> Phase {
    Phase {
        microseconds: u64::try_from(sys::since_boot().as_micros()).unwrap_or(u64::MAX),
        name: name.to_owned(),
    }
}
