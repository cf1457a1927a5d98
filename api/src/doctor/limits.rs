//! The limit on open files: the daemon holds a few for every microVM.

use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// Room for some thousand microVMs.
const WANTED: u64 = 65_536;
/// Room for one.
const NEEDED: u64 = 1024;

pub fn check() -> Finding {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => judge(soft, hard),
        Err(e) => Finding::degraded(format!("getrlimit: {e}"), "Run on Linux."),
    }
}

/// Pulau raises the soft limit itself, so it is the hard one that counts.
fn judge(soft: u64, hard: u64) -> Finding {
    let remedy = "Raise it: `LimitNOFILE=1048576` in the service's unit, or `* hard nofile 1048576` in \
                  /etc/security/limits.conf.";
    if hard < NEEDED {
        Finding::missing(format!("at most {hard}"), remedy)
    } else if hard < WANTED {
        Finding::degraded(format!("at most {hard}: enough for a few hundred microVMs"), remedy)
    } else {
        Finding::ok(format!("{soft}, at most {hard}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn the_hard_limit_counts() {
        assert_eq!(judge(1024, 1_048_576).state, State::Ok);
        assert_eq!(judge(1024, 4096).state, State::Degraded);
        assert_eq!(judge(512, 512).state, State::Missing);
    }
}
