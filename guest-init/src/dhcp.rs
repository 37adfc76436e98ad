//! A DHCP client's packets (RFC 2131, options of RFC 2132), with the IPv4 and UDP headers around them.
//!
//! DISCOVER goes to everybody, a server answers with an OFFER, REQUEST takes it, ACK confirms. The lease is not renewed:
//! a guest of a command is gone before it runs out.

use std::net::Ipv4Addr;

const BOOTREQUEST: u8 = 1;
const BOOTREPLY: u8 = 2;
const ETHERNET: u8 = 1;
/// "The client cannot receive unicast datagrams before it has an address" (RFC 2131 §2).
const BROADCAST: u16 = 0x8000;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;
/// Fixed part of a message: up to the magic number.
const FIXED: usize = 236;

/// Options.
const PAD: u8 = 0;
const SUBNET_MASK: u8 = 1;
const ROUTER: u8 = 3;
const DNS: u8 = 6;
const MTU: u8 = 26;
const REQUESTED_ADDRESS: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER: u8 = 54;
const PARAMETERS: u8 = 55;
const END: u8 = 255;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// What a server gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub router: Option<Ipv4Addr>,
    pub dns: Vec<Ipv4Addr>,
    pub mtu: Option<u16>,
    server: Option<Ipv4Addr>,
}

/// An answer to this client.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Offer(Lease),
    Acknowledged(Lease),
    Refused,
}

/// One conversation.
pub struct Client {
    pub transaction: u32,
    pub mac: [u8; 6],
}

impl Client {
    /// The packet that asks for offers.
    pub fn discover(&self) -> Vec<u8> {
        self.packet(&[MESSAGE_TYPE, 1, DISCOVER])
    }

    /// The packet that takes `offer`.
    pub fn request(&self, offer: &Lease) -> Vec<u8> {
        let mut options = vec![MESSAGE_TYPE, 1, REQUEST, REQUESTED_ADDRESS, 4];
        options.extend(offer.address.octets());
        if let Some(server) = offer.server {
            options.extend([SERVER, 4]);
            options.extend(server.octets());
        }
        self.packet(&options)
    }

    fn packet(&self, options: &[u8]) -> Vec<u8> {
        let mut message = vec![BOOTREQUEST, ETHERNET, self.mac.len() as u8, 0];
        message.extend(self.transaction.to_be_bytes());
        message.extend([0, 0]);
        message.extend(BROADCAST.to_be_bytes());
        message.extend([0; 16]);
        message.extend(self.mac);
        message.resize(FIXED, 0);
        message.extend(MAGIC);
        message.extend(options);
        message.extend([PARAMETERS, 4, SUBNET_MASK, ROUTER, DNS, MTU, END]);
        // Some servers insist on the length that BOOTP had.
        message.resize(message.len().max(300), 0);

        let len = message.len() as u16;
        let mut packet = vec![0x45, 0];
        packet.extend((len + 28).to_be_bytes());
        // No identification, no fragments, 64 hops, UDP, the checksum, 0.0.0.0 to 255.255.255.255.
        packet.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
        let sum = checksum(&packet).to_be_bytes();
        packet.splice(10..12, sum);
        for number in [CLIENT_PORT, SERVER_PORT, len + 8, 0] {
            packet.extend(number.to_be_bytes());
        }
        packet.extend(message);
        packet
    }

