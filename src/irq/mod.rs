//! Interrupt lines from devices to the guest's interrupt controllers.
//!
//! A device on a PC pulls a wire; the IOAPIC turns the wire into a message to a local APIC (SDM Vol.
//! 3A, chapter 11; 82093AA datasheet). KVM emulates both APICs, and lends us the wire as an *irqfd*:
//! an eventfd whose every write is one edge on one GSI, with no ioctl and no lock of ours on the way.

use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::hv;

/// A Global System Interrupt number: the index of an IOAPIC input, 0 to 23 (ACPI 6.5 §5.2.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Irq(pub u32);

/// An edge-triggered interrupt line.
pub trait IrqLine: Send + Sync {
    /// Raises one edge. Cheap, never blocks, callable from any thread.
    fn trigger(&self);
}

/// A line that ends in KVM's IOAPIC.
pub struct IrqfdLine {
    event: EventFd,
}

impl IrqfdLine {
    /// Wires a new line to `irq` of `vm`.
    ///
    /// # Errors
    /// When the host has no eventfd left, or KVM refuses the number.
    pub fn new(vm: &dyn hv::Vm, irq: Irq) -> Result<IrqfdLine, hv::Error> {
        let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)
            .map_err(|error| hv::Error::new("make an eventfd for an interrupt line", error))?;
        vm.register_irqfd(&event, irq.0)?;
        Ok(IrqfdLine { event })
    }
}

impl IrqLine for IrqfdLine {
    fn trigger(&self) {
        // The write fails only when 2^64 - 2 edges wait to be seen, and then one waits already.
        let _ = self.event.write(1);
    }
}

/// A line that ends in a counter, for tests of devices.
#[derive(Default)]
pub struct CountingLine {
    edges: AtomicU64,
}

impl CountingLine {
    /// How many edges there have been.
    pub fn edges(&self) -> u64 {
        self.edges.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountingLine {
    fn trigger(&self) {
        self.edges.fetch_add(1, Ordering::SeqCst);
    }
}
