//! A file as bytes, whose pages can be given back to the system as they are used up.

use memmap2::UncheckedAdvice;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// A read-only map of a whole file. The file must not be changed while it lives: a writer's
/// changes would show through, and a truncated file ends the process on the next read.
pub struct Mmap(memmap2::Mmap);

impl Mmap {
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the bytes are only ever read as `u8`, for which any content is valid; that
        // nobody rewrites a checkpoint while it loads is this type's documented condition.
        unsafe { memmap2::Mmap::map(&file) }.map(Self)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Drops the resident pages that lie wholly inside `range`. Reading them again works, and
    /// reads the file again. Does nothing where the system cannot.
    ///
    /// # Panics
    /// If `range` does not lie in the file.
    pub fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.0.len(), "range past the file");
        const PAGE: usize = 1 << 16; // a multiple of every page size in use
        let start = range.start.next_multiple_of(PAGE);
        let end = if range.end == self.0.len() { range.end } else { range.end / PAGE * PAGE };
        if start < end {
            // SAFETY: the map is read-only and backed by the file, so a dropped page comes back
            // with the same bytes; references into it stay valid.
            let _advice_only = unsafe {
                self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_the_same() {
        let path = std::env::temp_dir().join(format!("strand-mmap-{}", std::process::id()));
        let content: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let map = Mmap::open(&path).unwrap();
        assert_eq!(map.bytes(), content);
        for range in [0..300_000, 10..20, 70_000..299_999, 300_000..300_000] {
            map.release(range);
            assert_eq!(map.bytes(), content);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
