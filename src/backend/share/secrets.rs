//! What of a whole host a guest should not see when the host's `/` is shared: keys, passwords and tokens, and where people
//! keep what they have typed, browsed and said.
//!
//! The list can only have what is known to hold secrets. A password in a script or in a project's `.env` is not on it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Files and directories of the system.
const SYSTEM: &[&str] = &[
    // Passwords, and who may become root (shadow(5), gshadow(5), sudoers(5), doas.conf(5)).
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/security/opasswd",
    "/etc/sudoers",
    "/etc/sudoers.d",
    "/etc/doas.conf",
    // Who this host is, to others: the usual host keys of sshd(8), and Kerberos.
    "/etc/ssh/ssh_host_rsa_key",
    "/etc/ssh/ssh_host_dsa_key",
    "/etc/ssh/ssh_host_ecdsa_key",
    "/etc/ssh/ssh_host_ed25519_key",
    "/etc/krb5.keytab",
    "/var/kerberos/krb5kdc",
    "/var/lib/krb5kdc",
    // Keys of certificates.
    "/etc/ssl/private",
    "/etc/pki/tls/private",
    "/etc/pki/private",
    "/etc/letsencrypt",
    "/var/lib/acme",
    "/var/lib/caddy",
    // Wireless networks and VPNs.
    "/etc/NetworkManager/system-connections",
    "/var/lib/NetworkManager",
    "/etc/netplan",
    "/etc/wpa_supplicant",
    "/etc/wpa_supplicant.conf",
    "/var/lib/iwd",
    "/var/lib/connman",
    "/etc/wireguard",
    "/etc/openvpn",
    "/etc/ipsec.secrets",
    "/etc/ipsec.d/private",
    "/etc/swanctl",
    "/etc/ppp/chap-secrets",
    "/etc/ppp/pap-secrets",
    "/var/lib/tailscale",
    "/var/lib/zerotier-one",
    "/var/lib/bluetooth",
    // Services that know users' passwords, or have one of their own.
    "/etc/sssd",
    "/var/lib/sss/db",
    "/var/lib/sss/secrets",
    "/etc/ldap.secret",
    "/etc/libnss-ldap.secret",
    "/etc/pam_ldap.secret",
    "/var/lib/samba/private",
    "/etc/samba/smbpasswd",
    "/etc/mysql/debian.cnf",
    "/etc/postfix/sasl_passwd",
    "/etc/postfix/sasl_passwd.db",
    "/etc/exim4/passwd.client",
    "/etc/msmtprc",
    "/etc/davfs2/secrets",
    "/etc/fetchmailrc",
    // Credentials of systemd's services (systemd.exec(5)), and what its random numbers start from.
    "/etc/credstore",
    "/etc/credstore.encrypted",
    "/usr/lib/credstore",
    "/usr/lib/credstore.encrypted",
    "/var/lib/systemd/credential.secret",
    "/var/lib/systemd/random-seed",
    // Keys of disks and of the boot chain.
    "/etc/cryptsetup-keys.d",
    "/etc/luks",
    "/etc/secureboot",
    "/var/lib/sbctl",
    "/var/lib/shim-signed",
    // Clusters, clouds and those who manage hosts.
    "/etc/kubernetes",
    "/var/lib/kubelet",
    "/etc/rancher",
    "/var/lib/rancher",
    "/etc/docker/key.json",
    "/var/lib/cloud",
    "/var/lib/waagent",
    "/etc/salt/pki",
    "/etc/puppetlabs/puppet/ssl",
    "/etc/pve/priv",
    "/etc/vault.d",
    // What was in memory.
    "/swapfile",
    "/swap.img",
    "/var/lib/systemd/coredump",
    "/var/crash",
    // Of who is logged in and of what runs. A guest has its own /run, but sees this one's mount point.
    "/run/user",
    "/run/credentials",
    "/run/secrets",
    "/run/sudo",
    "/run/cloud-init",
    "/var/lib/sudo",
    "/var/db/sudo",
];

