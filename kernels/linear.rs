//! y = x W^T + b with weights packed once: x (rows, in) f32 -> (rows, out) f32.
//!
//! An output element is `acc = 0; for k ascending: acc = x[k].mul_add(w[k], acc)`, then `+ b`;
//! weights widen to f32 exactly, and bf16 weights round x to bf16 (nearest even) first. The order
//! never depends on the number of rows, the tile or the threads. Where the processor multiplies
//! bf16 in pairs, two steps are one instruction, in the same order, and numbers too small to be
//! normal are zeros in them. Quantized weights have an order of their own, as fixed:
//! `quantized/product.rs`.
//!
//! Weights lie in tiles of 32 output features, k sequential inside: [tile][k][32], or
//! [tile][k / 2][32][2] in pairs. A block of rows (up to 12) holds its sums in registers while a
//! tile streams past once. Rows are repacked per call so that a block's values of one k, or pair
//! of them, are neighbours: [block][k][row].

mod weight;

pub use weight::PackedWeight;
use weight::{Cell, Tiles};
pub(crate) use weight::{Columns, TILE};

use crate::dtype::{Element, WeightDtype};
use crate::error::Error;
use crate::isa::{Kernel, PairKernel};
use crate::math::{RoundToBf16, round_to_bf16};
use crate::memory::written;
use crate::quantized;
use crate::simd::{Bf16Pair, LANES, PairSimd, Simd, pair_dot};
use crate::threads::{Disjoint, Threads};
use crate::view::Rows;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

/// Rows of a block when 32 vectors fit the registers: 12 x 2 sums, 2 weights.
const WIDE_ROWS: usize = 12;
/// Rows of a block when 8 do: 6 sums, 1 weight.
const NARROW_ROWS: usize = 6;
/// Bytes of packed rows that pass over the weights together: they stay in the L2 cache.
const CHUNK_BYTES: usize = 512 << 10;

/// Bytes by which weights are asked for ahead of their use: across page borders, where the
/// processor's own prefetching stops.
const AHEAD: usize = 4 << 10;

/// The op: x (rows, in_features), any row stride -> (rows, out_features).
pub struct Linear {
    pub weight: Arc<PackedWeight>,
    pub bias: Option<Arc<Vec<f32>>>,
    pub threads: Threads,
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = Rows::new("linear", "x", storage, layout)?;
        let (inputs, outputs) = (self.weight.in_features, self.weight.out_features);
        if x.width != inputs {
            let expected = format!("the weight's {inputs}");
            return Err(Error::value("linear", "x's width", x.width, expected).into());
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.len() != outputs) {
            let expected = format!("the weight's {outputs}");
            return Err(Error::value("linear", "the bias's length", bias.len(), expected).into());
        }
        let y = match &self.weight.tiles {
            Tiles::F32(tiles) => self.plain(x, tiles),
            Tiles::F16(tiles) => self.plain(x, tiles),
            Tiles::Bf16(tiles) => self.plain(x, tiles),
            Tiles::Bf16Pairs(tiles) => self.in_pairs(x, tiles),
            Tiles::Quantized(panels) => {
                let bias = self.bias.as_deref().map(Vec::as_slice);
                quantized::product(x, panels, bias, &self.threads)
            }
        };
        Ok((CpuStorage::F32(y), Shape::from((x.count, outputs))))
    }
}

impl Linear {
    fn plain<E: Element>(&self, x: Rows, tiles: &[Columns<E>]) -> Vec<f32> {
        let isa = self.threads.isa();
        let block = if isa.is_wide() { WIDE_ROWS } else { NARROW_ROWS };
        let packed = self.pack_rows(x, block);
        self.product(x.count, block, &packed, tiles, |part| isa.run(part))
    }

    fn in_pairs(&self, x: Rows, tiles: &[Columns<Bf16Pair>]) -> Vec<f32> {
        let isa = self.threads.isa();
        // as wide as what `run_pairs` runs on
        let block = if isa.has_bf16_pairs() { WIDE_ROWS } else { NARROW_ROWS };
        let packed = self.pack_pairs(x, block);
        self.product(x.count, block, &packed, tiles, |part| isa.run_pairs(part))
    }

