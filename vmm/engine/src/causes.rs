//! What caused an error: the cause of any kind, and the whole chain in words.

use std::error::Error;

/// What went wrong in a part that somebody else supplies (memory, vCPUs, a device), in that part's words.
pub type Cause = Box<dyn Error + Send + Sync>;

/// The message of `error` and those of its causes, on one line, with `: ` between them.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
