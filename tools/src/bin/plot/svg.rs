//! What drawings are made of: plain shapes and text only, so that every viewer and converter shows the same.

use std::fmt::Write;

/// The beginning of a document of that size: its title and what is said under it, from `left` on.
pub(crate) fn open(width: f64, height: f64, left: f64, title: &str, subtitle: &str) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222222\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    let bold = "font-size=\"18\" font-weight=\"bold\"";
    svg.push_str(&text(left, 30.0, "start", bold, title));
    svg.push_str(&text(left, 52.0, "start", "fill=\"#555555\"", subtitle));
    svg
}

pub(crate) fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
        from.0, from.1, to.0, to.1
    );
}

/// A box with its upper left corner at `at`.
pub(crate) fn bar(svg: &mut String, at: (f64, f64), size: (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{:.2}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{:.1}\" fill=\"{colour}\"/>",
        at.0, at.1, size.0, size.1
    );
}

pub(crate) fn text(x: f64, y: f64, anchor: &str, more: &str, text: &str) -> String {
    format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{}</text>\n",
        escape(text)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
pub(crate) mod tests {
    /// Fails unless `svg` is one element with whatever in it, tags in pairs, attributes in quotes.
    pub(crate) fn assert_well_formed(svg: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = svg.trim();
        while let Some(start) = rest.find('<') {
            let words = &rest[..start];
            assert!(!words.contains('>'), "a bare > in {words:?}");
            for (at, _) in words.match_indices('&') {
                let entity = ["&amp;", "&lt;", "&gt;"];
                assert!(entity.iter().any(|e| words[at..].starts_with(e)), "{words}");
            }
            let end = start + rest[start..].find('>').expect("the tag ends");
            let tag = &rest[start + 1..end];
            assert!(!tag.contains('<'), "<{tag}>");
            assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
            let name = tag
                .trim_matches('/')
                .split_whitespace()
                .next()
                .expect("a name");
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name);
            }
            rest = &rest[end + 1..];
            assert!(!open.is_empty() || rest.is_empty(), "more than one element");
        }
        assert_eq!((rest, open.len()), ("", 0));
        assert!(
            !svg.contains("NaN") && !svg.contains("inf"),
            "a place that is none"
        );
    }
}
