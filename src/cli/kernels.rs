//! Finds a kernel when nobody named one.

use std::path::{Path, PathBuf};

use crate::backend::cache;

/// Where to look, so that a test can put a scratch directory in each place.
pub(super) struct Places {
    /// `$SARANG_KERNEL`.
    pub named: Option<PathBuf>,
    /// The current directory.
    pub here: PathBuf,
    /// sarang's cache, if the user has a home.
    pub cache: Option<PathBuf>,
    /// `/boot`.
    pub boot: PathBuf,
    /// The running kernel's release, as `uname -r` prints it.
    pub release: String,
}

/// A kernel that was found, with the initramfs that came along with it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
}

impl Places {
    /// The places of this host and user.
    pub(super) fn of_host() -> Places {
        let named = std::env::var_os("SARANG_KERNEL").filter(|value| !value.is_empty());
        Places {
            named: named.map(PathBuf::from),
            here: PathBuf::from("."),
            cache: cache::directory(),
            boot: PathBuf::from("/boot"),
            release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
        }
    }

    /// The first kernel in the order that `sarang run --help` documents.
    ///
    /// # Errors
    /// A sentence that lists the places, when none of them has a kernel.
    pub(super) fn find(&self) -> Result<Found, String> {
        let cached = |name: &str| self.cache.as_ref().map(|cache| cache.join(name));
        if let Some(kernel) = &self.named {
            return Ok(Found {
                kernel: kernel.clone(),
                initrd: None,
            });
        }
        let candidates = [
            Some(self.here.join("vmlinux")),
            Some(self.here.join("bzImage")),
            Some(self.here.join("arch/x86/boot/bzImage")),
            cached("vmlinux"),
            cached("vmlinuz"),
            Some(self.boot.join(format!("vmlinuz-{}", self.release))),
            newest_in(&self.boot),
        ];
        let kernel = candidates.into_iter().flatten().find(|path| path.is_file()).ok_or_else(|| {
            format!(
                "no kernel found in $SARANG_KERNEL, ./vmlinux, ./bzImage, ./arch/x86/boot/bzImage, {}, {}: \
                 name one with --kernel, or let scripts/guest-assets fetch one",
                self.cache.as_deref().unwrap_or(Path::new("~/.cache/sarang")).display(),
                self.boot.display()
            )
        })?;
        let from_cache = self
            .cache
            .as_ref()
            .is_some_and(|cache| kernel.starts_with(cache));
        let initrd = cached("initramfs.cpio").filter(|path| from_cache && path.is_file());
        Ok(Found { kernel, initrd })
    }
}

/// The most recently changed `vmlinuz*` of a directory.
fn newest_in(directory: &Path) -> Option<PathBuf> {
    std::fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .max()
        .map(|(_, path)| path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_nearest_kernel_wins() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        let places = |named: Option<PathBuf>| Places {
            named,
            here: root.join("here"),
            cache: Some(root.join("cache")),
            boot: root.join("boot"),
            release: "6.1.0".to_owned(),
        };
        for directory in ["here/arch/x86/boot", "cache", "boot"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        assert!(
            places(None)
                .find()
                .unwrap_err()
                .contains("scripts/guest-assets")
        );
        // From the last place to the first: each new file must win over all before it.
        for file in [
            "boot/vmlinuz-5.10.0",
            "boot/vmlinuz-6.1.0",
            "cache/vmlinuz",
            "cache/vmlinux",
            "here/arch/x86/boot/bzImage",
            "here/bzImage",
            "here/vmlinux",
        ] {
            fs::write(root.join(file), "x").unwrap();
            assert_eq!(places(None).find().unwrap().kernel, root.join(file));
        }
        let named = PathBuf::from("/k");
        assert_eq!(places(Some(named.clone())).find().unwrap().kernel, named);
    }

    #[test]
    fn a_cached_kernel_comes_with_the_cached_initramfs() {
        let scratch = tempfile::tempdir().unwrap();
        let cache = scratch.path().to_owned();
        fs::write(cache.join("vmlinux"), "x").unwrap();
        fs::write(cache.join("initramfs.cpio"), "x").unwrap();
        let nowhere = PathBuf::from("/nonexistent");
        let found = Places {
            named: None,
            here: nowhere.clone(),
            cache: Some(cache.clone()),
            boot: nowhere,
            release: String::new(),
        }
        .find()
        .unwrap();
        assert_eq!(found.initrd, Some(cache.join("initramfs.cpio")));
    }
}
