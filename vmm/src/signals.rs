//! Signals: those that ask the process to end, and those that say it cannot go on.
//!
//! The former (SIGTERM, SIGINT, SIGHUP) are blocked in every thread and read from a descriptor by the main
//! loop, which ends in order. At the latter (a system call the filter forbids, a fault) a handler says so
//! on standard error and in the log, puts the terminal right, removes the sockets and ends the process with the code of
//! [`crate::exit`]; it allocates nothing and takes no lock. SIGPIPE and SIGXFSZ are ignored, so that the
//! write that caused them fails instead; and so are SIGTTIN and SIGTTOU, so that a terminal whose foreground
//! is another's never stops the guest.

use std::ffi::CString;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};

use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{self, SetArg};

use crate::exit::{self, ExitCode};

/// Signals that end the process at once, and its code then.
const FATAL: [(Signal, ExitCode); 5] = [
    (Signal::SIGSYS, ExitCode::BadSyscall),
    (Signal::SIGBUS, ExitCode::Sigbus),
    (Signal::SIGSEGV, ExitCode::Sigsegv),
    (Signal::SIGXCPU, ExitCode::Sigxcpu),
    (Signal::SIGILL, ExitCode::Sigill),
];

/// Installs the handlers. For the main thread, before there is another.
pub fn install() -> io::Result<()> {
    let action = SigAction::new(
        SigHandler::SigAction(on_fatal),
        // Threads have a stack of their own for signals, in case theirs has run over.
        SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK,
        SigSet::empty(),
    );
    for (signal, _) in FATAL {
        // SAFETY: the handler does nothing but async-signal-safe calls.
        unsafe { signal::sigaction(signal, &action) }?;
    }
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGXFSZ, Signal::SIGTTIN, Signal::SIGTTOU] {
        // SAFETY: ignoring a signal runs no code.
        unsafe { signal::sigaction(signal, &ignore) }?;
    }
    Ok(())
}

/// The log's descriptor; none if negative.
static LOG: AtomicI32 = AtomicI32::new(-1);

/// Has fatal signals reported to the log's file too. To be called again with what replaces it.
pub fn report_to(log: RawFd) {
    LOG.store(log, Ordering::Relaxed);
}

/// Requests from outside to end.
pub struct EndRequests(SignalFd);

impl EndRequests {
    /// From now on they come here. For the main thread, before there is another.
    pub fn new() -> io::Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            set.add(signal);
        }
        signal::pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// The request, if there is one: the signal's name and the code to end with.
    pub fn take(&self) -> Option<(&'static str, ExitCode)> {
        let info = self.0.read_signal().ok()??;
        let signal = i32::try_from(info.ssi_signo).ok()?;
        Some(match Signal::try_from(signal).ok()? {
            Signal::SIGHUP => ("SIGHUP", ExitCode::Sighup),
            Signal::SIGINT => ("SIGINT", ExitCode::Ok),
            _ => ("SIGTERM", ExitCode::Ok),
        })
    }
}

impl AsRawFd for EndRequests {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Files to remove when the process ends in a handler, where nothing is dropped.
static LEFTOVERS: [AtomicPtr<libc::c_char>; 4] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 4];

/// Has `path` removed if the process ends at a fatal signal or a panic. For the few sockets a process
/// makes: beyond four, nothing happens.
pub fn remove_at_crash(path: &Path) {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return };
    let path = path.into_raw();
    let place = |slot: &AtomicPtr<libc::c_char>| {
        slot.compare_exchange(std::ptr::null_mut(), path, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    if !LEFTOVERS.iter().any(place) {
        // SAFETY: the pointer is the one of just above, and nobody else has got it.
        drop(unsafe { CString::from_raw(path) });
    }
}

/// Terminal settings to go back to.
static TERMINAL: OnceLock<libc::termios> = OnceLock::new();

/// Leaves nothing behind. Only makes calls that are allowed in a signal handler.
pub fn clean_up_at_crash() {
    for slot in &LEFTOVERS {
        let path = slot.load(Ordering::Acquire);
        if !path.is_null() {
            // SAFETY: whatever is in a slot is a C string that is never freed.
            unsafe { libc::unlink(path) };
        }
    }
    restore_terminal();
}

/// Whether standard input is a terminal, and ours to read: not while this is a background process, such as
/// one started with `&`.
fn owns_terminal() -> bool {
    let stdin = io::stdin();
    stdin.is_terminal() && nix::unistd::tcgetpgrp(stdin.as_fd()) == Ok(nix::unistd::getpgrp())
}

/// Whether what is typed into the terminal that is standard input is somebody else's.
pub fn input_is_anothers() -> bool {
    io::stdin().is_terminal() && !owns_terminal()
}

/// Gives the guest the terminal: keys come at once, unechoed, and none is a signal. Does nothing where
/// standard input is no terminal, or is that of a background process.
pub fn raw_terminal() -> io::Result<()> {
    if !owns_terminal() {
        return Ok(());
    }
    let stdin = io::stdin();
    let mut raw = termios::tcgetattr(&stdin)?;
    TERMINAL.get_or_init(|| raw.clone().into());
    termios::cfmakeraw(&mut raw);
    Ok(termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw)?)
}

