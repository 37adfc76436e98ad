//! `--disk` and `--root-disk`: which images a guest gets as its disks.

use super::options::{self, Key, Options};
use super::quantity;
use crate::backend::disk::{self, Format};
use crate::backend::rate::Limits;
use crate::virtio::VirtioDevice;
use crate::virtio::dev::block::{self, Block};

const KEYS: &[Key] = &[
    Key::Word("ro"),
    Key::Word("direct"),
    Key::Value("format", "raw|qcow2"),
    Key::Value("serial", "TEXT"),
    Key::Value("queues", "N"),
    Key::Value("bw", "RATE"),
    Key::Value("iops", "N"),
    Key::Value("worker", "own|shared"),
];

/// The value of one flag.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    /// As it was given.
    text: String,
    path: String,
    pub read_only: bool,
    direct: bool,
    format: Format,
    serial: Option<String>,
    queues: u16,
    limits: Limits,
    own_worker: bool,
}

/// Parses the value of `--disk`.
pub(super) fn data(text: &str) -> Result<Disk, String> {
    parse("--disk", text)
}

/// Parses the value of `--root-disk`.
pub(super) fn root(text: &str) -> Result<Disk, String> {
    parse("--root-disk", text)
}

fn parse(flag: &str, text: &str) -> Result<Disk, String> {
    let options = Options::parse(flag, "PATH", KEYS, text)?;
    let format = match options.value("format") {
        None | Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(other) => {
            return Err(format!(
                "{flag} does not know the format `{other}`: an image is raw or qcow2"
            ));
        }
    };
    let serial = options.value("serial");
    if serial.is_some_and(|serial| serial.len() > block::SERIAL_LEN || !serial.is_ascii()) {
        return Err(format!(
            "{flag} has a serial number that is not 1 to {} ASCII characters",
            block::SERIAL_LEN
        ));
    }
    let queues = match options.value("queues").map(str::parse) {
        None => 1,
        Some(Ok(queues)) if (1..=block::QUEUES_MAX).contains(&queues) => queues,
        Some(_) => {
            return Err(format!(
                "{flag} can have queues=1 to queues={}",
                block::QUEUES_MAX
            ));
        }
    };
    let named = |error| format!("{flag}: {error}");
    let worker = options.value("worker").map(options::own_worker);
    Ok(Disk {
        own_worker: worker.transpose().map_err(named)?.unwrap_or(false),
        text: text.to_owned(),
        path: options.first.to_owned(),
        read_only: options.has("ro"),
        direct: options.has("direct"),
        format,
        serial: serial.map(str::to_owned),
        queues,
        limits: Limits {
            bandwidth: options
                .value("bw")
                .map(quantity::bandwidth)
                .transpose()
                .map_err(named)?,
            operations: options
                .value("iops")
                .map(quantity::operations)
                .transpose()
                .map_err(named)?,
        },
    })
}

impl Disk {
    /// The value as it was given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the kernel command line has to say for this to be the root file system, if it is the first disk.
    pub fn root_words(&self) -> &'static str {
        if self.read_only {
            "root=/dev/vda ro"
        } else {
            "root=/dev/vda rw"
        }
    }

    /// Opens the image. `index` counts the guest's disks from 0; unless said otherwise, it makes the serial number.
    pub fn open(&self, index: usize) -> super::Result<Box<dyn VirtioDevice>> {
        let disk = disk::Disk::open(&disk::Options {
            path: self.path.clone().into(),
            read_only: self.read_only,
            direct: self.direct,
            format: self.format,
            depth: u32::from(self.queues) * u32::from(block::QUEUE_SIZE),
        })?;
        let settings = block::Settings {
            name: format!("BLK{index}"),
            serial: self
                .serial
                .clone()
                .unwrap_or_else(|| format!("sarang-{index}")),
            queues: self.queues,
            limits: self.limits,
            own_worker: self.own_worker,
        };
        let block = Block::new(disk, settings)
            .map_err(|error| format!("cannot limit the rate of the disk {}: {error}", self.path))?;
        Ok(Box::new(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_alone_is_a_raw_disk_to_read_and_write() {
        let disk = data("/dev/sdb").unwrap();
        assert_eq!((disk.path.as_str(), disk.format), ("/dev/sdb", Format::Raw));
        assert!(!disk.read_only && !disk.direct && disk.limits.is_unlimited());
        assert!(!disk.own_worker && !data("a,worker=shared").unwrap().own_worker);
        assert_eq!((disk.queues, disk.root_words()), (1, "root=/dev/vda rw"));
    }

    #[test]
    fn every_option_is_understood() {
        let text = "a.qcow2,ro,direct,format=qcow2,serial=S1,queues=4,bw=100M,iops=1000,worker=own";
        let disk = root(text).unwrap();
        assert!(disk.read_only && disk.direct && disk.own_worker);
        assert_eq!(disk.format, Format::Qcow2);
        assert_eq!((disk.serial.as_deref(), disk.queues), (Some("S1"), 4));
        assert_eq!(disk.limits.bandwidth.map(u64::from), Some(100 << 20));
        assert_eq!(disk.limits.operations.map(u64::from), Some(1000));
        assert_eq!((disk.text(), disk.root_words()), (text, "root=/dev/vda ro"));
    }

    #[test]
    fn values_out_of_range_are_refused_with_a_sentence() {
        for (text, words) in [
            ("", "--disk needs a PATH first"),
            ("a,format=vmdk", "an image is raw or qcow2"),
            ("a,queues=0", "queues=1 to queues=16"),
            ("a,queues=17", "queues=1 to queues=16"),
            ("a,queues=many", "queues=1 to queues=16"),
            ("a,serial=123456789012345678901", "1 to 20 ASCII characters"),
            ("a,bw=fast", "--disk: `fast` is not a rate"),
            ("a,iops=0", "--disk: `0` is not a number"),
            ("a,worker=mine", "--disk: a worker is own"),
        ] {
            let sentence = data(text).unwrap_err();
            assert!(sentence.contains(words), "{text}: {sentence}");
        }
    }

    #[test]
    fn an_image_becomes_a_device() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("disk.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = data(&format!("{},queues=3,iops=5,worker=own", path.display())).unwrap();
        let device = disk.open(2).unwrap();
        assert!(device.wants_own_worker());
        assert_eq!((device.name(), device.queue_sizes().len()), ("BLK2", 3));
        let error = disk.open(3).err().unwrap();
        assert!(error.to_string().contains("in use"), "{error}");
    }
}
