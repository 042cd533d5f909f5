//! The fast version: blocks of rows against one KV head, split by split.
//!
//! A task is up to [`QUERIES`] queries (rows of consecutive positions times the heads that share
//! a KV head), so each key is read once for all of them. Scores come in tiles of queries x keys,
//! sums in tiles of queries x dimensions; K and V are widened in registers. A task's memory is
//! a few hundred kilobytes whatever the length of the context.

use super::lanes::{dots, load_vectors, prefetch, soften};
use super::{PagedAttention, SPLIT, rescale};
use crate::dtype::Element;
use crate::isa::Kernel;
use crate::rope::rotate;
use crate::simd::{LANES, Simd};
use crate::threads::Disjoint;
use crate::view::{CacheShape, Rows};
use std::ops::Range;

/// Keys by which the caches are asked for ahead of their use: rows lie far apart, where the
/// processor's own prefetching does not follow.
const AHEAD: usize = 16;

/// Queries of a task, unless one row has more heads to a KV head.
const QUERIES: usize = 32;

impl PagedAttention {
    pub(super) fn fast<E: Element>(
        &self,
        q: Rows,
        cache: CacheShape,
        k: &[E],
        v: &[E],
    ) -> Vec<f32> {
        let mut out = vec![0f32; q.count * q.width];
        let blocks = self.row_blocks(cache);
        let shared = Disjoint::new(&mut out);
        self.threads.run(blocks.len() * cache.kv_heads, |task| {
            // The last blocks see the most keys: they go first, so that threads end together.
            let (sequence, rows) = &blocks[blocks.len() - 1 - task / cache.kv_heads];
            let kv_head = task % cache.kv_heads;
            let task = Task::new(self, q, cache, (*sequence, rows.clone(), kv_head));
            let finished = self.threads.isa().run(Run { task, k, v });
            let (group, d) = (self.num_heads / cache.kv_heads, cache.head_dim);
            for (i, row) in rows.clone().enumerate() {
                let start = row * q.width + kv_head * group * d;
                // SAFETY: a task alone has this row and KV head, and the heads that share a KV
                // head are disjoint from all others; the slice ends with this iteration.
                let out = unsafe { shared.slice(start..start + group * d) };
                for (g, out) in out.chunks_exact_mut(d).enumerate() {
                    out.copy_from_slice(&finished.query(&finished.out, i * group + g)[..d]);
                }
            }
        });
        out
    }

    /// Each sequence's rows in runs of consecutive positions, short enough for a task.
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

/// Query vectors are padded to `padded` dimensions with zeros. Query i * group + g is head g of
/// the KV head's group, of the task's row i.
struct Task<'a> {
    op: &'a PagedAttention,
    cache: CacheShape,
    sequence: usize,
    kv_head: usize,
    positions: &'a [u32],
    group: usize,
    padded: usize,
    q: Vec<f32>,
    turned: Vec<f32>,
    /// A row of scores, then weights, for each query.
    scores: Vec<f32>,
    score_width: usize,
    /// Offsets in the caches of the keys of this split.
    offsets: Vec<usize>,
    split: Sums,
    total: Sums,
    out: Vec<f32>,
}

struct Sums {
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
}

impl Sums {
    fn new(queries: usize, padded: usize) -> Self {
        let (max, sum) = (vec![f32::NEG_INFINITY; queries], vec![0.0; queries]);
        Self { max, sum, out: vec![0.0; queries * padded] }
    }
}

impl<'a> Task<'a> {
    fn new(
        op: &'a PagedAttention,
        rows_of_q: Rows,
        cache: CacheShape,
        (sequence, rows, kv_head): (usize, Range<usize>, usize),
    ) -> Self {
        let (group, d) = (op.num_heads / cache.kv_heads, cache.head_dim);
        let (queries, padded) = (rows.len() * group, d.next_multiple_of(LANES));
        let mut q = vec![0f32; queries * padded];
        for (i, q) in q.chunks_exact_mut(padded).enumerate() {
            let head = kv_head * group + i % group;
            q[..d].copy_from_slice(&rows_of_q.row(rows.start + i / group)[head * d..][..d]);
        }
        let positions = &op.positions[rows];
        let keys = positions.iter().map(|&p| op.visible(p).len()).max().unwrap_or(0);
        let score_width = (keys.min(SPLIT) + positions.len()).next_multiple_of(LANES);
        Self {
            op,
            cache,
            sequence,
            kv_head,
            positions,
            group,
            padded,
            turned: vec![0.0; q.len()],
            q,
            scores: vec![0.0; queries * score_width],
            score_width,
            offsets: Vec::with_capacity(score_width),
            split: Sums::new(queries, padded),
            total: Sums::new(queries, padded),
            out: vec![0.0; queries * padded],
        }
    }

