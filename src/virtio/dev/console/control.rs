//! The control messages (virtio 1.3 §5.3.6.2): which ports there are, and which of them are open on either side.
//!
//! | event | from | says |
//! | --- | --- | --- |
//! | DEVICE_READY | driver | tell me of your ports |
//! | DEVICE_ADD | device | there is a port |
//! | PORT_READY | driver | I have set the port up |
//! | CONSOLE_PORT | device | the port is a console |
//! | RESIZE | device | the console's terminal has this size |
//! | PORT_NAME | device | the port is called so |
//! | PORT_OPEN | both | my side is open, or closed |
//!
//! A driver that gives no buffers for messages, or sends a million, must not make a list of them grow. So there is no
//! list: for each port there is what the driver *has been told* and what *is*, and a message is made of the difference
//! when a buffer for it comes.

use serde::{Deserialize, Serialize};

use crate::backend::port::Size;

pub(super) const DEVICE_READY: u16 = 0;
pub(super) const DEVICE_ADD: u16 = 1;
pub(super) const PORT_READY: u16 = 3;
pub(super) const CONSOLE_PORT: u16 = 4;
pub(super) const RESIZE: u16 = 5;
pub(super) const PORT_OPEN: u16 = 6;
pub(super) const PORT_NAME: u16 = 7;

/// Bytes of a message without what may follow it: `id`, `event`, `value`.
pub(super) const MESSAGE: usize = 8;

/// A control message from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) fn parse(bytes: [u8; MESSAGE]) -> Message {
        let [a, b, c, d, event @ .., e, f] = bytes;
        Message {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes(event),
            value: u16::from_le_bytes([e, f]),
        }
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

/// What a port is, as things stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    /// The name of a generic port; a console has none.
    pub(super) name: Option<&'a str>,
    pub(super) size: Size,
    /// The host's side is open.
    pub(super) open: bool,
}

/// How far a port has come with its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    /// The driver has not asked for ports yet.
    #[default]
    Unknown,
    /// The driver is to be told of it.
    Asked,
    /// The driver has been told of it.
    Added,
    /// The driver has set it up.
    Ready,
    /// The driver could not set it up.
    Refused,
}

/// What the driver of a device knows of one port, and what it has said about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortControl {
    stage: Stage,
    /// CONSOLE_PORT or PORT_NAME has been sent.
    introduced: bool,
    /// As the last RESIZE said.
    size: Size,
    /// As the last PORT_OPEN to the driver said.
    host_open: bool,
    /// As the last PORT_OPEN from the driver said.
    guest_open: bool,
}

impl PortControl {
    /// Whether the driver has opened the port.
    pub(super) fn is_guest_open(&self) -> bool {
        self.guest_open
    }

    /// Whether the driver believes that the host's side is open.
    pub(super) fn believes_host_open(&self) -> bool {
        self.host_open
    }

    /// The driver asks for ports. One that it knows is not added again.
    pub(super) fn device_ready(&mut self) {
        if self.stage == Stage::Unknown {
            self.stage = Stage::Asked;
        }
    }

    /// The driver says something about this port. What is out of place is ignored: a driver that wakes from
    /// hibernation, for one, says PORT_READY for ports that it remembers, and it is right.
    pub(super) fn hear(&mut self, message: Message) {
        match (message.event, self.stage) {
            (PORT_READY, Stage::Ready) => {}
            (PORT_READY, _) => {
                let stage = match message.value {
                    0 => Stage::Refused,
                    _ => Stage::Ready,
                };
                *self = PortControl {
                    stage,
                    ..PortControl::default()
                };
            }
            (PORT_OPEN, Stage::Ready) => self.guest_open = message.value != 0,
            _ => {}
        }
    }

    /// The next message that the driver should get, which counts as told when `told` is called with its event.
    pub(super) fn owed(&self, id: u32, facts: Facts<'_>) -> Option<(u16, Vec<u8>)> {
        let message = |event, value| Message { id, event, value }.bytes();
        match self.stage {
            Stage::Asked => return Some((DEVICE_ADD, message(DEVICE_ADD, 0))),
            Stage::Ready => {}
            _ => return None,
        }
        match facts.name {
            None if !self.introduced => Some((CONSOLE_PORT, message(CONSOLE_PORT, 1))),
            None if self.size != facts.size => {
                let mut bytes = message(RESIZE, 0);
                bytes.extend(facts.size.columns.to_le_bytes());
                bytes.extend(facts.size.rows.to_le_bytes());
                Some((RESIZE, bytes))
            }
            Some(name) if !self.introduced => {
                let mut bytes = message(PORT_NAME, 1);
                bytes.extend(name.bytes());
                Some((PORT_NAME, bytes))
            }
            _ if self.host_open != facts.open => {
                Some((PORT_OPEN, message(PORT_OPEN, facts.open.into())))
            }
            _ => None,
        }
    }

