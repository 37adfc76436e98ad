//! The plan: what the VMM wants init to do with a guest, written to [`PATH`] in the initramfs.
//!
//! A plan is a list of records, each `key=value` with a zero byte behind it. Paths, arguments and variables cannot
//! contain that byte, so nothing needs quoting, and `tr '\0' '\n' < plan` shows a plan to a person. The first record is
//! `sarang-plan=1`, the version. A key that stands for a list is repeated, and the order of the records is the order of
//! the list. A key with a dot in it belongs to the nearest record above that has the part before the dot for its key:
//!
//! ```text
//! sarang-plan=1
//! module=/sarang/modules/00-fuse.ko    load this
//! root=virtiofs                        the root's file system type; no record: stay in the initramfs
//! root.source=root                     a virtio-fs tag, or a block device
//! root.options=                        the data of mount(2)
//! root.read-only=yes
//! overlay=yes                          let writes to the root go to memory
//! mount=virtiofs                       one more file system ...
//! mount.path=/home/me/project          ... at this place
//! mount.source=project
//! mount.options=
//! mount.read-only=no
//! hostname=sarang
//! network=static                       none, loopback, dhcp or static
//! network.interface=eth0
//! network.address=10.0.2.15/24
//! network.gateway=10.0.2.2
//! network.dns=10.0.2.3
//! clock=1700000000.000000000           seconds since 1970
//! argument=make                        the command ...
//! argument=test
//! environment=PATH=/usr/bin:/bin
//! directory=/home/me/project
//! user=1000
//! group=1000
//! groups=27
//! terminal=24x80                       ... on a terminal of so many rows and columns
//! ```
//!
//! The records of a command also travel alone, in the EXEC frame of the exec channel (`protocol`).
//!
//! This file is compiled into the VMM and into init, so it uses nothing but the standard library.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

/// Where init finds the plan in the initramfs.
pub const PATH: &str = "/sarang/plan";
/// The only version there is.
const VERSION: &str = "1";
const VERSION_KEY: &str = "sarang-plan";

/// What init is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Kernel modules to load, in this order; paths in the initramfs.
    pub modules: Vec<OsString>,
    /// The root of the command; `None` is the initramfs itself.
    pub root: Option<FileSystem>,
    /// Whether an overlay in memory lies over the root and takes all writes.
    pub overlay: bool,
    /// Further file systems, mounted in this order. Mount points that are missing are created.
    pub mounts: Vec<Mount>,
    pub hostname: Option<String>,
    pub network: Network,
    /// The wall clock when the plan was made, as time since 1970; `None` leaves it as the kernel has it.
    pub clock: Option<Duration>,
    /// The main command, with whose end the guest ends. `None`: the guest runs until it is told to stop.
    pub command: Option<Command>,
}

/// A file system for mount(2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type: `virtiofs`, `ext4`, …
    pub kind: String,
    /// A virtio-fs tag, or the path of a block device, for which init waits.
    pub source: OsString,
    /// The data of mount(2), comma-separated options; mostly empty.
    pub options: OsString,
    pub read_only: bool,
}

impl FileSystem {
    /// The virtio-fs share called `tag`.
    pub fn share(tag: &str, read_only: bool) -> FileSystem {
        FileSystem {
            kind: "virtiofs".into(),
            source: tag.into(),
            options: OsString::new(),
            read_only,
        }
    }

    /// The block device `device`, a path like `/dev/vda`, with a file system of type `kind`.
    pub fn block(device: &str, kind: &str, read_only: bool) -> FileSystem {
        FileSystem {
            kind: kind.into(),
            source: device.into(),
            options: OsString::new(),
            read_only,
        }
    }
}

/// A file system and the absolute path where it goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    pub path: OsString,
    pub file_system: FileSystem,
}

/// What init sets up of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// Nothing, not even the loopback interface.
    #[default]
    None,
    /// Only `lo`.
    Loopback,
    /// `lo`, and an interface that DHCP configures.
    Dhcp { interface: String },
    /// `lo`, and an interface with a fixed address.
    Static {
        interface: String,
        address: Ipv4Addr,
        /// Length of the network's prefix, 0 to 32 bits.
        prefix: u8,
        gateway: Option<Ipv4Addr>,
        dns: Vec<Ipv4Addr>,
    },
}

