//! Where virtio devices sit: a row of windows in the hole below 4 GiB, and the interrupts that a PC has to spare.

use crate::irq::Irq;
use crate::virtio::transport::mmio::{Place, WINDOW};

/// The first window; the others follow it without a gap.
pub const FIRST: u32 = 0xd000_0000;
/// How many devices a machine can have.
pub const MOST: usize = 32;

/// IOAPIC inputs (of 24) in the order in which they are given out. The others are those of the timer (0), the keyboard
/// (1), the second PIC (2), COM1 (4), power events (5), the clock (8) and ACPI (9).
pub const IRQS: [u32; 17] = [
    10, 11, 12, 6, 7, 3, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];

/// The places of `count` devices. When there are more devices than interrupts, some share one.
pub fn places(count: usize) -> impl Iterator<Item = Place> {
    let irqs = IRQS.iter().cycle().enumerate();
    (0..=u8::MAX)
        .zip(irqs)
        .take(count)
        .map(move |(number, (index, irq))| Place {
            number,
            address: FIRST + u32::from(number) * WINDOW,
            irq: Irq(*irq),
            shared: index >= IRQS.len() || index + IRQS.len() < count,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout;

    #[test]
    fn every_device_has_its_own_window_inside_the_hole() {
        let places: Vec<Place> = places(MOST).collect();
        assert_eq!(places.len(), MOST);
        assert!(
            places
                .windows(2)
                .all(|pair| pair[0].address + WINDOW == pair[1].address)
        );
        let last = u64::from(places[MOST - 1].address);
        assert!(layout::HOLE.contains(&FIRST.into()) && last < layout::IOAPIC);
    }

    #[test]
    fn an_interrupt_is_called_shared_when_two_devices_have_it() {
        for count in [1, IRQS.len(), IRQS.len() + 3, MOST] {
            let places: Vec<Place> = places(count).collect();
            for place in &places {
                let users = places.iter().filter(|other| other.irq == place.irq);
                assert_eq!(place.shared, users.count() > 1, "{place:?} of {count}");
                assert!(![0, 1, 2, 4, 5, 8, 9].contains(&place.irq.0) && place.irq.0 < 24);
            }
        }
    }
}
