//! From the pages of views, active or not, to the tables attention reads, on the device.

use super::{Gpu, Launch, Slice, Tables};
use crate::error::Error;
use crate::filter_view::PageEntry;

/// Bytes of a page on the device.
pub const PAGE_BYTES: usize = 16;

/// A page as the device takes it: block u32, stored position u32, first row u16, num_valid u16,
/// active u16, segment u16.
pub fn page_bytes(page: &PageEntry) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    bytes[0..4].copy_from_slice(&page.block.to_le_bytes());
    bytes[4..8].copy_from_slice(&page.stored_position.to_le_bytes());
    bytes[8..10].copy_from_slice(&page.first_row.to_le_bytes());
    bytes[10..12].copy_from_slice(&page.num_valid.to_le_bytes());
    bytes[12..14].copy_from_slice(&u16::from(page.active).to_le_bytes());
    bytes[14..16].copy_from_slice(&page.segment.to_le_bytes());
    bytes
}

/// What [`crate::filter_view`] does, for all sequences at once: the active pages with rows, in
/// order, each behind the keys of those before it. A sequence's entries stand where its pages
/// stand, from the first on; those behind are as they were.
pub struct FilterView<'a> {
    /// [`PAGE_BYTES`] each.
    pub pages: &'a Slice,
    /// u32 per sequence: its pages are `starts[i]..ends[i]`. Of one array of offsets, `starts` is
    /// the array and `ends` the array from its second number on.
    pub starts: &'a Slice,
    pub ends: &'a Slice,
    pub num_sequences: usize,
    /// Pages that `pages` and `tables.entries` have room for: sequences are cut off there.
    pub max_pages: usize,
    pub block_size: usize,
    /// Written but for `starts`, which must be those above.
    pub tables: &'a Tables,
}

impl FilterView<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "filter_view";
        let count = self.num_sequences;
        if self.block_size == 0 {
            return Err(Error::value(OP, "block_size", 0, "at least 1"));
        }
        let pages = self.pages.operand((OP, "pages"), self.max_pages, PAGE_BYTES, 16)?;
        let [_, starts, num_entries, num_keys] = self.tables.addresses(OP, count)?;
        let found = self.starts.operand((OP, "starts"), count, 4, 4)?;
        if starts != found {
            return Err(Error::device(OP, "the tables must start where the pages do"));
        }
        let entries = &self.tables.entries;
        let args = [
            pages,
            starts,
            self.ends.operand((OP, "ends"), count, 4, 4)?,
            self.max_pages as u64,
            self.block_size as u64,
            entries.operand((OP, "entries"), self.max_pages, 16, 16)?,
            num_entries,
            num_keys,
        ];
        let grid = [count as u32, 1, 1];
        let launch = Launch { kernel: "filter_view", grid, block: 256, shared: 32, args: &args };
        let mut slices = vec![self.pages, self.starts, self.ends];
        slices.extend(self.tables.slices());
        // SAFETY: the kernel's arguments; pages outside `max_pages` are left out.
        unsafe { gpu.launch(&launch, &slices) }
    }
}
