//! `--console`: the guest's end of the console, and where it goes on the host.

use std::fmt;

use crate::backend::console::Kind;
use crate::vm::ConsoleDevice;

/// The value of the flag: `off`, `stdio`, `pty`, `file=PATH`, each also after `virtio,`; and `virtio` alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flag {
    pub device: ConsoleDevice,
    pub kind: Kind,
}

/// A serial console on standard input and output.
pub(super) const DEFAULT: &str = "stdio";

impl Flag {
    /// What the kernel is told of its console. A kernel that has no virtio console yet, or never finds one, prints to
    /// COM1 until it has: or else a panic at that time could not be told from a reboot.
    pub(super) fn kernel_words(&self) -> &'static str {
        match self.device {
            ConsoleDevice::Serial => "console=ttyS0",
            ConsoleDevice::Virtio => "console=hvc0 earlyprintk=ttyS0",
        }
    }
}

/// Parses the flag's value.
pub(super) fn parse(text: &str) -> Result<Flag, String> {
    let (device, place) = match text.split_once(',') {
        Some(("virtio", place)) => (ConsoleDevice::Virtio, place),
        None if text == "virtio" => (ConsoleDevice::Virtio, DEFAULT),
        _ => (ConsoleDevice::Serial, text),
    };
    let kind = match place {
        "off" => Kind::Off,
        "stdio" => Kind::Stdio,
        "pty" => Kind::Pty,
        _ => match place.strip_prefix("file=") {
            Some(path) if !path.is_empty() => Kind::File(path.into()),
            _ => {
                return Err(
                    "a console is off, stdio, pty or file=PATH, or virtio and one of these: \
                     virtio,pty"
                        .to_owned(),
                );
            }
        },
    };
    Ok(Flag { device, kind })
}

/// As [`parse`] reads it back.
impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.device == ConsoleDevice::Virtio {
            f.write_str("virtio,")?;
        }
        match &self.kind {
            Kind::Off => f.write_str("off"),
            Kind::Stdio => f.write_str("stdio"),
            Kind::Pty => f.write_str("pty"),
            Kind::File(path) => write!(f, "file={}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_a_device_and_a_place_and_is_shown_as_it_is_read() {
        use ConsoleDevice::{Serial, Virtio};
        for (text, device, kind, shown) in [
            ("off", Serial, Kind::Off, "off"),
            ("stdio", Serial, Kind::Stdio, "stdio"),
            ("pty", Serial, Kind::Pty, "pty"),
            ("file=a,b", Serial, Kind::File("a,b".into()), "file=a,b"),
            (
                "file=virtio",
                Serial,
                Kind::File("virtio".into()),
                "file=virtio",
            ),
            ("virtio", Virtio, Kind::Stdio, "virtio,stdio"),
            ("virtio,off", Virtio, Kind::Off, "virtio,off"),
            ("virtio,stdio", Virtio, Kind::Stdio, "virtio,stdio"),
            ("virtio,pty", Virtio, Kind::Pty, "virtio,pty"),
            (
                "virtio,file=/a",
                Virtio,
                Kind::File("/a".into()),
                "virtio,file=/a",
            ),
        ] {
            let flag = parse(text).unwrap();
            assert_eq!(flag, Flag { device, kind }, "{text}");
            assert_eq!(flag.to_string(), shown);
            assert_eq!(parse(shown), Ok(flag));
        }
    }

    #[test]
    fn a_mistake_is_answered_with_what_a_console_can_be() {
        for text in [
            "",
            "tv",
            "file",
            "file=",
            "virtio,",
            "virtio,,pty",
            "virtiopty",
            "virtio,virtio",
            "virtio,file=",
            "virtio=pty",
            "serial",
            "pty,virtio",
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(
                sentence.contains("off, stdio, pty or file=PATH"),
                "{text}: {sentence}"
            );
        }
    }
}
