//! What a prisoner may attempt. Each returns without error if it got what it was after.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use pulau_vmm::jail::devices;
use pulau_vmm::virtio::net::tap::Tap;

/// Makes the attempt `what`: its name and its arguments.
pub fn make(what: &[&str]) -> io::Result<()> {
    match *what {
        ["nothing"] => Ok(()),
        // Ends only when it is ended.
        ["rest"] => loop {
            std::thread::park();
        },
        ["identity"] => identity(),
        ["live"] => live(),
        ["devices"] => use_devices(),
        ["tap", name] => Tap::open(name).map(drop).map_err(io::Error::other),
        ["read", path] => reach(path, OpenOptions::new().read(true)),
        ["write", path] => reach(path, OpenOptions::new().write(true)),
        ["ring", path] => open_by_ring(path),
        ["descriptors"] => descriptors(),
        ["environment", backwards] => environment(backwards),
        ["execute", path] => execute(path),
        ["execute-memory", path] => execute_memory(path),
        ["trace", pid] => trace(pid.parse().unwrap()),
        ["read-memory", pid] => read_memory(pid.parse().unwrap()),
        ["signal", pid] => check(unsafe_call(libc::SYS_kill, [pid.parse().unwrap(), 0, 0, 0])),
        ["tcp", port] => TcpStream::connect(("127.0.0.1", port.parse().unwrap())).map(drop),
        ["abstract", name] => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?).map(drop),
        ["raw-socket"] => socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        ["host-socket"] => socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
        ["mount", path] => mount(path),
        ["chroot"] => check(unsafe_call(libc::SYS_chroot, [c".".as_ptr() as i64, 0, 0, 0])),
        ["device", path] => make_device(path),
        ["become-root"] => check(unsafe_call(libc::SYS_setresuid, [0, 0, 0, 0])),
        ["unshare", flag] => check(unsafe_call(libc::SYS_unshare, [flag.parse().unwrap(), 0, 0, 0])),
        ["handle", path] => open_by_handle(path),
        ["memory", mib] => fill_memory(mib.parse().unwrap()),
        ["threads", count] => threads(count.parse().unwrap()),
        ["files", count] => {
            let files: io::Result<Vec<File>> =
                (0..count.parse().unwrap()).map(|_: u32| File::open("/")).collect();
            files.map(drop)
        }
        ["grow", bytes] => grow(bytes.parse().unwrap()),
        _ => panic!("unknown attempt {what:?}"),
    }
}

/// A system call by number, with whatever arguments: it is what an attacker would do.
fn unsafe_call(number: i64, [a, b, c, d]: [i64; 4]) -> i64 {
    // SAFETY: every caller passes pointers that are valid for what the call does with them.
    unsafe { libc::syscall(number, a, b, c, d) }
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<()> {
    check(unsafe_call(libc::SYS_socket, [family.into(), kind.into(), protocol.into(), 0]))
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Prints who the process is, a `name value` on each line.
fn identity() -> io::Result<()> {
    // SAFETY: none of these has preconditions; the array is as long as said.
    unsafe {
        println!("pid {}", libc::getpid());
        println!("thread {}", libc::gettid());
        println!("session {}", libc::getsid(0));
        let (mut real, mut effective, mut saved) = (0, 0, 0);
        libc::getresuid(&raw mut real, &raw mut effective, &raw mut saved);
        println!("uid {real} {effective} {saved}");
        libc::getresgid(&raw mut real, &raw mut effective, &raw mut saved);
        println!("gid {real} {effective} {saved}");
        println!("groups {}", libc::getgroups(0, std::ptr::null_mut()));
        println!("no_new_privs {}", libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
        println!("dumpable {}", libc::prctl(libc::PR_GET_DUMPABLE));
        let bounding = (0..64).filter(|&cap| libc::prctl(libc::PR_CAPBSET_READ, cap) == 1).count();
        println!("bounding {bounding}");
        let header: [u32; 2] = [0x2008_0522, 0];
        let mut sets = [0_u32; 6];
        libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr());
        println!("capabilities {}", sets.iter().map(|word| word.count_ones()).sum::<u32>());
        let mut core = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
        libc::getrlimit(libc::RLIMIT_CORE, &raw mut core);
        println!("core {}", core.rlim_max);
        println!("umask {:o}", libc::umask(0));
    }
    println!("environment {}", std::env::vars_os().count());
    let mut names: Vec<_> = fs::read_dir("/")?.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    println!("root {names:?}");
    println!("directory {:?}", std::env::current_dir()?);
    Ok(())
}

/// What the VMM itself does in its tree must work.
fn live() -> io::Result<()> {
    let mut text = String::new();
    File::open("/disk")?.read_to_string(&mut text)?;
    OpenOptions::new().read(true).write(true).open("/disk")?.sync_all()?;
    let listener = UnixListener::bind("/run/api.sock")?;
    drop(UnixStream::connect("/run/api.sock")?);
    drop(listener);
    fs::remove_file("/run/api.sock")?;
    fs::write("/run/state.new", "state")?;
    fs::rename("/run/state.new", "/run/state")?;
    File::open("/run")?.sync_all()?;
    fs::remove_file("/run/state")?;
    // The C library must know this thread under its new number.
    std::thread::spawn(|| ()).join().unwrap();
    // SAFETY: sends no signal.
    check(unsafe { libc::pthread_kill(libc::pthread_self(), 0) }.into())
}

/// The devices the VMM needs, several times.
fn use_devices() -> io::Result<()> {
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    const TUNGETFEATURES: libc::c_ulong = 0x8004_54cf;
    for _ in 0..3 {
        let kvm = devices::kvm()?;
        // SAFETY: this request takes no argument.
        assert_eq!(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) }, 12);
        let tun = devices::tun()?;
        let mut features: libc::c_uint = 0;
        // SAFETY: this request writes one number.
        check(unsafe { libc::ioctl(tun.as_raw_fd(), TUNGETFEATURES, &raw mut features) }.into())?;
        assert_ne!(features, 0);
    }
    Ok(())
}

