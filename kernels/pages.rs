//! Large pages for large memory: fewer faults when it is first touched, fewer misses afterwards.

/// Zeros on large pages where the system has some. Of integers and floats they take no memory until
/// they are written.
pub fn zeros<T: Clone + Default>(count: usize) -> Vec<T> {
    let mut zeros = vec![T::default(); count];
    prefer_large_pages(&mut zeros);
    zeros
}

/// Asks the system to back memory with its largest pages; worth asking before it is first written,
/// also as a vector's spare capacity. Advice only: nothing is read or written, and where the system
/// has no such pages nothing happens.
pub(crate) fn prefer_large_pages<T>(memory: &mut [T]) {
    // below this hardly any page would be filled
    const LEAST: usize = 1 << 20;
    if size_of_val(memory) >= LEAST {
        advise(memory.as_mut_ptr().cast(), size_of_val(memory));
    }
}

#[cfg(target_os = "linux")]
fn advise(start: *mut u8, bytes: usize) {
    use rustix::mm::{Advice, madvise};
    // Whole pages, also those that begin before or end behind: where neighbours are advised too,
    // a large page may hold a part of each.
    let skipped = start.addr() % rustix::param::page_size();
    // SAFETY: the advice changes what backs a range, not what it holds.
    let _advice_only = unsafe {
        madvise(start.wrapping_sub(skipped).cast(), bytes + skipped, Advice::LinuxHugepage)
    };
}

#[cfg(not(target_os = "linux"))]
fn advise(_: *mut u8, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_holds_what_it_held() {
        let mut bytes = vec![0u8; 9 << 20];
        bytes[5 << 20] = 7;
        prefer_large_pages(&mut bytes);
        assert_eq!(bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>(), 7);
        let mut grown: Vec<u16> = Vec::with_capacity(9 << 20);
        prefer_large_pages(grown.spare_capacity_mut());
        grown.resize(9 << 20, 3);
        assert!(grown.iter().all(|&number| number == 3));
    }
}
