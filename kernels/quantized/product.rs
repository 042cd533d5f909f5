//! x W^T for weights in [`Panels`]: integer products inside a group, f32 between groups.
//!
//! Rows become integers of 8 bits first: a group of 32 inputs is `scale * n`, where scale is its
//! largest number / 127, n to nearest even. An output element is then, for groups ascending (for
//! Q6K: halves of groups),
//!
//! ```text
//! acc = ((sum of (code - center) * n) as f32 * weight_scale).mul_add(x_scale, acc)
//! acc = weight_offset.mul_add(x_scale * (sum of n) as f32, acc)     where there are offsets
//! ```
//!
//! and `+ bias` at the end. Sums of integers are exact, so every instruction set gives the same
//! bits, for any number of rows.

use std::ops::Range;

use super::panels::{Panels, QUADS};
use super::rows::{Groups, IntRows, quantize};
use super::tiles::{Ahead, Buffer, Packed, Slab, Tile, Unpacked, half_of, half_of_mut};
use super::{BlockFormat, GROUP};
use crate::isa::IntKernel;
use crate::linear::{Columns, Output, TILE};
use crate::memory::written;
use crate::simd::{IntSimd, LANES, ROUNDING, Simd};
use crate::threads::{Disjoint, Threads};
use crate::view::Rows;

/// Bytes of packed rows that pass over the weights together: they stay in the L2 cache.
const CHUNK_BYTES: usize = 256 << 10;

/// x (rows, inputs) times `panels`, which follow each other, plus bias: (rows, outputs).
pub(crate) fn product(
    x: Rows,
    panels: &[Panels],
    bias: Option<&[f32]>,
    threads: &Threads,
) -> Vec<f32> {
    let outputs = panels.last().map_or(0, |last| last.rows.end);
    if x.count * outputs == 0 {
        return Vec::new();
    }
    let write = |y: Disjoint<_>| {
        let x = IntRows::new(x, threads);
        let output = Output { y, bias, features: outputs };
        for panels in panels {
            let starts = x.starts(panels.format);
            let job = Job { x: &x, starts: &starts, panels, output: &output };
            job.run(threads);
        }
    };
    // SAFETY: the panels are all columns, and a job finishes each of its own for all rows.
    unsafe { written(x.count * outputs, write) }
}

#[derive(Clone, Copy)]
struct Job<'a> {
    x: &'a IntRows,
    /// [`IntRows::starts`]
    starts: &'a [[i32; 2]],
    panels: &'a Panels,
    output: &'a Output<'a>,
}

impl Job<'_> {
    fn run(self, threads: &Threads) {
        let (rows, inputs, block) = (self.x.count, self.x.inputs, self.x.block);
        let tiles = self.panels.rows.len().div_ceil(TILE);
        let chunk = (CHUNK_BYTES / inputs.max(1)).max(1).next_multiple_of(block);
        let row_parts = rows.div_ceil(chunk);
        // Enough parts that threads end together, few enough that claiming them costs nothing.
        let tile_parts = tiles.min((threads.count() * 8).div_ceil(row_parts).max(1));
        threads.run(row_parts * tile_parts, |part| {
            let (row_part, tile_part) = (part / tile_parts, part % tile_parts);
            let rows = row_part * chunk..rows.min((row_part + 1) * chunk);
            let tiles = tile_part * tiles / tile_parts..(tile_part + 1) * tiles / tile_parts;
            threads.isa().run_int(Part { job: self, rows, tiles });
        });
    }

    /// Stores what stands for real output features.
    #[inline(always)]
    fn finish<S: Simd>(self, s: S, row: usize, column: usize, sums: S::V) {
        let rows = &self.panels.rows;
        let start = rows.start + column;
        if start < rows.end {
            self.output.put(s, row, start..rows.end.min(start + LANES), sums);
        }
    }
}

/// What one thread computes at a time: some tiles for some rows, beginning with a block.
struct Part<'a> {
    job: Job<'a>,
    rows: Range<usize>,
    tiles: Range<usize>,
}

