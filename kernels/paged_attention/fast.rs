//! The fast version: blocks of rows against the heads of K and V, split by split.
//!
//! Scores come in tiles of queries x keys, sums in tiles of queries x dimensions; K and V are
//! widened in registers. A job's memory is a few hundred kilobytes whatever the length of the
//! context; of a row alone, each split's sums wait for the others'.

use super::jobs::Job;
use super::lanes::{dots, load_vectors, prefetch, soften};
use super::{PagedAttention, SPLIT, rescale};
use crate::dtype::Stored;
use crate::isa::Kernel;
use crate::memory::written;
use crate::rope::rotate;
use crate::simd::{LANES, Simd};
use crate::threads::Disjoint;
use crate::view::{CacheShape, Rows};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Keys that all heads of a job take before the next ones: as many as the widest tile has, and as
/// the caches are asked for ahead of their use. Rows lie far apart, where the processor's own
/// prefetching does not follow.
const AHEAD: usize = 16;

impl PagedAttention {
    pub(super) fn fast<E: Stored>(&self, q: Rows, cache: CacheShape, k: &[E], v: &[E]) -> Vec<f32> {
        // SAFETY: `check` saw that the sequences are all rows; the jobs are these with all heads,
        // and the results of all are stored.
        unsafe { written(q.count * q.width, |out| self.fast_into(q, cache, (k, v), &out)) }
    }

    fn fast_into<E: Stored>(
        &self,
        q: Rows,
        cache: CacheShape,
        (k, v): (&[E], &[E]),
        out: &Disjoint<MaybeUninit<f32>>,
    ) {
        let jobs = self.jobs(cache);
        let mut parts: Vec<Option<Sums>> = jobs.iter().map(|_| None).collect();
        let slots = Disjoint::new(&mut parts);
        let isa = self.threads.isa();
        self.threads.run(jobs.len(), |i| {
            let sums = isa.run(Run { task: Task::new(self, q, cache, &jobs[i]), k, v });
            if jobs[i].split.is_none() {
                return self.put(cache, &jobs[i], &sums, out);
            }
            // SAFETY: each job runs once and has a slot of its own.
            let slot = unsafe { slots.slice(i..i + 1) };
            slot[0] = Some(sums);
        });
        let mut parts = &mut parts[..];
        for splits in jobs.chunk_by(|_, next| next.split.is_some_and(|split| split > 0)) {
            let (own, others) = std::mem::take(&mut parts).split_at_mut(splits.len());
            if splits.len() > 1 {
                self.put(cache, &splits[0], &isa.run(Merge(own)), out);
            }
            parts = others;
        }
    }

    /// Stores the result of a job's rows and heads.
    fn put(&self, cache: CacheShape, job: &Job, sums: &Sums, out: &Disjoint<MaybeUninit<f32>>) {
        let (group, d) = (self.num_heads / cache.kv_heads, cache.head_dim);
        let mut queries = sums.out.chunks_exact(sums.padded);
        for kv_head in job.kv_heads.clone() {
            for row in job.rows.clone() {
                let start = (row * self.num_heads + kv_head * group) * d;
                // SAFETY: jobs that store have rows and KV heads of their own, and the heads that
                // share a KV head are disjoint from all others; the slice ends with this turn.
                let out = unsafe { out.slice(start..start + group * d) };
                for (out, query) in out.chunks_exact_mut(d).zip(&mut queries) {
                    out.write_copy_of_slice(&query[..d]);
                }
            }
        }
    }
}

/// Query vectors are padded to `padded` dimensions with zeros. Queries of a KV head follow each
/// other: the job's rows, and in each the heads that share it.
struct Task<'a> {
    op: &'a PagedAttention,
    cache: CacheShape,
    job: &'a Job,
    positions: &'a [u32],
    group: usize,
    padded: usize,
    q: Vec<f32>,
    turned: Vec<f32>,
    /// A row of scores, then weights, for each query.
    scores: Vec<f32>,
    score_width: usize,
    /// Offsets in the caches of the rows of this split's keys.
    offsets: Vec<usize>,
    split: Sums,
    total: Sums,
}

/// What some splits come to, query by query.
struct Sums {
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
    padded: usize,
}

impl Sums {
    fn new(queries: usize, padded: usize) -> Self {
        let (max, sum) = (vec![f32::NEG_INFINITY; queries], vec![0.0; queries]);
        Self { max, sum, out: vec![0.0; queries * padded], padded }
    }

    fn vector(&self, i: usize) -> Range<usize> {
        i * self.padded..(i + 1) * self.padded
    }

