//! `--share`: which directories of the host a guest can mount, and by which tags.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use super::options::{Key, Options};
use crate::backend::share::{self, Budget};
use crate::virtio::VirtioDevice;
use crate::virtio::dev::fs::{Fs, TAG_LEN};

const KEYS: &[Key] = &[Key::Value("tag", "TAG"), Key::Word("ro")];

/// One `--share`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Share {
    path: String,
    /// Decided on by [`resolve`], if it was not given.
    tag: Option<String>,
    read_only: bool,
}

/// Parses one `--share`.
///
/// # Errors
/// One sentence about an unknown option, or a tag that is none.
pub(super) fn parse(text: &str) -> Result<Share, String> {
    let options = Options::parse("--share", "DIR", KEYS, text)?;
    let tag = options.value("tag");
    if tag.is_some_and(|tag| tag.len() > TAG_LEN) {
        return Err(format!(
            "--share has a tag that is longer than {TAG_LEN} bytes: give a shorter one"
        ));
    }
    Ok(Share {
        path: options.first.to_owned(),
        tag: tag.map(str::to_owned),
        read_only: options.has("ro"),
    })
}

/// All `--share` of one machine together, each with its tag: the one it was given, or the last name of its path, or
/// else `share` and its place.
///
/// # Errors
/// One sentence, when two have the same tag.
pub(super) fn resolve(shares: &[Share]) -> Result<Vec<Share>, String> {
    let mut shares = shares.to_vec();
    let mut tags = HashSet::new();
    for (index, share) in shares.iter_mut().enumerate() {
        let path = &share.path;
        let tag = share
            .tag
            .get_or_insert_with(|| last_name(path).unwrap_or_else(|| format!("share{index}")));
        if !tags.insert(tag.clone()) {
            return Err(format!(
                "--share: two directories have the tag `{tag}`: give one of them another with `,tag=TAG`"
            ));
        }
    }
    Ok(shares)
}

/// The last name of a directory's path, if it can be a tag.
fn last_name(path: &str) -> Option<String> {
    let name = match Path::new(path).file_name() {
        Some(name) => name.to_owned(),
        // `.` and `..` have a name all the same.
        None => Path::new(path).canonicalize().ok()?.file_name()?.to_owned(),
    };
    let name = name.into_string().ok()?;
    (name.len() <= TAG_LEN).then_some(name)
}

/// Opens all directories, which have been resolved.
///
/// # Errors
/// When one is missing, is not a directory or may not be read.
pub(super) fn open(shares: &[Share]) -> super::Result<Vec<Box<dyn VirtioDevice>>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    if shares.is_empty() {
        return Ok(devices);
    }
    let budget = Budget::of_process();
    for (index, share) in (0..).zip(shares) {
        let directory = share::Share::open(&share::Options {
            path: share.path.clone().into(),
            read_only: share.read_only,
            hidden: Vec::new(),
            budget: budget.clone(),
        })?;
        let tag = share.tag.as_deref().unwrap_or_default();
        devices.push(Box::new(Fs::new(index, tag, directory)));
    }
    Ok(devices)
}

/// As on the command line.
impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ",tag={tag}")?;
        }
        if self.read_only {
            f.write_str(",ro")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(texts: &[&str]) -> Result<Vec<String>, String> {
        let shares: Vec<Share> = texts.iter().map(|text| parse(text).unwrap()).collect();
        let shares = resolve(&shares)?;
        Ok(shares.into_iter().map(|share| share.tag.unwrap()).collect())
    }

    #[test]
    fn a_tag_is_the_one_given_or_the_last_name_or_the_place() {
        let long = format!("/{}", "x".repeat(37));
        assert_eq!(
            tags(&["/srv/src/", "/", "data,tag=d,ro", &long, "a/b/."]).unwrap(),
            ["src", "share1", "d", "share3", "b"]
        );
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            tags(&["."]).unwrap(),
            [here.file_name().unwrap().to_str().unwrap()]
        );
    }

    #[test]
    fn two_directories_with_one_tag_are_refused() {
        for texts in [&["a/src", "b/src"][..], &["/", "x,tag=share0"]] {
            let sentence = tags(texts).unwrap_err();
            assert!(sentence.contains(",tag=TAG"), "{sentence}");
        }
    }

    #[test]
    fn a_share_is_shown_with_the_tag_that_it_has() {
        let shares = [parse("/srv/src,ro").unwrap(), parse("d,tag=x").unwrap()];
        let shown: Vec<String> = resolve(&shares)
            .unwrap()
            .iter()
            .map(Share::to_string)
            .collect();
        assert_eq!(shown, ["/srv/src,tag=src,ro", "d,tag=x"]);
        for text in shown {
            assert_eq!(parse(&text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn mistakes_are_refused_with_a_sentence() {
        let long = format!("d,tag={}", "x".repeat(37));
        for (text, words) in [
            ("", "--share needs a DIR first"),
            (",ro", "--share needs a DIR first"),
            ("d,rw", "does not know `rw`"),
            ("d,tag=", "wants `tag` as `tag=TAG`"),
            ("d,tag", "wants `tag` as `tag=TAG`"),
            (&long, "longer than 36 bytes"),
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(sentence.contains(words), "{text}: {sentence}");
        }
    }

    #[test]
    fn directories_become_devices_and_what_is_none_is_told() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, "").unwrap();
        let open_one =
            |path: &Path| open(&resolve(&[parse(path.to_str().unwrap()).unwrap()]).unwrap());
        let devices = open_one(scratch.path()).unwrap();
        assert_eq!(devices[0].name(), "FS0");
        for (path, words) in [
            (scratch.path().join("none"), "there is no directory"),
            (file.clone(), "is not a directory"),
            (file.join("below"), "is not a directory"),
            ("/proc".into(), "share another directory"),
        ] {
            let error = open_one(&path).err().unwrap().to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
