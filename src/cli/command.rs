//! `sarang run -- CMD`: what has to be in a guest for a command, and how the command is to run there.
//!
//! The guest's root is the host's own, a directory, a disk or a container image. It is shared or attached read-only, with
//! an overlay in the guest's memory that takes all writes, so that a run leaves nothing behind; what the guest may really
//! change is named with `--rw`.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::{Result, say};
use crate::backend::console::{standard_error, standard_input, standard_output};
use crate::backend::image::{self, Disk, ImageConfig, Kind, Source};
use crate::backend::port::Port;
use crate::backend::{disk, share};
use crate::guest::exec::{Session, Streams};
use crate::guest::initramfs;
use crate::guest::modules::{self, Need};
use crate::guest::plan::{Command, FileSystem, Mount, Network, Plan, WindowSize};
use crate::virtio::VirtioDevice;
use crate::virtio::dev::block::{self, Block};
use crate::virtio::dev::fs::Fs;
use crate::vm::Image;

/// By which the guest mounts the root, and what it may change.
const ROOT_TAG: &str = "sarang.root";
/// The first virtio disk, as Linux calls it.
const ROOT_DISK: &str = "/dev/vda";
/// Where programs are, when nobody says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is asked of a run with a command.
pub(super) struct Request<'a> {
    pub kernel: &'a Image,
    pub kernel_path: &'a Path,
    pub modules: Option<&'a Path>,
    pub root: &'a Root,
    pub user: Option<User>,
    pub share_secrets: bool,
    /// Empty for a shell, or for what an image says.
    pub command: &'a [OsString],
    pub name: &'a str,
    /// The guest's first network card knows DHCP.
    pub dhcp: bool,
    /// What else the guest has drivers for.
    pub needs: Vec<Need>,
}

/// What a run with a command takes.
pub(super) struct Prepared {
    pub initramfs: Image,
    /// They come before all others.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    pub session: Session,
    pub port: Arc<Port>,
}

/// `--root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Root {
    /// `None` is the host's own.
    path: Option<OsString>,
    /// Without an overlay.
    writable: bool,
}

impl Root {
    pub const HOST: Root = Root {
        path: None,
        writable: false,
    };

    /// Whether it is the host's own.
    pub fn is_host(&self) -> bool {
        self.path.is_none()
    }
}

/// Parses `--root`: `host`, or a path with `,rw` behind it if the guest may change it.
pub(super) fn parse_root(text: &str) -> std::result::Result<Root, String> {
    let (path, writable) = match text.strip_suffix(",rw") {
        Some(path) => (path, true),
        None => (text, false),
    };
    match path {
        "" => Err(
            "--root is `host`, a directory, a disk image, a tar or a container image".to_owned(),
        ),
        "host" if writable => Err(
            "--root=host cannot be changed as a whole: name what may change with --rw".to_owned(),
        ),
        "host" => Ok(Root::HOST),
        path => Ok(Root {
            path: Some(path.into()),
            writable,
        }),
    }
}

/// As on the command line.
impl std::fmt::Display for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.path {
            None => f.write_str("host"),
            Some(path) => {
                let writable = if self.writable { ",rw" } else { "" };
                write!(f, "{}{writable}", path.display())
            }
        }
    }
}

/// `--user`: ids in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    id: u32,
    group: u32,
    groups: Vec<u32>,
}

/// Parses `--user`: `root`, or `UID[:GID]`.
pub(super) fn parse_user(text: &str) -> std::result::Result<User, String> {
    let text = if text == "root" { "0" } else { text };
    let (id, group) = text.split_once(':').unwrap_or((text, text));
    match (id.parse(), group.parse()) {
        (Ok(id), Ok(group)) => Ok(User {
            id,
            group,
            groups: Vec::new(),
        }),
        _ => Err(format!(
            "`{text}` is not a user: write root, or UID:GID in numbers"
        )),
    }
}

impl User {
    const ROOT: User = User {
        id: 0,
        group: 0,
        groups: Vec::new(),
    };

    /// Whoever runs this process.
    fn caller() -> User {
        let groups = rustix::process::getgroups().unwrap_or_default();
        User {
            id: rustix::process::geteuid().as_raw(),
            group: rustix::process::getegid().as_raw(),
            groups: groups.into_iter().map(|group| group.as_raw()).collect(),
        }
    }
}

