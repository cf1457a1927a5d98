//! `pulau-vmm`: one microVM per process. See `docs/api.md`.

use std::process::ExitCode;

use pulau_vmm::cli::{self, Command};
use pulau_vmm::{exit, program};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => program::print(cli::HELP),
        Ok(Command::Version) => program::print(concat!("pulau-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::Run(options)) => match program::run(*options) {
            Ok(code) => {
                exit::record(code);
                return code.into();
            }
            Err(error) => return fail(&error, error.exit_code()),
        },
        Err(error) => {
            let code = match error.is_configuration() {
                true => exit::ExitCode::BadConfiguration,
                false => exit::ExitCode::BadArguments,
            };
            eprintln!("pulau-vmm: {error}\nTry 'pulau-vmm --help'.");
            return code.into();
        }
    }
    ExitCode::SUCCESS
}

fn fail(error: &program::ProgramError, code: exit::ExitCode) -> ExitCode {
    eprintln!("pulau-vmm: {error}");
    if !pulau_vmm::logger::is_stderr() {
        log::error!("{error}");
    }
    exit::record(code);
    code.into()
}
