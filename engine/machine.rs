//! What the machine offers, read once at start.

use std::fs;

use crate::config::Machine;

/// Taken where the system doesn't say.
const UNKNOWN_MEMORY: u64 = 4 << 30;

impl Machine {
    /// Free memory (the system's, or what the control group leaves) and processors.
    pub fn this() -> Self {
        let free = [system_memory(), group_memory()].into_iter().flatten().min();
        Self {
            free_memory: free.unwrap_or(UNKNOWN_MEMORY),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
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
    let read = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let root = "/sys/fs/cgroup";
    let files = [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ];
    files.iter().find_map(|(limit, used)| {
        let limit = read(&format!("{root}/{limit}"))?;
        Some(limit.saturating_sub(read(&format!("{root}/{used}"))?))
    })
}
