//! Packs a guest's first files: init, the plan and the modules, as a cpio archive in the format "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst). It is made in memory and not compressed: the host hands
//! it to the guest in memory as well, and unpacking would take the guest time.

use std::ffi::OsString;
use std::io::{self, Write};

use cpio::newc::{Builder, trailer};

use super::GUEST_INIT;
use super::modules::Module;
use super::plan::{Invalid, PATH, Plan};

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the command cannot be handed to the guest: {0}")]
    Plan(#[from] Invalid),
    #[error("the first files of the guest cannot be packed: {0}")]
    Pack(#[from] io::Error),
}

/// File types and permissions, as in `st_mode`.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const DEVICE: u32 = 0o020_666;

/// The archive for `plan`, whose `modules` are set to the files of `modules` in it.
///
/// # Errors
/// When the plan has a zero byte in it, or something has 4 GiB or more.
pub fn build(plan: &Plan, modules: &[Module]) -> Result<Vec<u8>, Error> {
    let path =
        |(at, module): (usize, &Module)| format!("sarang/modules/{at:02}-{}.ko", module.name);
    let paths: Vec<String> = modules.iter().enumerate().map(path).collect();
    let plan = Plan {
        modules: paths
            .iter()
            .map(|path| OsString::from(format!("/{path}")))
            .collect(),
        ..plan.clone()
    };
    let plan = plan.encode()?;
    let size: usize = modules.iter().map(|module| module.bytes.len()).sum();
    let mut archive = Archive {
        bytes: Vec::with_capacity(size + GUEST_INIT.len() + plan.len() + (64 << 10)),
        entries: 0,
    };
    for directory in [
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "etc",
        "root",
        "sarang",
        "sarang/modules",
    ] {
        archive.add(directory, DIRECTORY, (0, 0), b"")?;
    }
    // The kernel opens the first for init, and the second is what a program without standard streams falls back to.
    archive.add("dev/console", DEVICE, (5, 1), b"")?;
    archive.add("dev/null", DEVICE, (1, 3), b"")?;
    archive.add("init", PROGRAM, (0, 0), GUEST_INIT)?;
    archive.add(PATH.trim_start_matches('/'), FILE, (0, 0), &plan)?;
    for (path, module) in paths.iter().zip(modules) {
        archive.add(path, FILE, (0, 0), &module.bytes)?;
    }
    Ok(trailer(archive.bytes)?)
}

struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file; `device` has the major and the minor number if it is one.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let mut file = Builder::new(name)
            .ino(self.entries)
            .mode(mode)
            .nlink(links)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut self.bytes, len);
        file.write_all(data)?;
        file.finish().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;
    use std::collections::BTreeMap;
    use std::io::Read;

    #[test]
    fn the_archive_has_init_the_plan_and_the_modules_by_the_paths_in_the_plan() {
        let module = |name: &str, len: usize| Module {
            name: name.into(),
            bytes: vec![7; len],
        };
        let modules = [module("fuse", 1001), module("virtiofs", 4)];
        let plan = Plan {
            hostname: Some("x".into()),
            ..Plan::default()
        };
        let archive = build(&plan, &modules).unwrap();
        let mut files = BTreeMap::new();
        let mut rest = &archive[..];
        loop {
            let mut file = Reader::new(rest).unwrap();
            if file.entry().is_trailer() {
                break;
            }
            let entry = file.entry().clone();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            files.insert(entry.name().to_owned(), (entry, bytes));
            rest = file.finish().unwrap();
        }
        let planned = Plan::decode(&files["sarang/plan"].1).unwrap();
        assert_eq!(planned.hostname, plan.hostname);
        assert_eq!(
            planned.modules,
            [
                "/sarang/modules/00-fuse.ko",
                "/sarang/modules/01-virtiofs.ko"
            ]
        );
        for (path, module) in planned.modules.iter().zip(&modules) {
            let path = path.to_str().unwrap().trim_start_matches('/');
            assert_eq!(files[path].1, module.bytes);
        }
        let (init, bytes) = &files["init"];
        assert_eq!((init.mode(), &bytes[..]), (0o100_755, GUEST_INIT));
        let (console, _) = &files["dev/console"];
        let device = (console.rdev_major(), console.rdev_minor());
        assert_eq!((console.mode() >> 12, device), (2, (5, 1)));
        assert!(files.contains_key("dev"), "before what is in it");
        assert_eq!(archive.len() % 4, 0);
    }
}