impl IntKernel for Part<'_> {
    /// A tile passes in slabs; each is used by all blocks of rows while it is in the L1 cache.
    #[inline(always)]
    fn run<S: IntSimd>(self, s: S) {
        let x = self.job.x;
        let (groups, blocks) = (x.inputs / GROUP, self.rows.len().div_ceil(x.block));
        let step = if blocks == 1 { groups } else { SLAB };
        let mut sums = vec![Columns([0.0; TILE]); if step < groups { self.rows.len() } else { 0 }];
        let mut buffer = Buffer::default();
        for tile in self.tiles.clone() {
            for first in (0..groups).step_by(step) {
                let slab = Slab { tile, groups: first..groups.min(first + step) };
                self.slab(s, &slab, &mut buffer, &mut sums);
            }
        }
    }
}

/// Groups of a slab: 16 KiB of codes taken apart.
const SLAB: usize = 16;

/// Blocks of rows for which a slab is read as it lies: taking it apart costs more than it saves.
const fn blocks_of_packed(format: BlockFormat) -> usize {
    if format.bits() == 4 { 3 } else { 1 }
}

impl Part<'_> {
    #[inline(always)]
    fn slab<S: IntSimd>(&self, s: S, slab: &Slab, buffer: &mut Buffer, sums: &mut [Columns<f32>]) {
        let panels = self.job.panels;
        if self.rows.len() <= self.job.x.block * blocks_of_packed(panels.format) {
            // Compiled for each format: what depends on it is not asked again for every group.
            super::by_format!(panels.format, F, {
                self.blocks(s, slab, sums, |ahead| Packed::<F>::new(panels, slab, ahead));
            });
            return;
        }
        buffer.fill(s, panels, slab);
        macro_rules! blocks {
            ($parts:literal, $has_offsets:literal) => {
                self.blocks(s, slab, sums, |ahead| {
                    Unpacked::<$parts, $has_offsets>::new(panels, slab, buffer, ahead)
                })
            };
        }
        match (panels.format.scale_len(), panels.format.has_offset()) {
            (GROUP, false) => blocks!(1, false),
            (GROUP, true) => blocks!(1, true),
            _ => blocks!(2, false),
        }
    }

    /// Multiplies a slab with all blocks of rows; `tile` has what each of them asks for ahead.
    #[inline(always)]
    fn blocks<S: IntSimd, T: Tile>(
        &self,
        s: S,
        slab: &Slab,
        sums: &mut [Columns<f32>],
        tile: impl Fn(Ahead) -> T,
    ) {
        let Self { job, rows, .. } = self;
        let count = rows.len().div_ceil(job.x.block);
        let first = Ahead::new(job.panels, slab, count);
        for block in 0..count {
            let tile = tile(first.of_block(block));
            let first = block * job.x.block;
            let range = first..rows.len().min(first + job.x.block);
            let sums = sums.get_mut(range.clone()).unwrap_or_default();
            let rows = rows.start + range.start..rows.start + range.end;
            Block { job: *job, tile, slab, rows, sums }.run(s);
        }
    }
}

/// A slab for a block of rows.
struct Block<'a, T> {
    job: Job<'a>,
    tile: T,
    slab: &'a Slab,
    rows: Range<usize>,
    /// What the sums of a tile are between two slabs.
    sums: &'a mut [Columns<f32>],
}

