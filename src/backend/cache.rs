//! Where this user's cache is: kernels, unpacked modules, root disks that were made of container images. All of it can be
//! made again, so it may be removed at any time.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// `$SARANG_CACHE`, or `sarang` in `$XDG_CACHE_HOME`, or in `~/.cache`. Nothing if there is no home.
pub fn directory() -> Option<PathBuf> {
    find(|name| std::env::var_os(name))
}

fn find(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    // The XDG Base Directory Specification wants relative paths to be ignored.
    let xdg = || set("XDG_CACHE_HOME").filter(|path| Path::is_absolute(path));
    let home = || Some(set("HOME")?.join(".cache"));
    set("SARANG_CACHE").or_else(|| Some(xdg().or_else(home)?.join("sarang")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_variable_says_where_it_is() {
        type Variables<'a> = &'a [(&'a str, &'a str)];
        let table: [(Variables<'_>, Option<&str>); 5] = [
            (&[("SARANG_CACHE", "/a"), ("HOME", "/h")], Some("/a")),
            (
                &[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")],
                Some("/x/sarang"),
            ),
            (
                &[("XDG_CACHE_HOME", "x"), ("HOME", "/h")],
                Some("/h/.cache/sarang"),
            ),
            (
                &[("SARANG_CACHE", ""), ("HOME", "/h")],
                Some("/h/.cache/sarang"),
            ),
            (&[], None),
        ];
        for (variables, expected) in table {
            let value = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name)?;
                Some(found.1.into())
            };
            assert_eq!(find(value), expected.map(PathBuf::from), "{variables:?}");
        }
    }
}
