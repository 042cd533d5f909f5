//! What the machine offers, read once at start.

use std::fs;

use crate::config::{GpuFacts, Machine};

/// Taken where the system doesn't say.
const UNKNOWN_MEMORY: u64 = 4 << 30;

impl Machine {
    /// Free memory (the system's, or what the control group leaves), processors, and the GPU that
    /// was chosen.
    pub fn this(gpu: Option<GpuFacts>) -> Self {
        let free = [system_memory(), group_memory()].into_iter().flatten().min();
        Self {
            free_memory: free.unwrap_or(UNKNOWN_MEMORY),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            gpu,
        }
    }
}

fn system_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Limit less use of the control group (version 2, then 1); `None` where there is no limit.
fn group_memory() -> Option<u64> {
    let text = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
    let files = [
        ("memory.max", "memory.current", "memory.stat", "inactive_file "),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file ",
        ),
    ];
    files.iter().find_map(|(limit, used, statistics, cached)| {
        let (limit, used) = (number(limit)?, number(used)?);
        let cached = text(statistics).and_then(|text| value_of(&text, cached)).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    })
}

/// What the line that begins with `key` says. Files that were read count as used although their
/// pages are given back on demand: a checkpoint just downloaded must not shrink the pool.
fn value_of(statistics: &str, key: &str) -> Option<u64> {
    statistics.lines().find_map(|line| line.strip_prefix(key))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_files_are_found_in_the_statistics() {
        let text = "anon 1000\ninactive_file 4096\ntotal_inactive_file 8192\n";
        assert_eq!(value_of(text, "inactive_file "), Some(4096));
        assert_eq!(value_of(text, "total_inactive_file "), Some(8192));
        assert_eq!(value_of(text, "active_file "), None);
    }
}
