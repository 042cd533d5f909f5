//! The day, for chat templates that print it and for lists.

use std::time::{SystemTime, UNIX_EPOCH};

/// Today as `YYYY-MM-DD`, by universal time; `None` where the clock stands before 1970.
pub fn today() -> Option<String> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(of(since.as_secs()))
}

/// The day so many seconds after 1970 began.
pub fn of(seconds: u64) -> String {
    civil(seconds / 86_400)
}

/// The date so many days after 1970-01-01.
///
/// Counts in years that begin with March, so that the leap day is the last of its year, and in
/// eras of 400 years, which all have 146,097 days.
fn civil(days: u64) -> String {
    // 719,468 days lie between 0000-03-01 and 1970-01-01
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = 400 * era + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (days, date) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (19_782, "2024-02-29"),
            (20_088, "2024-12-31"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(civil(days), date, "{days}");
        }
    }
}
