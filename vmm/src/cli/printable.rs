//! Text of a guest's, made harmless.

/// `text` with control characters spelled out: a guest must not drive the user's terminal.
pub(crate) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\t' {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_drive_the_terminal() {
        assert_eq!(printable("\x1b[2Jhé\tx\r"), "\\u{1b}[2Jhé\tx\\r");
    }
}
