//! The kinds of namespace the jail is made of.

use std::path::Path;

use super::Finding;

const NEEDED: &[&str] = &["cgroup", "ipc", "mnt", "net", "pid", "uts"];

pub fn check() -> Finding {
    judge(|name| Path::new("/proc/self/ns").join(name).exists())
}

fn judge(has: impl Fn(&str) -> bool) -> Finding {
    let lacking: Vec<_> = NEEDED.iter().copied().filter(|name| !has(name)).collect();
    if lacking.is_empty() {
        return Finding::ok(NEEDED.join(", "));
    }
    Finding::missing(
        format!("the kernel has no namespaces of kind {}", lacking.join(", ")),
        "Run a kernel with CONFIG_NAMESPACES and all its kinds; every distribution's has them.",
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn names_the_kinds_that_lack() {
        assert_eq!(judge(|_| true).state, State::Ok);
        assert!(judge(|name| name != "pid").detail.ends_with("of kind pid"));
    }
}