/// A command to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Its name, looked up by `PATH` of `environment` when it has no slash, and its arguments. Never empty.
    pub arguments: Vec<OsString>,
    /// All variables of its environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Working directory in the guest.
    pub directory: OsString,
    pub user: u32,
    pub group: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// `Some`: it runs on a terminal of this size, and its standard error is the same stream as its standard output.
    pub terminal: Option<WindowSize>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

/// What is wrong with a plan or a command, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid(pub String);

impl fmt::Display for Invalid {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// Writes records.
#[derive(Default)]
struct Records(Vec<u8>);

impl Records {
    /// # Errors
    /// When `value` has a zero byte in it, which no path, argument or variable can have.
    fn add(&mut self, key: &str, value: impl AsRef<OsStr>) -> Result<(), Invalid> {
        let value = value.as_ref().as_bytes();
        if value.contains(&0) {
            let text = String::from_utf8_lossy(value).replace('\0', "\\0");
            return Err(Invalid(format!("\"{text}\" has a zero byte in it")));
        }
        for part in [key.as_bytes(), b"=", value, b"\0"] {
            self.0.extend_from_slice(part);
        }
        Ok(())
    }

    fn add_flag(&mut self, key: &str, value: bool) -> Result<(), Invalid> {
        self.add(key, if value { "yes" } else { "no" })
    }

