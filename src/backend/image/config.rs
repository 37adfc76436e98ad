//! How an image wants to be run: the part of its configuration that a guest's init needs.
//!
//! (OCI image specification, config.md, "Properties".) An image names its user as a text of `/etc/passwd` or as
//! numbers; the names are looked up in the image itself, never on the host.

use serde::{Deserialize, Serialize};

use super::tree::{Kind, Tree};
use super::{Error, Result};

/// `/etc/passwd` and `/etc/group` are read up to this many bytes.
const FILE_READ_MAX: u64 = 1 << 20;

/// How an image wants to be run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Arguments after the entrypoint, or the program itself; what a person says takes its place.
    pub cmd: Vec<String>,
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// As the image says it: `NAME`, `UID`, with `:GROUP` or `:GID` behind it. Empty is root.
    pub user: String,
    /// Where the program starts. Empty is `/`.
    pub working_dir: String,
    /// Who `user` is, once the image has been unpacked.
    pub identity: Option<Identity>,
}

/// A user of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Other groups that have the user as a member.
    pub groups: Vec<u32>,
    /// The user's home directory, if the image says it.
    pub home: Option<String>,
}

impl ImageConfig {
    /// What an image's configuration says.
    pub(super) fn of(configuration: &oci_spec::image::ImageConfiguration) -> ImageConfig {
        let Some(config) = configuration.config() else {
            return ImageConfig::default();
        };
        ImageConfig {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            identity: None,
        }
    }

    /// What runs when a person does not say: the entrypoint and its arguments.
    pub fn command(&self) -> Vec<String> {
        [&self.entrypoint[..], &self.cmd].concat()
    }

    /// Looks the user up in the image's own files.
    ///
    /// # Errors
    /// When they do not know the name. `path` is the image.
    pub(super) fn identify(&mut self, path: &std::path::Path, tree: &Tree) -> Result<()> {
        let passwd = text(tree, b"/etc/passwd")?;
        let group = text(tree, b"/etc/group")?;
        let identity = identity(&self.user, &passwd, &group).map_err(|why| Error::User {
            path: path.to_owned(),
            user: self.user.clone(),
            why,
        })?;
        self.identity = Some(identity);
        Ok(())
    }
}

/// A file of the tree; an empty text if there is none.
fn text(tree: &Tree, path: &[u8]) -> Result<String> {
    if let Ok(Some(id)) = tree.find(path)
        && let Kind::File(contents) = &tree.node(id).kind
    {
        let bytes = contents.read(FILE_READ_MAX)?;
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    Ok(String::new())
}

/// Who `user` is, by the texts of `/etc/passwd` and `/etc/group`.
fn identity(user: &str, passwd: &str, group: &str) -> std::result::Result<Identity, String> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    // name:password:uid:gid:comment:home:shell
    let mut users = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let user = if user.is_empty() { "0" } else { user };
    let known = users
        .clone()
        .find(|fields| fields.first() == Some(&user))
        .or_else(|| users.find(|fields| fields.get(2) == Some(&user)));
    let number = |fields: &Vec<&str>, at: usize| fields.get(at).and_then(|text| text.parse().ok());
    let mut identity = match &known {
        Some(fields) => Identity {
            uid: number(fields, 2).ok_or("its line in /etc/passwd has no user number")?,
            gid: number(fields, 3).ok_or("its line in /etc/passwd has no group number")?,
            groups: Vec::new(),
            home: fields.get(5).map(|home| (*home).to_owned()),
        },
        None => Identity {
            uid: user
                .parse()
                .map_err(|_| format!("its /etc/passwd has no user `{user}`"))?,
            ..Identity::default()
        },
    };
    // name:password:gid:member,member
    let mut groups = group
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    if let Some(wanted) = wanted_group {
        let known = groups.find(|fields| fields.first() == Some(&wanted));
        identity.gid = known
            .and_then(|fields| number(&fields, 2))
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| format!("its /etc/group has no group `{wanted}`"))?;
    } else if let Some(name) = known.as_ref().and_then(|fields| fields.first()) {
        let member = |fields: &Vec<&str>| {
            let members = fields.get(3).copied().unwrap_or_default();
            members.split(',').any(|member| member == *name)
        };
        let numbers = groups
            .filter(member)
            .filter_map(|fields| number(&fields, 2));
        identity.groups = numbers.filter(|gid| *gid != identity.gid).collect();
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/false\nbad:x\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:web\nlog:x:40:other,web\nweb:x:50:\n";

    #[test]
    fn a_user_is_a_name_or_a_number_with_or_without_a_group() {
        let web = |gid: u32, groups: &[u32]| Identity {
            uid: 33,
            gid,
            groups: groups.to_vec(),
            home: Some("/var/www".to_owned()),
        };
        let root = Identity {
            home: Some("/root".to_owned()),
            ..Identity::default()
        };
        for (user, expected) in [
            ("", root.clone()),
            ("root", root.clone()),
            ("0", root),
            ("web", web(34, &[40])),
            ("33", web(34, &[40])),
            ("web:", web(34, &[40])),
            ("web:log", web(40, &[])),
            ("web:7", web(7, &[])),
            (
                "1000:1001",
                Identity {
                    uid: 1000,
                    gid: 1001,
                    ..Identity::default()
                },
            ),
        ] {
            assert_eq!(identity(user, PASSWD, GROUP), Ok(expected), "{user}");
        }
        assert_eq!(identity("", "", ""), Ok(Identity::default()));
    }

    #[test]
    fn a_user_or_group_that_the_image_does_not_have_is_named() {
        for (user, words) in [
            ("nobody", "no user `nobody`"),
            ("web:nogroup", "no group `nogroup`"),
            ("bad", "no user number"),
            ("-1", "no user `-1`"),
        ] {
            let why = identity(user, PASSWD, GROUP).unwrap_err();
            assert!(why.contains(words), "{user}: {why}");
        }
    }
}