    fn query<'b>(&self, vectors: &'b [f32], i: usize) -> &'b [f32] {
        &vectors[i * self.padded..(i + 1) * self.padded]
    }

    /// The keys the row of query i has in split `split`; empty past its last one.
    fn keys(&self, i: usize, split: usize) -> Range<usize> {
        let visible = self.op.visible(self.positions[i / self.group]);
        let start = (visible.start + split * SPLIT).min(visible.end);
        start..visible.end.min(start + SPLIT)
    }

    /// Fills `offsets` for the keys `all`, and cuts them where delta changes: (delta, keys).
    fn locate(&mut self, all: Range<usize>) -> Vec<(i32, Range<usize>)> {
        let entries = self.op.entries(self.sequence);
        let mut runs: Vec<(i32, Range<usize>)> = Vec::new();
        self.offsets.clear();
        let first = entries.partition_point(|e| e.first as usize <= all.start).saturating_sub(1);
        for entry in &entries[first..] {
            let start = entry.first as usize;
            let end = start + usize::from(entry.num_valid);
            let keys = all.start.max(start)..all.end.min(end);
            if start >= all.end {
                break;
            }
            for j in keys.clone() {
                let row = entry.row as usize + j - start;
                let offset = row * self.cache.width() + self.kv_head * self.cache.head_dim;
                self.offsets.push(offset);
            }
            match runs.last_mut() {
                Some((delta, run)) if *delta == entry.delta => run.end = keys.end,
                _ if keys.is_empty() => {}
                _ => runs.push((entry.delta, keys)),
            }
        }
        assert_eq!(self.offsets.len(), all.len(), "entries leave no gap");
        runs
    }

    /// Turns the queries for keys of this delta. Rows that see none of `keys` are left as they
    /// are: they may stand before the table's first rotation.
    fn turn(&mut self, delta: i32, keys: &Range<usize>) {
        let d = self.cache.head_dim;
        for i in 0..self.positions.len() * self.group {
            let position = self.positions[i / self.group];
            if (position as usize) < keys.start {
                continue;
            }
            let turned = i64::from(position) - i64::from(delta);
            let turned = usize::try_from(turned).expect("checked: inside the rotary table");
            let range = i * self.padded..i * self.padded + d;
            let angles = self.op.rotary.angles(turned);
            rotate(&self.q[range.clone()], angles, &mut self.turned[range]);
        }
    }
}

struct Run<'a, E> {
    task: Task<'a>,
    k: &'a [E],
    v: &'a [E],
}

impl<'a, E: Element> Kernel for Run<'a, E> {
    type Output = Task<'a>;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> Task<'a> {
        let queries = self.task.positions.len() * self.task.group;
        for split in 0.. {
            let rows = (0..queries).map(|i| self.task.keys(i, split)).filter(|r| !r.is_empty());
            let all = rows.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
            let Some(all) = all else {
                break;
            };
            for (delta, keys) in self.task.locate(all.clone()) {
                self.task.turn(delta, &keys);
                self.scores(s, queries, keys.start - all.start..keys.end - all.start);
            }
            for i in 0..queries {
                let keys = self.task.keys(i, split);
                if !keys.is_empty() {
                    let weights = i * self.task.score_width + keys.start - all.start;
                    let weights = &mut self.task.scores[weights..weights + keys.len()];
                    self.task.split.max[i] = soften(s, weights, self.task.op);
                }
            }
            self.values(s, queries, split, all.start);
            self.merge(queries, split);
        }
        for i in 0..queries {
            let range = i * self.task.padded..(i + 1) * self.task.padded;
            let sum = self.task.total.sum[i];
            for (out, total) in
                self.task.out[range.clone()].iter_mut().zip(&self.task.total.out[range])
            {
                *out = total / sum;
            }
        }
        self.task
    }
}