/// What the guest may change when nobody says: the current directory, unless that is all there is.
pub(super) fn writable(root: &Root, rw: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for path in rw {
        let found = path.canonicalize().map_err(|error| {
            format!(
                "cannot use --rw {}: {error}; name a directory that is there",
                path.display()
            )
        })?;
        if !found.is_dir() {
            return Err(format!(
                "--rw {} is not a directory: name the one it is in",
                path.display()
            )
            .into());
        }
        paths.push(found);
    }
    if rw.is_empty() && root.is_host() {
        let here = std::env::current_dir()
            .map_err(|error| format!("the current directory is gone: {error}"))?;
        if here != Path::new("/") {
            paths.push(here);
        }
    }
    // The outer before the inner, or the outer would hide it.
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// Puts together what the guest gets.
pub(super) fn prepare(request: Request<'_>, rw: &[PathBuf]) -> Result<Prepared> {
    let streams = streams();
    let budget = share::Budget::of_process();
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let mut needs = vec![Need::Console, Need::Overlay];
    let hidden = match request.share_secrets {
        true => Vec::new(),
        false => share::secrets(),
    };
    let mut shared = |path: &Path, tag: &str, read_only: bool| -> Result<()> {
        let directory = share::Share::open(&share::Options {
            path: path.to_owned(),
            read_only,
            budget: budget.clone(),
            hidden: hidden.clone(),
        })?;
        let index = u32::try_from(devices.len()).unwrap_or(u32::MAX);
        devices.push(Box::new(Fs::new(index, tag, directory)));
        Ok(())
    };

    let mut config = None;
    let writable = request.root.writable;
    let (file_system, disk) = match root_of(request.root)? {
        Place::Directory(path) => {
            shared(&path, ROOT_TAG, !writable)?;
            (FileSystem::share(ROOT_TAG, !writable), None)
        }
        Place::Disk(path, kind) => {
            config = image::read_config(&path).ok().flatten();
            needs.push(Need::Block(kind.to_owned()));
            (FileSystem::block(ROOT_DISK, kind, !writable), Some(path))
        }
    };
    let mut mounts = Vec::new();
    for (index, path) in rw.iter().enumerate() {
        let tag = format!("sarang.rw{index}");
        shared(path, &tag, false)?;
        mounts.push(Mount {
            path: path.clone().into(),
            file_system: FileSystem::share(&tag, false),
        });
    }
    if !devices.is_empty() {
        needs.push(Need::Fs);
    }
    if let Some(path) = disk {
        devices.insert(0, root_disk(&path, !writable)?);
    }
    needs.extend(request.needs);

    let command = command(
        request.command,
        request.root,
        config,
        request.user,
        request.share_secrets,
        streams.terminal,
    )?;
    let plan = Plan {
        root: Some(file_system),
        overlay: !writable,
        mounts,
        hostname: Some(request.name.to_owned()),
        network: match request.dhcp {
            true => Network::Dhcp {
                interface: "eth0".to_owned(),
            },
            false => Network::Loopback,
        },
        clock: SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok(),
        command: Some(command),
        ..Plan::default()
    };
    let modules = modules::load(
        &request.kernel.bytes,
        request.kernel_path,
        request.modules,
        &needs,
    )?;
    let (session, port) = Session::new(streams)?;
    Ok(Prepared {
        initramfs: Image {
            name: "the guest's first files".to_owned(),
            bytes: initramfs::build(&plan, &modules)?,
        },
        devices,
        session,
        port,
    })
}

/// Where a root is, and what it is.
enum Place {
    Directory(PathBuf),
    /// A file, and the type of the file system in it.
    Disk(PathBuf, &'static str),
}

fn root_of(root: &Root) -> Result<Place> {
    let Some(path) = &root.path else {
        return Ok(Place::Directory("/".into()));
    };
    let source = Source::open(path)?;
    let kind = match source.kind() {
        Kind::Directory => return Ok(Place::Directory(source.path().to_owned())),
        Kind::Disk(Disk::Ext4) => "ext4",
        Kind::Disk(Disk::Xfs) => "xfs",
        Kind::Disk(Disk::Btrfs) => "btrfs",
        Kind::Disk(Disk::Squashfs) => "squashfs",
        Kind::Disk(Disk::Erofs) => "erofs",
        Kind::Disk(Disk::Partitions | Disk::Qcow2) => {
            return Err(format!(
                "{} is a disk with partitions, or a qcow2 image, and not one file system: boot it with --root-disk",
                path.display()
            )
            .into());
        }
        Kind::Tar(_) | Kind::OciLayout | Kind::OciArchive(_) | Kind::DockerArchive(_) => {
            if root.writable {
                return Err(format!(
                    "{} cannot be changed in place: make a disk of it with `sarang image build`, and use that as --root",
                    path.display()
                )
                .into());
            }
            let cache = image::cache_directory().ok_or(
                "there is no place for root disks: set HOME, XDG_CACHE_HOME or SARANG_CACHE",
            )?;
            let mut told = false;
            let disk = image::ensure_disk(&source, &cache, &mut |progress| {
                if !std::mem::replace(&mut told, true) && std::io::stderr().is_terminal() {
                    say(&format!("# {}: {}", path.display(), progress.what));
                }
                ControlFlow::Continue(())
            })?;
            return Ok(Place::Disk(disk, "ext4"));
        }
    };
    Ok(Place::Disk(source.path().to_owned(), kind))
}

fn root_disk(path: &Path, read_only: bool) -> Result<Box<dyn VirtioDevice>> {
    let disk = disk::Disk::open(&disk::Options {
        path: path.to_owned(),
        read_only,
        direct: false,
        format: disk::Format::Raw,
        depth: u32::from(block::QUEUE_SIZE),
    })?;
    let settings = block::Settings {
        name: "BLK0".to_owned(),
        serial: ROOT_TAG.to_owned(),
        queues: 1,
        limits: Default::default(),
        own_worker: false,
    };
    Ok(Box::new(Block::new(disk, settings)?))
}

/// This process's own streams. It takes two ends of a terminal for the command to run on one.
fn streams() -> Streams {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    Streams {
        input: standard_input(),
        output: standard_output(),
        error: standard_error(),
        terminal,
    }
}

fn window_size() -> WindowSize {
    rustix::termios::tcgetwinsize(std::io::stdout())
        .map(|size| WindowSize {
            rows: size.ws_row,
            columns: size.ws_col,
        })
        .unwrap_or_default()
}

/// What runs in the guest, as whom and where.
fn command(
    words: &[OsString],
    root: &Root,
    config: Option<ImageConfig>,
    user: Option<User>,
    share_secrets: bool,
    terminal: bool,
) -> Result<Command> {
    let config = config.unwrap_or_default();
    let mut arguments: Vec<OsString> = config.entrypoint.iter().map(OsString::from).collect();
    match words {
        [] => arguments.extend(config.cmd.iter().map(OsString::from)),
        words => arguments.extend_from_slice(words),
    }
    if arguments.is_empty() {
        let shell = std::env::var_os("SHELL").filter(|_| root.is_host());
        arguments.push(shell.unwrap_or_else(|| "/bin/sh".into()));
    }
    let mut environment: Vec<(OsString, OsString)> = match root.is_host() {
        true => std::env::vars_os()
            .filter(|(name, _)| share_secrets || !is_secret(name))
            .collect(),
        false => vec![("PATH".into(), PATH.into())],
    };
    for variable in &config.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        environment.retain(|(known, _)| known != name);
        environment.push((name.into(), value.into()));
    }
    let identity = config.identity.unwrap_or_default();
    let user = match (user, root.is_host()) {
        (Some(user), _) => user,
        (None, true) => User::caller(),
        (None, false) => User {
            id: identity.uid,
            group: identity.gid,
            groups: identity.groups,
        },
    };
    let home = match user == User::ROOT {
        true => "/root".into(),
        false => identity.home.unwrap_or_else(|| "/".to_owned()),
    };
    let term = std::env::var_os("TERM").filter(|_| terminal);
    let defaults = [("HOME", Some(home.into())), ("TERM", term)];
    for (name, value) in defaults {
        if let Some(value) = value
            && !environment.iter().any(|(known, _)| known == name)
        {
            environment.push((name.into(), value));
        }
    }
    let directory = match (root.is_host(), config.working_dir.as_str()) {
        (true, _) => std::env::current_dir()
            .map_err(|error| format!("the current directory is gone: {error}"))?
            .into(),
        (false, "") => "/".into(),
        (false, directory) => directory.into(),
    };
    Ok(Command {
        arguments,
        environment,
        directory,
        user: user.id,
        group: user.group,
        groups: user.groups,
        terminal: terminal.then(window_size),
    })
}

/// Whether a variable is likely to hold a secret, or leads to something that only the host has.
fn is_secret(name: &OsStr) -> bool {
    const PARTS: [&str; 7] = [
        "SECRET",
        "TOKEN",
        "PASSWORD",
        "PASSWD",
        "CREDENTIAL",
        "API_KEY",
        "PRIVATE_KEY",
    ];
    const NAMES: [&str; 8] = [
        "AWS_ACCESS_KEY_ID",
        "SSH_AUTH_SOCK",
        "SSH_AGENT_PID",
        "GPG_AGENT_INFO",
        "DBUS_SESSION_BUS_ADDRESS",
        "XDG_RUNTIME_DIR",
        "WAYLAND_DISPLAY",
        "DISPLAY",
    ];
    let name = name.to_string_lossy().to_ascii_uppercase();
    NAMES.contains(&&*name) || PARTS.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["by".into(), "default".into()],
            env: vec!["PATH=/opt".into(), "A=1=2".into()],
            user: "web".into(),
            working_dir: "/srv".into(),
            identity: Some(image::Identity {
                uid: 33,
                gid: 34,
                groups: vec![35],
                home: Some("/var/www".into()),
            }),
        }
    }

    #[test]
    fn a_root_is_the_host_or_a_path_that_may_be_writable() {
        assert_eq!(parse_root("host"), Ok(Root::HOST));
        let root = parse_root("a,b.ext4,rw").unwrap();
        assert!(root.writable && !root.is_host());
        assert_eq!(root.to_string(), "a,b.ext4,rw");
        assert_eq!(parse_root("./host").unwrap().to_string(), "./host");
        for text in ["", ",rw", "host,rw"] {
            assert!(parse_root(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_user_is_root_or_numbers() {
        let user = |id, group| User {
            id,
            group,
            groups: Vec::new(),
        };
        assert_eq!(parse_user("root"), Ok(user(0, 0)));
        assert_eq!(parse_user("1000"), Ok(user(1000, 1000)));
        assert_eq!(parse_user("1000:27"), Ok(user(1000, 27)));
        for text in ["", "nobody", "1000:", "-1", "1:2:3"] {
            assert!(parse_user(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_image_says_what_runs_and_the_command_line_takes_the_place_of_its_arguments() {
        let root = parse_root("image.oci").unwrap();
        let made = command(&[], &root, Some(config()), None, false, false).unwrap();
        assert_eq!(made.arguments, ["/entry", "by", "default"]);
        assert_eq!(
            (made.user, made.group, &made.groups[..]),
            (33, 34, &[35][..])
        );
        assert_eq!(made.directory, "/srv");
        for (name, value) in [("PATH", "/opt"), ("A", "1=2"), ("HOME", "/var/www")] {
            let pair = (OsString::from(name), OsString::from(value));
            assert_eq!(
                made.environment
                    .iter()
                    .filter(|known| **known == pair)
                    .count(),
                1
            );
        }
        let words = ["ls".into(), "-l".into()];
        let root_user = Some(User::ROOT);
        let made = command(&words, &root, Some(config()), root_user, false, false).unwrap();
        assert_eq!(made.arguments, ["/entry", "ls", "-l"]);
        assert_eq!((made.user, made.terminal), (0, None));
    }

    #[test]
    fn a_tree_without_a_word_to_say_gets_a_shell_of_root() {
        let root = parse_root("tree").unwrap();
        let made = command(&[], &root, None, None, false, true).unwrap();
        assert_eq!(made.arguments, ["/bin/sh"]);
        assert_eq!((made.user, made.directory.to_str()), (0, Some("/")));
        assert!(made.terminal.is_some());
    }

    #[test]
    fn variables_with_secrets_stay_on_the_host() {
        for name in [
            "GITHUB_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "PGPASSWORD",
            "SSH_AUTH_SOCK",
            "my_api_key",
        ] {
            assert!(is_secret(OsStr::new(name)), "{name}");
        }
        for name in ["PATH", "HOME", "LANG", "CARGO_HOME", "MAKEFLAGS"] {
            assert!(!is_secret(OsStr::new(name)), "{name}");
        }
    }
}
