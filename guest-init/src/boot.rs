//! From the initramfs to the root of the plan: modules, mounts, the clock and the host's name; and back at the end.
//!
//! The new root is put together at [`NEW_ROOT`] in the initramfs and then moved over `/`. An overlay has the root
//! below and a file system in memory above; since all of it stays mounted where no path leads any more, nothing in
//! the guest can reach what lies below but through the overlay.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Failure;
use crate::news::wait_until;
use crate::plan::{FileSystem, Plan};
use crate::sys::{self, MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT};

const NEW_ROOT: &str = "/sarang/root";
/// What an overlay is made of.
const LOWER: &str = "/sarang/lower";
const MEMORY: &str = "/sarang/memory";
/// How long a device may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// Loads the plan's modules in order, and then gives their memory back.
pub fn load_modules(modules: &[OsString]) -> Result<(), Failure> {
    const ENOENT: i32 = 2;
    const ENOEXEC: i32 = 8;
    const EEXIST: i32 = 17;
    const ENODEV: i32 = 19;
    for path in modules {
        let failed = |why: &dyn std::fmt::Display| {
            let name = Path::new(path).file_name().unwrap_or(path);
            format!(
                "the kernel module {} cannot be loaded: {why}",
                name.display()
            )
        };
        let file = fs::File::open(path).map_err(|error| failed(&error))?;
        match sys::load_module(&file).map_err(|error| (error.raw_os_error(), error)) {
            // It is there, or built in, or what it drives is not; then whatever needs that says so.
            Ok(()) | Err((Some(EEXIST | ENODEV), _)) => {}
            Err((Some(ENOEXEC), _)) => return Err(failed(&"it is for another kernel")),
            Err((Some(ENOENT), _)) => {
                return Err(failed(&"it needs a module that is not loaded"));
            }
            Err((_, error)) => return Err(failed(&error)),
        }
    }
    for path in modules {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

/// Mounts one of the kernel's own file systems.
fn mount_kernel(kind: &str, target: &str, flags: u64, options: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let (source, target) = (OsStr::new(kind), OsStr::new(target));
    sys::mount_at(source, target, kind, flags, OsStr::new(options))
}

/// Mounts `/proc`, `/sys` and `/dev` in the initramfs.
pub fn mount_kernel_files() -> Result<(), Failure> {
    let failed = |path: &str, error: io::Error| format!("{path} cannot be mounted: {error}");
    let quiet = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    for (kind, path) in [("proc", "/proc"), ("sysfs", "/sys")] {
        mount_kernel(kind, path, quiet, "").map_err(|error| failed(path, error))?;
    }
    // Needed by few.
    let _ = mount_kernel("cgroup2", "/sys/fs/cgroup", quiet, "");
    if mount_kernel("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755").is_err() {
        make_devices().map_err(|error| failed("/dev", error))?;
    }
    let memory = MS_NOSUID | MS_NODEV;
    mount_kernel("tmpfs", "/dev/shm", memory, "mode=1777")
        .map_err(|error| failed("/dev/shm", error))?;
    // A kernel can be without pseudo-terminals; a command that wants one will say so.
    let options = ["gid=5,mode=0620,ptmxmode=0666", "mode=0620,ptmxmode=0666"];
    let _ = options
        .iter()
        .any(|options| mount_kernel("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, options).is_ok());
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = symlink(target, link);
    }
    Ok(())
}

/// Fills `/dev` for a kernel without devtmpfs. Where no device can be made, that of the old `/dev` serves.
fn make_devices() -> io::Result<()> {
    const NEW: &str = "/sarang/dev";
    mount_kernel("tmpfs", NEW, MS_NOSUID | MS_NOEXEC, "mode=0755")?;
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
        ("console", 5, 1),
    ] {
        let path = OsString::from(format!("{NEW}/{name}"));
        if sys::make_device(&path, major, minor).is_err() {
            let old = OsString::from(format!("/dev/{name}"));
            fs::write(&path, "")?;
            let _ = sys::mount_at(&old, &path, "", MS_BIND, OsStr::new(""));
        }
    }
    symlink("pts/ptmx", format!("{NEW}/ptmx"))?;
    fs::create_dir_all("/dev")?;
    let (from, to) = (OsStr::new(NEW), OsStr::new("/dev"));
    sys::mount_at(from, to, "", MS_MOVE, OsStr::new(""))
}

/// Goes where the plan's command is to run.
pub fn switch_root(plan: &Plan) -> Result<(), Failure> {
    let text = |error: io::Error| format!("the root cannot be put in place: {error}");
    if let Some(root) = &plan.root {
        mount_root(root, plan.overlay)?;
        for path in ["/proc", "/sys", "/dev"] {
            let to = format!("{NEW_ROOT}{path}");
            make_mount_point(Path::new(&to)).map_err(text)?;
            let (from, to) = (OsStr::new(path), OsStr::new(&to));
            sys::mount_at(from, to, "", MS_MOVE, OsStr::new("")).map_err(text)?;
        }
        std::env::set_current_dir(NEW_ROOT).map_err(text)?;
        let (here, there) = (OsStr::new("."), OsStr::new("/"));
        sys::mount_at(here, there, "", MS_MOVE, OsStr::new("")).map_err(text)?;
        std::os::unix::fs::chroot(".").map_err(text)?;
    }
    std::env::set_current_dir("/").map_err(text)?;
    // Sockets and locks of the host mean nothing here.
    let memory = MS_NOSUID | MS_NODEV;
    let _ = mount_kernel("tmpfs", "/run", memory, "mode=0755");
    if !is_writable_directory("/tmp") {
        let _ = mount_kernel("tmpfs", "/tmp", memory, "mode=1777");
    }
    for mount in &plan.mounts {
        let target = Path::new(&mount.path);
        let failed = |error: &dyn std::fmt::Display| {
            format!("{} cannot be mounted: {error}", target.display())
        };
        make_mount_point(target).map_err(|error| failed(&error))?;
        mount_file_system(&mount.file_system, target).map_err(|why| failed(&why))?;
    }
    Ok(())
}

/// Mounts the root at [`NEW_ROOT`].
fn mount_root(root: &FileSystem, overlay: bool) -> Result<(), Failure> {
    let failed =
        |why: &dyn std::fmt::Display| format!("the root of the guest cannot be mounted: {why}");
    let place = if overlay { LOWER } else { NEW_ROOT };
    for directory in [place, NEW_ROOT] {
        fs::create_dir_all(directory).map_err(|error| failed(&error))?;
    }
    let root = FileSystem {
        // Nothing is written to what lies below an overlay, and it is never unmounted.
        read_only: root.read_only || overlay,
        ..root.clone()
    };
    mount_file_system(&root, Path::new(place)).map_err(|why| failed(&why))?;
    if !overlay {
        return Ok(());
    }
    let options = format!("lowerdir={LOWER},upperdir={MEMORY}/upper,workdir={MEMORY}/work");
    let result = mount_kernel("tmpfs", MEMORY, 0, "mode=0755")
        .and_then(|()| fs::create_dir(format!("{MEMORY}/upper")))
        .and_then(|()| fs::create_dir(format!("{MEMORY}/work")))
        .and_then(|()| mount_kernel("overlay", NEW_ROOT, 0, &options));
    result.map_err(|error| {
        format!("no overlay in memory can be laid over the root of the guest: {error}")
    })
}

/// Mounts a file system of the plan; the error is a sentence without its subject.
fn mount_file_system(what: &FileSystem, target: &Path) -> Result<(), String> {
    const EINVAL: i32 = 22;
    const ENODEV: i32 = 19;
    let source = Path::new(&what.source);
    let is_block =
        |path: &Path| fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device());
    if source.starts_with("/dev")
        && wait_until(PATIENCE, || is_block(source).then_some(())).is_none()
    {
        return Err(format!("there is no block device {}", source.display()));
    }
    let flags = if what.read_only { MS_RDONLY } else { 0 };
    let share = what.kind == "virtiofs";
    let mount = || {
        sys::mount_at(
            &what.source,
            target.as_os_str(),
            &what.kind,
            flags,
            &what.options,
        )
    };
    // A share whose device is not there yet is an invalid argument.
    let patience = if share { PATIENCE } else { Duration::ZERO };
    let result = wait_until(patience, || match mount() {
        Err(error) if share && error.raw_os_error() == Some(EINVAL) => None,
        result => Some(result),
    });
    let kind = &what.kind;
    match result.unwrap_or_else(mount) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(ENODEV) => {
            Err(format!("the kernel does not know the file system {kind}"))
        }
        Err(error) if share && error.raw_os_error() == Some(EINVAL) => Err(format!(
            "there is no share with the tag {}",
            source.display()
        )),
        Err(error) => Err(format!("{kind} from {}: {error}", source.display())),
    }
}

