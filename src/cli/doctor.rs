//! `sarang doctor`: can this host run guests, how well, and what to do if not.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{Result, kvm_path, print};
use crate::backend::console::{self, Console};
use crate::guest;
use crate::hv::kvm::{CAPABILITIES, Kvm};
use crate::trace::{Direction, Event, Kind, Sink, Space};
use crate::vm::{Image, Machine, Spec};

/// Check whether this host can run guests, how well, and what to do if not
#[derive(Args)]
#[command(after_help = "\
The exit code is 0 only if guests will run, Linux among them.

Examples:
  sarang doctor
  sarang doctor --json | jq .")]
pub(super) struct Arguments {
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Guests run, but something is missing that they may want.
    Warn,
    /// Guests do not run.
    Fail,
}

/// One line of the examination.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    text: String,
}

fn check(name: &'static str, verdict: Verdict, text: impl Into<String>) -> Check {
    Check {
        name,
        verdict,
        text: text.into(),
    }
}

/// Runs the verb. The result is the exit code.
pub(super) fn main(arguments: &Arguments) -> Result<u8> {
    let mut checks = Vec::new();
    match Kvm::open(&kvm_path()) {
        Ok(kvm) => {
            let path = kvm_path();
            checks.push(check(
                "kvm",
                Verdict::Ok,
                format!("{} can be opened", path.display()),
            ));
            let text = format!("all {} that are needed", CAPABILITIES.len());
            checks.push(check("capabilities", Verdict::Ok, text));
            let text = format!("a machine can have up to {}", kvm.max_vcpus());
            checks.push(check("vcpus", Verdict::Ok, text));
            checks.extend(measure(&kvm));
        }
        Err(error) => checks.push(check("kvm", Verdict::Fail, error.to_string())),
    }
    checks.push(device(
        "tun",
        "/dev/net/tun",
        "guests can have taps",
        "networks need it: modprobe tun",
    ));
    checks.push(device(
        "vhost-net",
        "/dev/vhost-net",
        "the host kernel can serve networks",
        "not needed; networks are served in this process",
    ));
    checks.push(huge_pages());
    let fit = checks.iter().all(|check| check.verdict != Verdict::Fail);
    let text = if arguments.json {
        format!("{}\n", serde_json::json!({ "ok": fit, "checks": checks }))
    } else {
        let mut text: String = checks.iter().map(line).collect();
        text.push_str(if fit {
            "Guests will run on this host.\n"
        } else {
            "Guests will not run on this host as it is; see the lines that say fail.\n"
        });
        text
    };
    print(text.as_bytes())?;
    Ok(u8::from(!fit))
}

fn line(check: &Check) -> String {
    let verdict = match check.verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    format!("{verdict:<5} {:<13} {}\n", check.name, check.text)
}

/// Whether a device node can be opened for reading and writing.
fn device(name: &'static str, path: &str, good: &str, bad: &str) -> Check {
    match OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new(path))
    {
        Ok(_) => check(name, Verdict::Ok, format!("{path} can be opened: {good}")),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => check(
            name,
            Verdict::Warn,
            format!("no permission to open {path}: {bad}"),
        ),
        Err(_) => check(name, Verdict::Warn, format!("there is no {path}: {bad}")),
    }
}

fn huge_pages() -> Check {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    match std::fs::read_to_string(path) {
        Ok(text) if text.contains("[never]") => check(
            "huge-pages",
            Verdict::Warn,
            format!("off: guests will be slower; echo madvise > {path}"),
        ),
        Ok(_) => check("huge-pages", Verdict::Ok, "transparent huge pages are on"),
        Err(_) => check(
            "huge-pages",
            Verdict::Warn,
            "this host kernel has none: guests will be slower",
        ),
    }
}