    fn add_file_system(&mut self, key: &str, file_system: &FileSystem) -> Result<(), Invalid> {
        self.add(key, &file_system.kind)?;
        self.add(&format!("{key}.source"), &file_system.source)?;
        self.add(&format!("{key}.options"), &file_system.options)?;
        self.add_flag(&format!("{key}.read-only"), file_system.read_only)
    }
}

/// Splits `bytes` into its records' keys and values.
fn records(bytes: &[u8]) -> Result<Vec<(&str, &OsStr)>, Invalid> {
    let Some(body) = bytes.strip_suffix(b"\0") else {
        return Err(Invalid("its last record is cut short".into()));
    };
    let split = |record| {
        let record: &[u8] = record;
        let at = record.iter().position(|byte| *byte == b'=');
        let (key, value) = at
            .and_then(|at| record.split_at_checked(at))
            .ok_or_else(|| Invalid("it has a record without a key".into()))?;
        let key = std::str::from_utf8(key).map_err(|_| Invalid("a key is not text".into()))?;
        Ok((key, OsStr::from_bytes(value.get(1..).unwrap_or_default())))
    };
    body.split(|byte| *byte == 0).map(split).collect()
}

/// `value` as text that `parse` understands.
fn parsed<T>(
    key: &str,
    value: &OsStr,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, Invalid> {
    value.to_str().and_then(parse).ok_or_else(|| {
        let value = value.to_string_lossy();
        Invalid(format!("\"{value}\" is no value for \"{key}\""))
    })
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn out_of_place(key: &str) -> Invalid {
    Invalid(format!("a record \"{key}\" does not belong where it is"))
}

impl FileSystem {
    /// Takes one record whose key ends in `.part`.
    fn take(&mut self, part: &str, key: &str, value: &OsStr) -> Result<(), Invalid> {
        match part {
            "source" => self.source = value.to_owned(),
            "options" => self.options = value.to_owned(),
            "read-only" => self.read_only = parsed(key, value, flag)?,
            _ => return Err(out_of_place(key)),
        }
        Ok(())
    }

    fn of_kind(key: &str, value: &OsStr) -> Result<FileSystem, Invalid> {
        Ok(FileSystem {
            kind: parsed(key, value, text)?,
            ..FileSystem::default()
        })
    }
}

impl Network {
    fn of_kind(kind: &str) -> Option<Network> {
        Some(match kind {
            "none" => Network::None,
            "loopback" => Network::Loopback,
            "dhcp" => Network::Dhcp {
                interface: String::new(),
            },
            "static" => Network::Static {
                interface: String::new(),
                address: Ipv4Addr::UNSPECIFIED,
                prefix: 32,
                gateway: None,
                dns: Vec::new(),
            },
            _ => return None,
        })
    }

    fn take(&mut self, part: &str, key: &str, value: &OsStr) -> Result<(), Invalid> {
        match (part, self) {
            ("interface", Network::Dhcp { interface } | Network::Static { interface, .. }) => {
                *interface = parsed(key, value, text)?;
            }
            (
                "address",
                Network::Static {
                    address, prefix, ..
                },
            ) => {
                (*address, *prefix) = parsed(key, value, |text| {
                    let (address, prefix) = text.split_once('/')?;
                    let prefix = prefix.parse().ok().filter(|bits| *bits <= 32)?;
                    Some((address.parse().ok()?, prefix))
                })?;
            }
            ("gateway", Network::Static { gateway, .. }) => {
                *gateway = Some(parsed(key, value, |text| text.parse().ok())?);
            }
            ("dns", Network::Static { dns, .. }) => {
                dns.push(parsed(key, value, |text| text.parse().ok())?);
            }
            _ => return Err(out_of_place(key)),
        }
        Ok(())
    }

    fn add_to(&self, records: &mut Records) -> Result<(), Invalid> {
        match self {
            Network::None => records.add("network", "none"),
            Network::Loopback => records.add("network", "loopback"),
            Network::Dhcp { interface } => {
                records.add("network", "dhcp")?;
                records.add("network.interface", interface)
            }
            Network::Static {
                interface,
                address,
                prefix,
                gateway,
                dns,
            } => {
                records.add("network", "static")?;
                records.add("network.interface", interface)?;
                records.add("network.address", format!("{address}/{prefix}"))?;
                if let Some(gateway) = gateway {
                    records.add("network.gateway", gateway.to_string())?;
                }
                dns.iter()
                    .try_for_each(|server| records.add("network.dns", server.to_string()))
            }
        }
    }
}

impl Command {
    /// The command's records alone, as the EXEC frame carries them.
    ///
    /// # Errors
    /// When a part of it has a zero byte in it.
    pub fn encode(&self) -> Result<Vec<u8>, Invalid> {
        let mut records = Records::default();
        self.add_to(&mut records)?;
        Ok(records.0)
    }

    fn add_to(&self, records: &mut Records) -> Result<(), Invalid> {
        for argument in &self.arguments {
            records.add("argument", argument)?;
        }
        for (name, value) in &self.environment {
            let mut variable = name.clone();
            variable.push("=");
            variable.push(value);
            records.add("environment", variable)?;
        }
        records.add("directory", &self.directory)?;
        records.add("user", self.user.to_string())?;
        records.add("group", self.group.to_string())?;
        for group in &self.groups {
            records.add("groups", group.to_string())?;
        }
        if let Some(WindowSize { rows, columns }) = self.terminal {
            records.add("terminal", format!("{rows}x{columns}"))?;
        }
        Ok(())
    }

    /// The command that [`Command::encode`] wrote.
    ///
    /// # Errors
    /// When the bytes are something else.
    pub fn decode(bytes: &[u8]) -> Result<Command, Invalid> {
        let mut command = Command::default();
        for (key, value) in records(bytes)? {
            if !command.take(key, value)? {
                return Err(Invalid(format!("the key \"{key}\" is not known")));
            }
        }
        command.checked()
    }

    /// Takes a record, if it belongs to a command.
    fn take(&mut self, key: &str, value: &OsStr) -> Result<bool, Invalid> {
        let number = |value| parsed(key, value, |text| text.parse().ok());
        match key {
            "argument" => self.arguments.push(value.to_owned()),
            "environment" => {
                let variable = value.as_bytes();
                // A name may begin with an equals sign, as the standard library has it.
                let at = variable.iter().skip(1).position(|byte| *byte == b'=');
                let (name, value) = at
                    .and_then(|at| variable.split_at_checked(at + 1))
                    .ok_or_else(|| Invalid("a variable has no value".into()))?;
                let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
                let value = value.get(1..).unwrap_or_default();
                self.environment.push((owned(name), owned(value)));
            }
            "directory" => self.directory = value.to_owned(),
            "user" => self.user = number(value)?,
            "group" => self.group = number(value)?,
            "groups" => self.groups.push(number(value)?),
            "terminal" => {
                self.terminal = Some(parsed(key, value, |text| {
                    let (rows, columns) = text.split_once('x')?;
                    Some(WindowSize {
                        rows: rows.parse().ok()?,
                        columns: columns.parse().ok()?,
                    })
                })?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn checked(self) -> Result<Command, Invalid> {
        if self.arguments.is_empty() {
            return Err(Invalid("the command has no name".into()));
        }
        Ok(self)
    }
}

impl Plan {
    /// The plan as init reads it.
    ///
    /// # Errors
    /// When a part of it has a zero byte in it.
    pub fn encode(&self) -> Result<Vec<u8>, Invalid> {
        let mut records = Records::default();
        records.add(VERSION_KEY, VERSION)?;
        for module in &self.modules {
            records.add("module", module)?;
        }
        if let Some(root) = &self.root {
            records.add_file_system("root", root)?;
        }
        records.add_flag("overlay", self.overlay)?;
        for mount in &self.mounts {
            records.add_file_system("mount", &mount.file_system)?;
            records.add("mount.path", &mount.path)?;
        }
        if let Some(hostname) = &self.hostname {
            records.add("hostname", hostname)?;
        }
        self.network.add_to(&mut records)?;
        if let Some(clock) = self.clock {
            let text = format!("{}.{:09}", clock.as_secs(), clock.subsec_nanos());
            records.add("clock", text)?;
        }
        if let Some(command) = &self.command {
            command.add_to(&mut records)?;
        }
        Ok(records.0)
    }

    /// The plan that [`Plan::encode`] wrote.
    ///
    /// # Errors
    /// When the bytes are something else, or of a version that this build does not know.
    pub fn decode(bytes: &[u8]) -> Result<Plan, Invalid> {
        let records = records(bytes)?;
        match records.first() {
            Some((key, version)) if *key == VERSION_KEY && *version == VERSION => {}
            Some((key, version)) if *key == VERSION_KEY => {
                let version = version.to_string_lossy();
                return Err(Invalid(format!(
                    "it has version {version}, this init knows {VERSION}"
                )));
            }
            _ => {
                return Err(Invalid(format!(
                    "it does not begin with \"{VERSION_KEY}=\""
                )));
            }
        }
        let mut plan = Plan::default();
        let mut command = Command::default();
        let mut commanded = false;
        for (key, value) in records.into_iter().skip(1) {
            if command.take(key, value)? {
                commanded = true;
            } else {
                plan.take(key, value)?;
            }
        }
        let absolute = |mount: &Mount| mount.path.as_bytes().starts_with(b"/");
        if !plan.mounts.iter().all(absolute) {
            return Err(Invalid("a mount has no absolute path".into()));
        }
        plan.command = commanded.then(|| command.checked()).transpose()?;
        Ok(plan)
    }

    fn take(&mut self, key: &str, value: &OsStr) -> Result<(), Invalid> {
        match key.split_once('.').unwrap_or((key, "")) {
            ("module", "") => self.modules.push(value.to_owned()),
            ("root", "") => self.root = Some(FileSystem::of_kind(key, value)?),
            ("root", part) => {
                let root = self.root.as_mut().ok_or_else(|| out_of_place(key))?;
                root.take(part, key, value)?;
            }
            ("overlay", "") => self.overlay = parsed(key, value, flag)?,
            ("mount", "") => self.mounts.push(Mount {
                path: OsString::new(),
                file_system: FileSystem::of_kind(key, value)?,
            }),
            ("mount", part) => {
                let mount = self.mounts.last_mut().ok_or_else(|| out_of_place(key))?;
                if part == "path" {
                    mount.path = value.to_owned();
                } else {
                    mount.file_system.take(part, key, value)?;
                }
            }
            ("hostname", "") => self.hostname = Some(parsed(key, value, text)?),
            ("network", "") => self.network = parsed(key, value, Network::of_kind)?,
            ("network", part) => self.network.take(part, key, value)?,
            ("clock", "") => {
                self.clock = Some(parsed(key, value, |text| {
                    let (seconds, nanoseconds) = text.split_once('.')?;
                    let nanoseconds = nanoseconds.parse().ok().filter(|n| *n < 1_000_000_000)?;
                    Some(Duration::new(seconds.parse().ok()?, nanoseconds))
                })?);
            }
            _ => return Err(Invalid(format!("the key \"{key}\" is not known"))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Plan {
        let shell = Command {
            arguments: ["sh", "-c", "echo a=b\nexit 3", ""]
                .map(OsString::from)
                .to_vec(),
            environment: vec![
                ("PATH".into(), "/bin".into()),
                ("EMPTY".into(), "".into()),
                ("=odd".into(), "a=b".into()),
                ("BYTES".into(), OsString::from_vec(vec![0xff, b'\n'])),
            ],
            directory: "/home/me".into(),
            user: 1000,
            group: u32::MAX,
            groups: vec![27, 4],
            terminal: Some(WindowSize {
                rows: 24,
                columns: 80,
            }),
        };
        Plan {
            modules: vec!["/sarang/modules/00-fuse.ko".into(), "/m/01.ko".into()],
            root: Some(FileSystem::share("root", true)),
            overlay: true,
            mounts: vec![
                Mount {
                    path: "/work".into(),
                    file_system: FileSystem::share("work", false),
                },
                Mount {
                    path: "/data".into(),
                    file_system: FileSystem {
                        options: "noload".into(),
                        ..FileSystem::block("/dev/vdb", "ext4", true)
                    },
                },
            ],
            hostname: Some("sarang".into()),
            network: Network::Static {
                interface: "eth0".into(),
                address: Ipv4Addr::new(10, 0, 2, 15),
                prefix: 24,
                gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
                dns: vec![Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(1, 1, 1, 1)],
            },
            clock: Some(Duration::new(1_700_000_000, 5)),
            command: Some(shell),
        }
    }

    #[test]
    fn init_reads_what_the_vmm_wrote() {
        let dhcp = Plan {
            network: Network::Dhcp {
                interface: "eth1".into(),
            },
            ..Plan::default()
        };
        let loopback = Plan {
            network: Network::Loopback,
            ..full()
        };
        for plan in [Plan::default(), full(), dhcp, loopback] {
            assert_eq!(Plan::decode(&plan.encode().unwrap()), Ok(plan));
        }
    }

    #[test]
    fn a_command_travels_alone() {
        let command = full().command.unwrap();
        assert_eq!(Command::decode(&command.encode().unwrap()), Ok(command));
        let Invalid(why) = Command::decode(b"user=0\0").unwrap_err();
        assert!(why.contains("no name"), "{why}");
        let Invalid(why) = Command::decode(b"argument=a\0module=b\0").unwrap_err();
        assert!(why.contains("module"), "{why}");
    }

    #[test]
    fn a_zero_byte_is_refused_where_it_would_end_a_record() {
        let command = Command {
            arguments: vec!["a\0user=0".into()],
            ..Command::default()
        };
        let Invalid(why) = command.encode().unwrap_err();
        assert!(why.contains("a\\0user=0"), "{why}");
    }

    #[test]
    fn every_cut_of_a_plan_is_an_error_or_a_shorter_plan() {
        let bytes = full().encode().unwrap();
        let decoded = (0..bytes.len()).filter(|len| Plan::decode(&bytes[..*len]).is_ok());
        for len in decoded {
            assert!(bytes[..len].ends_with(b"\0"), "{len}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (records, complaint) in [
            ("", "cut short"),
            ("sarang-plan=1", "cut short"),
            ("module=a|", "does not begin with"),
            ("sarang-plan=2|", "has version 2"),
            ("sarang-plan=1|nonsense|", "without a key"),
            (
                "sarang-plan=1|colour=red|",
                "the key \"colour\" is not known",
            ),
            ("sarang-plan=1|module.x=a|", "\"module.x\""),
            ("sarang-plan=1|root.source=a|", "\"root.source\""),
            ("sarang-plan=1|root=ext4|root.colour=a|", "\"root.colour\""),
            (
                "sarang-plan=1|overlay=maybe|",
                "\"maybe\" is no value for \"overlay\"",
            ),
            ("sarang-plan=1|mount=ext4|", "no absolute path"),
            (
                "sarang-plan=1|mount=ext4|mount.path=here|",
                "no absolute path",
            ),
            ("sarang-plan=1|network=ipx|", "\"ipx\""),
            (
                "sarang-plan=1|network=dhcp|network.dns=1.1.1.1|",
                "\"network.dns\"",
            ),
            (
                "sarang-plan=1|network=static|network.address=1.1.1.1/33|",
                "1.1.1.1/33",
            ),
            ("sarang-plan=1|clock=1.1000000000|", "\"clock\""),
            ("sarang-plan=1|user=me|argument=a|", "\"me\""),
            ("sarang-plan=1|user=5|", "no name"),
            ("sarang-plan=1|argument=a|environment=PATH|", "no value"),
            ("sarang-plan=1|argument=a|terminal=80|", "\"80\""),
        ] {
            let Invalid(why) = Plan::decode(records.replace('|', "\0").as_bytes()).unwrap_err();
            assert!(why.contains(complaint), "{records}: {why}");
        }
    }
}
