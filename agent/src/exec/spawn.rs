//! Starting a process: its own session, default signals, no descriptors but its three, the right user,
//! and its end tied to the agent's.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child as Process, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::unistd::{Gid, Pid, Uid, fchown};
use pulau_agent_protocol::message::{ErrorReply, ExecRequest, Role, WindowSize};

use crate::refusal::{self, Context, bad_request};
use crate::users::{self, Credentials};

/// Where programs are looked for unless the request says otherwise.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A started process and the agent's ends of its descriptors, which do not block.
#[derive(Debug)]
pub struct Child {
    pub process: Process,
    /// Readable once the process has ended.
    pub pidfd: OwnedFd,
    pub stdin: Option<OwnedFd>,
    /// Standard output, or the terminal.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub tty: bool,
    /// It has ended and been waited for: its number may by now be another process's.
    pub reaped: bool,
}

/// Starts the process.
///
/// # Errors
/// `bad_request` for arguments that no process can have; `not_found` or `permission_denied` for the user,
/// the directory or the program; `busy` or `no_space` if the guest is out of something.
pub fn start(request: &ExecRequest, role: Role) -> Result<Child, ErrorReply> {
    check_strings(request)?;
    let program = request.argv.first().ok_or_else(|| bad_request("argv is empty"))?;
    let user = users::resolve(request.user.as_deref().unwrap_or("0"))?;
    let directory = working_directory(request, &user)?;

    let mut command = Command::new(program);
    command.args(&request.argv[1..]).env_clear().envs(environment(request, &user));

    let terminal = match request.tty {
        Some(size) => Some(open_terminal(size, &user).context("open a terminal")?),
        None => None,
    };
    match &terminal {
        Some((_, slave)) => {
            let copy = || slave.try_clone().map(Stdio::from).context("open a terminal");
            command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        }
        None => {
            let stdin = if request.stdin { Stdio::piped() } else { Stdio::null() };
            command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
    }
    in_child(&mut command, user, directory.clone(), terminal.is_some(), role);

    let mut process = command.spawn().map_err(|e| {
        let what = format!("run {program:?} in {}", directory.to_string_lossy());
        ErrorReply::new(refusal::code(&e), format!("{what}: {e}"))
    })?;
    // Ours until it is waited for, so its number cannot mean another process.
    match our_ends(&mut process, terminal) {
        Ok((pidfd, [stdin, stdout, stderr])) => {
            Ok(Child { process, pidfd, stdin, stdout, stderr, tty: request.tty.is_some(), reaped: false })
        }
        Err(e) => {
            let _ = process.kill();
            let _ = process.wait();
            Err(e).context(format_args!("run {program:?}"))
        }
    }
}

/// The process's pidfd, and the agent's ends of standard input, output and error.
type Ends = (OwnedFd, [Option<OwnedFd>; 3]);

fn our_ends(process: &mut Process, terminal: Option<(OwnedFd, OwnedFd)>) -> io::Result<Ends> {
    let pidfd = pidfd_open(process.id())?;
    let ends = match terminal {
        Some((master, _)) => [Some(master.try_clone()?), Some(master), None],
        None => [
            process.stdin.take().map(OwnedFd::from),
            process.stdout.take().map(OwnedFd::from),
            process.stderr.take().map(OwnedFd::from),
        ],
    };
    for end in ends.iter().flatten() {
        fcntl(
            end,
            FcntlArg::F_SETFL(OFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFL)?) | OFlag::O_NONBLOCK),
        )?;
    }
    Ok((pidfd, ends))
}

fn check_strings(request: &ExecRequest) -> Result<(), ErrorReply> {
    let nul = |text: &String| text.contains('\0');
    if request.argv.iter().any(nul) || request.cwd.iter().any(nul) || request.env.values().any(nul) {
        return Err(bad_request("argv, cwd and env cannot hold NUL bytes"));
    }
    match request.env.keys().find(|key| key.is_empty() || key.contains(['=', '\0'])) {
        Some(key) => Err(bad_request(format!("{key:?} cannot be the name of an environment variable"))),
        None => Ok(()),
    }
}

