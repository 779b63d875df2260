//! The `vmm` program. What it does is [`palimpsest::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    palimpsest::cli::main()
}