    /// `x` are `rows` rows in blocks of `block`; `run` computes a part.
    fn product<E: Sync, X: Sync>(
        &self,
        rows: usize,
        block: usize,
        x: &[X],
        tiles: &[Columns<E>],
        run: impl Fn(Part<E, X>) + Sync,
    ) -> Vec<f32> {
        let outputs = self.weight.out_features;
        if rows * outputs == 0 {
            return Vec::new();
        }
        let bias = self.bias.as_deref().map(Vec::as_slice);
        let columns = outputs.div_ceil(TILE);
        let lines = tiles.len() / columns;
        if lines == 0 {
            return bias.unwrap_or(&vec![0.0; outputs]).repeat(rows);
        }
        let chunk = (CHUNK_BYTES / (lines * size_of::<X>())).max(1).next_multiple_of(block);
        let row_parts = rows.div_ceil(chunk);
        // Enough parts that threads end together, few enough that claiming them costs nothing.
        let column_parts = columns.min((self.threads.count() * 8).div_ceil(row_parts).max(1));
        let write = |y: Disjoint<_>| {
            let output = Output { y, bias, features: outputs };
            let job = Product { x, tiles, lines, output, block };
            self.threads.run(row_parts * column_parts, |part| {
                let (row_part, column_part) = (part / column_parts, part % column_parts);
                run(Part {
                    job: &job,
                    rows: row_part * chunk..rows.min((row_part + 1) * chunk),
                    columns: column_part * columns / column_parts
                        ..(column_part + 1) * columns / column_parts,
                });
            });
        };
        // SAFETY: the parts are all rows and all columns, and a part finishes each of its own.
        unsafe { written(rows * outputs, write) }
    }

    /// [block][k][row], rounded as the weights ask. The last block is as narrow as its rows.
    fn pack_rows(&self, x: Rows, block: usize) -> Vec<f32> {
        let inputs = x.width;
        let mut packed = vec![0f32; x.count * inputs];
        self.threads.for_each_chunk(&mut packed, (block * inputs).max(1), |i, panel| {
            let rows = panel.len() / inputs;
            if rows == 1 {
                panel.copy_from_slice(x.row(i * block));
            } else {
                for r in 0..rows {
                    let row = x.row(i * block + r);
                    for (k, value) in row.iter().enumerate() {
                        panel[k * rows + r] = *value;
                    }
                }
            }
            if self.weight.dtype() == WeightDtype::Bf16 {
                self.threads.isa().run(RoundToBf16(panel));
            }
        });
        packed
    }

    /// [block][pair][row], rounded. The last block is as narrow as its rows.
    fn pack_pairs(&self, x: Rows, block: usize) -> Vec<Bf16Pair> {
        let pairs = x.width.div_ceil(2);
        let mut packed = vec![Bf16Pair::default(); x.count * pairs];
        self.threads.for_each_chunk(&mut packed, (block * pairs).max(1), |i, panel| {
            let rows = panel.len() / pairs;
            let mut rounded = vec![0f32; 2 * pairs];
            for r in 0..rows {
                rounded[..x.width].copy_from_slice(x.row(i * block + r));
                self.threads.isa().run(RoundToBf16(&mut rounded));
                for (pair, &[first, second]) in rounded.as_chunks().0.iter().enumerate() {
                    panel[pair * rows + r] = Bf16Pair::new(first, second);
                }
            }
        });
        packed
    }
}

struct Product<'a, E, X> {
    x: &'a [X],
    tiles: &'a [Columns<E>],
    /// Of a tile.
    lines: usize,
    output: Output<'a>,
    block: usize,
}

/// Where products go: (rows, features).
pub(crate) struct Output<'a> {
    pub y: Disjoint<'a, MaybeUninit<f32>>,
    pub bias: Option<&'a [f32]>,
    pub features: usize,
}

