//! The `vmm` program. What it does is [`vmm::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
