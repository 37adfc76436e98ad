//! The value of a device's flag: `PATH,key=value,flag`, as in `--disk root.img,ro,queues=2`.
//!
//! The first word says which thing of the host to use; what follows are options in any order. A comma cannot be part of
//! a word.

/// An option that a flag knows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key {
    /// A word that stands alone.
    Word(&'static str),
    /// A key and how its value is written.
    Value(&'static str, &'static str),
}

impl Key {
    fn name(self) -> &'static str {
        match self {
            Key::Word(name) | Key::Value(name, _) => name,
        }
    }

    fn show(self) -> String {
        match self {
            Key::Word(name) => name.to_owned(),
            Key::Value(name, value) => format!("{name}={value}"),
        }
    }
}

/// The parts of a device's flag.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options<'a> {
    /// What stands before the first comma. Not empty.
    pub first: &'a str,
    /// Each key once. The value of a word is empty.
    options: Vec<(&'static str, &'a str)>,
}

impl<'a> Options<'a> {
    /// Takes the value of `flag` apart. `what` is what its first word is, as the help calls it: `PATH`.
    ///
    /// # Errors
    /// One sentence about an option that `known` does not have, is given twice, or lacks its value.
    pub fn parse(
        flag: &str,
        what: &str,
        known: &[Key],
        text: &'a str,
    ) -> Result<Options<'a>, String> {
        let list = || {
            let names: Vec<String> = known.iter().map(|key| key.show()).collect();
            names.join(", ")
        };
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default();
        if first.is_empty() {
            return Err(format!(
                "{flag} needs a {what} first, then its options: {}",
                list()
            ));
        }
        let mut options: Vec<(&'static str, &'a str)> = Vec::new();
        for word in words {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            let Some(key) = known.iter().copied().find(|key| key.name() == name) else {
                return Err(format!(
                    "{flag} does not know `{name}`; its options are {}",
                    list()
                ));
            };
            if options.iter().any(|(name, _)| *name == key.name()) {
                return Err(format!(
                    "{flag} has `{name}` twice; each of {} is given once",
                    list()
                ));
            }
            let value = match (key, value) {
                (Key::Word(_), None) => "",
                (Key::Value(..), Some(value)) if !value.is_empty() => value,
                _ => {
                    return Err(format!(
                        "{flag} wants `{name}` as `{}`; its options are {}",
                        key.show(),
                        list()
                    ));
                }
            };
            options.push((key.name(), value));
        }
        Ok(Options { first, options })
    }

    /// The value of a key, if it was given.
    pub fn value(&self, name: &str) -> Option<&'a str> {
        let mut options = self.options.iter();
        options
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
    }

    /// Whether a word was given.
    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }
}

/// Parses the value of `worker=`: whether the device gets an event loop of its own, on a thread of its own.
///
/// # Errors
/// One sentence that says what there is.
pub(super) fn own_worker(text: &str) -> Result<bool, String> {
    match text {
        "own" => Ok(true),
        "shared" => Ok(false),
        other => Err(format!(
            "a worker is own (a thread for this device alone) or shared, not `{other}`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Key] = &[Key::Word("ro"), Key::Value("serial", "TEXT")];

    fn parse(text: &str) -> Result<Options<'_>, String> {
        Options::parse("--thing", "PATH", KNOWN, text)
    }

    #[test]
    fn options_come_in_any_order_after_the_first_word() {
        let options = parse("a=b.img,serial=x=y,ro").unwrap();
        assert_eq!(options.first, "a=b.img");
        assert_eq!(options.value("serial"), Some("x=y"));
        assert!(options.has("ro"));
        let options = parse("/dev/sdb").unwrap();
        assert!(!options.has("ro") && options.value("serial").is_none());
    }

    #[test]
    fn mistakes_are_named_with_the_flag_and_what_it_knows() {
        for (text, words) in [
            ("", "needs a PATH first"),
            (",ro", "needs a PATH first"),
            ("a,rw", "does not know `rw`"),
            ("a,", "does not know ``"),
            ("a,Ro", "does not know `Ro`"),
            ("a,color=red", "does not know `color`"),
            ("a,ro,ro", "has `ro` twice"),
            ("a,serial=1,serial=2", "has `serial` twice"),
            ("a,serial", "wants `serial` as `serial=TEXT`"),
            ("a,serial=", "wants `serial` as `serial=TEXT`"),
            ("a,ro=yes", "wants `ro` as `ro`"),
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(sentence.starts_with("--thing "), "{sentence}");
            assert!(sentence.contains(words), "{text}: {sentence}");
            assert!(sentence.contains("ro, serial=TEXT"), "{sentence}");
        }
    }
}
