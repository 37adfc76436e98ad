//! A conversation with a guest over its console, as expect(1) has it: steps that wait for output, and steps that type.
//!
//! Data moves through it as it does through a person at a terminal: what the guest prints goes in, in pieces of any
//! size, and what is to be typed comes out. [`Script`] is the pure state machine; [`Talk`] connects it with a console
//! and with the machine, which it ends when the last thing that was waited for has come.

use std::sync::{Arc, Mutex};

use serde::Serialize;

use super::pattern::{Match, Pattern, Search};
use super::{MachineHandle, Message, Outcome, lock};
use crate::backend::console::Typist;

/// The most of a match that is kept, in bytes from its end. A match may be longer; then its groups are not known.
pub const MATCH_MAX: usize = 64 << 10;

/// One step of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Wait until the output since the last match matches.
    Expect(Pattern),
    /// Type these bytes. The next step follows at once; the guest takes them at its own pace.
    Send(Vec<u8>),
}

/// How far a conversation has come, in the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ScriptReport {
    /// How many steps there are.
    pub steps: usize,
    /// How many of them were done.
    pub done: usize,
    /// What was waited for at the end, if it was not seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// What was seen, one for each step that waits and was done.
    pub matches: Vec<Match>,
}

/// What there is to do after a piece of output.
#[derive(Debug, Default, PartialEq, Eq)]
struct Reply {
    /// To be typed.
    text: Vec<u8>,
    /// The script has ended with this piece.
    over: bool,
}

/// The state machine.
struct Script {
    steps: Vec<Step>,
    /// Index of the step that comes next.
    next: usize,
    /// The last output, with all of [`MATCH_MAX`] bytes since the last match, and a byte before them.
    output: Vec<u8>,
    /// Where in `output` the last match ended.
    since: usize,
    /// The search of the step under way, which has come to the end of `output`.
    search: Option<Search>,
    matches: Vec<Match>,
}

impl Script {
    fn new(steps: Vec<Step>) -> Script {
        Script {
            steps,
            next: 0,
            output: Vec::new(),
            since: 0,
            search: None,
            matches: Vec::new(),
        }
    }

    fn is_over(&self) -> bool {
        self.next >= self.steps.len()
    }

    /// Whether the last step was to wait for something, and it came.
    fn ended_with_match(&self) -> bool {
        self.is_over() && matches!(self.steps.last(), Some(Step::Expect(_)))
    }

    /// Takes output of the guest; none to do the steps that need none.
    fn see(&mut self, output: &[u8]) -> Reply {
        let mut reply = Reply::default();
        if self.is_over() {
            return reply;
        }
        let mut unseen = self.output.len();
        self.output.extend_from_slice(output);
        while let Some(step) = self.steps.get(self.next) {
            match step {
                Step::Send(text) => reply.text.extend_from_slice(text),
                Step::Expect(pattern) => {
                    let before = self.since.checked_sub(1);
                    let before = before.and_then(|at| self.output.get(at)).copied();
                    let search = self.search.get_or_insert_with(|| pattern.search(before));
                    let new = self.output.get(unseen..).unwrap_or_default();
                    let Some(count) = search.advance(pattern, new) else {
                        break;
                    };
                    unseen = unseen.saturating_add(count);
                    let found = self.found(pattern, unseen);
                    self.matches.push(found);
                    self.since = unseen;
                    self.search = None;
                }
            }
            self.next = self.next.saturating_add(1);
        }
        self.forget();
        reply.over = self.is_over();
        reply
    }

    /// The output has ended, and with it its last line. Nothing can be typed any more.
    fn end(&mut self) {
        self.see(&[]);
        if let (Some(Step::Expect(pattern)), Some(search)) =
            (self.steps.get(self.next), self.search)
            && search.ends(pattern)
        {
            let found = self.found(pattern, self.output.len());
            self.matches.push(found);
            self.since = self.output.len();
            self.search = None;
            self.next = self.next.saturating_add(1);
            self.see(&[]);
        }
    }

    fn found(&self, pattern: &Pattern, end: usize) -> Match {
        let start = self.since.max(end.saturating_sub(MATCH_MAX));
        pattern.found(&self.output, start..end)
    }

    /// Drops output that no match can have in it. Not each time, since what is left has to be moved.
    fn forget(&mut self) {
        let unneeded = self.since.max(self.output.len().saturating_sub(MATCH_MAX));
        let unneeded = unneeded.saturating_sub(1);
        if self.is_over() {
            self.output = Vec::new();
            self.since = 0;
        } else if unneeded >= MATCH_MAX {
            self.output.drain(..unneeded);
            self.since = self.since.saturating_sub(unneeded).max(1);
        }
    }

