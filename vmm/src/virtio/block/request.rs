//! What one descriptor chain asks of the disk (virtio 1.2, section 5.2.6).
//!
//! A chain is 16 bytes of header, the data, and a byte for the status at its very end. How these are spread
//! over descriptors is the driver's choice (2.7.4). Everything is read once and checked here: a [`Request`]
//! lies within the disk and its memory within the guest's.

use virtio_bindings::virtio_blk::*;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::Memory;
use crate::virtio::buffers::{BadChain, GuestBuffers};
use crate::virtio::disk::{Clear, Range, SECTOR};

/// Most descriptors in a request, those of header and status included. The driver is told of two less.
pub const MAX_DESCRIPTORS: usize = 256;
/// Most bytes one request may move, so that none holds up the rest for long. Drivers stay far below.
pub const MAX_DATA: usize = 32 << 20;
/// Most sectors one request may discard or zero; told to the driver.
pub const MAX_CLEAR_SECTORS: u32 = (1 << 30) / SECTOR as u32;
/// A flush, or freeing a range, may take as long as moving this many bytes, and more.
const CONTROL_COST: u64 = 1 << 20;
/// Bytes of a serial number.
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The chain is no request: there is nowhere to put a status, or it is not the guest's memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken;

impl From<BadChain> for Broken {
    fn from(_: BadChain) -> Self {
        Self
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    GetId,
    Clear(Range, Clear),
    /// Nothing that can be done; the status to answer with.
    Refuse(u8),
}

/// A checked request.
pub struct Request {
    /// Names the chain in the used ring.
    pub head: u16,
    /// What to do.
    pub operation: Operation,
    /// Where on the disk, in bytes, for reads and writes.
    pub offset: u64,
    /// The data.
    pub data: GuestBuffers,
    /// How much of the data the device writes.
    data_in: u32,
    /// Where the status goes.
    status: GuestAddress,
}

/// What the device is, as far as requests depend on it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Accepted features.
    pub features: u64,
    /// Whether writing is refused.
    pub read_only: bool,
}

impl Limits {
    fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }
}

/// The layout of a chain: header, ranges, status.
struct Layout {
    header: [u8; 16],
    header_len: usize,
    data_out: usize,
    data_in: usize,
    /// The last writable descriptor seen, whose last byte is the status unless another follows.
    last_in: Option<(GuestAddress, u32)>,
}

impl Layout {
    fn read(
        memory: &Memory,
        chain: DescriptorChain<&Memory>,
        data: &mut GuestBuffers,
    ) -> Result<Self, Broken> {
        let mut layout = Self { header: [0; 16], header_len: 0, data_out: 0, data_in: 0, last_in: None };
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(Broken);
            }
            // A chain the iterator gave up on (a loop, an index or a table out of bounds) ends in a
            // descriptor that names a next one.
            complete = !descriptor.has_next();
            layout.add(memory, &descriptor, data)?;
        }
        if complete && layout.header_len == layout.header.len() { Ok(layout) } else { Err(Broken) }
    }

    fn add(
        &mut self,
        memory: &Memory,
        descriptor: &Descriptor,
        data: &mut GuestBuffers,
    ) -> Result<(), Broken> {
        let (mut addr, mut len) = (descriptor.addr(), descriptor.len());
        if descriptor.is_write_only() {
            if len != 0
                && let Some(before) = self.last_in.replace((addr, len))
            {
                self.add_in(before, data)?;
            }
            return Ok(());
        }
        if self.last_in.is_some() {
            return Err(Broken);
        }
        let missing = &mut self.header[self.header_len..];
        if !missing.is_empty() {
            let part = missing.len().min(len as usize);
            memory.read_slice(&mut missing[..part], addr).map_err(|_| Broken)?;
            self.header_len += part;
            addr = addr.checked_add(part as u64).ok_or(Broken)?;
            len -= part as u32;
        }
        self.data_out += len as usize;
        Ok(data.push(addr, len)?)
    }

    fn add_in(&mut self, (addr, len): (GuestAddress, u32), data: &mut GuestBuffers) -> Result<(), Broken> {
        self.data_in += len as usize;
        Ok(data.push(addr, len)?)
    }

    /// Takes the last byte for the status and the rest of its descriptor for data.
    fn status(&mut self, memory: &Memory, data: &mut GuestBuffers) -> Result<GuestAddress, Broken> {
        let (addr, len) = self.last_in.take().ok_or(Broken)?;
        let status = addr.checked_add(u64::from(len - 1)).ok_or(Broken)?;
        self.add_in((addr, len - 1), data)?;
        if memory.address_in_range(status) { Ok(status) } else { Err(Broken) }
    }
}

/// `N` bytes at `at`, which the caller knows to be there.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

