//! Text for the VMM to print.

use core::fmt::{self, Write};

use crate::abi::{PORT_CONSOLE, Text};
use crate::port;

/// Longest line; what is beyond is cut.
const LINE: usize = 512;

/// Prints a line.
pub fn print(line: fmt::Arguments<'_>) {
    send(PORT_CONSOLE, line);
}

/// Writes the gpa of a [`Text`] with `line` to `port`.
pub fn send(port: u16, line: fmt::Arguments<'_>) {
    let mut buffer = Buffer {
        bytes: [0; LINE],
        len: 0,
    };
    // Fails for a line that was cut, which is as good as it gets.
    let _ = buffer.write_fmt(line);
    let text = Text {
        gpa: buffer.bytes.as_ptr().addr() as u64,
        len: buffer.len as u64,
    };
    port::out_pointer(port, &text);
}

struct Buffer {
    bytes: [u8; LINE],
    len: usize,
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.len..];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        if taken == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}