/// The POST code port, by which the probe says what it is about to do.
const MARK_PORT: u64 = 0x80;
/// What the probe counts in kernel mode and in user mode, in iterations of two instructions.
const KERNEL_ITERATIONS: f64 = 20_000.0;
const USER_ITERATIONS: f64 = 20_000_000.0;
/// Exits that the probe makes in a row.
const EXITS: u32 = 1000;
/// Kernel mode that is this much slower than user mode is not run by the CPU. Where it is, the factor is beyond 1000;
/// where the CPU runs both, the short loop still has a fixed cost that can make it look 20 times slower.
const INTERPRETED: f64 = 100.0;
/// The fastest of so many probes counts, as a busy host can only make one slower.
const PROBES: usize = 3;

/// Notes when the probe reached each of its marks.
#[derive(Default)]
struct Marks(Mutex<Vec<(u8, Duration)>>);

impl Sink for Marks {
    fn emit(&self, event: &Event<'_>) {
        if let Kind::Access {
            space: Space::Io,
            direction: Direction::Write,
            address: MARK_PORT,
            data: &[mark, ..],
            ..
        } = event.kind
            && mark != 0
        {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((mark, event.at));
        }
    }

    fn flush(&self) {}
}

impl Marks {
    /// Time between two marks.
    fn between(&self, from: u8, to: u8) -> Option<Duration> {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = |mark| {
            marks
                .iter()
                .find(|(number, _)| *number == mark)
                .map(|(_, at)| *at)
        };
        at(to)?.checked_sub(at(from)?)
    }
}

/// Runs the probe guest: a loop in kernel mode, a longer one in user mode, and a thousand exits.
fn measure(kvm: &Kvm) -> Vec<Check> {
    let mut probes = Vec::new();
    for _ in 0..PROBES {
        let marks = Arc::new(Marks::default());
        let outcome = probe(kvm, &marks);
        if marks.between(1, 2).is_none() || marks.between(3, 4).is_none() {
            let why = outcome.unwrap_or_else(|error| error.to_string());
            let text = format!("a small guest did not run: {why}");
            return vec![check("guest", Verdict::Fail, text)];
        }
        probes.push(marks);
    }
    let fastest = |from, to| {
        probes
            .iter()
            .filter_map(|marks| marks.between(from, to))
            .min()
    };
    let (kernel, user) = (
        fastest(1, 2).unwrap_or_default(),
        fastest(3, 4).unwrap_or_default(),
    );
    let millions =
        |iterations: f64, time: Duration| 2.0 * iterations / time.as_secs_f64().max(1e-9) / 1e6;
    let (kernel, user) = (
        millions(KERNEL_ITERATIONS, kernel),
        millions(USER_ITERATIONS, user),
    );
    let mut checks = vec![if user / kernel > INTERPRETED {
        check(
            "guest-speed",
            Verdict::Fail,
            format!(
                "guest kernel mode is interpreted ({kernel:.1} million instructions/s; user mode \
                 {user:.0}): small bare-metal guests run, Linux does not; use scripts/kvm-anywhere"
            ),
        )
    } else {
        let text =
            format!("guest kernel mode runs on hardware ({kernel:.0} million instructions/s)");
        check("guest-speed", Verdict::Ok, text)
    }];
    if let Some(time) = fastest(5, 6) {
        let micros = time.as_secs_f64() * 1e6 / f64::from(EXITS);
        let verdict = if micros > 50.0 {
            Verdict::Warn
        } else {
            Verdict::Ok
        };
        checks.push(check(
            "exit-latency",
            verdict,
            format!("{micros:.1} µs for an exit to sarang"),
        ));
    }
    checks
}

/// Runs the probe; the result says how it ended.
fn probe(kvm: &Kvm, marks: &Arc<Marks>) -> Result<String> {
    let bytes = guest::bare_metal("speed").ok_or("the probe is missing from this build")?;
    let mut spec = Spec::new(Image {
        name: "the built-in probe".to_owned(),
        bytes: bytes.to_vec(),
    });
    spec.ram_bytes = 32 << 20;
    spec.timeout = Some(Duration::from_secs(20));
    spec.trace = Some(Arc::clone(marks) as Arc<dyn Sink>);
    let report = Machine::new(kvm, spec, Console::open(&console::Kind::Off)?)?.run()?;
    Ok(report.outcome.to_string())
}
