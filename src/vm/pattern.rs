//! A regular expression for what a guest prints, matched as it comes in.
//!
//! The console's output has no end to wait for, and it comes in pieces that are cut anywhere. So the expression is made
//! into a finite automaton: one table, and one look-up in it for each byte, whatever the guest prints and however long
//! ago a match may have begun. The automaton says where the first match *ends*; what the match is, and its groups, is
//! then looked for once, in the last of the text.
//!
//! When is there a match? At the first byte after which there is one whatever byte comes next. `[0-9]+` has matched the
//! `4` of `42`, and `[0-9]+$` the whole of it once the line has ended: the result depends on the bytes alone, not on the
//! pieces that they came in.

use std::ops::Range;
use std::sync::Arc;

use regex_automata::Input;
use regex_automata::dfa::Automaton;
use regex_automata::dfa::{StartKind, dense};
use regex_automata::nfa::thompson::{self, pikevm::PikeVM};
use regex_automata::util::primitives::StateID;
use regex_automata::util::start;
use regex_syntax::ParserBuilder;
use regex_syntax::hir::Hir;
use serde::Serialize;

/// Bytes of an expression before it is made into a table.
const NFA_LIMIT: usize = 256 << 10;
/// Bytes of the table, and of what is needed to make it.
const DFA_LIMIT: usize = 8 << 20;
/// Bytes of each kind that an assertion (`$`, `\b`) tells from the others: part of a word, other, ends of a line.
const KINDS: [u8; 4] = *b"a \n\r";

/// Why a regular expression is of no use. Each completes a sentence that names the expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("{what}, at character {character}")]
    Syntax {
        what: String,
        /// Counted from 1.
        character: usize,
    },
    #[error("it matches without any output, so that there is nothing to wait for")]
    Empty,
    #[error(
        "it has a Unicode word boundary, which is not supported: leave out the flag `u` before `\\b`"
    )]
    UnicodeWord,
    #[error(
        "it is too large: make counted repetitions, such as {{0,200}}, shorter, or use * or + for them"
    )]
    TooLarge,
}

/// What has matched: text that is not UTF-8 has replacement characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Match {
    pub text: String,
    /// The groups in parentheses, in the order in which they open; `None` for those that took no part.
    pub groups: Vec<Option<String>>,
}

/// A compiled expression in the syntax of the `regex` crate. It sees bytes: `.`, `\w`, `\d`, `\s` and `\b` are ASCII.
/// `^` and `$` are the borders of lines, which end with `\n`, `\r\n` or `\r`, and `.` is not part of these ends.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    ends: Arc<dense::DFA<Vec<u32>>>,
    groups: PikeVM,
}

/// Two patterns are the same if they were written so.
impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.text == other.text
    }
}

impl std::fmt::Debug for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pattern").field(&self.text).finish()
    }
}

