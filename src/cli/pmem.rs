//! `--pmem`: which files a guest gets as persistent memory.

use super::options::{Key, Options};
use crate::backend::pmem::{self, File};

const KEYS: &[Key] = &[Key::Word("ro")];

/// The value of one flag.
#[derive(Clone, Debug)]
pub(super) struct Pmem {
    /// As it was given.
    text: String,
    path: String,
    read_only: bool,
}

/// Parses the value of `--pmem`.
pub(super) fn parse(text: &str) -> Result<Pmem, String> {
    let options = Options::parse("--pmem", "PATH", KEYS, text)?;
    Ok(Pmem {
        text: text.to_owned(),
        path: options.first.to_owned(),
        read_only: options.has("ro"),
    })
}

impl Pmem {
    /// The value as it was given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Opens the file.
    pub fn open(&self) -> super::Result<File> {
        Ok(File::open(&pmem::Options {
            path: self.path.clone().into(),
            read_only: self.read_only,
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_unless_it_is_said_to_be_read_only() {
        let (writing, reading) = (parse("a.img").unwrap(), parse("b.img,ro").unwrap());
        assert_eq!((writing.path.as_str(), writing.read_only), ("a.img", false));
        assert_eq!((reading.path.as_str(), reading.read_only), ("b.img", true));
        assert_eq!(reading.text(), "b.img,ro");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_sentence() {
        for (text, words) in [
            ("", "--pmem needs a PATH first"),
            ("a,rw", "--pmem does not know `rw`"),
            ("a,ro=1", "--pmem wants `ro` as `ro`"),
            ("a,ro,ro", "twice"),
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(sentence.contains(words), "{text}: {sentence}");
        }
    }

    #[test]
    fn a_file_becomes_memory() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        scratch.as_file().set_len(6 << 20).unwrap();
        let path = scratch.path().to_str().unwrap();
        let file = parse(&format!("{path},ro")).unwrap().open().unwrap();
        assert_eq!(file.size(), 6 << 20);
        assert!(file.mapping().region().is_read_only());
        let error = parse(path).unwrap().open().err().unwrap();
        assert!(error.to_string().contains("in use"), "{error}");
    }
}
