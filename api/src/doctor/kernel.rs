//! The running kernel's version.

use super::Finding;

/// The jail relies on `CLONE_INTO_CGROUP`, pidfds and `openat2`, which are all there from here on.
const OLDEST: (u32, u32) = (5, 10);
/// What Pulau is tested on (Debian 12); `cgroup.kill`, Landlock and shared io_uring rings are there.
const WANTED: (u32, u32) = (6, 1);

pub fn check() -> Finding {
    match nix::sys::utsname::uname() {
        Ok(name) => judge(&name.release().to_string_lossy()),
        Err(e) => Finding::missing(format!("uname: {e}"), "Run Linux."),
    }
}

fn judge(release: &str) -> Finding {
    const REMEDY: &str = "Run Linux 6.1 or newer; Debian 12 does.";
    match parse(release) {
        None => Finding::degraded(format!("cannot read the version from `{release}`"), REMEDY),
        Some(version) if version < OLDEST => Finding::missing(format!("Linux {release} is too old"), REMEDY),
        Some(version) if version < WANTED => {
            Finding::degraded(format!("Linux {release} is older than what Pulau is tested on"), REMEDY)
        }
        Some(_) => Finding::ok(format!("Linux {release}")),
    }
}

/// Major and minor number of a release such as `6.1.0-18-cloud-amd64` or `6.12-rc1`.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn reads_the_releases_distributions_write() {
        assert_eq!(parse("6.1.0-18-cloud-amd64"), Some((6, 1)));
        assert_eq!(parse("6.12-rc1"), Some((6, 12)));
        assert_eq!(parse("5.10.0+"), Some((5, 10)));
        assert_eq!(parse("linux"), None);
        assert_eq!(parse("6"), None);
    }

    #[test]
    fn judges_by_number_not_by_text() {
        assert_eq!(judge("6.12.1").state, State::Ok);
        assert_eq!(judge("5.15.0").state, State::Degraded);
        assert_eq!(judge("5.9.0").state, State::Missing);
        assert_eq!(judge("4.19.0").state, State::Missing);
        assert_eq!(judge("10.0.1").state, State::Ok);
    }
}
