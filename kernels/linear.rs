//! y = x W^T + b with weights packed once: x (rows, in) f32 -> (rows, out) f32.
//!
//! An output element is `acc = 0; for k ascending: acc = x[k].mul_add(w[k], acc)`, then `+ b`;
//! weights widen to f32 exactly, and bf16 weights round x to bf16 (nearest even) first. The order
//! never depends on the number of rows, the tile or the threads. Quantized weights have an order
//! of their own, as fixed: `quantized/product.rs`.
//!
//! Weights lie in tiles of 32 output features, k sequential inside: [tile][k][32]. A block of
//! rows (up to 12) holds its sums in registers while a tile streams past once. Rows are repacked
//! per call so that a block's values of one k are neighbours: [block][k][row].

use crate::dtype::{Element, WeightDtype};
use crate::error::Error;
use crate::isa::Kernel;
use crate::math::{RoundToBf16, round_to_bf16};
use crate::pages::prefer_large_pages;
use crate::quantized::{self, BlockFormat, Panels};
use crate::simd::{LANES, Simd};
use crate::threads::{Disjoint, Threads};
use crate::view::Rows;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Output features of a tile.
pub(crate) const TILE: usize = 32;
/// Rows of a block when 32 vectors fit the registers: 12 x 2 sums, 2 weights.
const WIDE_ROWS: usize = 12;
/// Rows of a block when 8 do: 6 sums, 1 weight.
const NARROW_ROWS: usize = 6;
/// Bytes of packed rows that pass over the weights together: they stay in the L2 cache.
const CHUNK_BYTES: usize = 512 << 10;

/// Bytes by which weights are asked for ahead of their use: across page borders, where the
/// processor's own prefetching stops.
const AHEAD: usize = 4 << 10;

/// Weights of one k for a tile: a cache line or two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Columns<E>(pub(crate) [E; TILE]);

pub(crate) enum Tiles {
    F32(Vec<Columns<f32>>),
    F16(Vec<Columns<f16>>),
    Bf16(Vec<Columns<bf16>>),
    /// In integers; see `quantized.rs`.
    Quantized(Vec<Panels>),
}

/// A weight matrix (out_features, in_features) in tiles. The last one is filled with zeros.
pub struct PackedWeight {
    out_features: usize,
    in_features: usize,
    pub(crate) tiles: Tiles,
}

impl PackedWeight {
    /// `rows(range, out)` fills `out` with the f32 values of those output rows, row-major
    /// (`range.len()` x `in_features`). It is called in parallel for strips of at most 32 rows,
    /// each row once; `out` is zeroed. The first error ends the packing.
    pub fn pack<E: Send>(
        out_features: usize,
        in_features: usize,
        dtype: WeightDtype,
        threads: &Threads,
        rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let size = (out_features, in_features);
        let tiles = match dtype {
            WeightDtype::F32 => Tiles::F32(pack(size, threads, rows)?),
            // what doesn't come in blocks is no smaller in them
            WeightDtype::F16 | WeightDtype::Quantized => Tiles::F16(pack(size, threads, rows)?),
            WeightDtype::Bf16 => Tiles::Bf16(pack(size, threads, rows)?),
        };
        Ok(Self { out_features, in_features, tiles })
    }

