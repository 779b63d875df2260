//! What a host says on its second serial port, which has the results of the tasks and nothing else.
//!
//! `inside/init.sh` writes lines. One that begins with `@` is its own; one with a dot is what a task has
//! printed; all else is padding.

use std::time::Duration;

/// Something that a host has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Its kernel and processor.
    Host(String),
    /// There is a KVM, and tasks will follow, after this long.
    Ready(Duration),
    /// There is no KVM.
    NoKvm,
    /// A task begins, at a time since boot.
    Begun(usize, Duration),
    /// A line that it prints.
    Line(String),
    /// It has ended, with an exit code, at a time since boot.
    Ended(usize, i32, Duration),
    /// All tasks have ended.
    Done(Duration),
}

/// Makes events of bytes as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// The beginning of a line that is not all there yet.
    rest: Vec<u8>,
}

impl Reader {
    /// What `bytes`, which follow those before, complete.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.rest.split_off(end + 1);
        let lines = std::mem::replace(&mut self.rest, rest);
        String::from_utf8_lossy(&lines)
            .lines()
            .filter_map(event)
            .collect()
    }
}

fn event(line: &str) -> Option<Event> {
    if let Some(printed) = line.strip_prefix('.') {
        return Some(Event::Line(printed.to_owned()));
    }
    let (kind, rest) = line
        .strip_prefix('@')?
        .split_once(' ')
        .unwrap_or((&line[1..], ""));
    let mut words = rest.split(' ');
    let mut word = || words.next();
    match kind {
        "host" => Some(Event::Host(rest.to_owned())),
        "nokvm" => Some(Event::NoKvm),
        "ready" => Some(Event::Ready(seconds(word()?)?)),
        "begin" => Some(Event::Begun(word()?.parse().ok()?, seconds(word()?)?)),
        "end" => {
            let number = word()?.parse().ok()?;
            let code = word()?.parse().ok()?;
            Some(Event::Ended(number, code, seconds(word()?)?))
        }
        "done" => Some(Event::Done(seconds(word()?)?)),
        _ => None,
    }
}

fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "@host 6.1.0-50-amd64, AMD EPYC, 2 CPUs\n@ready 5.21\n@begin 0 5.30\n#####\n.ok: 3 snapshots\n.\n\
        .@end 0 0 1.0\n.#\n@end 0 3 9.50\n@done 9.60\n";

    fn expected() -> Vec<Event> {
        let at = Duration::from_millis;
        vec![
            Event::Host("6.1.0-50-amd64, AMD EPYC, 2 CPUs".to_owned()),
            Event::Ready(at(5210)),
            Event::Begun(0, at(5300)),
            Event::Line("ok: 3 snapshots".to_owned()),
            Event::Line(String::new()),
            Event::Line("@end 0 0 1.0".to_owned()),
            Event::Line("#".to_owned()),
            Event::Ended(0, 3, at(9500)),
            Event::Done(at(9600)),
        ]
    }

    #[test]
    fn nothing_a_task_prints_is_taken_for_the_hosts_own() {
        assert_eq!(Reader::default().feed(SAID.as_bytes()), expected());
    }

    #[test]
    fn it_does_not_matter_in_what_pieces_it_arrives() {
        for size in 1..20 {
            let mut reader = Reader::default();
            let pieces = SAID.as_bytes().chunks(size);
            let events = Vec::from_iter(pieces.flat_map(|piece| reader.feed(piece)));
            assert_eq!(events, expected(), "{size}");
        }
    }

    #[test]
    fn lines_that_make_no_sense_are_no_events() {
        let said =
            "@\n@end\n@end x 0 1\n@end 1 x 1\n@end 1 1 -1\n@begin 1\n@ready soon\n@what 1\n\nx\n";
        assert_eq!(Reader::default().feed(said.as_bytes()), []);
        // A carriage return that a terminal has added, and bytes that are no text.
        let events = Reader::default().feed(b".a\r\n.\xff\n");
        let lines = ["a", "\u{fffd}"].map(|line| Event::Line(line.to_owned()));
        assert_eq!(events, lines);
    }
}
