//! What happens when a thread makes a system call its filter forbids.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

/// Exit status of the process after a violation; Firecracker's for the same.
pub const EXIT_VIOLATION: libc::c_int = 148;

/// Where else than to standard error a violation is reported; none if negative.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// Has violations written to `log` too. To be called again with what replaces it.
pub fn report_to(log: RawFd) {
    REPORT.store(log, Ordering::Relaxed);
}

/// Installs the handler of SIGSYS, which says on standard error what was forbidden and ends the process.
/// The line is no ordinary log line: in a signal handler nothing may be locked or allocated.
pub fn install_handler() -> io::Result<()> {
    // SAFETY: all zeroes are a valid value; the handler only does what a signal handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `si_code` of a violation, from asm-generic/siginfo.h.
const SYS_SECCOMP: libc::c_int = 1;

extern "C" fn handle(_: libc::c_int, information: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers to both.
    let (information, context) = unsafe { (&*information, &*context.cast::<libc::ucontext_t>()) };
    let mut line = Line { text: [0; 160], len: 0 };
    if information.si_code == SYS_SECCOMP {
        line.push(b"seccomp: forbidden system call ");
        // SAFETY: this code says that the number is there.
        line.push_number(unsafe { information.si_syscall() }.unsigned_abs().into());
        // The calling convention's registers of the first three arguments tell most calls apart.
        for register in [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX] {
            let value = context.uc_mcontext.gregs.get(register as usize);
            line.push(if register == libc::REG_RDI { b" (" } else { b", " });
            line.push_hex(value.copied().unwrap_or_default() as u64);
        }
        // SAFETY: has no preconditions, and the filters allow it.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) };
        line.push(b") in thread ");
        line.push_number(thread.unsigned_abs());
        line.push(b": ending\n");
    } else {
        line.push(b"SIGSYS from outside: ending\n");
    }
    // SAFETY: the buffer is as long as said; the process ends without running anything else.
    unsafe {
        for fd in [libc::STDERR_FILENO, REPORT.load(Ordering::Relaxed)] {
            libc::write(fd, line.text.as_ptr().cast(), line.len);
        }
        libc::_exit(EXIT_VIOLATION)
    }
}

/// Text put together without allocating. What does not fit is left out.
struct Line {
    text: [u8; 160],
    len: usize,
}

impl Line {
    fn push(&mut self, more: &[u8]) {
        for (place, byte) in self.text.iter_mut().skip(self.len).zip(more) {
            *place = *byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u64) {
        self.push_digits(number, 10);
    }

    fn push_hex(&mut self, number: u64) {
        self.push(b"0x");
        self.push_digits(number, 16);
    }

    fn push_digits(&mut self, mut number: u64, base: u64) {
        let mut digits = [0_u8; 20];
        let mut first = digits.len();
        for digit in digits.iter_mut().rev() {
            *digit = b"0123456789abcdef".get((number % base) as usize).copied().unwrap_or(b'?');
            first -= 1;
            number /= base;
            if number == 0 {
                break;
            }
        }
        self.push(digits.get(first..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::Line;

    #[test]
    fn numbers_are_written_and_cut() {
        let mut line = Line { text: [0; 160], len: 0 };
        line.push_number(0);
        line.push(b" ");
        line.push_number(u64::MAX);
        line.push(b" ");
        line.push_hex(0xae80);
        assert_eq!(&line.text[..line.len], b"0 18446744073709551615 0xae80");
        line.push(&[b'x'; 200]);
        assert_eq!(line.len, 160);
    }
}
