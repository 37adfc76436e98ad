//! For tests: a network namespace of their own (network_namespaces(7)), with taps that nobody else sees.

use std::path::Path;
use std::process::Command;

use crate::worker::children;

/// Set in the process that runs inside.
const INSIDE: &str = "SARANG_TEST_IN_NAMESPACE";

/// Whether the caller runs in a namespace of its own. If not, it is started again in one, by its full name as the test
/// harness knows it, and succeeds there; then, and when the host has no taps at all, the caller has nothing left to do.
pub(crate) fn entered(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        run("ip link set lo up");
        return true;
    }
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: there is no /dev/net/tun");
        return false;
    }
    let mut command = Command::new("unshare");
    command.arg("--net");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let _child = children::some();
    let output = command
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "there is no test {test}: {text}");
    false
}

/// Runs one command, without a shell.
pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let _child = children::some();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
}
