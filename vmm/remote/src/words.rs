//! What went wrong, in words: without what was asked for, which whoever asked knows, and without what is in a signed URL.

use std::error::Error;

/// What went wrong. No part of it has credentials: what is behind `?` in a URL is left out.
pub(crate) fn words(error: &object_store::Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = Error::source(error);
    while let Some(error) = cause {
        texts.push(error.to_string());
        cause = error.source();
    }
    let mut parts: Vec<String> = Vec::new();
    for (number, text) in texts.iter().enumerate() {
        // Each has the text of the next at its end, or not.
        let own = match texts.get(number + 1) {
            Some(next) => text.strip_suffix(next.as_str()).unwrap_or(text),
            None => text,
        };
        let own = own.trim_end_matches([' ', '-', ':']).trim();
        // That there was a request, and to where.
        let is_known = own.starts_with("Error performing ")
            || own.starts_with("Generic ")
            || own.starts_with("Object at location ")
            || own.starts_with("The operation lacked ")
            || own.starts_with("HTTP error: request or response body error for url")
            || own.starts_with("HTTP error: error sending request for url");
        if !own.is_empty() && !is_known && !parts.iter().any(|part| part == own) {
            parts.push(shortened(own));
        }
    }
    match parts.is_empty() {
        true => shortened(&texts[0]),
        false => parts.join(": "),
    }
}

/// `text` without the queries of URLs, and what an XML answer says instead of the XML.
fn shortened(text: &str) -> String {
    let text = match text.find('<') {
        Some(at) => {
            let (before, xml) = text.split_at(at);
            let of = |tag: &str| {
                let (_, rest) = xml.split_once(&format!("<{tag}>"))?;
                Some(rest.split_once("</")?.0)
            };
            let said: Vec<_> = ["Code", "Message"].into_iter().filter_map(of).collect();
            format!("{before}{}", said.join(", "))
        }
        None => text.to_owned(),
    };
    let words = text
        .split_whitespace()
        .map(|word| match word.contains("://") {
            true => word.split('?').next().unwrap_or(word),
            false => word,
        });
    let text = words.collect::<Vec<_>>().join(" ");
    let mut text = text.trim_end_matches([' ', '-', ':']).to_owned();
    // Whatever a server says, it is one line.
    if let Some((at, _)) = text.char_indices().nth(400) {
        text.truncate(at);
        text.push_str("...");
    }
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: &str) -> String {
        words(&object_store::Error::Generic {
            store: "S3",
            source: source.into(),
        })
    }

    #[test]
    fn what_a_server_says_is_said_without_its_markup() {
        let said = generic(
            "Server returned non-2xx status code: 503 Service Unavailable: <?xml version=\"1.0\"?><Error><Code>\
             SlowDown</Code><Message>Reduce your rate</Message></Error>",
        );
        assert_eq!(
            said,
            "Server returned non-2xx status code: 503 Service Unavailable: SlowDown, Reduce your rate"
        );
    }

    #[test]
    fn what_is_signed_is_not_said() {
        let said = generic("cannot get https://a.b/c?sig=secret at all");
        assert_eq!(said, "cannot get https://a.b/c at all");
    }

    #[test]
    fn what_a_server_says_is_one_line_and_not_too_long() {
        let said = generic(&format!("a\nb\x1b[2J {}", "x".repeat(1000)));
        assert!(
            said.starts_with("a b") && said.chars().count() < 420,
            "{said}"
        );
        assert!(!said.contains('\x1b'), "{said}");
    }
}
