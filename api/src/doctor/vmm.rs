//! The VMM program that `pulau` starts for every microVM.

use super::Finding;

pub fn check() -> Finding {
    match crate::programs::vmm() {
        Ok(path) => Finding::ok(path.display().to_string()),
        Err(e) => Finding::missing(
            e.to_string(),
            "Build it with `cargo build --release -p pulau-vmm`, or set PULAU_VMM.",
        ),
    }
}
