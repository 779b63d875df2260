//! Archives that Linux unpacks into its first file system: cpio, format `newc`.
//! <https://docs.kernel.org/driver-api/early-userspace/buffer-format.html>

use std::collections::BTreeMap;
use std::io::{self, Write};

/// A file system to be: what is in it, by path without a leading slash.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Folder,
    Program(Vec<u8>),
    Link(String),
}

impl Archive {
    /// Puts a file that can be executed at `path`, in folders that are made for it.
    pub(crate) fn program(&mut self, path: &str, content: impl Into<Vec<u8>>) {
        self.insert(path, Entry::Program(content.into()));
    }

    /// Puts a symbolic link to `target` at `path`.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Link(target.to_owned()));
    }

    /// Puts an empty folder at `path`.
    pub(crate) fn folder(&mut self, path: &str) {
        self.insert(path, Entry::Folder);
    }

    /// Whether something is at `path`.
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_start_matches('/'))
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            let parent = self.entries.entry(path[..at].to_owned());
            parent.or_insert(Entry::Folder);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Writes it down. A folder comes before what is in it: its path is the lesser one.
    pub(crate) fn write(&self, mut out: impl Write) -> io::Result<()> {
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            let (mode, content) = match entry {
                Entry::Folder => (0o040_755, &[][..]),
                Entry::Program(content) => (0o100_755, content.as_slice()),
                Entry::Link(target) => (0o120_777, target.as_bytes()),
            };
            write_entry(&mut out, number, path, mode, content)?;
        }
        write_entry(&mut out, 0, "TRAILER!!!", 0, &[])?;
        out.flush()
    }
}

fn write_entry(
    out: &mut impl Write,
    number: u32,
    path: &str,
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(content.len()).map_err(|_| {
        let name = format!("{path} is too large for an archive");
        io::Error::new(io::ErrorKind::InvalidInput, name)
    })?;
    let name_size = path.len() + 1;
    // Inode, mode, user, group, links, time, size, device (two), device of a node (two),
    // size of the name, checksum.
    let fields = [
        number,
        mode,
        0,
        0,
        1,
        0,
        size,
        0,
        0,
        0,
        0,
        name_size as u32,
        0,
    ];
    write!(out, "070701")?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    const HEADER: usize = 110;
    pad(out, HEADER + name_size)?;
    out.write_all(content)?;
    pad(out, content.len())
}

/// Fills what was written up to a multiple of four.
fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..written.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.program("/a/b", "hello");
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let zeros = |n: usize| "0".repeat(8 * n);
        let header = |number, mode, size: usize, name: usize| {
            format!(
                "070701{number:08x}{mode:08x}{}00000001{}{size:08x}{}{name:08x}{}",
                zeros(2),
                zeros(1),
                zeros(4),
                zeros(1)
            )
        };
        let expected = [
            header(1, 0o040_755, 0, 2) + "a\0",
            header(2, 0o100_755, 5, 4) + "a/b\0" + "\0\0" + "hello" + "\0\0\0",
            header(0, 0, 0, 11) + "TRAILER!!!\0" + "\0\0\0",
        ];
        assert_eq!(text, expected.concat());
    }

    #[test]
    fn folders_are_made_once_and_come_first() {
        let mut archive = Archive::default();
        archive.folder("proc");
        archive.program("a-b", "");
        archive.program("/a/x/y", "");
        archive.link("/a/x/z", "y");
        let paths = Vec::from_iter(archive.entries.keys().map(String::as_str));
        assert_eq!(paths, ["a", "a-b", "a/x", "a/x/y", "a/x/z", "proc"]);
        assert!(archive.contains("/a/x/y"));
        assert!(!archive.contains("/a/x/w"));
    }

    #[test]
    fn everything_begins_at_a_multiple_of_four() {
        for length in 0..9 {
            let mut archive = Archive::default();
            archive.program(&"n".repeat(length + 1), "c".repeat(length));
            let mut bytes = Vec::new();
            archive.write(&mut bytes).unwrap();
            assert_eq!(bytes.len() % 4, 0, "{length}");
            let at = bytes.len() - 124;
            assert!(bytes[at..].starts_with(b"070701"), "{length}");
        }
    }
}