impl Request {
    /// Reads `chain`; `data` is a list to use again, of the same memory.
    pub fn parse(
        memory: &Memory,
        chain: DescriptorChain<&Memory>,
        mut data: GuestBuffers,
        limits: Limits,
    ) -> Result<Self, Broken> {
        data.clear();
        let head = chain.head_index();
        // Copies two numbers and an address; only discards look at it again.
        let again = chain.clone();
        let mut layout = Layout::read(memory, chain, &mut data)?;
        let status = layout.status(memory, &mut data)?;
        let kind = u32::from_le_bytes(field(&layout.header, 0));
        let sector = u64::from_le_bytes(field(&layout.header, 8));
        let mut offset = 0;
        let operation = match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => match check_data(&layout, sector, limits) {
                Some((operation, at)) => {
                    offset = at;
                    operation
                }
                None => Operation::Refuse(VIRTIO_BLK_S_IOERR as u8),
            },
            VIRTIO_BLK_T_FLUSH if limits.has(VIRTIO_BLK_F_FLUSH) => Operation::Flush,
            VIRTIO_BLK_T_GET_ID if layout.data_in >= SERIAL_LEN => Operation::GetId,
            VIRTIO_BLK_T_GET_ID => Operation::Refuse(VIRTIO_BLK_S_IOERR as u8),
            VIRTIO_BLK_T_DISCARD if limits.has(VIRTIO_BLK_F_DISCARD) => {
                clear(memory, again, &layout, true, limits)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if limits.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                clear(memory, again, &layout, false, limits)
            }
            _ => Operation::Refuse(VIRTIO_BLK_S_UNSUPP as u8),
        };
        // Chains are at most 4 GiB long, and what moves data far less.
        let data_in = u32::try_from(layout.data_in).map_err(|_| Broken)?;
        Ok(Self { head, operation, offset, data, data_in, status })
    }

    /// Bytes this moves between disk and guest.
    pub fn bytes(&self) -> u64 {
        match self.operation {
            Operation::Read | Operation::Write => self.data.len() as u64,
            _ => 0,
        }
    }

    /// What doing this is worth in bytes moved, where a pass of the queue is not to become too long.
    pub fn cost(&self) -> u64 {
        match self.operation {
            Operation::Flush | Operation::Clear(..) => CONTROL_COST,
            _ => self.bytes(),
        }
    }

    /// Answers with `status` and returns how many bytes of the chain have been written, counted from
    /// the first writable one (2.7.8.2).
    pub fn answer(&self, memory: &Memory, status: u8) -> u32 {
        // The address was checked, and guest memory never shrinks.
        let _ = memory.write_obj(status, self.status);
        match (self.operation, self.data_in) {
            (_, 0) => 1,
            (Operation::Read, data) if status == VIRTIO_BLK_S_OK as u8 => data.saturating_add(1),
            (Operation::GetId, _) if status == VIRTIO_BLK_S_OK as u8 => SERIAL_LEN as u32,
            _ => 0,
        }
    }
}

/// A read or write as it should be, and its place in bytes.
fn check_data(layout: &Layout, sector: u64, limits: Limits) -> Option<(Operation, u64)> {
    let write = field(&layout.header, 0) == VIRTIO_BLK_T_OUT.to_le_bytes();
    let (data, none) =
        if write { (layout.data_out, layout.data_in) } else { (layout.data_in, layout.data_out) };
    let len = data as u64;
    let offset = sector.checked_mul(SECTOR)?;
    let fits = offset.checked_add(len)? <= limits.size;
    let whole = data != 0 && len.is_multiple_of(SECTOR) && data <= MAX_DATA;
    let allowed = !(write && limits.read_only);
    let operation = if write { Operation::Write } else { Operation::Read };
    (fits && whole && allowed && none == 0).then_some((operation, offset))
}

/// A discard or a write of zeroes: one range, as the driver was told (5.2.6.1, 5.2.6.2).
fn clear(
    memory: &Memory,
    chain: DescriptorChain<&Memory>,
    layout: &Layout,
    discard: bool,
    limits: Limits,
) -> Operation {
    let error = Operation::Refuse(VIRTIO_BLK_S_IOERR as u8);
    let mut bytes = [0; 32];
    let read = chain.reader(memory).map(|mut r| std::io::Read::read_exact(&mut r, &mut bytes));
    if limits.read_only || layout.data_out != 16 || layout.data_in != 0 || !matches!(read, Ok(Ok(()))) {
        return error;
    }
    let sector = u64::from_le_bytes(field(&bytes, 16));
    let count = u32::from_le_bytes(field(&bytes, 24));
    let how = match (discard, u32::from_le_bytes(field(&bytes, 28))) {
        (true, 0) => Clear::Discard,
        (false, 0) => Clear::ZeroKeep,
        (false, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => Clear::ZeroUnmap,
        _ => return Operation::Refuse(VIRTIO_BLK_S_UNSUPP as u8),
    };
    let Some(offset) = sector.checked_mul(SECTOR) else { return error };
    let len = u64::from(count) * SECTOR;
    let fits = offset.checked_add(len).is_some_and(|end| end <= limits.size);
    if !fits || count == 0 || count > MAX_CLEAR_SECTORS {
        return error;
    }
    Operation::Clear(Range { offset, len }, how)
}
