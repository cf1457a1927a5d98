//! A network of the test's own, and stand-ins for guests: network namespaces whose only link is joined to a tap
//! of the host's, frame by frame, as a VMM would. All that a guest's kernel does is there, and no guest.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

nix::ioctl_write_int!(set_interface, b'T', 202);

/// A named network namespace, `/run/netns/<name>`.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    /// A new one, with nothing in it but `lo`, which is up.
    pub fn new(what: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pulau-{}-{number}-{what}", std::process::id());
        host(&format!("ip netns add {name}"));
        let namespace = Self { name };
        namespace.sh("ip link set lo up");
        namespace
    }

    fn open(&self) -> File {
        File::open(format!("/run/netns/{}", self.name)).expect("the namespace's file")
    }

    /// Moves this thread into it, for good.
    pub fn enter(&self) {
        setns(self.open(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
    }

    /// Does something in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let run = || {
                self.enter();
                work()
            };
            match scope.spawn(run).join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A shell command in it.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "sh", "-c", script]).stdin(Stdio::null());
        command
    }

    /// Runs a shell command in it.
    pub fn try_sh(&self, script: &str) -> Output {
        self.command(script).output().expect("ip netns exec")
    }

    /// Runs one that must succeed, and returns its output.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}: {script}: {out}{err}", self.name);
        out.into_owned()
    }

    /// Whether one succeeds.
    pub fn can(&self, script: &str) -> bool {
        self.try_sh(script).status.success()
    }

    /// Whether it reaches an address by ping.
    pub fn pings(&self, address: impl std::fmt::Display) -> bool {
        self.can(&format!("ping -c 1 -W 1 -i 0.2 {address}"))
    }

    /// Whether it reaches a TCP port.
    pub fn connects(&self, address: impl std::fmt::Display, port: u16) -> bool {
        self.can(&format!("timeout 2 busybox nc {address} {port} </dev/null"))
    }

    /// Starts a server that says who asks, on a TCP port.
    pub fn serve(&self, port: u16) -> Background {
        let script =
            format!("exec socat TCP-LISTEN:{port},reuseaddr,fork SYSTEM:'echo $SOCAT_PEERADDR' 2>/dev/null");
        let server = Background::new(self.command(&script));
        crate::wait_for("the server", Duration::from_secs(20), || {
            self.can(&format!("ss -Hltn 'sport = :{port}' | grep -q .")).then_some(())
        });
        server
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A process that is ended when dropped.
pub struct Background(std::process::Child);

impl Background {
    pub fn new(mut command: Command) -> Self {
        Self(command.spawn().expect("a process"))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn host(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().expect("a shell");
    assert!(status.success(), "{command}");
}

/// Attaches to a tap, or makes one, in this thread's network namespace: whole frames, without headers.
fn open_tap(name: &str, headers: bool) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | if headers { libc::IFF_VNET_HDR } else { 0 };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the call.
    let result =
        unsafe { set_interface(file.as_raw_fd(), std::ptr::from_mut(&mut request) as libc::c_ulong) };
    result.unwrap_or_else(|e| panic!("attach to {name}: {e}"));
    file
}

/// A namespace that is what is behind a tap.
pub struct Guest {
    pub namespace: Namespace,
    pub tap: String,
    stop: Arc<AtomicBool>,
    wire: Option<JoinHandle<()>>,
}

impl Guest {
    /// Joins a new namespace's `eth0` to `tap` of the namespace `host`. It has `mac` and no address.
    pub fn behind(host: &Namespace, tap: &str, mac: &str) -> Self {
        let namespace = Namespace::new(tap);
        let outer = host.run(|| open_tap(tap, true));
        let inner = namespace.run(|| open_tap("eth0", false));
        namespace.sh(&format!("ip link set eth0 address {mac} && ip link set eth0 up"));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let wire = std::thread::spawn(move || carry(outer, inner, &stopped));
        Self { namespace, tap: tap.to_owned(), stop, wire: Some(wire) }
    }

    /// The same, with its address as its owner would set it by hand.
    pub fn with_address(
        host: &Namespace,
        tap: &str,
        mac: &str,
        address: Ipv4Addr,
        gateway: Ipv4Addr,
    ) -> Self {
        let guest = Self::behind(host, tap, mac);
        guest
            .namespace
            .sh(&format!("ip addr add {address}/24 dev eth0 && ip route add default via {gateway}"));
        guest
    }
}

impl std::ops::Deref for Guest {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(wire) = self.wire.take() {
            let _ = wire.join();
        }
    }
}

/// Carries frames both ways until told to stop or an end is gone. The outer end has 10 bytes of header before
/// each, which say nothing here as no offloads are on.
fn carry(mut outer: File, mut inner: File, stop: &AtomicBool) {
    let mut buffer = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        let ready = |file: &File| {
            let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut polled, PollTimeout::ZERO);
            polled[0].revents().unwrap_or(PollFlags::empty())
        };
        let (from_host, from_guest) = (ready(&outer), ready(&inner));
        let broken = PollFlags::POLLERR | PollFlags::POLLHUP;
        if from_host.intersects(broken) || from_guest.intersects(broken) {
            return;
        }
        if from_host.contains(PollFlags::POLLIN)
            && let Ok(length) = outer.read(&mut buffer)
        {
            let _ = inner.write(buffer.get(10..length).unwrap_or_default());
        }
        if from_guest.contains(PollFlags::POLLIN)
            && let Ok(length) = inner.read(&mut buffer[10..])
        {
            buffer[..10].fill(0);
            let _ = outer.write(&buffer[..length + 10]);
        }
        if (from_host | from_guest).is_empty() {
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}
