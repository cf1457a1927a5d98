//! The header every packet on a vsock queue starts with (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub const HEADER_SIZE: usize = 44;
/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// Socket type: stream, the only one there is here.
pub const TYPE_STREAM: u16 = 1;

/// `flags` of [`op::SHUTDOWN`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `flags` of [`op::SHUTDOWN`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Operations.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends one at once.
    pub const RST: u16 = 3;
    /// Ends one or both directions.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells the sender's credit.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the receiver's credit.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header, in the order of its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's context identifier.
    pub src_cid: u64,
    /// Receiver's context identifier.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type.
    pub type_: u16,
    /// Operation, see [`op`].
    pub op: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// Bytes the sender's receive buffer holds at most.
    pub buf_alloc: u32,
    /// Bytes, modulo 2^32, that left the sender's receive buffer so far.
    pub fwd_cnt: u32,
}

impl Header {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.type_.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// From memory; any bytes make a header.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            type_: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes: [u8; HEADER_SIZE] = std::array::from_fn(|i| i as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(header.src_port, 0x1312_1110);
        assert_eq!((header.type_, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.to_bytes(), bytes);
    }
}
