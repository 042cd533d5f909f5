//! Attention over a paged KV cache whose keys are never rotated again: the query turns instead.
//!
//! q (rows, heads * d), not rotated; caches (blocks, block_size, kv_heads, d). Query head h reads
//! KV head h / (heads / kv_heads). A row at logical position p sees the keys with logical index in
//! `[first, p]`, `first` being 0 or, with a sliding window w, max(0, p + 1 - w). Against the keys
//! of a table entry the query stands at `p - entry.delta`, since
//! `<R(p) q, R(delta + j) k> = <R(p - delta) q, R(j) k>`.
//!
//! The arithmetic knows no block borders. The keys a row sees are cut into splits of 512, counted
//! from the first one. In a split:
//!
//! - `score = dot(q, k) * scale` ([`crate::math::dot`]), then `cap * tanh(score / cap)`;
//! - `max` over the split, `weight = exp(score - max)`;
//! - `sum` and `out` key by key, ascending: `sum += weight`, `out = weight.mul_add(v, out)`.
//!
//! Where K and V are int8, k and v are the integers, `dot(q, k)` is multiplied by the key's scale
//! before `scale`, and the weight of v by its value's.
//!
//! Splits merge in ascending order (`Partial::merge`), the result is `out / sum`. A NaN score
//! makes its row and head NaN.

use crate::dtype::Stored;
use crate::error::Error;
use crate::filter_view::{BlockTables, TableEntry};
use crate::math::{dot, exp, tanh};
use crate::rope::{RotaryTable, rope_reference};
use crate::store_kv::not_kv;
use crate::threads::Threads;
use crate::view::{CacheShape, Rows, refused};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

mod fast;
mod jobs;
mod lanes;

const OP: &str = "paged_attention";

/// Keys of a split. Part of the result: never derived from the machine.
pub(crate) const SPLIT: usize = 512;

/// The op on (q, k_cache, v_cache) -> (rows, heads * d) f32. q may have any row stride.
pub struct PagedAttention {
    pub tables: Arc<BlockTables>,
    /// Sequence i has rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`; the first number is 0.
    pub cu_seqlens_q: Arc<Vec<u32>>,
    /// Logical index of each row in its view; its own key is in the table.
    pub positions: Arc<Vec<u32>>,
    pub rotary: Arc<RotaryTable>,
    pub num_heads: usize,
    pub scale: f32,
    pub sliding_window: Option<u32>,
    pub soft_cap: Option<f32>,
    pub threads: Threads,
}

impl CustomOp3 for PagedAttention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let q = Rows::new(OP, "q", q, q_layout)?;
        let cache = CacheShape::of(OP, "the K cache", k.dtype(), k_layout)?;
        if CacheShape::of(OP, "the V cache", v.dtype(), v_layout)? != cache {
            let expected = format!("of the K cache's shape {:?}", k_layout.dims());
            return Err(refused(OP, "the V cache", expected, v_layout).into());
        }
        if q.width != self.num_heads * cache.head_dim {
            let expected = format!("(rows, {} * {})", self.num_heads, cache.head_dim);
            return Err(refused(OP, "q", expected, q_layout).into());
        }
        self.check(q.count, cache)?;
        let out = match k {
            CpuStorage::F32(_) => self.product::<f32>(q, cache, (k, k_layout), (v, v_layout)),
            CpuStorage::F16(_) => self.product::<f16>(q, cache, (k, k_layout), (v, v_layout)),
            CpuStorage::BF16(_) => self.product::<bf16>(q, cache, (k, k_layout), (v, v_layout)),
            CpuStorage::U8(_) => self.product::<u8>(q, cache, (k, k_layout), (v, v_layout)),
            other => Err(not_kv(OP, other.dtype())),
        }?;
        Ok((CpuStorage::F32(out), Shape::from((q.count, q.width))))
    }
}

impl PagedAttention {
    fn product<E: Stored>(
        &self,
        q: Rows,
        cache: CacheShape,
        k: (&CpuStorage, &Layout),
        v: (&CpuStorage, &Layout),
    ) -> Result<Vec<f32>, Error> {
        let k = cache.values::<E>(OP, "the K cache", k.0, k.1)?;
        let v = cache.values::<E>(OP, "the V cache", v.0, v.1)?;
        Ok(self.fast(q, cache, k, v))
    }

