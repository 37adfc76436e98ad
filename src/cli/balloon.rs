//! `--balloon`: how much of its memory a guest is to give back.

use std::time::Duration;

use super::options::{Key, Options};
use super::quantity;
use crate::virtio::dev::balloon::Balloon;

const KEYS: &[Key] = &[Key::Value("stats", "TIME")];

/// The value of the flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flag {
    /// As it was given.
    text: String,
    /// Bytes.
    target: u64,
    statistics: Option<Duration>,
}

/// Parses the flag's value.
pub(super) fn parse(text: &str) -> Result<Flag, String> {
    let options = Options::parse("--balloon", "SIZE", KEYS, text)?;
    let target = quantity::size(options.first).map_err(|error| format!("--balloon: {error}"))?;
    let statistics = options
        .value("stats")
        .map(quantity::time)
        .transpose()
        .map_err(|error| format!("--balloon: {error}"))?;
    Ok(Flag {
        text: text.to_owned(),
        target,
        statistics,
    })
}

impl Flag {
    /// The value as it was given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// That a guest of `ram` bytes is left with something.
    pub fn check(&self, ram: u64) -> Result<(), String> {
        if self.target < ram {
            return Ok(());
        }
        Err(format!(
            "--balloon takes {} of the guest's {}: choose less, or give it more with --mem",
            quantity::show_ram(self.target),
            quantity::show_ram(ram)
        ))
    }

    /// Makes the device.
    pub fn open(&self) -> super::Result<Balloon> {
        let balloon = Balloon::new(self.target, self.statistics);
        Ok(balloon.map_err(|error| format!("cannot make the balloon: {error}"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_has_a_target_and_may_have_statistics() {
        let flag = parse("512M,stats=2s").unwrap();
        assert_eq!(flag.target, 512 << 20);
        assert_eq!(flag.statistics, Some(Duration::from_secs(2)));
        assert_eq!(flag.text(), "512M,stats=2s");
        assert_eq!(parse("0").unwrap().target, 0);
        assert_eq!(flag.check(513 << 20), Ok(()));
        let sentence = flag.check(512 << 20).unwrap_err();
        assert!(sentence.contains("512M of the guest's 512M"), "{sentence}");
    }

    #[test]
    fn values_that_make_no_sense_are_refused_with_a_sentence() {
        for (text, words) in [
            ("", "--balloon needs a SIZE first"),
            ("12", "`12` needs a unit"),
            ("much", "--balloon: `much` is not a size"),
            ("1G,stats", "wants `stats` as `stats=TIME`"),
            ("1G,stats=often", "`often` is not a time"),
            ("1G,poison", "does not know `poison`"),
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(sentence.contains(words), "{text}: {sentence}");
        }
    }
}
