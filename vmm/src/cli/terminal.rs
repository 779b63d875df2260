//! The terminal that the status block is drawn on.

use std::io;
use std::sync::{Mutex, PoisonError};

use indicatif::TermLike;
use rustix::termios::tcgetwinsize;

use super::outlet::Outlet;

/// Columns and rows of a terminal that does not tell.
const USUAL: (u16, u16) = (80, 24);

/// Standard error, which is a terminal. What is drawn is sent in one piece, so that it is never half dropped.
#[derive(Debug)]
pub(crate) struct Terminal {
    outlet: Outlet,
    drawn: Mutex<String>,
}

impl Terminal {
    pub(crate) fn new(outlet: Outlet) -> Self {
        Self {
            outlet,
            drawn: Mutex::default(),
        }
    }

    fn draw(&self, parts: &[&str]) {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        drawn.extend(parts.iter().copied());
    }

    /// Moves the cursor `n` places by escape sequence `direction`: of zero places it would move one.
    fn move_cursor(&self, n: usize, direction: &str) {
        if n > 0 {
            self.draw(&["\x1b[", &n.to_string(), direction]);
        }
    }

    fn size() -> (u16, u16) {
        match tcgetwinsize(io::stderr()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
            _ => USUAL,
        }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        Self::size().0
    }

    fn height(&self) -> u16 {
        Self::size().1
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, "A");
        Ok(())
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, "B");
        Ok(())
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, "C");
        Ok(())
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, "D");
        Ok(())
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(&[text, "\n"]);
        Ok(())
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.draw(&[text]);
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw(&["\r\x1b[2K"]);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if !drawn.is_empty() {
            self.outlet.send(std::mem::take(&mut *drawn));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_drawn_comes_in_one_piece() {
        let (mut reader, writer) = io::pipe().unwrap();
        let outlet = Outlet::to_file(writer.into()).unwrap();
        let terminal = Terminal::new(outlet.clone());
        terminal.move_cursor_up(2).unwrap();
        terminal.move_cursor_down(0).unwrap();
        terminal.clear_line().unwrap();
        terminal.write_line("a").unwrap();
        terminal.write_str("b").unwrap();
        outlet.finish(Duration::ZERO).unwrap();
        terminal.flush().unwrap();
        terminal.flush().unwrap();
        outlet.finish(Duration::from_secs(60)).unwrap();
        let mut bytes = [0; 64];
        let count = reader.read(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"\x1b[2A\r\x1b[2Ka\nb");
    }
}