/// Puts the terminal as it was before [`raw_terminal`].
pub fn restore_terminal() {
    if let Some(settings) = TERMINAL.get() {
        // SAFETY: the settings were read from a terminal.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings) };
    }
}

/// Ends the process. Runs as a signal handler: no allocation, no lock.
extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut message = Message::new();
    let code = match FATAL.iter().find(|(fatal, _)| *fatal as libc::c_int == signal) {
        Some((Signal::SIGSYS, code)) => {
            // SAFETY: the kernel gives a handler with SA_SIGINFO valid pointers, and fills in the number of
            // the system call for SIGSYS.
            let (number, context) = unsafe { ((*info).si_syscall(), &*context.cast::<libc::ucontext_t>()) };
            message.push(b"pulau-vmm: made the forbidden system call ");
            message.push_number(number.unsigned_abs());
            // Its first three arguments, which tell most calls apart.
            for (register, before) in [(libc::REG_RDI, b"("), (libc::REG_RSI, b","), (libc::REG_RDX, b",")] {
                let value = context.uc_mcontext.gregs.get(register as usize);
                message.push(before);
                message.push_hex(value.copied().unwrap_or_default() as u64);
            }
            // SAFETY: has no preconditions, and every filter allows it.
            let thread = unsafe { libc::gettid() };
            message.push(b") in thread ");
            message.push_number(thread.unsigned_abs());
            *code
        }
        Some((fatal, code)) => {
            message.push(b"pulau-vmm: ended by ");
            message.push(fatal.as_str().as_bytes());
            *code
        }
        None => ExitCode::Error,
    };
    message.push(b"\n");
    // SAFETY: the pointer and length are those of a live buffer; these calls are async-signal-safe.
    unsafe {
        libc::write(libc::STDERR_FILENO, message.bytes.as_ptr().cast(), message.len);
        libc::write(LOG.load(Ordering::Relaxed), message.bytes.as_ptr().cast(), message.len);
    }
    clean_up_at_crash();
    exit::record(code);
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(i32::from(code.code())) }
}

/// A line of text that is put together without allocating. What does not fit is left out.
struct Message {
    bytes: [u8; 160],
    len: usize,
}

impl Message {
    const fn new() -> Self {
        Self { bytes: [0; 160], len: 0 }
    }

    fn push(&mut self, text: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(self.len).zip(text) {
            *slot = *byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        self.push_digits(number.into(), 10);
    }

    fn push_hex(&mut self, number: u64) {
        self.push(b"0x");
        self.push_digits(number, 16);
    }

    fn push_digits(&mut self, mut number: u64, base: u64) {
        let mut digits = [0; 20];
        let mut start = digits.len();
        while start == digits.len() || number > 0 {
            start -= 1;
            digits[start] = b"0123456789abcdef"[(number % base) as usize];
            number /= base;
        }
        self.push(&digits[start..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_not_overrun() {
        let mut message = Message::new();
        for number in [0, 7, 4_294_967_295] {
            message.push_number(number);
            message.push(b" ");
        }
        message.push_hex(u64::MAX);
        assert_eq!(&message.bytes[..message.len], b"0 7 4294967295 0xffffffffffffffff");
        message.push(&[b'x'; 200]);
        assert_eq!(message.len, 160);
    }
}
