//! sarang is a Type-2 hypervisor: one userspace process on Linux KVM.
//!
//! It opens `/dev/kvm`, maps guest memory, loads a guest kernel and runs one thread per vCPU. Every
//! guest access that KVM cannot answer by itself comes back as an *exit*; the run loop hands it to
//! the [`bus`], the bus finds the device model that owns the address, and the device reaches the
//! terminal or a file through ordinary system calls of the host kernel.
//!
//! The modules are the rooms of one house, listed here from the street down to the foundation. A
//! room may only use rooms that stand *below* it in this list (`scripts/check-layers` sees to it),
//! so the list can be read from either end: from the bottom it is the hardware, from the top it is
//! what a person types.
//!
//! | room | what lives there |
//! | --- | --- |
//! | [`cli`] | one file a verb, the flags, the words a person reads |
//! | [`vm`] | [`vm::Machine`]: a [`vm::Spec`] in, a typed [`vm::Outcome`] out |
//! | [`cpu`] | vCPU threads, the run loop, the pause barrier |
//! | [`board`] | the x86 machine: address map, interrupt numbers, which device sits where |
//! | [`guest`] | what sarang puts into a guest |
//! | [`loader`] | kernels and initrds into guest memory |
//! | [`firmware`] | the ACPI tables |
//! | [`virtio`] | queues, the transport, and one file a virtio device |
//! | [`device`] | uart, i8042, rtc, power management, panic and exit ports |
//! | [`backend`] | the host's side of a device: the terminal, disk images, the network |
//! | [`worker`] | the event loop that devices run on |
//! | [`bus`] | port-I/O and MMIO dispatch, the [`bus::Device`] trait, the one trace point |
//! | [`irq`] | interrupt lines |
//! | [`mem`] | guest RAM |
//! | [`hv`] | the hypervisor interface: KVM, and a scripted fake for tests |
//! | [`arch`] | pure encodings: registers, CPUID, page tables |
//! | [`trace`] | the event schema and its exporters |

pub mod arch;
pub mod backend;
pub mod board;
pub mod bus;
pub mod cli;
pub mod cpu;
pub mod device;
pub mod firmware;
pub mod guest;
pub mod hv;
pub mod irq;
pub mod loader;
pub mod mem;
pub mod trace;
pub mod virtio;
pub mod vm;
pub mod worker;