    fn report(&self) -> ScriptReport {
        ScriptReport {
            steps: self.steps.len(),
            done: self.next,
            waiting_for: self.steps.get(self.next).and_then(|step| match step {
                Step::Expect(pattern) => Some(pattern.text().to_owned()),
                Step::Send(_) => None,
            }),
            matches: self.matches.clone(),
        }
    }

    /// What the end of a machine means for its script. What was waited for came before the end, whatever that was; but
    /// who stopped the run knows better.
    fn outcome(&self, ended: Outcome) -> Outcome {
        match ended {
            Outcome::Stopped { .. } => ended,
            _ if self.ended_with_match() => Outcome::Expected,
            _ if !self.is_over() && ended.exit_code() == 0 => Outcome::NotExpected {
                guest: Box::new(ended),
            },
            _ => ended,
        }
    }
}

/// A script with the console that it is about, and the machine that it ends.
#[derive(Clone)]
pub(super) struct Talk {
    script: Arc<Mutex<Script>>,
    typist: Typist,
    handle: MachineHandle,
}

impl Talk {
    /// Begins with the steps that need no output.
    pub(super) fn new(steps: Vec<Step>, typist: Typist, handle: MachineHandle) -> Talk {
        let script = Arc::new(Mutex::new(Script::new(steps)));
        let talk = Talk {
            script,
            typist,
            handle,
        };
        talk.see(&[]);
        talk
    }

    /// Takes output of the guest.
    pub(super) fn see(&self, output: &[u8]) {
        let mut script = lock(&self.script);
        let reply = script.see(output);
        if !reply.text.is_empty() {
            self.typist.write(&reply.text);
        }
        if reply.over && script.ended_with_match() {
            self.handle.send(Message::Expected);
        } else if reply.over {
            self.typist.leave();
        }
    }

