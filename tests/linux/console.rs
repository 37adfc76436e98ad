//! The virtio console.

use crate::guest::{Guest, Kernel, on_each_kernel};

fn a_virtio_console_has_what_was_printed_before_it_was_there_and_after(kernel: Kernel) {
    let script = "echo consoles=$(cat /proc/consoles | cut -d ' ' -f 1) end
        echo tty=$(cat /sys/class/tty/console/active)";
    let text = Guest::new(kernel, script)
        .with_modules()
        .flags(&["--console", "virtio", "-p", "loglevel=7"])
        .output();
    // The kernel's first line, which only the serial port can have had, and what a program printed to /dev/console.
    for expected in ["Linux version", "consoles=hvc0 end", "tty=hvc0"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
#[ignore = "needs a full KVM"]
fn a_kernel_panic_ends_the_run_as_such_whether_or_not_there_is_a_virtio_console_yet() {
    let script = "echo c > /proc/sysrq-trigger";
    // Debian's kernel has the driver in a module, which this initramfs does not bring.
    for (kernel, message) in [(Kernel::Small, "sysrq"), (Kernel::Debian61, "")] {
        let flags = ["--json", "--console", "virtio,off"];
        let (code, json) = Guest::new(kernel, script).flags(&flags).run();
        assert_eq!(code, Some(80), "{json}");
        assert!(
            json.contains("\"panicked\"") && json.contains(message),
            "{json}"
        );
    }
}

on_each_kernel! {
    a_virtio_console_has_what_was_printed_before_it_was_there_and_after;
}