impl Output<'_> {
    /// Stores the first of the sums, as many as there are columns, with the bias added.
    #[inline(always)]
    pub fn put<S: Simd>(&self, s: S, row: usize, columns: Range<usize>, sums: S::V) {
        let start = row * self.features + columns.start;
        // SAFETY: these are elements of one row and one tile; the parts of a run split rows and
        // tiles between them without overlap, and a part stores one segment at a time.
        let out = unsafe { self.y.slice(start..start + columns.len()) };
        let bias = self.bias.map(|bias| &bias[columns]);
        let mut values = [0f32; LANES];
        // copying a number of values that is not known costs as much as some products
        if let Ok(out) = <&mut [MaybeUninit<f32>; LANES]>::try_from(&mut *out) {
            let sums = match bias.and_then(<[f32]>::first_chunk) {
                Some(bias) => s.add(sums, s.load(bias)),
                None => sums,
            };
            s.store(sums, &mut values);
            *out = values.map(MaybeUninit::new);
            return;
        }
        s.store(sums, &mut values);
        let values = &mut values[..out.len()];
        for (value, bias) in values.iter_mut().zip(bias.into_iter().flatten()) {
            *value += bias;
        }
        out.write_copy_of_slice(values);
    }
}

/// What one thread computes at a time: some tiles for some rows (a multiple of the block).
struct Part<'a, E, X> {
    job: &'a Product<'a, E, X>,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// How sixteen columns of a line of weights, `E` each, are multiplied with an `X` of a row.
trait Multiply<E, X>: Copy {
    type Float: Simd;
    type Weights: Copy;

    fn float(self) -> Self::Float;
    fn weights(self, line: &[E; LANES]) -> Self::Weights;
    fn add(
        self,
        sums: <Self::Float as Simd>::V,
        weights: Self::Weights,
        x: X,
    ) -> <Self::Float as Simd>::V;
}

/// One k to a line.
#[derive(Clone, Copy)]
struct Single<S>(S);

impl<S: Simd, E: Element> Multiply<E, f32> for Single<S> {
    type Float = S;
    type Weights = S::V;

    #[inline(always)]
    fn float(self) -> S {
        self.0
    }
    #[inline(always)]
    fn weights(self, line: &[E; LANES]) -> S::V {
        E::load(self.0, line)
    }
    #[inline(always)]
    fn add(self, sums: S::V, weights: S::V, x: f32) -> S::V {
        self.0.mul_add(self.0.splat(x), weights, sums)
    }
}

/// Two k to a line.
#[derive(Clone, Copy)]
struct InPairs<S>(S);

impl<S: PairSimd> Multiply<Bf16Pair, Bf16Pair> for InPairs<S> {
    type Float = S::Float;
    type Weights = S::Pairs;

    #[inline(always)]
    fn float(self) -> S::Float {
        self.0.float()
    }
    #[inline(always)]
    fn weights(self, line: &[Bf16Pair; LANES]) -> S::Pairs {
        self.0.pairs(line)
    }
    #[inline(always)]
    fn add(
        self,
        sums: <S::Float as Simd>::V,
        weights: S::Pairs,
        x: Bf16Pair,
    ) -> <S::Float as Simd>::V {
        self.0.dot(sums, weights, x)
    }
}

impl<E: Element> Kernel for Part<'_, E, f32> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.tiles(Single(s));
    }
}

impl PairKernel for Part<'_, Bf16Pair, Bf16Pair> {
    #[inline(always)]
    fn run<S: PairSimd>(self, s: S) {
        self.tiles(InPairs(s));
    }
}

impl<E, X: Copy> Part<'_, E, X> {
    #[inline(always)]
    fn tiles<M: Multiply<E, X>>(self, m: M) {
        let lines = self.job.lines;
        for column in self.columns {
            let tile = &self.job.tiles[column * lines..(column + 1) * lines];
            for row in self.rows.clone().step_by(self.job.block) {
                let rows = (self.rows.end - row).min(self.job.block);
                let x = &self.job.x[row * lines..(row + rows) * lines];
                self.job.block_of_rows(m, (row, rows, column), x, tile);
            }
        }
    }
}

