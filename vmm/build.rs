//! Flags for linking the program.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Where the program lies in memory is decided at its start (static-pie), and some thousand pointers in it
    // are put right then. Written the compact way, the list of them is 1 KiB instead of 90, and a start reads
    // that much less.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