impl<E: Element> Run<'_, E> {
    /// Dot products of all queries with the keys at `keys` of `offsets`.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, s: S, queries: usize, keys: Range<usize>) {
        let mut i = 0;
        while i < queries {
            let left = queries - i;
            i += if S::WIDE {
                match left {
                    1 => self.score_rows::<S, 1, 16>(s, i, keys.clone()),
                    2..4 => self.score_rows::<S, 2, 8>(s, i, keys.clone()),
                    _ => self.score_rows::<S, 4, 4>(s, i, keys.clone()),
                }
            } else {
                match left {
                    1 => self.score_rows::<S, 1, 4>(s, i, keys.clone()),
                    _ => self.score_rows::<S, 2, 2>(s, i, keys.clone()),
                }
            };
        }
    }

    /// `Q` queries from `first` on against tiles of `J` keys, then single ones. Returns `Q`.
    #[inline(always)]
    fn score_rows<S: Simd, const Q: usize, const J: usize>(
        &mut self,
        s: S,
        first: usize,
        keys: Range<usize>,
    ) -> usize {
        let task = &mut self.task;
        let width = task.score_width;
        let mut q: [&[[f32; LANES]]; Q] = [&[]; Q];
        for (i, q) in q.iter_mut().enumerate() {
            *q = task.turned[(first + i) * task.padded..][..task.padded].as_chunks().0;
        }
        let d = task.cache.head_dim;
        let mut j = keys.start;
        while j + J <= keys.end {
            let mut k: [&[E]; J] = [&[]; J];
            for (k, offset) in k.iter_mut().zip(&task.offsets[j..j + J]) {
                *k = &self.k[*offset..][..d];
            }
            if first == 0 {
                let ahead = &task.offsets[(j + AHEAD).min(keys.end)..(j + AHEAD + J).min(keys.end)];
                ahead.iter().for_each(|offset| prefetch(s, &self.k[*offset..][..d]));
            }
            for (i, row) in dots(s, &q, &k).iter().enumerate() {
                task.scores[(first + i) * width + j..][..J].copy_from_slice(row);
            }
            j += J;
        }
        for j in j..keys.end {
            let k = [&self.k[task.offsets[j]..][..d]];
            for (i, row) in dots(s, &q, &k).iter().enumerate() {
                task.scores[(first + i) * width + j] = row[0];
            }
        }
        Q
    }

    /// The sums of split `split`, whose keys begin at `start` in `offsets` and `scores`.
    #[inline(always)]
    fn values<S: Simd>(&mut self, s: S, queries: usize, split: usize, start: usize) {
        self.task.split.sum.fill(0.0);
        self.task.split.out.fill(0.0);
        let tile = if S::WIDE { 4 } else { 2 };
        for first in (0..queries).step_by(tile) {
            let count = tile.min(queries - first);
            let keys: [Range<usize>; 4] = std::array::from_fn(|i| {
                let keys = self.task.keys(first + i.min(count - 1), split);
                if keys.is_empty() { 0..0 } else { keys.start - start..keys.end - start }
            });
            // [start, common.start) and [common.end, end) differ by query; between, all see all.
            let common = keys
                .iter()
                .fold(0..usize::MAX, |all, keys| all.start.max(keys.start)..all.end.min(keys.end));
            let common = if common.start < common.end { common } else { 0..0 };
            for (i, keys) in keys[..count].iter().enumerate() {
                let alone = keys.start..common.start.clamp(keys.start, keys.end);
                self.weigh::<S, 1>(s, first + i, alone);
            }
            match count {
                _ if common.is_empty() => {}
                4 => self.weigh::<S, 4>(s, first, common.clone()),
                3 => {
                    self.weigh::<S, 2>(s, first, common.clone());
                    self.weigh::<S, 1>(s, first + 2, common.clone());
                }
                2 => self.weigh::<S, 2>(s, first, common.clone()),
                _ => self.weigh::<S, 1>(s, first, common.clone()),
            }
            for (i, keys) in keys[..count].iter().enumerate() {
                let alone = common.end.clamp(keys.start, keys.end)..keys.end;
                self.weigh::<S, 1>(s, first + i, alone);
            }
        }
    }

    /// `Q` queries from `first` on add the values of `keys`, in order, to their sums.
    #[inline(always)]
    fn weigh<S: Simd, const Q: usize>(&mut self, s: S, first: usize, keys: Range<usize>) {
        if keys.is_empty() {
            return;
        }
        let vectors = self.task.padded / LANES;
        let mut from = 0;
        while from < vectors {
            let left = vectors - from;
            from += if left >= 8 && Q <= 2 && S::WIDE {
                self.weigh_columns::<S, Q, 8>(s, first, keys.clone(), from)
            } else if left >= 4 && (S::WIDE || Q == 1) {
                self.weigh_columns::<S, Q, 4>(s, first, keys.clone(), from)
            } else if left >= 2 {
                self.weigh_columns::<S, Q, 2>(s, first, keys.clone(), from)
            } else {
                self.weigh_columns::<S, Q, 1>(s, first, keys.clone(), from)
            };
        }
    }

    /// Vectors `from..from + D` of the values. Returns `D`.
    #[inline(always)]
    fn weigh_columns<S: Simd, const Q: usize, const D: usize>(
        &mut self,
        s: S,
        first: usize,
        keys: Range<usize>,
        from: usize,
    ) -> usize {
        let (task, column) = (&mut self.task, from * LANES);
        let end = (column + D * LANES).min(task.cache.head_dim);
        let mut weights: [&[f32]; Q] = [&[]; Q];
        for (i, weights) in weights.iter_mut().enumerate() {
            *weights = &task.scores[(first + i) * task.score_width..][keys.clone()];
        }
        let mut sums = [0f32; Q];
        let mut out = [[s.splat(0.0); D]; Q];
        for (i, out) in out.iter_mut().enumerate() {
            sums[i] = task.split.sum[first + i];
            let stored = &task.split.out[(first + i) * task.padded + column..][..D * LANES];
            for (out, stored) in out.iter_mut().zip(stored.as_chunks().0) {
                *out = s.load(stored);
            }
        }
        for (j, offset) in task.offsets[keys.clone()].iter().enumerate() {
            if let (0, Some(ahead)) = (first, task.offsets.get(keys.start + j + AHEAD)) {
                prefetch(s, &self.v[ahead + column..ahead + end]);
            }
            let v = load_vectors::<S, E, D>(s, &self.v[offset + column..offset + end]);
            for i in 0..Q {
                let weight = weights[i][j];
                sums[i] += weight;
                for (out, v) in out[i].iter_mut().zip(v) {
                    *out = s.mul_add(s.splat(weight), v, *out);
                }
            }
        }
        for (i, out) in out.iter().enumerate() {
            if from + D == task.padded / LANES {
                task.split.sum[first + i] = sums[i];
            }
            let stored = &mut task.split.out[(first + i) * task.padded + column..][..D * LANES];
            for (out, stored) in out.iter().zip(stored.as_chunks_mut().0) {
                s.store(*out, stored);
            }
        }
        D
    }

    /// Adds the split's sums to the total.
    #[inline(always)]
    fn merge(&mut self, queries: usize, split: usize) {
        let task = &mut self.task;
        for i in 0..queries {
            if task.keys(i, split).is_empty() {
                continue;
            }
            let range = i * task.padded..(i + 1) * task.padded;
            let (next_sum, next_max) = (task.split.sum[i], task.split.max[i]);
            let next = &task.split.out[range.clone()];
            if split == 0 {
                (task.total.max[i], task.total.sum[i]) = (next_max, next_sum);
                task.total.out[range].copy_from_slice(next);
                continue;
            }
            let (max, a, b) = rescale(task.total.max[i], next_max);
            task.total.max[i] = max;
            task.total.sum[i] = task.total.sum[i].mul_add(a, next_sum * b);
            for (out, next) in task.total.out[range].iter_mut().zip(next) {
                *out = out.mul_add(a, next * b);
            }
        }
    }
}
