//! `--vsock`: sockets between programs of the guest and of the host.

use std::path::PathBuf;

use super::options::{Key, Options};
use crate::backend::vsock::{Host, Place};
use crate::virtio::VirtioDevice;
use crate::virtio::dev::vsock::{CID_MAX, CID_MIN, Vsock};

const FLAG: &str = "--vsock";
const KEYS: &[Key] = &[Key::Value("path", "DIR")];

/// The value of the flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sockets {
    cid: u32,
    /// Without one, a fresh directory is made.
    path: Option<PathBuf>,
}

/// Parses the value of `--vsock`.
///
/// # Errors
/// One sentence on what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Sockets, String> {
    let options = Options::parse(FLAG, "CID", KEYS, text)?;
    let cid = options.first;
    let cid = cid
        .parse()
        .ok()
        .filter(|cid| (CID_MIN..=CID_MAX).contains(cid))
        .ok_or_else(|| {
            format!("{FLAG}: `{cid}` is not a guest's CID, which is {CID_MIN} to {CID_MAX}")
        })?;
    Ok(Sockets {
        cid,
        path: options.value("path").map(PathBuf::from),
    })
}

/// The flag with the directory decided on.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    cid: u32,
    place: Place,
}

impl Sockets {
    /// Decides on the directory, if none was given, for the machine of this name.
    pub fn resolve(&self, machine: &str) -> Resolved {
        let place = match &self.path {
            Some(path) => Place::Given(path.clone()),
            None => Place::for_machine(machine),
        };
        Resolved {
            cid: self.cid,
            place,
        }
    }
}

impl Resolved {
    /// The value of the flag, with its directory.
    pub fn text(&self) -> String {
        format!("{},path={}", self.cid, self.place.path().display())
    }

    /// Listens in the directory.
    ///
    /// # Errors
    /// One sentence about the directory.
    pub fn open(&self) -> super::Result<Box<dyn VirtioDevice>> {
        let host = Host::open(&self.place)?;
        Ok(Box::new(Vsock::new(0, self.cid, host)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cid_may_have_a_directory_with_it() {
        let sockets = parse("3,path=/run/vm1").unwrap();
        assert_eq!(sockets.resolve("vm").text(), "3,path=/run/vm1");
        let fresh = parse("4294967294").unwrap().resolve("vm").text();
        let name = format!("sarang-vm-{}", std::process::id());
        assert!(fresh.starts_with("4294967294,path=/"), "{fresh}");
        assert!(fresh.ends_with(&name), "{fresh}");
    }

    #[test]
    fn what_is_no_guests_cid_is_refused_with_a_sentence() {
        for (text, words) in [
            ("0", "`0` is not a guest's CID, which is 3 to 4294967294"),
            ("2", "`2` is not a guest's CID"),
            ("4294967295", "is not a guest's CID"),
            ("4294967296", "is not a guest's CID"),
            ("-3", "is not a guest's CID"),
            ("guest", "is not a guest's CID"),
            ("path=/tmp", "`path=/tmp` is not a guest's CID"),
            ("", "--vsock needs a CID first"),
            (
                "3,port=5",
                "--vsock does not know `port`; its options are path=DIR",
            ),
            ("3,path=", "wants `path` as `path=DIR`"),
            ("3,path=a,path=b", "`path` twice"),
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(sentence.contains(words), "{text}: {sentence}");
        }
    }

    #[test]
    fn a_flag_becomes_a_device_whose_socket_goes_with_it() {
        let scratch = tempfile::tempdir().unwrap();
        let sockets = parse(&format!("5,path={}", scratch.path().display())).unwrap();
        let device = sockets.resolve("vm").open().unwrap();
        assert_eq!(device.name(), "VSOCK0");
        assert!(scratch.path().join("vsock").exists());
        let error = sockets.resolve("vm").open().err().unwrap().to_string();
        assert!(error.contains("another VM uses the directory"), "{error}");
        drop(device);
        assert!(!scratch.path().join("vsock").exists());
    }
}
