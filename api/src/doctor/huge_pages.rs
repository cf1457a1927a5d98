//! Huge pages, for microVMs that ask for their memory to be made of them.

use super::{Finding, read};

pub fn check() -> Finding {
    match read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") {
        Ok(free) => judge(free.trim().parse().ok()),
        Err(_) => judge(None),
    }
}

/// `free` is the number of free 2 MiB pages, or none if the kernel has no such pages.
fn judge(free: Option<u64>) -> Finding {
    match free {
        Some(0) => Finding::degraded(
            "none free: a microVM that asks for huge pages is refused",
            "Reserve what they need, here 1 GiB: `sudo sysctl vm.nr_hugepages=512`.",
        ),
        Some(free) => Finding::ok(format!("{} MiB free in pages of 2 MiB", free.saturating_mul(2))),
        None => Finding::degraded(
            "not in this kernel: a microVM that asks for huge pages is refused",
            "Run a kernel with CONFIG_HUGETLBFS; Debian's has it.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn is_never_required() {
        assert_eq!(judge(Some(512)), Finding::ok("1024 MiB free in pages of 2 MiB"));
        assert_eq!(judge(Some(0)).state, State::Degraded);
        assert_eq!(judge(None).state, State::Degraded);
    }
}