    /// Refuses whatever would read outside the cache, the tables or the rotations.
    fn check(&self, rows: usize, cache: CacheShape) -> Result<(), Error> {
        if self.num_heads == 0 || !self.num_heads.is_multiple_of(cache.kv_heads) {
            let expected = format!("a multiple of the cache's {}", cache.kv_heads);
            return Err(Error::value(OP, "num_heads", self.num_heads, expected));
        }
        if self.rotary.head_dim() != cache.head_dim {
            let expected = format!("the cache's {}", cache.head_dim);
            return Err(Error::value(OP, "the rotary width", self.rotary.head_dim(), expected));
        }
        if self.sliding_window == Some(0) {
            return Err(Error::value(OP, "sliding_window", 0, "at least 1"));
        }
        if self.positions.len() != rows {
            let expected = format!("q's {rows} rows");
            return Err(Error::value(OP, "positions' length", self.positions.len(), expected));
        }
        check_offsets("cu_seqlens_q", &self.cu_seqlens_q, rows)?;
        check_offsets("cu_entries", &self.tables.cu_entries, self.tables.entries.len())?;
        let sequences = self.cu_seqlens_q.len();
        if self.tables.cu_entries.len() != sequences {
            let expected = format!("cu_seqlens_q's {sequences}");
            let found = self.tables.cu_entries.len();
            return Err(Error::value(OP, "cu_entries' length", found, expected));
        }
        (0..sequences - 1).try_for_each(|i| self.check_sequence(i, cache))
    }

    fn check_sequence(&self, sequence: usize, cache: CacheShape) -> Result<(), Error> {
        let entries = self.entries(sequence);
        let mut keys = 0u32;
        for entry in entries {
            let (row, size) = (entry.row as usize, cache.block_size);
            if row >= cache.blocks * size {
                let expected = format!("below the cache's {}", cache.blocks * size);
                return Err(Error::value(OP, "an entry's row", entry.row, expected));
            }
            let left = size - row % size;
            if usize::from(entry.num_valid) > left {
                let expected = format!("at most {left}, the rest of the block at row {row}");
                return Err(Error::value(OP, "num_valid", entry.num_valid, expected));
            }
            if entry.first != keys {
                let expected = format!("{keys}, the keys before it");
                return Err(Error::value(OP, "an entry's first", entry.first, expected));
            }
            keys += u32::from(entry.num_valid);
        }
        let positions = &self.positions[self.rows(sequence)];
        let Some(&last) = positions.iter().max() else {
            return Ok(());
        };
        if last >= keys {
            let expected = format!("below the {keys} keys of sequence {sequence}");
            return Err(Error::value(OP, "a position", last, expected));
        }
        // The furthest query is the one that turns furthest; those before an entry don't see it.
        let limit = self.rotary.max_position() as i64;
        for entry in entries.iter().filter(|entry| entry.first <= last) {
            let turned = i64::from(last) - i64::from(entry.delta);
            if turned < i64::from(last - entry.first) || turned >= limit {
                let expected = format!("in 0..{limit}, the rotary table");
                return Err(Error::value(OP, "a query's turned position", turned, expected));
            }
        }
        Ok(())
    }

    fn rows(&self, sequence: usize) -> Range<usize> {
        self.cu_seqlens_q[sequence] as usize..self.cu_seqlens_q[sequence + 1] as usize
    }

    fn entries(&self, sequence: usize) -> &[TableEntry] {
        let offsets = &self.tables.cu_entries;
        &self.tables.entries[offsets[sequence] as usize..offsets[sequence + 1] as usize]
    }

    /// The logical indices a row at `position` sees.
    fn visible(&self, position: u32) -> Range<usize> {
        let end = position as usize + 1;
        let window = self.sliding_window.map_or(end, |window| end.min(window as usize));
        end - window..end
    }
}

fn check_offsets(what: &str, offsets: &[u32], end: usize) -> Result<(), Error> {
    let (first, last) = (offsets.first().copied(), offsets.last().copied());
    if first != Some(0) || last.is_none_or(|last| last as usize != end) {
        let found = last.map_or(-1, i64::from);
        let expected = format!("offsets from 0 to {end}");
        return Err(Error::value(OP, format!("{what}, whose last number"), found, expected));
    }
    match offsets.array_windows().find(|[a, b]| a > b) {
        Some([a, b]) => Err(Error::value(OP, format!("{what}, at {b}"), *a, "in ascending order")),
        None => Ok(()),
    }
}

/// What some splits of a row and head come to.
pub(crate) struct Partial {
    pub(crate) max: f32,
    pub(crate) sum: f32,
    pub(crate) out: Vec<f32>,
}

