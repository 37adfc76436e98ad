//! `--expect` and `--send`: a conversation with the guest over its console, in the order of the command line.

use clap::{ArgMatches, Args, Command, FromArgMatches};

use crate::vm::{Pattern, Step};

/// The two flags, as clap knows them.
#[derive(Args)]
struct Flags {
    /// Wait until the guest's console prints what matches REGEX: a step, see below. Several, with --send, are done in order
    ///
    /// In the syntax of Rust's crate `regex`, on bytes: . \w \d \s \b are ASCII. A pattern with long counted repetitions
    /// such as {0,200} may be too large.
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true, value_parser = Pattern::new)]
    expect: Vec<Pattern>,
    /// Type TEXT at the guest's console: a step, see below. \n is the Enter key, which is not added by itself
    ///
    /// There are also \r, \t, \e (Escape), \\ and \xNN (\x03 is Ctrl-C). The guest takes it at its own pace.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = parse_text)]
    send: Vec<Text>,
}

/// What to type.
#[derive(Clone)]
struct Text {
    /// As it was given.
    text: String,
    bytes: Vec<u8>,
}

/// One of the flags, with its value as it was given.
#[derive(Clone, Debug, PartialEq)]
struct Given {
    flag: &'static str,
    text: String,
    step: Step,
}

/// Both flags in the order of the command line.
#[derive(Clone, Default)]
pub(super) struct Talk(Vec<Given>);

impl Talk {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The flags and their values.
    pub(super) fn flags(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|given| (given.flag, given.text.as_str()))
    }

    pub(super) fn steps(self) -> Vec<Step> {
        self.0.into_iter().map(|given| given.step).collect()
    }
}

/// clap keeps the values of each flag by themselves, and for each value its place on the command line.
impl FromArgMatches for Talk {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Talk, clap::Error> {
        let places = |flag| matches.indices_of(flag).into_iter().flatten();
        let (expect, send) = (places("expect"), places("send"));
        let flags = Flags::from_arg_matches(matches)?;
        let waits = flags.expect.into_iter().map(|pattern| Given {
            flag: "--expect",
            text: pattern.text().to_owned(),
            step: Step::Expect(pattern),
        });
        let texts = flags.send.into_iter().map(|Text { text, bytes }| Given {
            flag: "--send",
            text,
            step: Step::Send(bytes),
        });
        let mut steps: Vec<_> = expect.zip(waits).chain(send.zip(texts)).collect();
        steps.sort_by_key(|(place, _)| *place);
        Ok(Talk(steps.into_iter().map(|(_, given)| given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Talk::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Talk {
    fn augment_args(command: Command) -> Command {
        Flags::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Flags::augment_args_for_update(command)
    }
}

fn parse_text(text: &str) -> Result<Text, String> {
    Ok(Text {
        bytes: unescaped(text)?,
        text: text.to_owned(),
    })
}

/// The bytes that are meant.
fn unescaped(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            bytes.extend(c.encode_utf8(&mut [0; 4]).bytes());
            continue;
        }
        bytes.push(match chars.next() {
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('e') => 0x1b,
            Some('\\') => b'\\',
            Some('x') => {
                let mut digit = || chars.next()?.to_digit(16);
                let byte = digit().zip(digit()).map(|(high, low)| high * 16 + low);
                byte.and_then(|byte| u8::try_from(byte).ok())
                    .ok_or("after \\x come two hexadecimal digits, as in \\x03 for Ctrl-C")?
            }
            Some(other) => {
                return Err(format!(
                    "\\{other} means nothing; there are \\n, \\r, \\t, \\e, \\xNN, and \\\\ for a backslash"
                ));
            }
            None => {
                return Err("a backslash at the end means nothing; \\\\ is a backslash".to_owned());
            }
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        talk: Talk,
        #[arg(long)]
        other: Vec<String>,
    }

    #[test]
    fn steps_have_the_order_of_the_command_line() {
        let line = Line::try_parse_from([
            "run",
            "--send",
            "a",
            "--other=x",
            "--expect=b",
            "--expect",
            "--- c",
            "--send=-d",
            "--expect",
            "e",
        ])
        .unwrap();
        let expect = |regex| Step::Expect(Pattern::new(regex).unwrap());
        let send = |text: &str| Step::Send(text.into());
        let flags: Vec<_> = line.talk.flags().collect();
        assert_eq!(
            flags,
            [
                ("--send", "a"),
                ("--expect", "b"),
                ("--expect", "--- c"),
                ("--send", "-d"),
                ("--expect", "e")
            ]
        );
        assert_eq!(
            line.talk.steps(),
            [
                send("a"),
                expect("b"),
                expect("--- c"),
                send("-d"),
                expect("e")
            ]
        );
        assert!(Line::try_parse_from(["run"]).unwrap().talk.is_empty());
    }

    #[test]
    fn escapes_are_the_bytes_that_they_stand_for() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("root\\n", b"root\n"),
            (r"\r\t\e\\n", b"\r\t\x1b\\n"),
            (r"\x03\xfF0", b"\x03\xff0"),
            ("\u{e9}\n", b"\xc3\xa9\n"),
        ] {
            assert_eq!(unescaped(text).as_deref(), Ok(bytes), "{text}");
        }
        for (text, reason) in [
            ("a\\", "a backslash at the end"),
            ("\\d", "\\d means nothing"),
            ("\\", "a backslash at the end"),
            ("\\x4", "two hexadecimal digits"),
            ("\\x4g", "two hexadecimal digits"),
            ("\\x+1", "two hexadecimal digits"),
        ] {
            let error = unescaped(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
