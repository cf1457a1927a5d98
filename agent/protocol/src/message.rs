//! The JSON messages. Field and variant names here are the wire format: within a protocol version fields
//! may be added (a reader passes over those it does not know), never renamed or given another meaning.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::network::NetworkConfig;

/// First frame on every connection, host to agent: the protocol versions the host speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientHello {
    pub min_version: u32,
    pub max_version: u32,
    /// Name and version of the program, for logs.
    pub client: String,
}

/// The agent's answer to [`ClientHello`], unless that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentHello {
    /// The version both will use: the newest both speak.
    pub version: u32,
    /// Name and version of the agent, for logs.
    pub agent: String,
    pub role: Role,
}

/// What the agent is in its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It is PID 1.
    Init,
    /// Another init started it.
    Service,
}

/// What the host asks. `Exec`, `CopyIn` and `CopyOut` take the connection over and end with it; after any
/// other the next request may follow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    Exec(ExecRequest),
    CopyIn(CopyIn),
    CopyOut(CopyOut),
    /// Set the guest's wall clock. Answered by [`Reply::Done`].
    SetTime(WallClock),
    /// Answered by [`Reply::Health`].
    Health,
    /// Set up one interface. Answered by [`Reply::Done`].
    ConfigureNetwork(NetworkConfig),
    /// The guest has been restored from a snapshot and is now somebody else. Answered by [`Reply::Done`].
    Resumed(Resumed),
    /// Answered by [`Reply::Done`] before anything is stopped; the end is seen by the VMM.
    Shutdown(Shutdown),
}

/// The agent's answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Health(Health),
    /// To `CopyIn`: send the bytes now. `Done` follows once the file is in place.
    Ready,
    /// To `CopyOut`: the bytes follow.
    File(FileInfo),
}

/// Why a request failed. It ends an exec or copy; after another request's the connection goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorReply {
    pub code: ErrorCode,
    /// For a person; says what was attempted, and on what.
    pub message: String,
}

impl ErrorReply {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Kinds of failure a program may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The message could not be understood, or asks for something that makes no sense.
    BadRequest,
    /// No protocol version in common.
    UnsupportedVersion,
    /// A file, program, user or interface does not exist.
    NotFound,
    /// The guest kernel refused: permissions, read-only file system, not executable.
    PermissionDenied,
    /// The path is not of the right kind: a directory where a file is meant, or the reverse.
    WrongType,
    /// No space or memory left.
    NoSpace,
    /// The data ended before its announced size, or went past it.
    Truncated,
    /// Too much is going on at once; try again later.
    Busy,
    /// Anything else.
    #[serde(other)]
    Failed,
}

/// Start a process. It gets a new session, default signal handling, and no descriptor but its three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; the program is looked up in the process's own `PATH`.
    pub argv: Vec<String>,
    /// Set over the defaults `PATH`, `HOME`, `USER`, `LOGNAME`, `SHELL` (and `TERM` with a terminal).
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Leave the defaults out: `env` is the whole environment.
    #[serde(default)]
    pub clear_env: bool,
    /// Working directory; the user's home directory, or `/` if that does not exist, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `name`, `uid`, `name:group` or `uid:gid`; `0` if left out. Without a group, a known user's own
    /// and supplementary groups apply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// With a terminal of this size: one stream, sent as `Stdout`, and job control. Else three pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<WindowSize>,
    /// Whether the host will send standard input. Else it is `/dev/null` (without a terminal).
    #[serde(default)]
    pub stdin: bool,
}

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub cols: u16,
}

/// Host to agent while a process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecControl {
    /// Sends a signal, 1 to 64 as Linux x86 and Arm number them, to the process group of the process.
    Signal { signal: i32 },
    /// Gives the terminal another size; the foreground process group gets SIGWINCH. Nothing without one.
    WindowSize(WindowSize),
}

/// Agent to host while a process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecEvent {
    /// The program has been executed. First event.
    Started {
        /// In the guest.
        pid: u32,
        /// How many bytes of standard input may be under way unacknowledged.
        stdin_window: u32,
    },
    /// The process (or its pipe) took this many bytes of standard input: that many more may be sent.
    StdinTaken { bytes: u32 },
    /// The process no longer reads its standard input; what was sent and not taken is lost.
    StdinClosed,
    /// The process ended; all it wrote has been sent before this. Last event.
    Exited { status: ExitStatus },
}