    /// Rows in blocks as they are stored: `parts` are a format and how many rows it has, one below
    /// the other; `read(row, bytes)` fills in the bytes of a row. In parallel, each row once; the
    /// first error ends the packing.
    pub fn pack_blocks<E: Send>(
        parts: &[(BlockFormat, usize)],
        in_features: usize,
        threads: &Threads,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut panels = Vec::with_capacity(parts.len());
        let mut rows = 0;
        for &(format, count) in parts.iter().filter(|(_, count)| *count > 0) {
            let range = rows..rows + count;
            panels.push(Panels::pack(format, range, in_features, threads, &read)?);
            rows += count;
        }
        Ok(Self { out_features: rows, in_features, tiles: Tiles::Quantized(panels) })
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn dtype(&self) -> WeightDtype {
        match self.tiles {
            Tiles::F32(_) => WeightDtype::F32,
            Tiles::F16(_) => WeightDtype::F16,
            Tiles::Bf16(_) => WeightDtype::Bf16,
            Tiles::Quantized(_) => WeightDtype::Quantized,
        }
    }

    /// Memory the tiles take.
    pub fn bytes(&self) -> usize {
        if let Tiles::Quantized(panels) = &self.tiles {
            return panels.iter().map(Panels::bytes).sum();
        }
        self.out_features.next_multiple_of(TILE) * self.in_features * self.dtype().size()
    }

    /// The weight of output feature `row` for input `k`.
    pub(crate) fn value(&self, row: usize, k: usize) -> f32 {
        let (line, column) = (row / TILE * self.in_features + k, row % TILE);
        match &self.tiles {
            Tiles::F32(tiles) => tiles[line].0[column],
            Tiles::F16(tiles) => tiles[line].0[column].widen(),
            Tiles::Bf16(tiles) => tiles[line].0[column].widen(),
            Tiles::Quantized(panels) => {
                let holds = |panels: &&Panels| panels.rows.contains(&row);
                panels.iter().find(holds).expect("a row of the matrix").value(row, k)
            }
        }
    }
}

fn pack<T: Element, E: Send>(
    (out_features, in_features): (usize, usize),
    threads: &Threads,
    rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<Vec<Columns<T>>, E> {
    let lines = out_features.div_ceil(TILE) * in_features;
    let mut tiles = Vec::with_capacity(lines);
    prefer_large_pages(tiles.spare_capacity_mut());
    tiles.resize(lines, Columns([T::default(); TILE]));
    let failure = Mutex::new(None);
    let failed = || failure.lock().expect("nothing panics under this lock").is_some();
    threads.for_each_chunk(&mut tiles, in_features, |tile, lines| {
        if failed() {
            return;
        }
        let range = tile * TILE..out_features.min((tile + 1) * TILE);
        let mut values = vec![0f32; range.len() * in_features];
        if let Err(error) = rows(range, &mut values) {
            failure.lock().expect("nothing panics under this lock").get_or_insert(error);
            return;
        }
        for (column, row) in values.chunks_exact(in_features).enumerate() {
            for (line, value) in lines.iter_mut().zip(row) {
                line.0[column] = T::narrow(*value);
            }
        }
    });
    match failure.into_inner().expect("nothing panics under this lock") {
        Some(error) => Err(error),
        None => Ok(tiles),
    }
}

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
            Tiles::F32(tiles) => self.product(x, tiles),
            Tiles::F16(tiles) => self.product(x, tiles),
            Tiles::Bf16(tiles) => self.product(x, tiles),
            Tiles::Quantized(panels) => {
                let bias = self.bias.as_deref().map(Vec::as_slice);
                quantized::product(x, panels, bias, &self.threads)
            }
        };
        Ok((CpuStorage::F32(y), Shape::from((x.count, outputs))))
    }
}

impl Linear {
    fn product<E: Element>(&self, x: Rows, tiles: &[Columns<E>]) -> Vec<f32> {
        let (inputs, outputs) = (self.weight.in_features, self.weight.out_features);
        let mut y = vec![0f32; x.count * outputs];
        if y.is_empty() {
            return y;
        }
        let bias = self.bias.as_deref().map(Vec::as_slice);
        if inputs == 0 {
            for row in y.chunks_exact_mut(outputs) {
                row.copy_from_slice(bias.unwrap_or(&vec![0.0; outputs]));
            }
            return y;
        }
        let block = if self.threads.isa().is_wide() { WIDE_ROWS } else { NARROW_ROWS };
        let packed = self.pack_rows(x, block);
        let columns = outputs.div_ceil(TILE);
        let chunk = (CHUNK_BYTES / (inputs * 4)).next_multiple_of(block);
        let row_parts = x.count.div_ceil(chunk);
        // Enough parts that threads end together, few enough that claiming them costs nothing.
        let column_parts = columns.min((self.threads.count() * 8).div_ceil(row_parts).max(1));
        let output = Output { y: Disjoint::new(&mut y), bias, features: outputs };
        let job = Product { x: &packed, tiles, inputs, output, block };
        self.threads.run(row_parts * column_parts, |part| {
            let (row_part, column_part) = (part / column_parts, part % column_parts);
            self.threads.isa().run(Part {
                job: &job,
                rows: row_part * chunk..x.count.min((row_part + 1) * chunk),
                columns: column_part * columns / column_parts
                    ..(column_part + 1) * columns / column_parts,
            });
        });
        y
    }

