//! Builds the guests with the compiler that builds the rest, by calling it directly: they need no target,
//! no toolchain and no Cargo package of their own.
//!
//! The flags are these alone. A guest is not instrumented, not tuned for the host's CPU and not built for
//! debugging, whatever `RUSTFLAGS` and the profile say; Cargo hands those to the compilers it starts, and
//! this is not one of them.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Root source files in `payload/`, and so the names of the guests.
const GUESTS: [(&str, &str); 5] = [
    ("payload", "main.rs"),
    ("misbehave", "misbehave.rs"),
    ("puppet", "puppet.rs"),
    ("sweep", "sweep.rs"),
    ("drill", "drill.rs"),
];

const FLAGS: [&str; 18] = [
    "--edition=2024",
    "--crate-type=bin",
    "--target=x86_64-unknown-linux-gnu",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Cpanic=abort",
    "-Cdebuginfo=0",
    "-Cstrip=debuginfo",
    "-Crelocation-model=static",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,max-page-size=4096",
    "-Clink-arg=-Wl,-z,noexecstack",
    // The prebuilt `core` refers to it; nothing here unwinds.
    "-Clink-arg=-Wl,--defsym=rust_eh_personality=0",
    "-Clink-arg=-Wl,--script=payload/link.ld",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=payload");
    for shared in [
        "abi",
        "draws/count",
        "draws/mod",
        "drill",
        "formula",
        "misbehaviour",
        "registers",
        "sweep",
    ] {
        println!("cargo::rerun-if-changed=src/{shared}.rs");
    }

    match build_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn build_all() -> Result<(), Box<dyn Error>> {
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    for (name, source) in GUESTS {
        build(name, source, &out_dir.join(name))?;
    }
    Ok(())
}

fn build(name: &str, source: &str, output: &Path) -> Result<(), Box<dyn Error>> {
    let rustc = variable("RUSTC")?;
    let mut command = Command::new(&rustc);
    command
        // Relative to here, so that the guest's panics name no path of this machine.
        .current_dir(variable("CARGO_MANIFEST_DIR")?)
        .args(FLAGS)
        .arg(format!("--crate-name={name}"))
        .arg("-o")
        .arg(output)
        .arg(Path::new("payload").join(source));
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut flag = OsString::from("-Clinker=");
        flag.push(linker);
        command.arg(flag);
    }
    for flags in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        command.env_remove(flags);
    }

    let ran = command
        .output()
        .map_err(|error| format!("can't run the compiler {rustc:?}: {error}"))?;
    let messages = String::from_utf8_lossy(&ran.stderr);
    if !ran.status.success() {
        return Err(format!(
            "building the guest `{name}` failed ({}):\n{messages}\nthe command was: {command:?}",
            ran.status
        )
        .into());
    }
    for line in messages.lines() {
        println!("cargo::warning=guest `{name}`: {line}");
    }
    Ok(())
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set: this runs as Cargo's build script"))
}