impl<T: Tile> Block<'_, T> {
    #[inline(always)]
    fn run<S: IntSimd>(mut self, s: S) {
        macro_rules! by_rows {
            ($halves:literal, $first:expr, $($n:literal)*) => {
                match self.rows.len() {
                    $($n => self.sums::<S, $n, $halves>(s, $first),)*
                    rows => unreachable!("a block of {rows} rows"),
                }
            };
        }
        // A constant condition, so that only the half in use is compiled.
        if S::Float::WIDE {
            by_rows!(2, 0, 1 2 3 4 5 6);
        } else {
            by_rows!(1, 0, 1 2);
            by_rows!(1, 1, 1 2);
        }
    }

    /// `H` halves of the slab, from the one named on, for `R` rows.
    ///
    /// A sum of integers begins with the bits of [`ROUNDING`] and is then, being below 2^22, larger
    /// by just that as a float. `(ROUNDING + sum) * scale - ROUNDING * scale`, rounded once, is the
    /// product rounded: a scale has few enough digits that what is subtracted is exact.
    #[inline(always)]
    fn sums<S: IntSimd, const R: usize, const H: usize>(&mut self, s: S, first: usize) {
        let Self { job, tile, slab, .. } = *self;
        let (f, groups) = (s.float(), job.x.inputs / GROUP);
        // all of the block, then what belongs to the slab
        let (at, range) = (self.rows.start * groups, slab.groups.clone());
        let quads = &job.x.quads[at..].as_chunks::<R>().0[range.clone()];
        let scales = &job.x.scales[at..].as_chunks::<R>().0[range.clone()];
        let worths = &job.x.worths[at..].as_chunks::<R>().0[range.clone()];
        let starts = &job.starts[at..].as_chunks::<R>().0[range];
        let mut acc = [[f.splat(0.0); H]; R];
        if slab.groups.start > 0 {
            for (acc, sums) in acc.iter_mut().zip(&*self.sums) {
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = f.load(half_of(&sums.0, first + h));
                }
            }
        }
        for group in 0..slab.groups.len() {
            tile.ask_ahead(s, group);
            for part in 0..T::PARTS {
                let mut sums = [[s.splat(0); H]; R];
                for (sums, start) in sums.iter_mut().zip(&starts[group]) {
                    *sums = [s.splat(start[part]); H];
                }
                for quad in part * (QUADS / T::PARTS)..(part + 1) * (QUADS / T::PARTS) {
                    let mut codes = [tile.codes(s, group, first, quad); H];
                    for (h, codes) in codes.iter_mut().enumerate().skip(1) {
                        *codes = tile.codes(s, group, first + h, quad);
                    }
                    for (sums, x) in sums.iter_mut().zip(&quads[group]) {
                        for (sum, codes) in sums.iter_mut().zip(&codes) {
                            *sum = s.dot(*sum, *codes, x[quad]);
                        }
                    }
                }
                for h in 0..H {
                    let scale = tile.scale(s, group, part, first + h);
                    let excess = f.mul(scale, f.splat(-ROUNDING));
                    for ((acc, sums), x) in acc.iter_mut().zip(&sums).zip(&scales[group]) {
                        let product = f.mul_add(s.as_floats(sums[h]), scale, excess);
                        acc[h] = f.mul_add(product, f.splat(*x), acc[h]);
                    }
                }
            }
            if T::HAS_OFFSETS {
                for h in 0..H {
                    let offset = tile.offset(s, group, first + h);
                    for (acc, x) in acc.iter_mut().zip(&worths[group]) {
                        acc[h] = f.mul_add(offset, f.splat(*x), acc[h]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (h, acc) in acc.iter().enumerate() {
                let half = first + h;
                if slab.groups.end < groups {
                    f.store(*acc, half_of_mut(&mut self.sums[r].0, half));
                } else {
                    job.finish(f, self.rows.start + r, slab.tile * TILE + half * LANES, *acc);
                }
            }
        }
    }
}

/// The plain loop: `x` holds whole rows.
pub(crate) fn reference(x: &[f32], panels: &[Panels], bias: Option<&[f32]>) -> Vec<f32> {
    let inputs = panels.first().map_or(1, |panels| panels.inputs);
    let mut y = Vec::new();
    for row in x.chunks_exact(inputs) {
        let groups = row.as_chunks::<GROUP>().0.chunks(1);
        let groups: Vec<_> = groups.map(|x| quantize(crate::simd::Portable, x)).collect();
        for panels in panels {
            for n in panels.rows.clone() {
                y.push(element(&groups, panels, n) + bias.map_or(0.0, |bias| bias[n]));
            }
        }
    }
    y
}

/// `groups`: the first of each is the group.
fn element(groups: &[Groups], panels: &Panels, row: usize) -> f32 {
    let (format, mut acc) = (panels.format, 0f32);
    let (tile, column) = ((row - panels.rows.start) / TILE, (row - panels.rows.start) % TILE);
    for (group, x) in groups.iter().enumerate() {
        let (x, x_scale) = (x.bytes[0].map(u8::cast_signed), x.scales[0]);
        let len = format.scale_len();
        for (part, x) in x.chunks_exact(len).enumerate() {
            let first = group * GROUP + part * len;
            let term = |(i, &x): (usize, &i8)| {
                let code = i32::from(panels.code(tile, column, first + i));
                (code - format.center()) * i32::from(x)
            };
            let sum: i32 = x.iter().enumerate().map(term).sum();
            let (scale, _) = panels.scale(tile, column, first);
            acc = (sum as f32 * scale).mul_add(x_scale, acc);
        }
        if format.has_offset() {
            let (_, offset) = panels.scale(tile, column, group * GROUP);
            let sum: i32 = x.iter().map(|&n| i32::from(n)).sum();
            acc = offset.mul_add(x_scale * sum as f32, acc);
        }
    }
    acc
}