/// Opens a file of the host by its path: from the root, from further up, and from every descriptor.
fn reach(path: &str, options: &OpenOptions) -> io::Result<()> {
    if options.open(path).is_ok() || options.open(format!("/../../../../../..{path}")).is_ok() {
        return Ok(());
    }
    let up = CString::new(format!("../../../../../..{path}")).unwrap();
    for fd in [libc::AT_FDCWD].into_iter().chain(0..1024) {
        // SAFETY: the path is a valid C string.
        if unsafe { libc::openat(fd, up.as_ptr(), libc::O_RDONLY) } >= 0 {
            return Ok(());
        }
    }
    options.open(path).map(drop)
}

/// Looks for descriptors other than the standard ones and those the VMM must have, and for a directory
/// that has something above it.
fn descriptors() -> io::Result<()> {
    let stat = |fd| {
        // SAFETY: all zeroes are a valid value of this structure, which the kernel fills in.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        check(unsafe { libc::fstat(fd, &raw mut stat) }.into()).map(|()| stat)
    };
    let mut found = Vec::new();
    for fd in 3..4096 {
        let Ok(file) = stat(fd) else { continue };
        found.push(match file.st_mode & libc::S_IFMT {
            libc::S_IFCHR if file.st_rdev == libc::makedev(10, 232) => "kvm",
            libc::S_IFDIR => {
                // SAFETY: the path is a constant C string.
                let up = unsafe { libc::openat(fd, c"..".as_ptr(), libc::O_PATH) };
                let above = stat(up)?;
                // SAFETY: nobody else has this descriptor.
                check(unsafe { libc::close(up) }.into())?;
                if (above.st_dev, above.st_ino) == (file.st_dev, file.st_ino) { "net" } else { "a way up" }
            }
            _ => "something",
        });
    }
    println!("{found:?}");
    if found == ["kvm", "net"] { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
}

/// Looks for a text (given backwards, so that the argument is not what is found) where the kernel put the
/// environment: above this thread's stack.
fn environment(backwards: &str) -> io::Result<()> {
    let secret: Vec<u8> = backwards.bytes().rev().collect();
    let mut copy = vec![0_u8; 1 << 20];
    let here = &raw const copy;
    let local = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: copy.len() };
    let remote = libc::iovec { iov_base: here.cast_mut().cast(), iov_len: copy.len() };
    // SAFETY: the kernel copies what of that memory there is, to where there is room for all.
    let read =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    println!("{read} bytes");
    if copy[..read].windows(secret.len()).any(|part| part == secret) {
        return Ok(());
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Becomes another program: this one, to attempt nothing.
fn execute(path: &str) -> io::Result<()> {
    let path = CString::new(path).unwrap();
    let args = [path.as_ptr(), c"prisoner".as_ptr(), c"attempt=nothing".as_ptr(), std::ptr::null()];
    // SAFETY: the path is a valid C string, and the array one of such with a null pointer at its end.
    check(unsafe { libc::execv(path.as_ptr(), args.as_ptr()) }.into())
}

/// The same with a copy of the program that is in memory only, made from a file that can be read.
fn execute_memory(path: &str) -> io::Result<()> {
    let program = fs::read(path)?;
    // SAFETY: the name is a constant C string.
    let fd = unsafe { libc::memfd_create(c"program".as_ptr(), 0) };
    check(fd.into())?;
    // SAFETY: nobody else has this descriptor.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&program)?;
    let args = [c"program".as_ptr(), c"prisoner".as_ptr(), c"attempt=nothing".as_ptr(), std::ptr::null()];
    // SAFETY: the path is a valid C string, the array one of such with a null pointer at its end, and no
    // environment is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            args.as_ptr(),
            std::ptr::null::<libc::c_void>(),
            libc::AT_EMPTY_PATH,
        )
    })
}