impl Pattern {
    /// Compiles `text`.
    ///
    /// # Errors
    /// When it is not a regular expression, can match without any text, or needs more than 8 MiB.
    pub fn new(text: &str) -> Result<Pattern, PatternError> {
        let parsed = ParserBuilder::new()
            .unicode(false)
            .utf8(false)
            .multi_line(true)
            .crlf(true)
            .build()
            .parse(text)
            .map_err(|error| explain(text, &error))?;
        check(&parsed)?;
        let config = thompson::Config::new()
            .utf8(false)
            .nfa_size_limit(Some(NFA_LIMIT));
        let nfa = thompson::Compiler::new()
            .configure(config)
            .build_from_hir(&parsed)
            .map_err(|_| PatternError::TooLarge)?;
        let config = dense::Config::new()
            .start_kind(StartKind::Unanchored)
            .accelerate(false)
            .dfa_size_limit(Some(DFA_LIMIT))
            .determinize_size_limit(Some(DFA_LIMIT));
        // What else it can fail for has been checked above.
        let ends = dense::Builder::new()
            .configure(config)
            .build_from_nfa(&nfa)
            .map_err(|_| PatternError::TooLarge)?;
        let groups = PikeVM::new_from_nfa(nfa).map_err(|_| PatternError::TooLarge)?;
        Ok(Pattern {
            text: text.to_owned(),
            ends: Arc::new(ends),
            groups,
        })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A search through what follows the byte `before`; `None` at the very beginning.
    pub(super) fn search(&self, before: Option<u8>) -> Search {
        let start = self
            .ends
            .start_state(&start::Config::new().look_behind(before));
        // It is only refused for searches of another kind than the table was made for.
        Search(start.ok())
    }

    /// The match in the last of the output that ends at the end of `span`; bytes around `span` are only looked at by
    /// assertions. When the match began before `span`, it is cut, and its groups are not known.
    pub(super) fn found(&self, text: &[u8], span: Range<usize>) -> Match {
        let mut captures = self.groups.create_captures();
        let input = Input::new(text).span(span.clone());
        let mut cache = self.groups.create_cache();
        self.groups.captures(&mut cache, input, &mut captures);
        let read = |range: Range<usize>| {
            String::from_utf8_lossy(text.get(range).unwrap_or_default()).into_owned()
        };
        let whole = captures.get_match().map_or(span, |found| found.range());
        Match {
            text: read(whole),
            groups: (1..self
                .groups
                .get_nfa()
                .group_info()
                .group_len(Default::default()))
                .map(|group| captures.get_group(group).map(|span| read(span.range())))
                .collect(),
        }
    }
}

/// That the automaton can be made, and is of use.
fn check(parsed: &Hir) -> Result<(), PatternError> {
    let properties = parsed.properties();
    if properties.look_set().contains_word_unicode() {
        return Err(PatternError::UnicodeWord);
    }
    match properties.minimum_len() {
        Some(0) => Err(PatternError::Empty),
        // `None` is an expression that matches nothing ever, such as `[a&&b]`: it is waited for in vain.
        _ => Ok(()),
    }
}

/// What is wrong with `text`, and where.
fn explain(text: &str, error: &regex_syntax::Error) -> PatternError {
    let (what, offset) = match error {
        regex_syntax::Error::Parse(error) => (error.kind().to_string(), error.span().start.offset),
        regex_syntax::Error::Translate(error) => {
            (error.kind().to_string(), error.span().start.offset)
        }
        // There are no others today.
        other => (other.to_string(), 0),
    };
    let before = text.get(..offset).unwrap_or_default();
    PatternError::Syntax {
        what,
        character: before.chars().count().saturating_add(1),
    }
}

/// How far a search has come: a row of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Search(Option<StateID>);

impl Search {
    /// Goes on through `bytes`. How many of them there are before the end of the first match, if it is among them.
    pub(super) fn advance(&mut self, pattern: &Pattern, bytes: &[u8]) -> Option<usize> {
        let mut state = self.0?;
        for (index, &byte) in bytes.iter().enumerate() {
            // The table is one byte late, so that it knows what assertions at the end of a match are about.
            state = pattern.ends.next_state(state, byte);
            if pattern.ends.is_match_state(state) {
                return Some(index);
            }
        }
        self.0 = Some(state);
        let certain = KINDS
            .iter()
            .all(|kind| matches_at(pattern, pattern.ends.next_state(state, *kind)));
        certain.then_some(bytes.len())
    }

