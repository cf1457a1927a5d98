//! The `pulau` program. Everything is in the library; this only calls it.

use std::process::ExitCode;

fn main() -> ExitCode {
    pulau::cli::main()
}