/// What is in a user's home.
const HOME: &[&str] = &[
    // Keys, and what keeps passwords.
    ".ssh",
    ".gnupg",
    ".age",
    ".config/age",
    ".config/sops",
    ".pki",
    ".password-store",
    ".local/share/password-store",
    ".local/share/keyrings",
    ".local/share/kwalletd",
    ".kde/share/apps/kwallet",
    ".config/op",
    ".config/1Password",
    ".config/Bitwarden",
    ".config/Bitwarden CLI",
    ".config/keepassxc",
    ".config/credstore",
    ".config/credstore.encrypted",
    ".vault-token",
    // Clouds and clusters.
    ".aws",
    ".azure",
    ".config/gcloud",
    ".boto",
    ".s3cfg",
    ".passwd-s3fs",
    ".config/rclone",
    ".oci",
    ".aliyun",
    ".bluemix",
    ".ibmcloud",
    ".config/doctl",
    ".config/hcloud",
    ".config/linode-cli",
    ".config/scw",
    ".config/exoscale",
    ".config/openstack",
    ".config/netlify",
    ".local/share/com.vercel.cli",
    ".fly",
    ".kube",
    ".config/helm",
    ".docker/config.json",
    ".config/containers/auth.json",
    ".terraform.d/credentials.tfrc.json",
    ".terraformrc",
    ".pulumi/credentials.json",
    // Forges and registries of packages.
    ".git-credentials",
    ".config/git/credentials",
    ".config/gh",
    ".config/hub",
    ".config/glab-cli",
    ".config/tea",
    ".npmrc",
    ".yarnrc",
    ".yarnrc.yml",
    ".pypirc",
    ".config/pypoetry/auth.toml",
    ".cargo/credentials",
    ".cargo/credentials.toml",
    ".gem/credentials",
    ".local/share/gem/credentials",
    ".m2/settings.xml",
    ".m2/settings-security.xml",
    ".gradle/gradle.properties",
    ".nuget/NuGet/NuGet.Config",
    ".config/NuGet/NuGet.Config",
    ".composer/auth.json",
    ".config/composer/auth.json",
    ".huggingface",
    ".cache/huggingface/token",
    ".cache/huggingface/stored_tokens",
    ".kaggle",
    // Passwords for hosts, databases and mail.
    ".netrc",
    ".authinfo",
    ".authinfo.gpg",
    ".pgpass",
    ".my.cnf",
    ".mylogin.cnf",
    ".msmtprc",
    ".config/msmtp",
    ".fetchmailrc",
    ".mbsyncrc",
    ".config/isyncrc",
    ".smbcredentials",
    ".davfs2/secrets",
    ".vnc",
    ".config/tigervnc",
    ".local/share/remmina",
    // Sessions of this user's desktop.
    ".Xauthority",
    ".ICEauthority",
    ".config/pulse/cookie",
    // Browsers, mail and chats: cookies are as good as passwords. `.var/app` and `snap` have those of Flatpak and snap.
    ".mozilla",
    ".config/mozilla",
    ".librewolf",
    ".config/google-chrome",
    ".config/google-chrome-beta",
    ".config/google-chrome-unstable",
    ".config/chromium",
    ".config/BraveSoftware",
    ".config/microsoft-edge",
    ".config/vivaldi",
    ".config/opera",
    ".cache/mozilla",
    ".cache/google-chrome",
    ".cache/chromium",
    ".var/app",
    "snap",
    ".thunderbird",
    ".config/evolution",
    ".local/share/evolution",
    ".config/Signal",
    ".config/Slack",
    ".config/discord",
    ".config/Element",
    ".local/share/TelegramDesktop",
    ".purple",
    ".config/weechat",
    ".irssi",
    // Money.
    ".bitcoin",
    ".electrum",
    ".ethereum",
    ".config/solana",
    // What was typed: shells first.
    ".bash_history",
    ".sh_history",
    ".ksh_history",
    ".mksh_history",
    ".ash_history",
    ".history",
    ".zsh_history",
    ".zhistory",
    ".histfile",
    ".local/share/zsh/history",
    ".local/state/zsh/history",
    ".local/state/bash/history",
    ".local/share/fish/fish_history",
    ".config/nushell/history.txt",
    ".config/nushell/history.sqlite3",
    ".local/share/atuin",
    ".python_history",
    ".node_repl_history",
    ".psql_history",
    ".mysql_history",
    ".mariadb_history",
    ".sqlite_history",
    ".rediscli_history",
    ".lesshst",
    ".wget-hsts",
    ".viminfo",
];

