//! Reading a guest program that somebody names.

use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::units::bytes;

/// No program is longer, debug information and all.
const LONGEST: u64 = 256 << 20;

/// Reads the file at `path`. No more of it than a program may have, and of a file without a length, as the
/// kernel makes them, nothing.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Before it is opened: to open a pipe waits for somebody, and to open a device may do things.
    length(&fs::metadata(path)?)?;
    // Between the look at the path and opening it, another file may have come there.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let length = length(&file.metadata()?)?;
    let mut program = Vec::with_capacity(length as usize);
    file.take(length).read_to_end(&mut program)?;
    Ok(program)
}

/// How long a regular file is.
fn length(meta: &Metadata) -> io::Result<u64> {
    let kind = meta.file_type();
    let what = match kind {
        _ if kind.is_file() && meta.len() <= LONGEST => return Ok(meta.len()),
        _ if kind.is_file() => format!(
            "has {}, and no guest program has more than {}",
            bytes(meta.len()),
            bytes(LONGEST)
        ),
        _ if kind.is_dir() => "is a directory".to_owned(),
        _ if kind.is_fifo() => "is a pipe, not a file".to_owned(),
        _ if kind.is_socket() => "is a socket, not a file".to_owned(),
        _ => "is a device, not a file".to_owned(),
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;

    #[test]
    fn a_program_is_read_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guest");
        fs::write(&path, guest::MISBEHAVE).unwrap();
        assert_eq!(read(&path).unwrap(), guest::MISBEHAVE);
    }

    #[test]
    fn what_is_no_file_of_a_programs_length_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        mkfifoat(CWD, at("pipe"), Mode::from_raw_mode(0o600)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        // Takes no room: it has holes only.
        File::create(at("long"))
            .unwrap()
            .set_len(LONGEST + 1)
            .unwrap();
        for (path, why) in [
            (at("pipe"), "is a pipe, not a file"),
            (at("socket"), "is a socket, not a file"),
            (
                at("long"),
                "has 256 MiB, and no guest program has more than 256 MiB",
            ),
            (directory.path().to_owned(), "is a directory"),
            ("/dev/zero".into(), "is a device, not a file"),
        ] {
            assert_eq!(read(&path).unwrap_err().to_string(), why);
        }
    }

    #[test]
    fn nothing_is_read_of_what_has_no_length() {
        // To read it would take the kernel's messages away, or wait for the next one.
        assert_eq!(length(&fs::metadata("/proc/kmsg").unwrap()).unwrap(), 0);
        assert_eq!(read(Path::new("/proc/self/status")).unwrap(), b"");
    }
}