    /// Adds to query `i` the split behind: [`Partial::merge`](super::Partial::merge).
    #[inline(always)]
    fn merge(&mut self, next: &Sums, i: usize) {
        let (max, a, b) = rescale(self.max[i], next.max[i]);
        self.max[i] = max;
        self.sum[i] = self.sum[i].mul_add(a, next.sum[i] * b);
        let vector = self.vector(i);
        for (out, next) in self.out[vector.clone()].iter_mut().zip(&next.out[vector]) {
            *out = out.mul_add(a, next * b);
        }
    }

    #[inline(always)]
    fn divide(&mut self) {
        for (out, sum) in self.out.chunks_exact_mut(self.padded).zip(&self.sum) {
            for out in out {
                *out /= sum;
            }
        }
    }
}

/// The splits of a row, in their order.
struct Merge<'a>(&'a mut [Option<Sums>]);

impl Kernel for Merge<'_> {
    type Output = Sums;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Sums {
        let mut parts = self.0.iter_mut().map(|part| part.take().expect("every job has run"));
        let mut total = parts.next().expect("there is a first split");
        for next in parts {
            for i in 0..next.sum.len() {
                total.merge(&next, i);
            }
        }
        total.divide();
        total
    }
}

impl<'a> Task<'a> {
    fn new(op: &'a PagedAttention, rows_of_q: Rows, cache: CacheShape, job: &'a Job) -> Self {
        let (group, d) = (op.num_heads / cache.kv_heads, cache.head_dim);
        let positions = &op.positions[job.rows.clone()];
        let queries = job.kv_heads.len() * positions.len() * group;
        let padded = d.next_multiple_of(LANES);
        let mut q = vec![0f32; queries * padded];
        let mut vectors = q.chunks_exact_mut(padded);
        for kv_head in job.kv_heads.clone() {
            for row in job.rows.clone() {
                let heads = &rows_of_q.row(row)[kv_head * group * d..][..group * d];
                for (head, q) in heads.chunks_exact(d).zip(&mut vectors) {
                    q[..d].copy_from_slice(head);
                }
            }
        }
        let keys = positions.iter().map(|&p| op.visible(p).len()).max().unwrap_or(0);
        let score_width = (keys.min(SPLIT) + positions.len()).next_multiple_of(LANES);
        Self {
            op,
            cache,
            job,
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
        }
    }

    /// Of each KV head.
    fn queries(&self) -> usize {
        self.positions.len() * self.group
    }

    /// Of all KV heads.
    fn all_queries(&self) -> Range<usize> {
        0..self.job.kv_heads.len() * self.queries()
    }

    fn position(&self, i: usize) -> u32 {
        self.positions[i % self.queries() / self.group]
    }

    /// Where the head that query i reads begins in a row of the caches.
    fn head_offset(&self, i: usize) -> usize {
        (self.job.kv_heads.start + i / self.queries()) * self.cache.stored_dim
    }

    /// The keys the row of query i has in split `split`; empty past its last one.
    fn keys(&self, i: usize, split: usize) -> Range<usize> {
        let visible = self.op.visible(self.position(i));
        let start = (visible.start + split * SPLIT).min(visible.end);
        start..visible.end.min(start + SPLIT)
    }

    /// Keys that a head takes before the next head does.
    fn together(&self) -> usize {
        if self.job.kv_heads.len() > 1 { AHEAD } else { usize::MAX }
    }

    /// Asks for the first values of a split, while weights are made of its scores.
    #[inline(always)]
    fn ask_for_values<S: Simd, E: Stored>(&self, s: S, v: &[E]) {
        let (d, heads) = (self.cache.stored_dim, &self.job.kv_heads);
        for offset in self.offsets.iter().take(AHEAD) {
            prefetch(s, &v[offset + heads.start * d..][..heads.len() * d]);
        }
    }