impl<E, X: Copy> Product<'_, E, X> {
    /// One tile for `rows` rows from `row` on.
    #[inline(always)]
    fn block_of_rows<M: Multiply<E, X>>(
        &self,
        m: M,
        (row, rows, column): (usize, usize, usize),
        x: &[X],
        tile: &[Columns<E>],
    ) {
        // A constant condition, so that only the half in use is compiled.
        macro_rules! by_rows {
            ($method:ident: $($n:literal)*) => {
                match rows {
                    $($n => self.$method::<M, $n>(m, (row, column), x, tile),)*
                    _ => unreachable!("a block of {rows} rows"),
                }
            };
        }
        if M::Float::WIDE {
            by_rows!(wide: 1 2 3 4 5 6 7 8 9 10 11 12);
        } else {
            by_rows!(narrow: 1 2 3 4 5 6);
        }
    }

    #[inline(always)]
    fn wide<M: Multiply<E, X>, const R: usize>(
        &self,
        m: M,
        (row, column): (usize, usize),
        x: &[X],
        tile: &[Columns<E>],
    ) {
        let s = m.float();
        let mut sums = [[s.splat(0.0); 2]; R];
        for (x, line) in x.as_chunks::<R>().0.iter().zip(tile) {
            s.prefetch((&raw const line.0).wrapping_byte_add(AHEAD));
            if size_of_val(line) > 64 {
                s.prefetch((&raw const line.0).wrapping_byte_add(AHEAD + 64));
            }
            let weights = [m.weights(low(&line.0)), m.weights(high(&line.0))];
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[0] = m.add(sums[0], weights[0], *x);
                sums[1] = m.add(sums[1], weights[1], *x);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            self.finish(s, row + r, column * TILE, sums[0]);
            self.finish(s, row + r, column * TILE + LANES, sums[1]);
        }
    }

    #[inline(always)]
    fn narrow<M: Multiply<E, X>, const R: usize>(
        &self,
        m: M,
        (row, column): (usize, usize),
        x: &[X],
        tile: &[Columns<E>],
    ) {
        self.narrow_half::<M, R>(m, (row, column * TILE), x, tile, low);
        self.narrow_half::<M, R>(m, (row, column * TILE + LANES), x, tile, high);
    }

    #[inline(always)]
    fn narrow_half<M: Multiply<E, X>, const R: usize>(
        &self,
        m: M,
        (row, column): (usize, usize),
        x: &[X],
        tile: &[Columns<E>],
        half: impl Fn(&[E; TILE]) -> &[E; LANES],
    ) {
        let s = m.float();
        let mut sums = [s.splat(0.0); R];
        for (x, line) in x.as_chunks::<R>().0.iter().zip(tile) {
            let weights = m.weights(half(&line.0));
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = m.add(*sum, weights, *x);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            self.finish(s, row + r, column, *sum);
        }
    }

    /// Stores what stands for real output features.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, row: usize, column: usize, sums: S::V) {
        let end = self.output.features.min(column + LANES);
        if column < end {
            self.output.put(s, row, column..end, sums);
        }
    }
}

#[inline(always)]
fn low<E>(line: &[E; TILE]) -> &[E; LANES] {
    line.first_chunk().expect("16 of 32")
}

#[inline(always)]
fn high<E>(line: &[E; TILE]) -> &[E; LANES] {
    line.last_chunk().expect("16 of 32")
}

/// The plain loop: `x` holds whole rows of `in_features`.
pub fn linear_reference(weight: &PackedWeight, bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    if let Tiles::Quantized(panels) = &weight.tiles {
        return quantized::reference(x, panels, bias);
    }
    let round = weight.dtype() == WeightDtype::Bf16;
    let mut y = Vec::new();
    for row in x.chunks_exact(weight.in_features.max(1)) {
        for n in 0..weight.out_features {
            let sum = match &weight.tiles {
                Tiles::Bf16Pairs(_) => {
                    let weights: Vec<f32> = (0..row.len()).map(|k| weight.value(n, k)).collect();
                    let pairs = weights.chunks(2).zip(row.chunks(2));
                    pairs.fold(0.0, |sum, (w, x)| pair_dot(sum, Cell::of(w), Cell::of(x)))
                }
                _ => row.iter().enumerate().fold(0f32, |sum, (k, &x)| {
                    let x = if round { round_to_bf16(x) } else { x };
                    x.mul_add(weight.value(n, k), sum)
                }),
            };
            y.push(sum + bias.map_or(0.0, |bias| bias[n]));
        }
    }
    y
}

#[cfg(test)]
mod tests;
