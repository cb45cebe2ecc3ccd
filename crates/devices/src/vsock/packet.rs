//! The header of a packet (VIRTIO 1.2, section 5.10.6).

use virtio::{Chain, GuestFault};

/// The size of a header.
pub(super) const HEADER: usize = 44;
/// The host's address.
pub(super) const HOST: u64 = 2;
/// Stream sockets, the only type here.
pub(super) const STREAM: u16 = 1;

/// What a packet is for (section 5.10.6).
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a SHUTDOWN: its sender will not receive any more.
pub(super) const NO_RECEIVE: u32 = 1;
/// Flags of a SHUTDOWN: its sender will not send any more.
pub(super) const NO_SEND: u32 = 2;
/// Both.
pub(super) const NOTHING: u32 = NO_RECEIVE | NO_SEND;

/// The two ports that name a connection, as the host sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads the header of a packet from the guest, whose payload is all there.
    pub(super) fn read(chain: &Chain) -> Result<Self, GuestFault> {
        let mut raw = [0; HEADER];
        chain.read_at(0, &mut raw)?;
        let header = Self::decode(&raw);
        let payload = chain.readable_len() - HEADER;
        if header.len as usize > payload {
            let len = header.len;
            return Err(GuestFault::new(format!("a packet says that it has {len} bytes, and has {payload}")));
        }
        Ok(header)
    }

    pub(super) fn decode(raw: &[u8; HEADER]) -> Self {
        let number = |at: usize, size: usize| {
            raw[at..at + size].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        #[allow(clippy::cast_possible_truncation, reason = "each field is cut out of its place")]
        Self {
            src_cid: number(0, 8),
            dst_cid: number(8, 8),
            src_port: number(16, 4) as u32,
            dst_port: number(20, 4) as u32,
            len: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            buf_alloc: number(36, 4) as u32,
            fwd_cnt: number(40, 4) as u32,
        }
    }

    /// The header as it lies in memory.
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut raw = [0; HEADER];
        raw[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        raw[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        let words = [self.src_port, self.dst_port, self.len];
        for (at, word) in (16..).step_by(4).zip(words) {
            raw[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        raw[28..30].copy_from_slice(&self.kind.to_le_bytes());
        raw[30..32].copy_from_slice(&self.op.to_le_bytes());
        for (at, word) in (32..).step_by(4).zip([self.flags, self.buf_alloc, self.fwd_cnt]) {
            raw[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let header = Header {
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
        let raw = header.encode();
        assert!(raw.iter().zip(1..).all(|(byte, place)| *byte == place));
        assert_eq!(Header::decode(&raw), header);
    }
}
