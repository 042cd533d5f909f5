//! Byte counts as people write them: `2GiB`, `512M`, `1.5 GB`, `4096`.
//!
//! Parsing and printing are pure. `K`, `M`, `G`, `T` alone mean powers of 1024, as in the memory
//! options of other tools; `KB`, `MB`, `GB`, `TB` mean powers of 1000.

/// Bytes of a text like `2GiB`; the message says what is wrong with it.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err("expected a size like 2GiB, 512MiB or 1000000".to_owned()),
    };
    let number: f64 =
        number.parse().map_err(|_| "expected a size like 2GiB, 512MiB or 1000000".to_owned())?;
    let bytes = (number * scale as f64).round();
    if bytes < 1.0 {
        return Err("must be at least one byte".to_owned());
    }
    if bytes >= u64::MAX as f64 {
        return Err("is more than any machine has".to_owned());
    }
    Ok(bytes as u64)
}

/// The shortest faithful reading: `17 B`, `5.5 MiB`, `1.2 GiB`.
pub fn format(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("2GiB", 2 << 30),
            ("2g", 2 << 30),
            (" 512 MiB ", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("2GB", 2_000_000_000),
            ("4096", 4096),
            ("4096b", 4096),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "GiB", "2 GiBs", "-1", "1.2.3G", "0", "0.1", "nan", "99999999999T"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_in_the_largest_unit_that_fits() {
        assert_eq!(format(17), "17 B");
        assert_eq!(format(1024), "1.0 KiB");
        assert_eq!(format(5_777_728), "5.5 MiB");
        assert_eq!(format(3 << 30), "3.0 GiB");
    }
}
