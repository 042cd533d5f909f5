//! How attention is cut into jobs for threads.
//!
//! A block is up to [`QUERIES`] queries of one KV head (rows of consecutive positions times the
//! heads that share it), so each key is read once for all of them. A row alone costs reading, not
//! arithmetic: it takes several KV heads at once, whose keys are neighbours in memory, and its
//! splits are computed side by side, to be merged in their order.

use super::{PagedAttention, SPLIT};
use crate::view::CacheShape;
use std::ops::Range;

/// Queries of a block, unless one row has more heads to a KV head.
const QUERIES: usize = 32;

/// What one thread computes at a time.
#[derive(Clone)]
pub(super) struct Job {
    pub sequence: usize,
    pub rows: Range<usize>,
    /// Of K and V.
    pub kv_heads: Range<usize>,
    /// The one split to compute, if not all.
    pub split: Option<usize>,
}

impl PagedAttention {
    /// The blocks of rows, cut by heads and, where a row is alone, by splits: those of a row and
    /// its heads follow each other.
    pub(super) fn jobs(&self, cache: CacheShape) -> Vec<Job> {
        let blocks = self.row_blocks(cache);
        let splits = |row: usize| self.visible(self.positions[row]).len().div_ceil(SPLIT);
        let alone = blocks.iter().filter(|(_, rows)| rows.len() == 1);
        let alone: usize = alone.map(|(_, rows)| splits(rows.start)).sum();
        // enough jobs that threads end together
        let heads_together = (cache.kv_heads * alone).div_ceil(self.threads.count() * 2);
        let parts = cache.kv_heads.div_ceil(heads_together.clamp(1, cache.kv_heads));
        let heads_together = cache.kv_heads.div_ceil(parts);
        let mut jobs = Vec::new();
        // The last blocks see the most keys: they go first, so that threads end together.
        for (sequence, rows) in blocks.into_iter().rev() {
            let (each, splits) = match rows.len() {
                1 => (heads_together, splits(rows.start)),
                _ => (1, 1),
            };
            for first in (0..cache.kv_heads).step_by(each) {
                let kv_heads = first..cache.kv_heads.min(first + each);
                let job = Job { sequence, rows: rows.clone(), kv_heads, split: None };
                match splits {
                    1 => jobs.push(job),
                    _ => jobs.extend((0..splits).map(|n| Job { split: Some(n), ..job.clone() })),
                }
            }
        }
        jobs
    }

    /// Each sequence's rows in runs of consecutive positions, short enough for a job.
    fn row_blocks(&self, cache: CacheShape) -> Vec<(usize, Range<usize>)> {
        let most = (QUERIES / (self.num_heads / cache.kv_heads)).max(1);
        let mut blocks = Vec::new();
        for sequence in 0..self.cu_seqlens_q.len() - 1 {
            let rows = self.rows(sequence);
            let mut start = rows.start;
            for row in rows.clone() {
                let follows = row + 1 < rows.end
                    && self.positions[row + 1] == self.positions[row].wrapping_add(1);
                if !follows || row + 1 - start == most {
                    blocks.push((sequence, start..row + 1));
                    start = row + 1;
                }
            }
        }
        blocks
    }
}
