//! The kernel's settings under `/proc/sys/net`. They are those of the network namespace of whoever asks.

use std::fs;
use std::io;
use std::path::Path;

/// Sets `net/<name>` to `value`, if it is not so already.
///
/// # Errors
///
/// Those of open(2) and write(2).
pub fn set(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    if fs::read_to_string(&path).is_ok_and(|now| now.trim_end() == value) {
        return Ok(());
    }
    fs::write(path, value)
}

/// The value of `net/<name>`.
///
/// # Errors
///
/// Those of open(2) and read(2).
pub fn get(name: &str) -> io::Result<String> {
    let text = fs::read_to_string(Path::new("/proc/sys/net").join(name))?;
    Ok(text.trim_end().to_owned())
}

/// What a guest's link needs: the host answers for every address it routes elsewhere, at once, forwards what
/// comes, and speaks no IPv6 on it.
///
/// # Errors
///
/// As [`set`].
pub fn set_link(name: &str) -> io::Result<()> {
    set(&format!("ipv4/conf/{name}/proxy_arp"), "1")?;
    set(&format!("ipv4/conf/{name}/forwarding"), "1")?;
    set(&format!("ipv4/conf/{name}/accept_redirects"), "0")?;
    set(&format!("ipv4/conf/{name}/send_redirects"), "0")?;
    set(&format!("ipv4/neigh/{name}/proxy_delay"), "0")?;
    match set(&format!("ipv6/conf/{name}/disable_ipv6"), "1") {
        // A kernel without IPv6.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