impl Partial {
    /// `self` stands for the splits before `next`. With M the larger max, both are brought to M:
    /// `sum = sum * exp(max - M) + next.sum * exp(next.max - M)`, `out` likewise, each as
    /// `(next * b)` and one `mul_add`.
    fn merge(&mut self, next: &Partial) {
        let (max, a, b) = rescale(self.max, next.max);
        self.max = max;
        self.sum = self.sum.mul_add(a, next.sum * b);
        for (out, next) in self.out.iter_mut().zip(&next.out) {
            *out = out.mul_add(a, next * b);
        }
    }
}

/// The larger of two maxima, and the factors that bring their sums to it.
pub(crate) fn rescale(before: f32, next: f32) -> (f32, f32, f32) {
    let max = if before > next { before } else { next };
    (max, exp(before - max), exp(next - max))
}

/// A whole cache for the reference: its numbers, and of each vector the scale (none: all 1).
#[derive(Clone, Copy)]
pub struct PlainCache<'a> {
    pub numbers: &'a [f32],
    pub scales: &'a [f32],
}

impl PlainCache<'_> {
    fn vector(&self, index: usize, d: usize) -> (&[f32], f32) {
        let scale = self.scales.get(index).copied().unwrap_or(1.0);
        (&self.numbers[index * d..][..d], scale)
    }
}

/// Caches, and which of their vectors is the head of an entry's key j.
type Lookup<'a> = (PlainCache<'a>, PlainCache<'a>, &'a dyn Fn(&TableEntry, usize) -> usize);

/// The plain loops. `q` (rows, num_heads * d).
///
/// # Panics
/// Where the op would refuse.
pub fn paged_attention_reference(
    op: &PagedAttention,
    q: &[f32],
    cache: CacheShape,
    k: PlainCache,
    v: PlainCache,
) -> Vec<f32> {
    let (d, width) = (cache.head_dim, op.num_heads * cache.head_dim);
    op.check(q.len() / width, cache).expect("arguments inside the op's limits");
    let mut out = Vec::with_capacity(q.len());
    for sequence in 0..op.cu_seqlens_q.len() - 1 {
        for row in op.rows(sequence) {
            for head in 0..op.num_heads {
                let kv_head = head / (op.num_heads / cache.kv_heads);
                let q = &q[row * width + head * d..][..d];
                let place = |entry: &TableEntry, j: usize| {
                    let row = entry.row as usize + j - entry.first as usize;
                    row * cache.kv_heads + kv_head
                };
                let visible = op.visible(op.positions[row]);
                let mut total: Option<Partial> = None;
                for start in visible.clone().step_by(SPLIT) {
                    let keys = start..visible.end.min(start + SPLIT);
                    let split = reference_split(op, (sequence, row), q, keys, (k, v, &place));
                    match &mut total {
                        Some(total) => total.merge(&split),
                        None => total = Some(split),
                    }
                }
                let total = total.expect("a row sees itself");
                out.extend(total.out.iter().map(|out| out / total.sum));
            }
        }
    }
    out
}

fn reference_split(
    op: &PagedAttention,
    (sequence, row): (usize, usize),
    q: &[f32],
    keys: Range<usize>,
    (k, v, place): Lookup,
) -> Partial {
    let entry_of = |j: usize| {
        let contains = |e: &&TableEntry| {
            (e.first as usize..e.first as usize + usize::from(e.num_valid)).contains(&j)
        };
        op.entries(sequence).iter().find(contains).expect("checked: entries leave no gap")
    };
    let mut scores = Vec::new();
    for j in keys.clone() {
        let entry = entry_of(j);
        let turned = i64::from(op.positions[row]) - i64::from(entry.delta);
        let q = rope_reference(q, &op.rotary, usize::try_from(turned).expect("checked"));
        let (k, k_scale) = k.vector(place(entry, j), q.len());
        let score = dot(&q, k) * k_scale * op.scale;
        scores.push(op.soft_cap.map_or(score, |cap| cap * tanh(score / cap)));
    }
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &s| if max > s { max } else { s });
    let mut split = Partial { max, sum: 0.0, out: vec![0.0; q.len()] };
    for (j, score) in keys.zip(scores) {
        let weight = exp(score - max);
        split.sum += weight;
        let (v, v_scale) = v.vector(place(entry_of(j), j), q.len());
        let weight = weight * v_scale;
        for (out, v) in split.out.iter_mut().zip(v) {
            *out = weight.mul_add(*v, *out);
        }
    }
    split
}

#[cfg(test)]
mod tests;