    /// [block][k][row], rounded as the weights ask. The last block is as narrow as its rows.
    fn pack_rows(&self, x: Rows, block: usize) -> Vec<f32> {
        let inputs = self.weight.in_features;
        let mut packed = vec![0f32; x.count * inputs];
        self.threads.for_each_chunk(&mut packed, block * inputs, |i, panel| {
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
}

struct Product<'a, E> {
    x: &'a [f32],
    tiles: &'a [Columns<E>],
    inputs: usize,
    output: Output<'a>,
    block: usize,
}

/// Where products go: (rows, features).
pub(crate) struct Output<'a> {
    pub y: Disjoint<'a, f32>,
    pub bias: Option<&'a [f32]>,
    pub features: usize,
}

impl Output<'_> {
    /// Stores the first of the sums, as many as there are columns, with the bias added.
    #[inline(always)]
    pub fn put<S: Simd>(&self, s: S, row: usize, columns: Range<usize>, sums: S::V) {
        let mut values = [0f32; LANES];
        s.store(sums, &mut values);
        let values = &mut values[..columns.len()];
        if let Some(bias) = self.bias {
            for (value, bias) in values.iter_mut().zip(&bias[columns.clone()]) {
                *value += bias;
            }
        }
        let start = row * self.features + columns.start;
        // SAFETY: these are elements of one row and one tile; the parts of a run split rows and
        // tiles between them without overlap, and a part stores one segment at a time.
        let out = unsafe { self.y.slice(start..start + values.len()) };
        out.copy_from_slice(values);
    }
}

/// What one thread computes at a time: some tiles for some rows (a multiple of the block).
struct Part<'a, E> {
    job: &'a Product<'a, E>,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl<E: Element> Kernel for Part<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.job.inputs;
        for column in self.columns {
            let tile = &self.job.tiles[column * inputs..(column + 1) * inputs];
            for row in self.rows.clone().step_by(self.job.block) {
                let rows = (self.rows.end - row).min(self.job.block);
                let x = &self.job.x[row * inputs..(row + rows) * inputs];
                self.job.block_of_rows(s, (row, rows, column), x, tile);
            }
        }
    }
}

impl<E: Element> Product<'_, E> {
    /// One tile for `rows` rows from `row` on.
    #[inline(always)]
    fn block_of_rows<S: Simd>(
        &self,
        s: S,
        (row, rows, column): (usize, usize, usize),
        x: &[f32],
        tile: &[Columns<E>],
    ) {
        // A constant condition, so that only the half in use is compiled.
        macro_rules! by_rows {
            ($method:ident: $($n:literal)*) => {
                match rows {
                    $($n => self.$method::<S, $n>(s, (row, column), x, tile),)*
                    _ => unreachable!("a block of {rows} rows"),
                }
            };
        }
        if S::WIDE {
            by_rows!(wide: 1 2 3 4 5 6 7 8 9 10 11 12);
        } else {
            by_rows!(narrow: 1 2 3 4 5 6);
        }
    }

    #[inline(always)]
    fn wide<S: Simd, const R: usize>(
        &self,
        s: S,
        (row, column): (usize, usize),
        x: &[f32],
        tile: &[Columns<E>],
    ) {
        let mut sums = [[s.splat(0.0); 2]; R];
        for (x, line) in x.as_chunks::<R>().0.iter().zip(tile) {
            s.prefetch((&raw const line.0).wrapping_byte_add(AHEAD));
            if size_of_val(line) > 64 {
                s.prefetch((&raw const line.0).wrapping_byte_add(AHEAD + 64));
            }
            let weights = [E::load(s, low(&line.0)), E::load(s, high(&line.0))];
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = s.splat(*x);
                sums[0] = s.mul_add(x, weights[0], sums[0]);
                sums[1] = s.mul_add(x, weights[1], sums[1]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            self.finish(s, row + r, column * TILE, sums[0]);
            self.finish(s, row + r, column * TILE + LANES, sums[1]);
        }
    }

    #[inline(always)]
    fn narrow<S: Simd, const R: usize>(
        &self,
        s: S,
        (row, column): (usize, usize),
        x: &[f32],
        tile: &[Columns<E>],
    ) {
        let mut sums = [s.splat(0.0); R];
        for (x, line) in x.as_chunks::<R>().0.iter().zip(tile) {
            let weights = E::load(s, low(&line.0));
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = s.mul_add(s.splat(*x), weights, *sum);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            self.finish(s, row + r, column * TILE, *sum);
        }
        let mut sums = [s.splat(0.0); R];
        for (x, line) in x.as_chunks::<R>().0.iter().zip(tile) {
            let weights = E::load(s, high(&line.0));
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = s.mul_add(s.splat(*x), weights, *sum);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            self.finish(s, row + r, column * TILE + LANES, *sum);
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
            let mut sum = 0f32;
            for (k, &x) in row.iter().enumerate() {
                let x = if round { round_to_bf16(x) } else { x };
                sum = x.mul_add(weight.value(n, k), sum);
            }
            y.push(sum + bias.map_or(0.0, |bias| bias[n]));
        }
    }
    y
}

#[cfg(test)]
mod tests;