/// Attaches to another process as a debugger.
fn trace(pid: i64) -> io::Result<()> {
    check(unsafe_call(libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), pid, 0, 0]))
}

/// Reads a byte of another process's memory, if there is one at that address.
fn read_memory(pid: libc::pid_t) -> io::Result<()> {
    let mut byte = 0_u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
    // SAFETY: the kernel writes at most one byte, to `byte`.
    let result = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match check(result as i64) {
        // Allowed to look, but nothing is there.
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        other => other,
    }
}

/// Opens a file with a ring made for it, which no filter looks at.
fn open_by_ring(path: &str) -> io::Result<()> {
    let mut ring = io_uring::IoUring::new(1)?;
    let path = CString::new(path).unwrap();
    let at = io_uring::types::Fd(libc::AT_FDCWD);
    let open = io_uring::opcode::OpenAt::new(at, path.as_ptr()).flags(libc::O_RDONLY).build();
    // SAFETY: the path lives until the operation is complete.
    unsafe { ring.submission().push(&open) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next().map(|done| done.result()) {
        Some(error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        _ => Ok(()),
    }
}

/// Mounts something over a directory, in a namespace of its own if it may have one.
fn mount(path: &str) -> io::Result<()> {
    let path = CString::new(path).unwrap();
    let kind = c"tmpfs".as_ptr() as i64;
    // SAFETY: all are valid C strings.
    check(unsafe {
        libc::syscall(libc::SYS_mount, kind, path.as_ptr(), kind, 0_i64, std::ptr::null::<libc::c_void>())
    })
}

/// Makes a node of the device behind `/dev/kmsg` and opens it.
fn make_device(path: &str) -> io::Result<()> {
    let c_path = CString::new(path).unwrap();
    // SAFETY: the path is a valid C string.
    check(unsafe { libc::mknod(c_path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 11)) }.into())?;
    File::open(path).map(drop)
}

/// Opens the root of the file system that a file is on by its inode number, which is 2 for ext4 and which
/// no path is looked up for.
fn open_by_handle(path: &str) -> io::Result<()> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u32; 32],
    }
    let mut handle = Handle { bytes: 128, kind: 0, handle: [0; 32] };
    let mut mount = 0;
    let c_path = CString::new(path).unwrap();
    let fd = File::open(path)?;
    // SAFETY: the path is a valid C string; the kernel writes at most `bytes` to the handle.
    check(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            c_path.as_ptr(),
            &raw mut handle,
            &raw mut mount,
            0,
        )
    })?;
    check(unsafe_call(
        libc::SYS_open_by_handle_at,
        [fd.as_raw_fd().into(), (&raw const handle) as i64, libc::O_RDONLY.into(), 0],
    ))
}

/// Uses memory. The kernel may kill the process for it.
fn fill_memory(mib: usize) -> io::Result<()> {
    let mut all = Vec::new();
    for _ in 0..mib {
        all.push(std::hint::black_box(vec![1_u8; 1 << 20]));
    }
    Ok(())
}

/// Has that many threads at once.
fn threads(count: usize) -> io::Result<()> {
    let sleep = || loop {
        std::thread::park();
    };
    let builder = || std::thread::Builder::new().stack_size(64 << 10);
    (0..count).try_for_each(|_| builder().spawn(sleep).map(drop))
}

/// Writes a file of that many bytes.
fn grow(bytes: usize) -> io::Result<()> {
    // SAFETY: no handler runs. Without this the process would end by the signal.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let result = File::create("/run/grown").and_then(|mut file| file.write_all(&vec![0; bytes]));
    let _ = fs::remove_file("/run/grown");
    result
}
