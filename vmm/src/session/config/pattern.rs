//! Patterns by name.

use guest::abi::Pattern;
use serde::{Deserialize, Deserializer, Serializer, de::Error};

/// The name of `pattern`, as `--pattern` takes it.
pub const fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Dense => "dense",
        Pattern::Uniform => "uniform",
        Pattern::Hot => "hot",
        Pattern::Sparse => "sparse",
    }
}

/// The pattern called `name`, if there is one.
pub fn pattern_named(name: &str) -> Option<Pattern> {
    [
        Pattern::Dense,
        Pattern::Uniform,
        Pattern::Hot,
        Pattern::Sparse,
    ]
    .into_iter()
    .find(|pattern| pattern_name(*pattern) == name)
}

pub(super) fn serialize<S: Serializer>(value: &Pattern, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(pattern_name(*value))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pattern, D::Error> {
    let name = String::deserialize(from)?;
    pattern_named(&name).ok_or_else(|| D::Error::custom(format_args!("unknown pattern {name:?}")))
}
