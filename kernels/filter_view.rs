//! From a view (all resident blocks of a context, active or not) to the table attention reads.

/// A run of rows of a block as the view lists it: `[first_row, first_row + num_valid)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    pub block: u32,
    /// Rows of the block before the run; not of this view.
    pub first_row: u16,
    /// Position at which the row at `first_row` was rotated when it was stored.
    pub stored_position: u32,
    /// Rows of the run; those of the block beyond it are never read.
    pub num_valid: u16,
    pub active: bool,
    pub segment: u16,
}

/// A run of rows as attention sees it; it never leaves its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Physical row of its first key: block x block size + offset.
    pub row: u32,
    /// Logical index of its first key: how many keys are visible before it.
    pub first: u32,
    /// `first - stored_position`: a query at logical position p turns to `p - delta` here.
    pub delta: i32,
    pub num_valid: u16,
}

/// The tables of all sequences of a batch, one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTables {
    pub entries: Vec<TableEntry>,
    /// Sequence i has entries `cu_entries[i]..cu_entries[i + 1]`; the first number is 0.
    pub cu_entries: Vec<u32>,
}

/// Appends the active entries to `out`, in order, each behind the keys of those before it (the
/// running sum of `num_valid`). Returns the number of visible keys. Entries without rows are
/// left out.
///
/// # Panics
/// If the view holds 2^31 keys or more, or if a row's number takes more than 32 bits.
pub fn filter_view(entries: &[PageEntry], block_size: usize, out: &mut Vec<TableEntry>) -> u32 {
    let mut first = 0u32;
    for entry in entries.iter().filter(|e| e.active && e.num_valid > 0) {
        let delta = i64::from(first) - i64::from(entry.stored_position);
        let row = entry.block as usize * block_size + usize::from(entry.first_row);
        out.push(TableEntry {
            row: u32::try_from(row).expect("rows of the cache are numbered in 32 bits"),
            first,
            delta: i32::try_from(delta).expect("positions are below 2^31"),
            num_valid: entry.num_valid,
        });
        first += u32::from(entry.num_valid);
    }
    assert!(i32::try_from(first).is_ok(), "a view of {first} keys");
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(block: u32, stored_position: u32, num_valid: u16, active: bool) -> PageEntry {
        PageEntry { block, first_row: 0, stored_position, num_valid, active, segment: 0 }
    }

    #[test]
    fn inactive_and_empty_entries_leave_no_gap() {
        let view = [
            page(4, 0, 1, true),
            page(9, 1, 16, false),
            page(2, 1, 16, true),
            page(7, 17, 0, true),
            page(3, 17, 5, true),
            page(8, 1, 3, true),
        ];
        let mut out = vec![];
        assert_eq!(filter_view(&view, 16, &mut out), 25);
        let found: Vec<_> = out.iter().map(|e| (e.row, e.first, e.delta, e.num_valid)).collect();
        assert_eq!(found, [(64, 0, 0, 1), (32, 1, 0, 16), (48, 17, 0, 5), (128, 22, 21, 3)]);
    }

    #[test]
    fn a_segment_stored_further_back_has_a_negative_delta() {
        let mut out = vec![];
        assert_eq!(filter_view(&[page(0, 100, 4, true)], 8, &mut out), 4);
        assert_eq!(out[0].delta, -100);
    }

    #[test]
    fn rows_before_the_first_visible_one_take_no_position() {
        let tail = PageEntry { first_row: 5, ..page(3, 20, 11, true) };
        let mut out = vec![];
        assert_eq!(filter_view(&[page(0, 0, 4, true), tail], 16, &mut out), 15);
        assert_eq!(out[1], TableEntry { row: 53, first: 4, delta: -16, num_valid: 11 });
    }

    #[test]
    fn tables_are_appended() {
        let mut out = vec![];
        filter_view(&[page(0, 0, 4, true)], 8, &mut out);
        filter_view(&[page(1, 0, 2, true)], 8, &mut out);
        assert_eq!(out.iter().map(|e| e.first).collect::<Vec<_>>(), [0, 0]);
    }
}
