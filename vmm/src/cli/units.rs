//! Sizes, times and counts, as people write and read them.

use std::time::Duration;

use indicatif::HumanCount;

/// Bytes of a size such as `256M`, `64KiB` or `1.5G`. Units are binary; no unit is bytes.
pub fn parse_size(text: &str) -> Result<u64, ParseError> {
    let (number, unit) = split(text)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => {
            return Err(ParseError::UnknownUnit {
                unit: unit.to_owned(),
                known: "K, M, G or T (binary: KiB, MiB, GiB, TiB)",
            });
        }
    };
    scale(number, 1 << shift)
}

/// The time of a text such as `20ms`, `500us`, `1.5s` or `2m`. There must be a unit.
pub fn parse_time(text: &str) -> Result<Duration, ParseError> {
    let (number, unit) = split(text)?;
    let nanos = match unit {
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "" => {
            return Err(ParseError::NoUnit {
                number: number.to_owned(),
            });
        }
        _ => {
            return Err(ParseError::UnknownUnit {
                unit: unit.to_owned(),
                known: "us, ms, s, m or h",
            });
        }
    };
    scale(number, nanos).map(Duration::from_nanos)
}

/// Why a size or a time is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Does not begin with a number.
    #[error("must be a number and a unit, such as {}", "256M or 20ms")]
    NoNumber,
    /// A number alone, where that could mean several things.
    #[error("has no unit: write {number}us, {number}ms, {number}s or {number}m")]
    NoUnit {
        /// The number.
        number: String,
    },
    /// A unit that is none.
    #[error("unknown unit {unit:?}: use {known}")]
    UnknownUnit {
        /// What was given.
        unit: String,
        /// What there is.
        known: &'static str,
    },
    /// More than 64 bits hold.
    #[error("is too large")]
    TooLarge,
}

/// Splits a number from its unit.
fn split(text: &str) -> Result<(&str, &str), ParseError> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    // f64 would take "." and "1.", too. Here both are mistakes.
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(ParseError::NoNumber);
    }
    Ok((number, unit.trim_start()))
}

/// `number` times `unit`. Whole numbers are exact.
fn scale(number: &str, unit: u64) -> Result<u64, ParseError> {
    if number.contains('.') {
        let number: f64 = number.parse().map_err(|_| ParseError::NoNumber)?;
        let scaled = (number * unit as f64).round();
        if scaled < u64::MAX as f64 {
            Ok(scaled as u64)
        } else {
            Err(ParseError::TooLarge)
        }
    } else {
        // Nothing but digits: parsing fails only for too many of them.
        number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit))
            .ok_or(ParseError::TooLarge)
    }
}

/// `number` with a comma every three digits.
pub fn count(number: u64) -> String {
    HumanCount(number).to_string()
}

/// `bytes` in a binary unit, three digits of it.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = 0;
    // 999.5 would be shown with four digits.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `time` in the unit that fits, three digits of it.
pub fn time(time: Duration) -> String {
    micros(time.as_secs_f64() * 1e6)
}

/// A time somebody chose, in full, in the largest unit that leaves something before the point.
pub fn exact_time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 1.0 {
        format!("{seconds} s")
    } else if seconds >= 1e-3 {
        format!("{} ms", time.as_nanos() as f64 / 1e6)
    } else {
        format!("{} µs", time.as_nanos() as f64 / 1e3)
    }
}

/// `micros` microseconds in the unit that fits, three digits of it.
pub fn micros(micros: f64) -> String {
    if micros < 0.05 {
        "0 µs".to_owned()
    } else if micros < 999.5 {
        format!("{} µs", three_digits(micros))
    } else if micros < 999_500.0 {
        format!("{} ms", three_digits(micros / 1e3))
    } else if micros < 119.5e6 {
        format!("{} s", three_digits(micros / 1e6))
    } else {
        let seconds = (micros / 1e6).round();
        format!("{} min {:02} s", (seconds / 60.0) as u64, seconds % 60.0)
    }
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("12B", 12),
            ("3K", 3 << 10),
            ("3k", 3 << 10),
            ("3KiB", 3 << 10),
            ("256M", 256 << 20),
            ("256 MiB", 256 << 20),
            ("4G", 4 << 30),
            ("1.5g", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn times_need_a_unit() {
        for (text, time) in [
            ("0s", Duration::ZERO),
            ("500us", Duration::from_micros(500)),
            ("500µs", Duration::from_micros(500)),
            ("20ms", Duration::from_millis(20)),
            ("1.5s", Duration::from_millis(1500)),
            ("2m", Duration::from_secs(120)),
            ("2 min", Duration::from_secs(120)),
            ("1h", Duration::from_secs(3600)),
        ] {
            assert_eq!(parse_time(text), Ok(time), "{text}");
        }
        assert_eq!(
            parse_time("10").unwrap_err().to_string(),
            "has no unit: write 10us, 10ms, 10s or 10m"
        );
    }

    #[test]
    fn nonsense_is_named() {
        for text in ["", "M", "-1M", ".", "1.", ".5M", "1.2.3M", "ten"] {
            assert_eq!(parse_size(text), Err(ParseError::NoNumber), "{text}");
            assert_eq!(parse_time(text), Err(ParseError::NoNumber), "{text}");
        }
        assert_eq!(
            parse_size("256MB").unwrap_err().to_string(),
            "unknown unit \"MB\": use K, M, G or T (binary: KiB, MiB, GiB, TiB)"
        );
        assert_eq!(
            parse_time("1d").unwrap_err().to_string(),
            "unknown unit \"d\": use us, ms, s, m or h"
        );
    }

    #[test]
    fn what_64_bits_do_not_hold_is_refused() {
        assert_eq!(parse_size("16777215T"), Ok(16_777_215 << 40));
        for text in ["16777216T", "16777216.5T", "99999999999999999999"] {
            assert_eq!(parse_size(text), Err(ParseError::TooLarge), "{text}");
        }
        assert_eq!(parse_time("5124096h"), Err(ParseError::TooLarge));
    }

    #[test]
    fn counts_have_commas() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(2_941), "2,941");
        assert_eq!(count(1_234_567), "1,234,567");
    }

    #[test]
    fn bytes_have_three_digits() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (256 << 20, "256 MiB"),
            (1000 << 20, "0.98 GiB"),
            (1_277_968_384, "1.19 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn times_have_three_digits() {
        for (number, text) in [
            (0.0, "0 µs"),
            (0.5, "0.50 µs"),
            (9.999, "10.0 µs"),
            (56.34, "56.3 µs"),
            (999.4, "999 µs"),
            (999.6, "1.00 ms"),
            (41_000.0, "41.0 ms"),
            (999_600.0, "1.00 s"),
            (60e6, "60.0 s"),
            (119.4e6, "119 s"),
            (119.6e6, "2 min 00 s"),
            (3_725e6, "62 min 05 s"),
        ] {
            assert_eq!(micros(number), text);
        }
        assert_eq!(time(Duration::from_micros(1_210)), "1.21 ms");
    }

    #[test]
    fn times_that_were_chosen_are_exact() {
        for (micros, text) in [
            (20_000, "20 ms"),
            (10_000_000, "10 s"),
            (1_234_567, "1.234567 s"),
            (500, "500 µs"),
            (1_500, "1.5 ms"),
        ] {
            assert_eq!(exact_time(Duration::from_micros(micros)), text);
        }
    }
}