fn environment(request: &ExecRequest, user: &Credentials) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    if !request.clear_env {
        let defaults = [
            ("PATH", DEFAULT_PATH),
            ("HOME", &user.home),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("SHELL", &user.shell),
        ];
        env.extend(defaults.map(|(key, value)| (key.to_owned(), value.to_owned())));
        if request.tty.is_some() {
            env.insert("TERM".to_owned(), "xterm".to_owned());
        }
    }
    env.extend(request.env.iter().map(|(key, value)| (key.clone(), value.clone())));
    env
}

/// Looked at before the start, so that a missing directory is not taken for a missing program.
fn working_directory(request: &ExecRequest, user: &Credentials) -> Result<CString, ErrorReply> {
    let directory = match &request.cwd {
        Some(cwd) if !cwd.starts_with('/') => {
            return Err(bad_request(format!("cwd {cwd:?} is not an absolute path")));
        }
        Some(cwd) => {
            let found = std::fs::metadata(cwd).context(format_args!("cwd {cwd}"))?;
            if !found.is_dir() {
                return Err(nix::errno::Errno::ENOTDIR).context(format_args!("cwd {cwd}"));
            }
            cwd.as_str()
        }
        None if Path::new(&user.home).is_dir() => &user.home,
        None => "/",
    };
    CString::new(directory).map_err(|_| bad_request("cwd cannot hold NUL bytes"))
}

/// The group that may write to terminals, by convention of devpts.
const TTY_GROUP: u32 = 5;

/// A new terminal: master, slave. The slave belongs to the user, so that what he starts may open it.
fn open_terminal(size: WindowSize, user: &Credentials) -> io::Result<(OwnedFd, OwnedFd)> {
    let pty = openpty(Some(&winsize(size)), None)?;
    for fd in [&pty.master, &pty.slave] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    fchown(&pty.slave, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(TTY_GROUP)))?;
    Ok((pty.master, pty.slave))
}

/// The kernel's form of a window size; pixel sizes are not known.
pub fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: takes two integers; the descriptor it returns (close-on-exec) is nobody else's.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as libc::c_int)) }
    }
}

const LAST_SIGNAL: libc::c_int = 64;
/// The kernel's `struct sigaction`, all zero: SIG_DFL, no flags, no restorer, an empty mask of 8 bytes.
static DEFAULT_ACTION: [u64; 4] = [0; 4];

/// Arranges what happens between fork and exec.
fn in_child(command: &mut Command, user: Credentials, directory: CString, tty: bool, role: Role) {
    let parent = Pid::this();
    let groups: Vec<libc::gid_t> = user.groups.clone();
    let steps = move || {
        // SAFETY: system calls on plain integers and on memory that the fork has copied; none of them
        // allocates or takes a lock, as must be so in the child of a process with threads.
        unsafe {
            check(libc::setsid())?;
            if tty {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            if role == Role::Init {
                unprotect();
            }
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setresgid(user.gid, user.gid, user.gid))?;
            check(libc::setresuid(user.uid, user.uid, user.uid))?;
            check(libc::chdir(directory.as_ptr()))?;
            // Not at once: through one of them the parent learns how exec went.
            check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
            for signal in 1..=LAST_SIGNAL {
                // The kernel's own call: the C library's refuses two signals that may be ignored as well.
                // Fails for SIGKILL and SIGSTOP, which never are.
                libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT_ACTION.as_ptr(), 0, 8);
            }
            // After the change of user, which would undo it. The "parent" is the thread that serves this
            // exec, which outlives the process unless the agent itself is killed.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::getppid() != parent.as_raw() {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Ok(())
    };
    // SAFETY: see inside; the closure makes nothing but system calls.
    unsafe { command.pre_exec(steps) };
}

/// Takes away what the agent has given itself as part of PID 1: its protection against the OOM killer and
/// its limit of open files. Failures leave the process too well off, no more.
unsafe fn unprotect() {
    // SAFETY: system calls on constants and on a live local; see the caller.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            // What programs that use select(2) can live with; others raise it themselves.
            limit.rlim_cur = limit.rlim_max.min(1024);
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

fn check<T: Into<i64>>(result: T) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
