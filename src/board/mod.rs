//! The machine: which device sits at which address, on which interrupt.
//!
//! It is a small PC without the parts that only history asks for. KVM brings the processors' local APICs,
//! the IOAPIC, the 8259 PICs and the 8254 timer. Around them stand the devices of [`ADDRESS_MAP`]. There is
//! no PCI bus, no firmware and no keyboard; an operating system learns what exists from ACPI tables in the
//! hardware-reduced form (ACPI 6.5 §4.1), where power is controlled by a few registers of our own.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use acpi_tables::Aml;

use crate::arch::x86_64::layout;
use crate::backend::ByteQueue;
use crate::bus::{AddressMap, Device, Overlap};
use crate::device::exit_port::ExitPort;
use crate::device::i8042::{I8042, Port};
use crate::device::pm::{self, PowerManagement};
use crate::device::pvpanic::PvPanic;
use crate::device::rtc::Rtc;
use crate::device::uart::{self, Uart};
use crate::firmware;
use crate::hv;
use crate::irq::{Irq, IrqLine, IrqfdLine};
use crate::mem::GuestRam;
use crate::virtio::VirtioDevice;
use crate::virtio::transport::mmio::{self, MmioTransport};

/// COM1 and its interrupt, where a PC has had them since 1981.
pub const COM1: u16 = 0x3f8;
pub const COM1_IRQ: Irq = Irq(4);
/// Keyboard controller: data and command port.
pub const I8042_DATA: u16 = 0x60;
pub const I8042_COMMAND: u16 = 0x64;
/// Real-time clock: index and data port.
pub const RTC: u16 = 0x70;
/// Debug exit port.
pub const EXIT: u16 = 0xf4;
/// pvpanic, where QEMU has it.
pub const PVPANIC: u16 = 0x505;
/// Sleep control, sleep status, reset and event registers.
pub const PM: u16 = 0x600;
/// The interrupt by which power events are announced.
pub const PM_IRQ: Irq = Irq(5);

/// One line of the address map.
pub struct Place {
    pub name: &'static str,
    pub ports: Range<u16>,
    pub irq: Option<Irq>,
}

const fn place(name: &'static str, start: u16, len: u16, irq: Option<Irq>) -> Place {
    Place {
        name,
        ports: start..start + len,
        irq,
    }
}

/// All I/O ports that sarang answers itself. KVM answers those of the PICs (0x20, 0xa0, 0x4d0) and of the timer
/// (0x40, 0x61).
pub const ADDRESS_MAP: &[Place] = &[
    place("I8042", I8042_DATA, 1, None),
    place("I8042", I8042_COMMAND, 1, None),
    place("RTC", RTC, 2, None),
    place("EXIT", EXIT, 1, None),
    place("COM1", COM1, uart::PORTS, Some(COM1_IRQ)),
    place("PVPANIC", PVPANIC, 1, None),
    place("PM", PM, pm::PORTS, Some(PM_IRQ)),
];

/// Where the windows of the virtio devices begin, one after the other.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// How many virtio devices a machine can have.
pub const VIRTIO_MAX: usize = 32;
/// The interrupts of the virtio devices: what the devices above leave free of the IOAPIC's 24 inputs, those without a
/// past on the PC first. More devices than these share them.
const VIRTIO_IRQS: [Irq; 16] = [
    Irq(16),
    Irq(17),
    Irq(18),
    Irq(19),
    Irq(20),
    Irq(21),
    Irq(22),
    Irq(23),
    Irq(10),
    Irq(11),
    Irq(12),
    Irq(14),
    Irq(15),
    Irq(6),
    Irq(7),
    Irq(3),
];

/// The devices of one machine, and the map by which the bus finds them.
pub struct Board {
    pub io: AddressMap,
    pub mmio: AddressMap,
    pub com1: Arc<Uart>,
    pub power: Arc<PowerManagement>,
    /// The virtio devices, in the order of their windows.
    pub virtio: Vec<Arc<MmioTransport>>,
    rtc: Arc<Rtc>,
    pvpanic: Arc<PvPanic>,
}