/// What to hide of this host: absolute paths, sorted, of which most do not exist.
///
/// The homes are those in `/etc/passwd`, each directory in `/home`, root's, and `$HOME`.
pub fn secrets() -> Vec<PathBuf> {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let mut homes = homes_in(&passwd);
    homes.extend(entries(Path::new("/home")));
    homes.insert("/root".into());
    homes.extend(std::env::var_os("HOME").map(PathBuf::from));
    let host_keys = entries(Path::new("/etc/ssh")).filter(|path| is_host_key(path));
    let mut paths = list(&homes);
    paths.extend(host_keys);
    paths.into_iter().collect()
}

/// The list for these homes, of which those that are no absolute paths are left out.
fn list(homes: &BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    let mut paths: BTreeSet<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    for home in homes.iter().filter(|home| home.is_absolute()) {
        paths.extend(HOME.iter().map(|name| home.join(name)));
    }
    paths
}

/// The sixth field of each line (passwd(5)). Lines that are something else give nothing.
fn homes_in(passwd: &[u8]) -> BTreeSet<PathBuf> {
    let lines = passwd.split(|byte| *byte == b'\n');
    let lines = lines.filter(|line| !line.starts_with(b"#"));
    lines
        .filter_map(|line| line.split(|byte| *byte == b':').nth(5))
        .map(|home| PathBuf::from(OsStr::from_bytes(home.trim_ascii())))
        .filter(|home| home.is_absolute())
        .collect()
}

/// A host key of sshd(8) that is not one of the usual ones. Its `.pub` is no secret.
fn is_host_key(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    name.starts_with(b"ssh_host_") && name.ends_with(b"_key")
}

/// What is in a directory. Nothing, if it cannot be read.
fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes_are_found_in_a_passwd_that_nobody_has_checked() {
        let passwd = b"root:x:0:0:root:/root:/bin/bash\n\
            # comment:x:1:1::/commented:/bin/sh\n\
            +::::::\n\
            \n\
            short:x:1:1\n\
            ann:x:1000:1000:Ann, of: /srv/ann \n\
            rel:x:1001:1001::home/rel:/bin/sh\n\
            b\xffb:x:1002:1002:B\xff:/home/b\xffb:/bin/sh\n\
            last:x:1003:1003::/home/last";
        let expected: [&[u8]; 4] = [b"/home/b\xffb", b"/home/last", b"/root", b"/srv/ann"];
        let homes: Vec<PathBuf> = homes_in(passwd).into_iter().collect();
        assert_eq!(
            homes,
            expected.map(|home| Path::new(OsStr::from_bytes(home)))
        );
        assert!(homes_in(b"").is_empty());
    }

    #[test]
    fn each_home_has_all_that_a_home_has_and_the_system_its_own() {
        let homes = ["/home/ann", "/srv/bob", "relative", ""].map(PathBuf::from);
        let paths = list(&homes.into());
        assert_eq!(paths.len(), SYSTEM.len() + 2 * HOME.len(), "none is twice");
        for path in [
            "/etc/shadow",
            "/run/user",
            "/home/ann/.ssh",
            "/srv/bob/.ssh",
            "/srv/bob/.config/gcloud",
            "/home/ann/.docker/config.json",
        ] {
            assert!(paths.contains(Path::new(path)), "{path}");
        }
        assert!(paths.iter().all(|path| path.is_absolute()));
    }

    /// A hidden directory hides what is below it, and a list that says so twice hides a mistake.
    #[test]
    fn nothing_on_the_list_is_below_something_else_on_it() {
        let paths = list(&["/home/ann".into()].into());
        for path in &paths {
            let above = path
                .ancestors()
                .skip(1)
                .find(|above| paths.contains(*above));
            assert_eq!(above, None, "{}", path.display());
        }
    }

    #[test]
    fn the_list_of_this_host_has_the_homes_of_root_and_of_whoever_asks() {
        let paths = secrets();
        assert!(paths.is_sorted());
        for path in ["/etc/shadow", "/root/.ssh"] {
            assert!(paths.contains(&path.into()), "{path}");
        }
        let home = std::env::var_os("HOME").map(PathBuf::from);
        if let Some(home) = home.filter(|home| home.is_absolute()) {
            assert!(paths.contains(&home.join(".gnupg")));
        }
        for path in [&b"/etc/ssh/ssh_host_x_key"[..], b"/x/ssh_host_\xff_key"] {
            assert!(is_host_key(Path::new(OsStr::from_bytes(path))));
        }
        for path in ["/etc/ssh/ssh_host_rsa_key.pub", "/etc/ssh/ssh_config", "/"] {
            assert!(!is_host_key(Path::new(path)), "{path}");
        }
    }
}