/// Makes sure that there is a directory to mount something on.
fn make_mount_point(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|error| {
        let path = path.strip_prefix(NEW_ROOT).unwrap_or(path);
        let why = format!(
            "there is no directory {}, and none can be made: {error}",
            path.display()
        );
        io::Error::new(error.kind(), why)
    })
}

fn is_writable_directory(path: &str) -> bool {
    let probe = format!("{path}/.sarang-init");
    let writable = fs::write(&probe, "").is_ok();
    let _ = fs::remove_file(probe);
    writable
}

/// More than passes between the making of a plan and the start of a guest's kernel.
const START_UP: Duration = Duration::from_secs(60);

/// Sets the wall clock and the name of the guest.
pub fn set_clock_and_name(plan: &Plan) -> Result<(), Failure> {
    if let Some(clock) = plan.clock {
        // The plan was made before the guest was started, so it is at least so late. A kernel that has its clock from the
        // hypervisor knows better how much later.
        let earliest = clock.saturating_add(sys::since_boot());
        let is_right = (earliest..earliest.saturating_add(START_UP)).contains(&sys::clock());
        if !is_right {
            sys::set_clock(earliest)
                .map_err(|error| format!("the clock cannot be set: {error}"))?;
        }
    }
    if let Some(name) = &plan.hostname {
        sys::set_hostname(name)
            .map_err(|error| format!("\"{name}\" cannot be the name of the guest: {error}"))?;
    }
    Ok(())
}