/// Why a machine cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Hypervisor(#[from] hv::Error),
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error("cannot make a virtio device: {0}")]
    Virtio(io::Error),
    #[error("a machine can have at most {VIRTIO_MAX} virtio devices, not {0}")]
    TooMany(usize),
    #[error("cannot describe the machine to the guest: {0}")]
    Firmware(#[from] firmware::Error),
}

impl Board {
    /// Puts the devices of a machine in their places, with COM1 connected to two byte queues.
    ///
    /// # Errors
    /// When the hypervisor gives no interrupt line, or there are too many devices.
    pub fn new(
        vm: &Arc<dyn hv::Vm>,
        ram: &GuestRam,
        (output, input): (Arc<ByteQueue>, Arc<ByteQueue>),
        devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Board, Error> {
        let line = |irq| -> Result<Arc<dyn IrqLine>, hv::Error> {
            Ok(Arc::new(IrqfdLine::new(&**vm, irq)?))
        };
        let com1 = Arc::new(Uart::new(
            "COM1",
            COM1,
            COM1_IRQ,
            line(COM1_IRQ)?,
            output,
            input,
        ));
        let power = Arc::new(PowerManagement::new(PM, PM_IRQ, line(PM_IRQ)?));
        let rtc = Arc::new(Rtc::new(RTC, Arc::new(host_clock)));
        let pvpanic = Arc::new(PvPanic::new(PVPANIC));
        let mut io = AddressMap::new();
        for place in ADDRESS_MAP {
            let device: Arc<dyn Device> = match place.ports.start {
                COM1 => Arc::clone(&com1) as Arc<dyn Device>,
                PM => Arc::clone(&power) as Arc<dyn Device>,
                RTC => Arc::clone(&rtc) as Arc<dyn Device>,
                PVPANIC => Arc::clone(&pvpanic) as Arc<dyn Device>,
                I8042_DATA => Arc::new(I8042::new(Port::Data)),
                I8042_COMMAND => Arc::new(I8042::new(Port::Command)),
                _ => Arc::new(ExitPort::new()),
            };
            io.insert(place.ports.start.into(), place.ports.len() as u64, device)?;
        }
        if devices.len() > VIRTIO_MAX {
            return Err(Error::TooMany(devices.len()));
        }
        let (mut map, mut virtio) = (AddressMap::new(), Vec::new());
        for ((index, device), irq) in (0..).zip(devices).zip(VIRTIO_IRQS.into_iter().cycle()) {
            let base = VIRTIO_BASE + u64::from(index) * mmio::WINDOW;
            let transport = MmioTransport::new(
                Arc::clone(vm),
                ram.clone(),
                device,
                (index, base),
                (irq, line(irq)?),
            )
            .map_err(Error::Virtio)?;
            let transport = Arc::new(transport);
            map.insert(
                base,
                mmio::WINDOW,
                Arc::clone(&transport) as Arc<dyn Device>,
            )?;
            virtio.push(transport);
        }
        Ok(Board {
            io,
            mmio: map,
            com1,
            power,
            virtio,
            rtc,
            pvpanic,
        })
    }

    /// The ACPI tables for `cpus` processors, as they lie at [`layout::ACPI_TABLES`].
    ///
    /// # Errors
    /// When the tables do not fit there.
    pub fn acpi_tables(&self, cpus: u32) -> Result<Vec<u8>, Error> {
        let mut devices: Vec<&dyn Aml> =
            vec![&*self.com1, &*self.rtc, &*self.power, &*self.pvpanic];
        devices.extend(self.virtio.iter().map(|transport| &**transport as &dyn Aml));
        let description = firmware::Description {
            cpus,
            devices: &devices,
            sleep_control: PM + pm::SLEEP_CONTROL,
            sleep_status: PM + pm::SLEEP_STATUS,
            reset: PM + pm::RESET,
            reset_value: pm::RESET_VALUE,
            io_apic: layout::IOAPIC as u32,
            local_apic: layout::LOCAL_APIC as u32,
        };
        Ok(firmware::tables(layout::ACPI_TABLES.start, &description)?)
    }
}

/// Time since 1970, UTC.
fn host_clock() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}
