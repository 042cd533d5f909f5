//! From a view (all resident blocks of a context, active or not) to the table attention reads.

/// A block as the view lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    pub block: u32,
    /// Position at which the block's first row was rotated when it was stored.
    pub stored_position: u32,
    /// Rows in use; those beyond are never read.
    pub num_valid: u16,
    pub active: bool,
    pub segment: u16,
}

/// A block as attention sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    pub block: u32,
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
/// If the view holds 2^31 keys or more.
pub fn filter_view(entries: &[PageEntry], out: &mut Vec<TableEntry>) -> u32 {
    let mut first = 0u32;
    for entry in entries.iter().filter(|e| e.active && e.num_valid > 0) {
        let delta = i64::from(first) - i64::from(entry.stored_position);
        out.push(TableEntry {
            block: entry.block,
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
        PageEntry { block, stored_position, num_valid, active, segment: 0 }
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
        assert_eq!(filter_view(&view, &mut out), 25);
        let found: Vec<_> = out.iter().map(|e| (e.block, e.first, e.delta, e.num_valid)).collect();
        assert_eq!(found, [(4, 0, 0, 1), (2, 1, 0, 16), (3, 17, 0, 5), (8, 22, 21, 3)]);
    }

    #[test]
    fn a_segment_stored_further_back_has_a_negative_delta() {
        let mut out = vec![];
        assert_eq!(filter_view(&[page(0, 100, 4, true)], &mut out), 4);
        assert_eq!(out[0].delta, -100);
    }

    #[test]
    fn tables_are_appended() {
        let mut out = vec![];
        filter_view(&[page(0, 0, 4, true)], &mut out);
        filter_view(&[page(1, 0, 2, true)], &mut out);
        assert_eq!(out.iter().map(|e| e.first).collect::<Vec<_>>(), [0, 0]);
    }
}