    /// Fills `offsets` for the keys `all`, and cuts them where delta changes: (delta, keys).
    fn locate(&mut self, all: Range<usize>) -> Vec<(i32, Range<usize>)> {
        let entries = self.op.entries(self.job.sequence);
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
            let row = entry.row as usize;
            self.offsets.extend(keys.clone().map(|j| (row + j - start) * self.cache.width()));
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
    #[inline(always)]
    fn turn(&mut self, delta: i32, keys: &Range<usize>) {
        let d = self.cache.head_dim;
        for i in self.all_queries() {
            let position = self.position(i);
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

impl<E: Stored> Kernel for Run<'_, E> {
    type Output = Sums;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> Sums {
        let splits = match self.task.job.split {
            Some(split) => split..split + 1,
            None => 0..usize::MAX,
        };
        for split in splits.clone() {
            let rows = (0..self.task.queries()).map(|i| self.task.keys(i, split));
            let rows = rows.filter(|keys| !keys.is_empty());
            let all = rows.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
            let Some(all) = all else {
                break;
            };
            for (delta, keys) in self.task.locate(all.clone()) {
                self.task.turn(delta, &keys);
                self.scores(s, keys.start - all.start..keys.end - all.start);
            }
            self.task.ask_for_values(s, self.v);
            for i in self.task.all_queries() {
                let keys = self.task.keys(i, split);
                if !keys.is_empty() {
                    let weights = i * self.task.score_width + keys.start - all.start;
                    let weights = &mut self.task.scores[weights..weights + keys.len()];
                    self.task.split.max[i] = soften(s, weights, self.task.op);
                }
            }
            self.values(s, split, all.start);
            if split == splits.start {
                // every row has keys in it
                std::mem::swap(&mut self.task.total, &mut self.task.split);
                continue;
            }
            for i in self.task.all_queries() {
                if !self.task.keys(i, split).is_empty() {
                    self.task.total.merge(&self.task.split, i);
                }
            }
        }
        if self.task.job.split.is_none() {
            self.task.total.divide();
        }
        self.task.total
    }
}

impl<E: Stored> Run<'_, E> {
    /// Dot products of all queries with the keys at `keys` of `offsets`.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, s: S, keys: Range<usize>) {
        let mut start = keys.start;
        while start < keys.end {
            let together = start..keys.end.min(start.saturating_add(self.task.together()));
            for head in 0..self.task.job.kv_heads.len() {
                self.head_scores(s, head, together.clone());
            }
            start = together.end;
        }
    }

    /// As `scores`, of one of the KV heads.
    #[inline(always)]
    fn head_scores<S: Simd>(&mut self, s: S, head: usize, keys: Range<usize>) {
        let queries = self.task.queries();
        let (mut i, end) = (head * queries, (head + 1) * queries);
        while i < end {
            let left = end - i;
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
        let CacheShape { head_dim: d, stored_dim, .. } = task.cache;
        let column = task.head_offset(first);
        let last = task.offsets.len();
        let mut j = keys.start;
        while j + J <= keys.end {
            let mut k: [&[E]; J] = [&[]; J];
            for (k, offset) in k.iter_mut().zip(&task.offsets[j..j + J]) {
                *k = &self.k[*offset + column..][..stored_dim];
            }
            if first.is_multiple_of(task.queries()) {
                let ahead = j + AHEAD;
                for offset in &task.offsets[ahead.min(last)..(ahead + J).min(last)] {
                    prefetch(s, &self.k[*offset + column..][..stored_dim]);
                }
            }
            for (i, row) in dots(s, &q, &k, d).iter().enumerate() {
                task.scores[(first + i) * width + j..][..J].copy_from_slice(row);
            }
            j += J;
        }
        for j in j..keys.end {
            let k = [&self.k[task.offsets[j] + column..][..stored_dim]];
            for (i, row) in dots(s, &q, &k, d).iter().enumerate() {
                task.scores[(first + i) * width + j] = row[0];
            }
        }
        Q
    }

    /// The sums of split `split`, whose keys begin at `start` in `offsets` and `scores`.
    #[inline(always)]
    fn values<S: Simd>(&mut self, s: S, split: usize, start: usize) {
        self.task.split.sum.fill(0.0);
        self.task.split.out.fill(0.0);
        let (mut from, end) = (start, start + self.task.offsets.len());
        while from < end {
            let together = from..end.min(from.saturating_add(self.task.together()));
            for head in 0..self.task.job.kv_heads.len() {
                self.head_values(s, head, split, together.clone(), start);
            }
            from = together.end;
        }
    }

    /// As `values`, of one of the KV heads and of the keys `together`.
    #[inline(always)]
    fn head_values<S: Simd>(
        &mut self,
        s: S,
        head: usize,
        split: usize,
        together: Range<usize>,
        start: usize,
    ) {
        let tile = if S::WIDE { 4 } else { 2 };
        let queries = head * self.task.queries()..(head + 1) * self.task.queries();
        for first in queries.clone().step_by(tile) {
            let count = tile.min(queries.end - first);
            let keys: [Range<usize>; 4] = std::array::from_fn(|i| {
                let keys = self.task.keys(first + i.min(count - 1), split);
                let keys = keys.start.max(together.start)..keys.end.min(together.end);
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
        let head = task.head_offset(first);
        let asks = first.is_multiple_of(task.queries());
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
            let offset = offset + head;
            if let (true, Some(ahead)) = (asks, task.offsets.get(keys.start + j + AHEAD)) {
                prefetch(s, &self.v[ahead + head..][column..end]);
            }
            let stored = &self.v[offset..][..task.cache.stored_dim];
            let scale = E::scale(stored, task.cache.head_dim);
            let v = load_vectors::<S, E, D>(s, &stored[column..end]);
            for i in 0..Q {
                let mut weight = weights[i][j];
                sums[i] += weight;
                if E::SCALED {
                    weight *= scale;
                }
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
}
