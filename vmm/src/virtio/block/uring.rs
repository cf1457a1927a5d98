//! Requests made later, by io_uring: many in flight, submitted with one system call per batch.
//!
//! The ring can do nothing but read, write, sync and punch holes in the one file registered with it: the
//! kernel is told so before the ring is enabled, because what goes through a ring passes by the seccomp
//! filter. Guest memory is not registered as fixed buffers: that would pin all of it, and neither lazy
//! memory nor the balloon would be worth anything.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::request::{Operation, Request};

/// Most requests in flight.
pub const DEPTH: u16 = 128;

/// `IORING_REGISTER_FILES_UPDATE`, the one change allowed once the ring is enabled.
const REGISTER_FILES_UPDATE: u8 = 6;
/// The registered file.
const FILE: Fixed = Fixed(0);

/// A ring and the requests in it.
pub struct Uring {
    ring: IoUring,
    /// The requests in flight; a request's place is its number in the ring.
    slots: Vec<Option<Request>>,
    free: Vec<u16>,
}

impl Uring {
    /// A ring for `file` that signals `wake` at every completion.
    pub fn new(file: RawFd, wake: &EventFd) -> io::Result<Self> {
        // COOP_TASKRUN (Linux 5.19) spares interrupting this process for each completion.
        let ring = match IoUring::builder().setup_r_disabled().setup_coop_taskrun().build(DEPTH.into()) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_r_disabled().build(DEPTH.into())?
            }
            ring => ring?,
        };
        let submitter = ring.submitter();
        submitter.register_files(&[file])?;
        submitter.register_eventfd(wake.as_raw_fd())?;
        let operations = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut restrictions: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, slots: Vec::new(), free: Vec::new() })
    }

    /// Puts `file` in the place of the one before. Nothing may be in flight.
    pub fn replace_file(&mut self, file: RawFd) -> io::Result<()> {
        self.ring.submitter().register_files_update(0, &[file]).map(drop)
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether [`Uring::push`] can take another.
    pub fn has_room(&self) -> bool {
        self.in_flight() < usize::from(DEPTH)
    }

    /// Takes a request, to be submitted with the next batch. Gives it back where there is no room, or
    /// it is not one for the ring.
    pub fn push(&mut self, request: Request) -> Result<(), Request> {
        let Some(entry) = self.has_room().then(|| entry(&request)).flatten() else { return Err(request) };
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                // Below DEPTH, as there is room.
                (self.slots.len() - 1) as u16
            }
        };
        // SAFETY: what the entry points to is the list of pieces, which the kernel copies when the entry is
        // submitted (IORING_FEAT_SUBMIT_STABLE, Linux 5.5) and which stay in their slot until completed,
        // and guest memory, which outlives the request: whoever unmaps it drains the ring first.
        if unsafe { self.ring.submission().push(&entry.user_data(slot.into())) }.is_err() {
            // Not reached: the ring has an entry for every slot.
            self.free.push(slot);
            return Err(request);
        }
        self.slots[usize::from(slot)] = Some(request);
        Ok(())
    }

    /// Hands what was pushed to the kernel. `EAGAIN` and `EBUSY` mean that it should be tried again later.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => drop(result?),
            }
        }
        Ok(())
    }

    /// A completed request with the kernel's answer (bytes, or an error number below zero), if there is
    /// one.
    pub fn reap(&mut self) -> Option<(Request, i32)> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = u16::try_from(entry.user_data()).ok()?;
            if let Some(request) = self.slots.get_mut(usize::from(slot)).and_then(Option::take) {
                self.free.push(slot);
                return Some((request, entry.result()));
            }
        }
    }

    /// Waits until something in flight is completed.
    pub fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
            result => result.map(drop),
        }
    }
}

impl Drop for Uring {
    /// The kernel must not write to guest memory that is there no more.
    fn drop(&mut self) {
        while self.in_flight() > 0 && self.wait().is_ok() {
            while self.reap().is_some() {}
        }
    }
}

fn entry(request: &Request) -> Option<Entry> {
    let pieces = request.data.pieces();
    // At most MAX_DATA bytes and MAX_DESCRIPTORS pieces, far within u32.
    let (count, len) = (pieces.len() as u32, request.data.len() as u32);
    let entry = match (request.operation, pieces) {
        (Operation::Read, [piece]) => {
            opcode::Read::new(FILE, piece.iov_base.cast(), len).offset(request.offset).build()
        }
        (Operation::Write, [piece]) => {
            opcode::Write::new(FILE, piece.iov_base.cast(), len).offset(request.offset).build()
        }
        (Operation::Read, _) => {
            opcode::Readv::new(FILE, pieces.as_ptr(), count).offset(request.offset).build()
        }
        (Operation::Write, _) => {
            opcode::Writev::new(FILE, pieces.as_ptr(), count).offset(request.offset).build()
        }
        (Operation::Flush, _) => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        (Operation::Clear(range, how), _) => {
            opcode::Fallocate::new(FILE, range.len).offset(range.offset).mode(how.mode().bits()).build()
        }
        (Operation::GetId | Operation::Refuse(_), _) => return None,
    };
    Some(entry)
}