    /// The driver has got the message that [`PortControl::owed`] gave for the same facts.
    pub(super) fn told(&mut self, event: u16, facts: Facts<'_>) {
        match event {
            DEVICE_ADD => self.stage = Stage::Added,
            CONSOLE_PORT | PORT_NAME => self.introduced = true,
            RESIZE => self.size = facts.size,
            PORT_OPEN => self.host_open = facts.open,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOSED: Facts<'static> = Facts {
        name: Some("agent"),
        size: Size {
            columns: 0,
            rows: 0,
        },
        open: false,
    };
    const OPEN: Facts<'static> = Facts {
        open: true,
        ..CLOSED
    };

    /// All that the driver is owed, in order, as event and last two bytes.
    fn tell(port: &mut PortControl, facts: Facts<'_>) -> Vec<(u16, u16)> {
        let mut told = Vec::new();
        while let Some((event, bytes)) = port.owed(7, facts) {
            let message = Message::parse(bytes[..MESSAGE].try_into().unwrap());
            assert_eq!((message.id, message.event), (7, event));
            told.push((event, message.value));
            port.told(event, facts);
        }
        told
    }

    fn hear(port: &mut PortControl, event: u16, value: u16) {
        port.hear(Message {
            id: 7,
            event,
            value,
        });
    }

    #[test]
    fn a_port_is_added_named_and_opened_in_this_order_and_each_once() {
        let mut port = PortControl::default();
        assert_eq!(tell(&mut port, OPEN), []);
        port.device_ready();
        assert_eq!(tell(&mut port, OPEN), [(DEVICE_ADD, 0)]);
        port.device_ready();
        assert_eq!(tell(&mut port, OPEN), []);
        hear(&mut port, PORT_READY, 1);
        let expected = [(PORT_NAME, 1), (PORT_OPEN, 1)];
        assert_eq!(tell(&mut port, OPEN), expected);
        hear(&mut port, PORT_READY, 1);
        assert_eq!(tell(&mut port, OPEN), []);
        assert_eq!(tell(&mut port, CLOSED), [(PORT_OPEN, 0)]);
    }

    #[test]
    fn a_console_is_told_its_size_when_it_is_a_console_and_when_it_changes() {
        let facts = |columns| Facts {
            name: None,
            size: Size { columns, rows: 24 },
            open: true,
        };
        let mut port = PortControl::default();
        port.device_ready();
        tell(&mut port, facts(80));
        hear(&mut port, PORT_READY, 1);
        let (event, _) = port.owed(7, facts(80)).unwrap();
        assert_eq!(event, CONSOLE_PORT);
        port.told(event, facts(80));
        let (_, bytes) = port.owed(7, facts(80)).unwrap();
        assert_eq!(bytes, [7, 0, 0, 0, 5, 0, 0, 0, 80, 0, 24, 0]);
        assert_eq!(tell(&mut port, facts(81)), [(RESIZE, 0), (PORT_OPEN, 1)]);
        assert_eq!(tell(&mut port, facts(132)), [(RESIZE, 0)]);
    }

    #[test]
    fn a_driver_that_opens_and_closes_for_ever_leaves_nothing_behind() {
        let mut port = PortControl::default();
        port.device_ready();
        hear(&mut port, PORT_READY, 1);
        let before = port.clone();
        for count in 0..1_000_000_u32 {
            hear(&mut port, PORT_OPEN, (count % 2 == 0).into());
        }
        assert_eq!(port, before);
        for open in [true, false, true, false] {
            port.owed(7, if open { OPEN } else { CLOSED });
        }
        assert_eq!(tell(&mut port, CLOSED), [(PORT_NAME, 1)]);
    }

    #[test]
    fn what_is_out_of_place_is_ignored() {
        let mut port = PortControl::default();
        for event in 0..=u16::MAX {
            if event != PORT_READY {
                hear(&mut port, event, 1);
            }
        }
        assert_eq!(port, PortControl::default(), "the port is not there yet");
        hear(&mut port, PORT_READY, 0);
        hear(&mut port, PORT_OPEN, 1);
        assert!(!port.is_guest_open(), "the driver has refused it");
        assert_eq!(tell(&mut port, OPEN), []);
    }

    #[test]
    fn a_driver_that_remembers_its_ports_need_not_ask_for_them() {
        let mut port = PortControl::default();
        hear(&mut port, PORT_READY, 1);
        hear(&mut port, PORT_OPEN, 1);
        assert!(port.is_guest_open());
        assert_eq!(tell(&mut port, OPEN), [(PORT_NAME, 1), (PORT_OPEN, 1)]);
    }
}
