//! What machine to make, and what to boot on it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Error, Step};
use crate::backend::pmem;
use crate::backend::port::Port;
use crate::guest::exec::Session;
use crate::loader;
use crate::trace::Sink;
use crate::virtio::VirtioDevice;
use crate::virtio::dev::balloon;

/// A kernel or initrd: its bytes, and the name by which messages call it.
#[derive(Clone, Debug)]
pub struct Image {
    pub name: String,
    pub bytes: Vec<u8>,
}

impl Image {
    /// Reads a file.
    ///
    /// # Errors
    /// One sentence that names the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<Image, Error> {
        let bytes = loader::read_image(path)?;
        Ok(Image {
            name: path.display().to_string(),
            bytes,
        })
    }
}

/// The guest's end of its console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleDevice {
    /// COM1, `ttyS0` in Linux: there from the first instruction on, a byte at a time.
    #[default]
    Serial,
    /// A virtio device, `hvc0` in Linux, fast and aware of the terminal's size. What COM1 prints goes to the same
    /// place; what is typed does not go to COM1.
    Virtio,
}

/// What machine to make, and what to boot on it.
pub struct Spec {
    pub name: String,
    /// vCPUs, 1 to 64.
    pub cpus: u32,
    /// RAM in bytes, a multiple of 2 MiB.
    pub ram_bytes: u64,
    pub kernel: Image,
    /// Concatenated in this order.
    pub initrds: Vec<Image>,
    pub command_line: String,
    /// In the order in which the guest finds them.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    /// Reaches the balloon among `devices`, for the report.
    pub balloon: Option<balloon::Handle>,
    pub console: ConsoleDevice,
    /// Channels to programs in the guest, from [`Port::channel`]. They and a virtio console come before `devices`.
    pub ports: Vec<Arc<Port>>,
    /// Files that the guest has as persistent memory. It finds them in this order, after the devices.
    pub pmem: Vec<pmem::File>,
    /// The command that the guest's plan has, if it has one. Its end is the run's end.
    pub session: Option<Session>,
    /// A conversation over the console. When the last step waits for something, the run ends with it.
    pub steps: Vec<Step>,
    /// When the run began, in which the machine is made and what it needs is got ready.
    pub since: Instant,
    /// Ends the run with [`super::Outcome::TimedOut`], so long after `since`.
    pub timeout: Option<Duration>,
    /// Receives every exit.
    pub trace: Option<Arc<dyn Sink>>,
}

impl Spec {
    /// A machine with one vCPU and 128 MiB that boots `kernel`, in a run that begins now.
    pub fn new(kernel: Image) -> Spec {
        Spec {
            name: "sarang".to_owned(),
            cpus: 1,
            ram_bytes: 128 << 20,
            kernel,
            initrds: Vec::new(),
            command_line: String::new(),
            devices: Vec::new(),
            balloon: None,
            console: ConsoleDevice::default(),
            ports: Vec::new(),
            session: None,
            steps: Vec::new(),
            pmem: Vec::new(),
            since: Instant::now(),
            timeout: None,
            trace: None,
        }
    }
}
