//! Sizes, counts and times as a person writes them: `512M`, `4G`, `30s`.

use std::num::NonZeroU64;
use std::time::Duration;

/// A guest's RAM has at least this many bytes.
const RAM_MIN: u64 = 16 << 20;
/// And at most this many: what 40-bit physical addresses reach, less the hole.
const RAM_MAX: u64 = 512 << 30;
/// vCPUs of one machine.
pub(super) const CPUS_MAX: u32 = 64;

/// The longest prefix of digits, and what follows it.
fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit))
}

/// Parses a size in bytes: a number with the unit K, M, G or T (binary, `MiB` and `GiB` too), or 0.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let invalid = || format!("`{text}` is not a size: write 512M or 4G");
    let (number, unit) = split(text).ok_or_else(invalid)?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" if number > 0 => {
            return Err(format!("`{text}` needs a unit: write {text}M or {text}G"));
        }
        "" | "K" | "KIB" | "KB" => 10,
        "M" | "MIB" | "MB" => 20,
        "G" | "GIB" | "GB" => 30,
        "T" | "TIB" | "TB" => 40,
        _ => return Err(invalid()),
    };
    Ok(number.saturating_mul(1 << shift))
}

/// Parses an amount of RAM, in bytes.
pub(super) fn ram(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes < RAM_MIN {
        return Err("a guest needs at least 16M of memory".to_owned());
    }
    if bytes > RAM_MAX {
        return Err("a guest can have at most 512G of memory".to_owned());
    }
    // Memory comes in whole 2 MiB pages.
    Ok(bytes.next_multiple_of(2 << 20))
}

/// Parses the size of a disk, in bytes: a number with the unit M, G or T (binary).
pub(super) fn disk(text: &str) -> Result<u64, String> {
    // The smallest journal takes 4M, and ext4 wants it to be no more than a quarter.
    const MIN: u64 = 16 << 20;
    const MAX: u64 = 15 << 40;
    let invalid = || format!("`{text}` is not a size: write 512M or 4G");
    let (number, unit) = split(text).ok_or_else(invalid)?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" => return Err(format!("`{text}` needs a unit: write {text}M or {text}G")),
        "K" | "KIB" | "KB" => 10,
        "M" | "MIB" | "MB" => 20,
        "G" | "GIB" | "GB" => 30,
        "T" | "TIB" | "TB" => 40,
        _ => return Err(invalid()),
    };
    match number.saturating_mul(1 << shift) {
        ..MIN => Err("an ext4 disk has at least 16M".to_owned()),
        bytes @ MIN..=MAX => Ok(bytes),
        _ => Err("an ext4 disk can have at most 15T".to_owned()),
    }
}

/// Parses a rate in bytes a second: a number, with the unit K, M or G (binary) if large.
pub(super) fn bandwidth(text: &str) -> Result<NonZeroU64, String> {
    let invalid = || format!("`{text}` is not a rate: write 500K, 100M or 1G, in bytes a second");
    let (number, unit) = split(text).ok_or_else(invalid)?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KIB" | "KB" => 10,
        "M" | "MIB" | "MB" => 20,
        "G" | "GIB" | "GB" => 30,
        _ => return Err(invalid()),
    };
    NonZeroU64::new(number.saturating_mul(1 << shift)).ok_or_else(invalid)
}

/// Parses a number of operations a second.
pub(super) fn operations(text: &str) -> Result<NonZeroU64, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a number of operations a second: write 1000"))
}

/// RAM as a person would write it.
pub(super) fn show_ram(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 30) {
        format!("{}G", bytes >> 30)
    } else {
        format!("{}M", bytes >> 20)
    }
}

/// Parses a number of vCPUs.
pub(super) fn cpus(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|cpus| (1..=CPUS_MAX).contains(cpus))
        .ok_or_else(|| format!("a guest can have 1 to {CPUS_MAX} vCPUs"))
}

/// Parses a time: a number with the unit ms, s, m or h; without one, seconds.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let invalid = || format!("`{text}` is not a time: write 500ms, 30s, 5m or 1h");
    let (number, unit) = split(text).ok_or_else(invalid)?;
    let ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(invalid()),
    };
    match number.saturating_mul(ms) {
        0 => Err("a time limit must be longer than nothing".to_owned()),
        ms => Ok(Duration::from_millis(ms.min(u64::from(u32::MAX)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_limits() {
        assert_eq!(ram("512M"), Ok(512 << 20));
        assert_eq!(ram("4GiB"), Ok(4 << 30));
        assert_eq!(ram("17M"), Ok(18 << 20), "rounded up to whole pages");
        for bad in [
            "",
            "M",
            "0",
            "0M",
            "12",
            "1T",
            "abc",
            "4X",
            "-1M",
            "99999999999999999999G",
        ] {
            assert!(ram(bad).is_err(), "{bad}");
        }
        assert_eq!(show_ram(4 << 30), "4G");
        assert_eq!(show_ram(1536 << 20), "1536M");
    }

    #[test]
    fn disks_have_sizes_that_ext4_can_have() {
        for (text, bytes) in [
            ("16M", 16 << 20),
            ("16384K", 16 << 20),
            ("4GiB", 4 << 30),
            ("15T", 15 << 40),
        ] {
            assert_eq!(disk(text), Ok(bytes));
        }
        for bad in [
            "",
            "M",
            "8",
            "16383K",
            "16T",
            "1P",
            "-1G",
            "99999999999999999999G",
        ] {
            assert!(disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_may_have_units_and_are_never_zero() {
        assert_eq!(bandwidth("100M").map(NonZeroU64::get), Ok(100 << 20));
        assert_eq!(bandwidth("512").map(NonZeroU64::get), Ok(512));
        assert_eq!(operations("1000").map(NonZeroU64::get), Ok(1000));
        for bad in ["", "0", "0M", "M", "1T", "fast", "-1"] {
            assert!(bandwidth(bad).is_err(), "{bad}");
            assert!(operations(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2"), Ok(Duration::from_secs(2)));
        assert_eq!(time("5m"), Ok(Duration::from_secs(300)));
        for bad in ["", "s", "0", "3 days", "-1s"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
