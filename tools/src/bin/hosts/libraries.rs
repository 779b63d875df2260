//! What a program needs to run somewhere else.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The shared libraries of `program`, its loader among them; none if it is static, or no program at all.
pub(crate) fn of(program: &Path) -> Vec<PathBuf> {
    let mut ldd = Command::new("ldd");
    let output = ldd.arg(program).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => named(&String::from_utf8_lossy(&output.stdout)),
        _ => Vec::new(),
    }
}

/// The files that `ldd` has printed.
fn named(said: &str) -> Vec<PathBuf> {
    said.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_those_with_a_path() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let files = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(named(said), files.map(PathBuf::from));
        assert_eq!(named("\tstatically linked\n").len(), 0);
    }
}