    /// What the run came to, after all output has been seen.
    pub(super) fn finish(&self, ended: Outcome) -> (Outcome, ScriptReport) {
        let mut script = lock(&self.script);
        script.end();
        (script.outcome(ended), script.report())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect(regex: &str) -> Step {
        Step::Expect(Pattern::new(regex).unwrap())
    }

    fn send(text: &str) -> Step {
        Step::Send(text.into())
    }

    /// All that is typed while `output` comes in pieces of `size`.
    fn typed(script: &mut Script, output: &[u8], size: usize) -> String {
        let mut text = script.see(&[]).text;
        for piece in output.chunks(size) {
            text.extend(script.see(piece).text);
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn steps_are_done_in_their_order_wherever_the_output_is_cut() {
        let output = b"boot\r\nlogin: root\r\n# echo 42\r\n42\r\n# ";
        let login = || {
            vec![
                expect("login: "),
                send("root\n"),
                expect("^# "),
                send("echo 42\n"),
                expect(r"^(\d+)$"),
            ]
        };
        let cases: &[(Vec<Step>, &str, usize, &[&str])] = &[
            (login(), "root\necho 42\n", 5, &["login: ", "# ", "42"]),
            (vec![send("a"), send("b")], "ab", 2, &[]),
            (vec![send("a"), expect("42"), send("b")], "ab", 3, &["42"]),
            // Each match begins after the last.
            (
                vec![expect("root"), expect("boot"), send("x")],
                "",
                1,
                &["root"],
            ),
            (
                vec![expect("4"), expect("2"), expect("42")],
                "",
                3,
                &["4", "2", "42"],
            ),
            (vec![expect("4"), expect("^2")], "", 1, &["4"]),
            (
                vec![expect("o"), expect("o"), expect("t")],
                "",
                3,
                &["o", "o", "t"],
            ),
            (vec![expect("never"), send("x")], "", 0, &[]),
        ];
        for (steps, expected, done, matches) in cases {
            for size in 1..=output.len() {
                let mut script = Script::new(steps.clone());
                assert_eq!(typed(&mut script, output, size), *expected, "{steps:?}");
                let report = script.report();
                assert_eq!(report.done, *done, "{steps:?} in pieces of {size}");
                let texts: Vec<_> = report.matches.iter().map(|found| &found.text).collect();
                assert_eq!(texts, *matches);
            }
        }
        let mut script = Script::new(login());
        typed(&mut script, output, 3);
        let groups: Vec<_> = script.matches.iter().map(|found| &found.groups).collect();
        assert_eq!(groups, [&vec![], &vec![], &vec![Some("42".to_owned())]]);
    }

    #[test]
    fn the_end_is_told_once_and_output_after_it_is_ignored() {
        let mut script = Script::new(vec![expect("a"), send("x")]);
        assert_eq!(script.see(b"-"), Reply::default());
        let reply = Reply {
            text: b"x".to_vec(),
            over: true,
        };
        assert_eq!(script.see(b"aa"), reply);
        assert_eq!(script.see(b"a"), Reply::default());
        assert!(script.output.is_empty() && !script.ended_with_match());
    }

    #[test]
    fn the_end_of_the_output_ends_its_last_line() {
        let mut script = Script::new(vec![expect("down$"), send("x"), expect("down$")]);
        script.see(b"power down");
        assert_eq!(script.next, 0);
        script.end();
        assert_eq!(script.next, 2, "one match is one match");
        let mut script = Script::new(vec![expect("a"), expect("b$")]);
        script.see(b"ab");
        script.end();
        assert!(script.ended_with_match());
    }

    #[test]
    fn a_guest_that_prints_without_end_takes_neither_memory_nor_time_without_end() {
        // Each `a` may be where a match begins.
        for (regex, text) in [("(?s)a.*b", "a"), ("(a|b)*c", "ab"), ("(a+)+$b", "a")] {
            let mut script = Script::new(vec![expect(regex)]);
            let output = text.repeat((1 << 20) / text.len());
            let (once, bytes) = output.as_bytes().split_at(1000);
            once.chunks(1).for_each(|byte| drop(script.see(byte)));
            (0..8).for_each(|_| drop(script.see(bytes)));
            assert!(script.output.len() <= 2 * MATCH_MAX, "{regex}");
            assert_eq!(script.next, 0);
        }
    }

    #[test]
    fn a_long_match_is_seen_and_its_last_is_kept() {
        let mut script = Script::new(vec![expect("(?s)begin(.*)end"), expect("^x")]);
        script.see(b"begin");
        (0..100).for_each(|_| drop(script.see(&[b'-'; 4000])));
        script.see(b"end");
        assert_eq!(script.next, 1);
        let found = &script.matches[0];
        assert_eq!(found.text.len(), MATCH_MAX);
        assert!(found.text.ends_with("--end"));
        assert_eq!(found.groups, [None]);
        // The byte before the search is still known.
        script.see(b"x");
        assert_eq!(script.next, 1);
        script.see(b"\nx");
        assert!(script.ended_with_match());
        // What is kept does not depend on the pieces.
        let output = ["b".to_owned(), "-".repeat(3 * MATCH_MAX), "e".to_owned()].concat();
        for size in [1, 1000, output.len()] {
            let mut script = Script::new(vec![expect("(?s)b.*e")]);
            typed(&mut script, output.as_bytes(), size);
            assert_eq!(script.matches[0].text.len(), MATCH_MAX);
        }
    }

    #[test]
    fn an_outcome_tells_whether_the_steps_were_done() {
        let not_expected = |guest: Outcome| Outcome::NotExpected {
            guest: Box::new(guest),
        };
        let stopped = Outcome::Stopped {
            by: super::super::StoppedBy::Interrupt,
        };
        let waiting = || vec![expect("x")];
        for (steps, ended, expected) in [
            (vec![expect("a")], Outcome::PoweredOff, Outcome::Expected),
            (vec![expect("a")], Outcome::TripleFaulted, Outcome::Expected),
            (vec![expect("a")], stopped.clone(), stopped.clone()),
            (vec![send("a")], Outcome::PoweredOff, Outcome::PoweredOff),
            (
                waiting(),
                Outcome::PoweredOff,
                not_expected(Outcome::PoweredOff),
            ),
            (
                waiting(),
                Outcome::Rebooted,
                not_expected(Outcome::Rebooted),
            ),
            (
                waiting(),
                Outcome::Exited { code: 0 },
                not_expected(Outcome::Exited { code: 0 }),
            ),
            (
                waiting(),
                Outcome::Exited { code: 3 },
                Outcome::Exited { code: 3 },
            ),
            (
                waiting(),
                Outcome::TimedOut { limit_ms: 1 },
                Outcome::TimedOut { limit_ms: 1 },
            ),
            (waiting(), Outcome::TripleFaulted, Outcome::TripleFaulted),
            (waiting(), stopped.clone(), stopped.clone()),
        ] {
            let mut script = Script::new(steps);
            script.see(b"a");
            assert_eq!(script.outcome(ended), expected);
        }
    }
}
