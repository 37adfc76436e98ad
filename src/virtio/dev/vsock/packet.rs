//! The header of a packet (virtio 1.3 §5.10.6, `struct virtio_vsock_hdr`).
//!
//! Every packet begins with one, in both directions. Most are nothing else; only those with the operation RW have data
//! behind it. Both sides of a connection are named in each: the CID says which machine, the port which socket there.

/// Bytes of a header.
pub(super) const HEADER_LEN: u32 = 44;

/// The host's CID (§5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the one type without SEQPACKET (§5.10.6.4).
pub(super) const TYPE_STREAM: u16 = 1;

// Operations (§5.10.6).
/// `VIRTIO_VSOCK_OP_REQUEST`: connect.
pub(super) const OP_REQUEST: u16 = 1;
/// `VIRTIO_VSOCK_OP_RESPONSE`: connected.
pub(super) const OP_RESPONSE: u16 = 2;
/// `VIRTIO_VSOCK_OP_RST`: refused, or at an end.
pub(super) const OP_RST: u16 = 3;
/// `VIRTIO_VSOCK_OP_SHUTDOWN`: the sender will not receive, or not send, any more.
pub(super) const OP_SHUTDOWN: u16 = 4;
/// `VIRTIO_VSOCK_OP_RW`: data.
pub(super) const OP_RW: u16 = 5;
/// `VIRTIO_VSOCK_OP_CREDIT_UPDATE`: nothing but `buf_alloc` and `fwd_cnt`, which every packet of a connection has.
pub(super) const OP_CREDIT_UPDATE: u16 = 6;
/// `VIRTIO_VSOCK_OP_CREDIT_REQUEST`: the receiver shall send a CREDIT_UPDATE.
pub(super) const OP_CREDIT_REQUEST: u16 = 7;

// Flags of SHUTDOWN (§5.10.6.5).
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`
pub(super) const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`
pub(super) const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A packet's header, field by field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes of data that the sender can keep for this connection until they are used.
    pub buf_alloc: u32,
    /// Bytes of data of this connection that the sender has used so far, counted modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_LEN as usize]) -> Header {
        let mut rest: &[u8] = bytes;
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN as usize);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        for word in [self.src_port, self.dst_port, self.len] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    /// The RST that answers this packet, unless it is one itself: then there is no answer, or two sides that know
    /// nothing of each other would never be done.
    pub fn reset(&self) -> Option<Header> {
        (self.op != OP_RST).then_some(Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: OP_RST,
            ..Header::default()
        })
    }
}

/// The next field. The header has exactly the bytes of its fields, so none is short.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((field, after)) = rest.split_first_chunk() else {
        return [0; N];
    };
    *rest = after;
    *field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_lies_where_the_specification_has_it() {
        let bytes: [u8; 44] = std::array::from_fn(|index| index as u8 + 1);
        let header = Header::parse(&bytes);
        let expected = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        assert_eq!(header, expected);
        assert_eq!(header.bytes(), bytes);
    }

    #[test]
    fn a_reset_goes_back_where_the_packet_came_from_and_is_not_answered() {
        let packet = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 1000,
            dst_port: 52,
            len: 9,
            kind: 2,
            op: OP_RW,
            ..Header::default()
        };
        let reset = packet.reset().unwrap();
        let expected = Header {
            src_cid: 2,
            dst_cid: 3,
            src_port: 52,
            dst_port: 1000,
            kind: 2,
            op: OP_RST,
            ..Header::default()
        };
        assert_eq!(reset, expected);
        assert_eq!(reset.reset(), None);
    }
}