    /// Whether a match ends here, where the output ends for good.
    pub(super) fn ends(self, pattern: &Pattern) -> bool {
        self.0
            .is_some_and(|state| matches_at(pattern, pattern.ends.next_eoi_state(state)))
    }
}

fn matches_at(pattern: &Pattern, state: StateID) -> bool {
    pattern.ends.is_match_state(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the first match in `text` ends when it comes in pieces of `size` bytes, and when it then ends.
    fn end(pattern: &Pattern, before: Option<u8>, text: &[u8], size: usize) -> Option<usize> {
        let mut search = pattern.search(before);
        let mut passed = 0;
        for piece in text.chunks(size) {
            if let Some(count) = search.advance(pattern, piece) {
                return Some(passed + count);
            }
            passed += piece.len();
        }
        search.ends(pattern).then_some(passed)
    }

    #[test]
    fn a_match_ends_at_the_same_byte_wherever_the_output_is_cut() {
        const CASES: &[(&str, &[u8], Option<usize>)] = &[
            ("login:", b"debian login: ", Some(13)),
            ("# ", b"\r\n# ", Some(4)),
            // As soon as there is no doubt.
            ("[0-9]+", b"a 42 b", Some(3)),
            ("[0-9]+$", b"a 42\r\n", Some(4)),
            ("[0-9]+ ", b"a 42 b", Some(5)),
            ("^42$", b"142\r\n42\r\n", Some(7)),
            ("^42\r?$", b"x\n42\n", Some(4)),
            ("^42\r?$", b"x\r\n42\r\n", Some(5)),
            (r"foo\b", b"food foo.", Some(8)),
            (r"foo\B", b"foo food", Some(7)),
            (r"=\b", b"= =a", Some(3)),
            ("a.c", b"a\nc a\rc abc", Some(11)),
            ("(?s)a.c", b"a\nc", Some(3)),
            ("one|two|three", b"threetwo", Some(5)),
            // Only the end of the output is the end of its last line.
            ("down$", b"power down", Some(10)),
            ("downs$", b"power down", None),
            ("[^a]b", b"\xff\xfeb", Some(3)),
            ("\u{e9}t\u{e9}", "l'\u{e9}t\u{e9}".as_bytes(), Some(7)),
            ("^x", b"ax\rx", Some(4)),
            (r"\Ax", b"ax\nx", None),
        ];
        for (regex, text, expected) in CASES {
            let pattern = Pattern::new(regex).unwrap();
            for size in 1..=text.len() {
                let found = end(&pattern, None, text, size);
                assert_eq!(found, *expected, "{regex} in pieces of {size}");
            }
        }
    }

    #[test]
    fn a_search_knows_the_byte_before_it() {
        for (regex, before, text, expected) in [
            ("^a", Some(b'\n'), "a", Some(1)),
            ("^a", Some(b' '), "a", None),
            (r"\ba", Some(b' '), "a", Some(1)),
            (r"\ba", Some(b'b'), "a", None),
            (r"\Aa", Some(b'\n'), "a", None),
        ] {
            let pattern = Pattern::new(regex).unwrap();
            assert_eq!(
                end(&pattern, before, text.as_bytes(), 1),
                expected,
                "{regex}"
            );
        }
    }

    #[test]
    fn a_match_has_its_groups_and_what_is_left_of_one_that_began_too_early() {
        let pattern = Pattern::new(r"(?s)(\w+)=(\d+)(;)?.*end").unwrap();
        let text = b"a b=42 xx end";
        let found = pattern.found(text, 0..text.len());
        assert_eq!(found.text, "b=42 xx end");
        assert_eq!(found.groups, [Some("b".into()), Some("42".into()), None]);
        let cut = pattern.found(text, 5..text.len());
        assert_eq!(cut.text, "2 xx end");
        assert_eq!(cut.groups, [None, None, None]);
        // Not UTF-8.
        let pattern = Pattern::new("a.").unwrap();
        assert_eq!(pattern.found(b"a\xff", 0..2).text, "a\u{fffd}");
    }

    #[test]
    fn an_expression_of_no_use_is_refused_with_the_reason() {
        for (regex, reason) in [
            ("login(", "unclosed group, at character 6"),
            ("\u{e9}*?*+[", "unclosed character class, at character 6"),
            (
                "*",
                "repetition operator missing expression, at character 1",
            ),
            (
                "(?=a)",
                "look-around, including look-ahead and look-behind, is not supported, at character 1",
            ),
            (r"a\1", "backreferences are not supported, at character 2"),
            ("", "without any output"),
            ("x*", "without any output"),
            ("^$", "without any output"),
            (r"(?u)\bx", "Unicode word boundary"),
            ("(a{200}){200}", "too large"),
            ("a.{0,400}b.{0,400}c", "too large"),
        ] {
            let error = Pattern::new(regex).unwrap_err().to_string();
            assert!(error.contains(reason), "{regex}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