/// How a process ended: `{"code":0}` or `{"signal":9}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl ExitStatus {
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// As a shell would report it: the code, or 128 and the signal.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// Put a file into the guest. The file appears under its name only when whole: it is written beside it
/// and renamed over what was there (a symbolic link is replaced, not followed).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyIn {
    /// Absolute.
    pub path: String,
    /// Exact number of bytes that will follow.
    pub size: u64,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// As [`ExecRequest::user`]; `0:0` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Make missing directories above it (mode 0755, root's).
    #[serde(default)]
    pub parents: bool,
    /// Have file and directory on disk before answering.
    #[serde(default)]
    pub sync: bool,
}

/// Fetch a regular file from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOut {
    /// Absolute; symbolic links are followed.
    pub path: String,
}

/// The file a [`CopyOut`] found, at the time it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Bytes that will follow.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Modification time, seconds since 1970-01-01 UTC.
    pub mtime: i64,
}

/// A point in time: since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallClock {
    pub secs: u64,
    /// Below 1,000,000,000.
    pub nanos: u32,
}

impl WallClock {
    /// This machine's wall clock; 1970 if that is set before it.
    pub fn now() -> Self {
        let since: Duration = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { secs: since.as_secs(), nanos: since.subsec_nanos() }
    }
}

/// What a guest must learn before it runs on after a restore: two guests restored from one snapshot share
/// everything else, down to the state of their random generators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resumed {
    pub identity: Identity,
    /// Interfaces to set up anew.
    #[serde(default)]
    pub network: Vec<NetworkConfig>,
    pub wall_clock: WallClock,
    pub entropy_seed: EntropySeed,
}

/// Who the guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The host's name for the microVM; reported in [`Health`].
    pub id: String,
    /// 1 to 64 bytes; unchanged if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

/// Fresh random bytes for the guest kernel's pool; 32 to 512 of them. In JSON lower-case hexadecimal.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EntropySeed(Vec<u8>);

impl EntropySeed {
    /// `None` unless there are 32 to 512 bytes.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (32..=512).contains(&bytes.len()).then_some(Self(bytes))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for EntropySeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It seeds the guest's keys: not for logs.
        write!(f, "EntropySeed({} bytes)", self.0.len())
    }
}

impl TryFrom<String> for EntropySeed {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const BAD: &str = "an entropy seed is 64 to 1024 hexadecimal digits, an even number of them";
        let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
        let digits = digits.filter(|d| d.len() % 2 == 0).ok_or(BAD)?;
        let bytes = digits.chunks_exact(2).filter_map(|d| u8::try_from(d[0] << 4 | d[1]).ok()).collect();
        Self::new(bytes).ok_or(BAD)
    }
}

impl From<EntropySeed> for String {
    fn from(seed: EntropySeed) -> String {
        seed.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// End the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    pub action: ShutdownAction,
    /// How long processes get between SIGTERM and SIGKILL, in milliseconds; 5,000 if left out. Only an
    /// agent that is PID 1 heeds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u32>,
}

/// How to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownAction {
    PowerOff,
    Reboot,
}

/// How the guest is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// As the last [`Resumed`] said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub hostname: String,
    /// Since the kernel started, suspended time included, in milliseconds.
    pub uptime_ms: u64,
    /// Over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Bytes.
    pub memory_total: u64,
    /// Bytes that could be had without swapping (`MemAvailable`).
    pub memory_available: u64,
    /// Processes the agent runs for hosts now.
    pub execs: u32,
    /// When each phase of the agent's start was done, in order; empty for a service.
    pub boot: Vec<BootPhase>,
    /// What went wrong at boot, one sentence each. Not empty: the guest runs, but not as asked.
    pub problems: Vec<String>,
}

/// A step of the boot and when it was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootPhase {
    /// `init`, `mounts`, `overlay`, `network`, `ready`.
    pub phase: String,
    /// Microseconds of the guest's monotonic clock, which starts with its kernel.
    pub at_us: u64,
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