/// Gets everything that was written to where it is kept, and lets go of what can be.
pub fn unmount_all() {
    let _ = std::env::set_current_dir("/");
    sys::sync_all();
    if !sys::is_first() {
        return;
    }
    let table = fs::read("/proc/self/mounts").unwrap_or_default();
    let mounts: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(kept)
        .collect();
    for path in mounts.iter().rev() {
        let path = path.as_os_str();
        if path == "/" || sys::unmount(path).is_err() {
            let flags = MS_REMOUNT | MS_RDONLY;
            let _ = sys::mount_at(OsStr::new(""), path, "", flags, OsStr::new(""));
        }
    }
    sys::sync_all();
}

/// The mount that a line of `/proc/self/mounts` describes, if it keeps files beyond the guest's end.
fn kept(line: &[u8]) -> Option<PathBuf> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (_source, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
    let in_memory: [&[u8]; 9] = [
        b"proc",
        b"sysfs",
        b"devtmpfs",
        b"devpts",
        b"tmpfs",
        b"ramfs",
        b"rootfs",
        b"cgroup2",
        b"overlay",
    ];
    if in_memory.contains(&kind) {
        return None;
    }
    Some(PathBuf::from(unescaped(path)))
}

/// A path as it is, from how the table of mounts writes it: a space is `\040`.
fn unescaped(text: &[u8]) -> OsString {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((byte, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| *byte == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(code.unwrap_or(*byte));
        rest = tail
            .get(if code.is_some() { 3 } else { 0 }..)
            .unwrap_or_default();
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_keeps_files_is_unmounted() {
        for (line, path) in [
            ("root / virtiofs rw 0 0", Some("/")),
            ("/dev/vdb /a\\040b ext4 rw 0 0", Some("/a b")),
            ("work /w\\134 virtiofs ro 0 0", Some("/w\\")),
            ("proc /proc proc rw 0 0", None),
            ("overlay / overlay rw 0 0", None),
            ("", None),
        ] {
            let found = kept(line.as_bytes());
            assert_eq!(found, path.map(PathBuf::from), "{line}");
        }
    }
}
