//! What the console and the ports are connected to in a machine.
//!
//! The console is a wire with one end on the host. The guest's end is COM1, or the first port of a virtio device. In
//! the second case COM1 is still there, and what it prints goes down the same wire: a kernel has nothing else to print
//! to before it finds its virtio devices. What is typed goes to the virtio device alone.

use std::sync::Arc;

use super::{ConsoleDevice, Error};
use crate::backend::console::{self, Console};
use crate::backend::port::Port;
use crate::backend::{ByteQueue, SerialEnd};
use crate::device::uart::Uart;
use crate::virtio::VirtioDevice;
use crate::virtio::dev::console::VirtioConsole;

/// The guest's ends, before the devices are in their places.
pub(super) struct Wiring {
    /// COM1's output and input.
    pub(super) com1: (Arc<ByteQueue>, Arc<ByteQueue>),
    /// The console's port, if it has one.
    pub(super) port: Option<Arc<Port>>,
    /// The devices that have ports.
    pub(super) devices: Vec<Box<dyn VirtioDevice>>,
}

impl Wiring {
    /// The console and the ports have a device each, so that a console alone is as simple as a console can be (see
    /// [`crate::virtio::dev::console`]).
    pub(super) fn new(
        console: &Console,
        device: ConsoleDevice,
        ports: Vec<Arc<Port>>,
    ) -> Result<Wiring, Error> {
        let mut com1 = (console.output(), console.input());
        let (mut port, mut devices) = (None, Vec::<Box<dyn VirtioDevice>>::new());
        if device == ConsoleDevice::Virtio {
            let console_port = Arc::new(Port::of_console(com1.0.clone(), com1.1)?);
            console_port.resize(
                console
                    .display()
                    .map(|display| display.size())
                    .unwrap_or_default(),
            );
            com1.1 = Arc::new(ByteQueue::input().map_err(console::Error::Queue)?);
            let device = VirtioConsole::new(0, Some(Arc::clone(&console_port)), Vec::new())?;
            devices.push(Box::new(device));
            port = Some(console_port);
        }
        if !ports.is_empty() {
            devices.push(Box::new(VirtioConsole::new(1, None, ports)?));
        }
        Ok(Wiring {
            com1,
            port,
            devices,
        })
    }
}

/// What the console tells its news.
pub(super) fn end(com1: &Arc<Uart>, port: Option<&Arc<Port>>) -> Arc<dyn SerialEnd> {
    match port {
        None => Arc::clone(com1) as Arc<dyn SerialEnd>,
        Some(port) => Arc::new(Both {
            com1: Arc::clone(com1),
            port: Arc::clone(port),
        }),
    }
}

/// Two devices that print to one console.
struct Both {
    com1: Arc<Uart>,
    port: Arc<Port>,
}

impl SerialEnd for Both {
    fn input_arrived(&self) {
        self.port.input_arrived();
    }

    fn output_drained(&self) {
        self.com1.output_drained();
        self.port.output_drained();
    }
}