    /// What `packet`, an IPv4 packet of any kind, says to this client. Its checksums are not looked at: a virtual network
    /// leaves them to hardware that it does not have.
    pub fn read(&self, packet: &[u8]) -> Option<Answer> {
        let header = usize::from(packet.first()? & 15) * 4;
        if packet.first()? >> 4 != 4 || *packet.get(9)? != 17 {
            return None;
        }
        let udp = packet.get(header..)?;
        if udp.get(2..4)? != CLIENT_PORT.to_be_bytes() {
            return None;
        }
        let message = udp.get(8..)?;
        let ours = *message.first()? == BOOTREPLY
            && message.get(4..8)? == self.transaction.to_be_bytes()
            && message.get(28..34)? == self.mac
            && message.get(FIXED..FIXED + 4)? == MAGIC;
        if !ours {
            return None;
        }
        let mut lease = Lease {
            address: address(message.get(16..)?)?,
            prefix: 24,
            router: None,
            dns: Vec::new(),
            mtu: None,
            server: None,
        };
        let mut kind = 0;
        let mut options = message.get(FIXED + 4..)?;
        while let Some((option, rest)) = options.split_first() {
            options = rest;
            if *option == PAD {
                continue;
            }
            if *option == END {
                break;
            }
            let (len, rest) = options.split_first()?;
            let (value, rest) = rest.split_at_checked(usize::from(*len))?;
            options = rest;
            match *option {
                MESSAGE_TYPE => kind = *value.first()?,
                SUBNET_MASK => lease.prefix = address(value)?.to_bits().leading_ones() as u8,
                ROUTER => lease.router = address(value),
                DNS => lease.dns = value.chunks_exact(4).filter_map(address).collect(),
                MTU => lease.mtu = value.first_chunk().map(|bytes| u16::from_be_bytes(*bytes)),
                SERVER => lease.server = address(value),
                _ => {}
            }
        }
        match kind {
            OFFER => Some(Answer::Offer(lease)),
            ACK => Some(Answer::Acknowledged(lease)),
            6 => Some(Answer::Refused),
            _ => None,
        }
    }
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes))
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: Client = Client {
        transaction: 0x1234_5678,
        mac: [2, 0, 0, 0, 0, 7],
    };

    /// A server's answer of `kind`, made from the client's own packet.
    fn answer(kind: u8, options: &[u8]) -> Vec<u8> {
        let mut packet = CLIENT.discover();
        packet.truncate(28 + FIXED + 4);
        packet[22..24].copy_from_slice(&CLIENT_PORT.to_be_bytes());
        packet[28] = BOOTREPLY;
        packet[28 + 16..28 + 20].copy_from_slice(&[10, 0, 2, 15]);
        packet.extend([PAD, MESSAGE_TYPE, 1, kind]);
        packet.extend(options);
        packet.push(END);
        packet
    }

    #[test]
    fn an_offer_is_taken_as_it_was_made() {
        let options = [
            1, 4, 255, 255, 240, 0, 3, 4, 10, 0, 2, 2, 6, 8, 10, 0, 2, 3, 1, 1, 1, 1, 26, 2, 0xff,
            0xdc, 54, 4, 10, 0, 2, 1, 99, 1, 0,
        ];
        let lease = Lease {
            address: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 20,
            router: Some(Ipv4Addr::new(10, 0, 2, 2)),
            dns: vec![Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(1, 1, 1, 1)],
            mtu: Some(65500),
            server: Some(Ipv4Addr::new(10, 0, 2, 1)),
        };
        let offer = answer(OFFER, &options);
        assert_eq!(CLIENT.read(&offer), Some(Answer::Offer(lease.clone())));
        let ack = answer(ACK, &options);
        assert_eq!(CLIENT.read(&ack), Some(Answer::Acknowledged(lease.clone())));
        assert_eq!(CLIENT.read(&answer(6, &[])), Some(Answer::Refused));
        let request = CLIENT.request(&lease);
        let asked = [
            MESSAGE_TYPE,
            1,
            REQUEST,
            50,
            4,
            10,
            0,
            2,
            15,
            54,
            4,
            10,
            0,
            2,
            1,
        ];
        assert!(request.windows(asked.len()).any(|window| window == asked));
    }

    #[test]
    fn packets_of_others_and_cut_packets_are_passed_over() {
        let offer = answer(OFFER, &[1, 4, 255, 255, 255, 0]);
        assert_eq!(CLIENT.read(&CLIENT.discover()), None, "its own");
        for at in [0, 9, 23, 28, 32, 56, 28 + FIXED] {
            let mut packet = offer.clone();
            packet[at] ^= 0x40;
            assert_eq!(CLIENT.read(&packet), None, "byte {at}");
        }
        for len in 0..offer.len() - 8 {
            let _ = CLIENT.read(&offer[..len]);
        }
        assert_eq!(CLIENT.read(&answer(OFFER, &[6, 200, 1])), None);
    }

    #[test]
    fn a_header_with_its_checksum_sums_up_to_zero() {
        assert_eq!(checksum(&CLIENT.discover()[..20]), 0);
    }
}
