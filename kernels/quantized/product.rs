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

use super::panels::{Line, Panels, QUAD, QUADS};
use super::{BlockFormat, GROUP};
use crate::isa::{IntKernel, Kernel};
use crate::linear::TILE;
use crate::simd::{IntSimd, LANES, ROUNDING, Simd};
use crate::threads::{Disjoint, Threads};
use crate::view::Rows;

/// Rows of a block when 32 vectors fit the registers: 6 x 2 sums of integers, as many of f32.
const WIDE_ROWS: usize = 6;
/// Rows of a block when 8 do, one half of a tile at a time.
const NARROW_ROWS: usize = 2;
/// Bytes of packed rows that pass over the weights together: they stay in the L2 cache.
const CHUNK_BYTES: usize = 256 << 10;
/// Below it a group counts as zero: its scale would have no reciprocal.
const SMALLEST: f32 = f32::MIN_POSITIVE * 256.0;

/// x (rows, inputs) times `panels`, which follow each other, plus bias: (rows, outputs).
pub(crate) fn product(
    x: Rows,
    panels: &[Panels],
    bias: Option<&[f32]>,
    threads: &Threads,
) -> Vec<f32> {
    let outputs = panels.last().map_or(0, |last| last.rows.end);
    let mut y = vec![0f32; x.count * outputs];
    if y.is_empty() {
        return y;
    }
    let x = IntRows::new(x, threads);
    let y_parts = Disjoint::new(&mut y);
    for panels in panels {
        let job = Job { x: &x, panels, y: &y_parts, bias, outputs };
        job.run(threads);
    }
    y
}

/// Rows as integers, in blocks of neighbours.
struct IntRows {
    count: usize,
    inputs: usize,
    block: usize,
    /// Four inputs' integers: [block][quad][row]. The last block is as narrow as its rows.
    quads: Vec<i32>,
    /// [block][group][row]
    scales: Vec<f32>,
    /// Sums of the integers of each half of a group: [block][group][row]
    sums: Vec<[i32; 2]>,
}

impl IntRows {
    fn new(x: Rows, threads: &Threads) -> Self {
        let block = if threads.isa().is_wide_int() { WIDE_ROWS } else { NARROW_ROWS };
        let (inputs, groups) = (x.width, x.width / GROUP);
        let mut rows = Self {
            count: x.count,
            inputs,
            block,
            quads: vec![0; x.count * groups * QUADS],
            scales: vec![0.0; x.count * groups],
            sums: vec![[0; 2]; x.count * groups],
        };
        let quads = Disjoint::new(&mut rows.quads);
        let scales = Disjoint::new(&mut rows.scales);
        let sums = Disjoint::new(&mut rows.sums);
        threads.run(x.count.div_ceil(block), |index| {
            let range = index * block..x.count.min((index + 1) * block);
            let part = |of: usize| range.start * of..range.end * of;
            // SAFETY: blocks of rows are disjoint, and each is written by one part.
            let quads = unsafe { quads.slice(part(groups * QUADS)) };
            // SAFETY: as above.
            let scales = unsafe { scales.slice(part(groups)) };
            // SAFETY: as above.
            let sums = unsafe { sums.slice(part(groups)) };
            threads.isa().run(Quantize { x, rows: range.clone(), quads, scales, sums });
        });
        rows
    }
}

/// A block of rows on its way to integers.
struct Quantize<'a> {
    x: Rows<'a>,
    rows: Range<usize>,
    quads: &'a mut [i32],
    scales: &'a mut [f32],
    sums: &'a mut [[i32; 2]],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let count = self.rows.len();
        for (r, row) in self.rows.enumerate() {
            for (group, x) in self.x.row(row).as_chunks::<GROUP>().0.iter().enumerate() {
                let (bytes, scale) = quantize(s, x);
                let at = group * count + r;
                self.scales[at] = scale;
                let (first, second) = bytes.split_at(GROUP / 2);
                self.sums[at] =
                    [first, second].map(|half| half.iter().map(|&n| i32::from(n)).sum());
                for (quad, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    let four = four.map(i8::cast_unsigned);
                    self.quads[(group * QUADS + quad) * count + r] = i32::from_le_bytes(four);
                }
            }
        }
    }
}

/// A group's integers and their scale; a scale of NaN where a number is not finite.
#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32; GROUP]) -> ([i8; GROUP], f32) {
    let halves: [&[f32; LANES]; 2] = [
        x.first_chunk().expect("sixteen of thirty-two"),
        x.last_chunk().expect("sixteen of thirty-two"),
    ];
    let [a, b] = halves.map(|half| s.load(half));
    let zero = s.splat(0.0);
    let size = |v| s.max(v, s.sub(zero, v));
    let mut lanes = [0f32; LANES];
    s.store(s.max(size(a), size(b)), &mut lanes);
    let largest = lanes.iter().fold(0f32, |most, &lane| if lane > most { lane } else { most });
    // zero, or NaN from an infinity or a NaN
    s.store(s.mul(s.add(s.mul(a, zero), s.mul(b, zero)), zero), &mut lanes);
    let poison: f32 = lanes.iter().sum();
    let inverse = if largest >= SMALLEST { 127.0 / largest } else { 0.0 };
    let scale = if largest >= SMALLEST { largest / 127.0 } else { 0.0 } + poison;
    let mut bytes = [0i8; GROUP];
    for (half, bytes) in [a, b].into_iter().zip(bytes.as_chunks_mut::<LANES>().0) {
        let rounded = s.mul_add(half, s.splat(inverse), s.splat(ROUNDING));
        s.store(rounded, &mut lanes);
        for (byte, lane) in bytes.iter_mut().zip(&lanes) {
            // the integer lies in the low bits
            *byte = lane.to_bits() as i8;
        }
    }
    (bytes, scale)
}

#[derive(Clone, Copy)]
struct Job<'a> {
    x: &'a IntRows,
    panels: &'a Panels,
    y: &'a Disjoint<'a, f32>,
    bias: Option<&'a [f32]>,
    outputs: usize,
}

/// What one thread computes at a time: some tiles for some rows (a multiple of the block).
struct Part<'a> {
    job: Job<'a>,
    rows: Range<usize>,
    tiles: Range<usize>,
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
}

impl IntKernel for Part<'_> {
    #[inline(always)]
    fn run<S: IntSimd>(self, s: S) {
        match self.job.panels.format.bits() {
            4 => self.tiles::<S, 4>(s),
            5 => self.tiles::<S, 5>(s),
            6 => self.tiles::<S, 6>(s),
            _ => self.tiles::<S, 8>(s),
        }
    }
}

impl Part<'_> {
    #[inline(always)]
    fn tiles<S: IntSimd, const BITS: usize>(self, s: S) {
        for tile in self.tiles {
            for row in self.rows.clone().step_by(self.job.x.block) {
                let rows = (self.rows.end - row).min(self.job.x.block);
                self.job.block_of_rows::<S, BITS>(s, (row, rows, tile));
            }
        }
    }
}

impl Job<'_> {
    /// One tile for `rows` rows from `row` on.
    #[inline(always)]
    fn block_of_rows<S: IntSimd, const BITS: usize>(
        self,
        s: S,
        (row, rows, tile): (usize, usize, usize),
    ) {
        // A constant condition, so that only the half in use is compiled.
        macro_rules! by_rows {
            ($halves:literal, $first:expr, $($n:literal)*) => {
                match rows {
                    $($n => self.sums::<S, BITS, $n, $halves>(s, (row, tile, $first)),)*
                    _ => unreachable!("a block of {rows} rows"),
                }
            };
        }
        if S::Float::WIDE {
            by_rows!(2, 0, 1 2 3 4 5 6);
        } else {
            by_rows!(1, 0, 1 2);
            by_rows!(1, 1, 1 2);
        }
    }

    /// `H` halves of a tile, from the one named on, for `R` rows.
    #[inline(always)]
    fn sums<S: IntSimd, const BITS: usize, const R: usize, const H: usize>(
        self,
        s: S,
        (row, tile, first): (usize, usize, usize),
    ) {
        let f = s.float();
        let groups = self.x.inputs / GROUP;
        let quads = self.x.quads[row * groups * QUADS..].as_chunks::<R>().0;
        let scales = self.x.scales[row * groups..].as_chunks::<R>().0;
        let sums_of_x = self.x.sums[row * groups..].as_chunks::<R>().0;
        // known at run time alone: unrolled, the loop over them would hold a whole group of x,
        // which no registers do
        let part_quads = self.panels.format.scale_len() / QUAD;
        let parts = QUADS / part_quads;
        let mut acc = [[f.splat(0.0); H]; R];
        for group in 0..groups {
            let at = tile * groups + group;
            let codes = &self.panels.codes[(at * 2 + first) * BITS..][..H * BITS];
            s.prefetch(codes.as_ptr().wrapping_byte_add(AHEAD));
            for part in 0..parts {
                let mut sums = [[s.splat(0); H]; R];
                for (sums, [a, b]) in sums.iter_mut().zip(&sums_of_x[group]) {
                    let n = [a + b, *a, *b][if parts == 1 { 0 } else { 1 + part }];
                    *sums = [s.splat(-self.panels.format.center() * n); H];
                }
                for quad in part * part_quads..(part + 1) * part_quads {
                    let mut weights = [s.bytes(&codes[0].0); H];
                    for (h, weights) in weights.iter_mut().enumerate() {
                        *weights = codes_of::<S, BITS>(s, &codes[h * BITS..][..BITS], quad);
                    }
                    for (sums, x) in sums.iter_mut().zip(&quads[group * QUADS + quad]) {
                        for (sum, weights) in sums.iter_mut().zip(&weights) {
                            *sum = s.dot(*sum, *weights, *x);
                        }
                    }
                }
                for h in 0..H {
                    let scale = self.scale(s, at * parts + part, first + h);
                    for ((acc, sums), x) in acc.iter_mut().zip(&sums).zip(&scales[group]) {
                        let product = f.mul(s.to_float(sums[h]), scale);
                        acc[h] = f.mul_add(product, f.splat(*x), acc[h]);
                    }
                }
            }
            if self.panels.format.has_offset() {
                for h in 0..H {
                    let offset = self.offset(s, at, first + h);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let [a, b] = sums_of_x[group][r];
                        let x = scales[group][r] * (a + b) as f32;
                        acc[h] = f.mul_add(offset, f.splat(x), acc[h]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (h, acc) in acc.iter().enumerate() {
                self.finish(f, row + r, tile * TILE + (first + h) * LANES, *acc);
            }
        }
    }

    /// The scales of 16 features; `at` counts stretches of equal scale from the first tile's.
    #[inline(always)]
    fn scale<S: IntSimd>(self, s: S, at: usize, half: usize) -> <S::Float as Simd>::V {
        let format = self.panels.format;
        let block = at / (format.block_len() / format.scale_len());
        let scale = s.float().load_f16(half_of(&self.panels.scales[block].0, half));
        if !format.has_factors() {
            return scale;
        }
        let factors = half_of(&self.panels.factors[at], half);
        let is_signed = format == BlockFormat::Q6K;
        let factors = if is_signed { s.load_i8(factors) } else { s.load_u8(factors) };
        s.float().mul(scale, factors)
    }

    /// What is added to the weights of a group, for 16 features.
    #[inline(always)]
    fn offset<S: IntSimd>(self, s: S, group: usize, half: usize) -> <S::Float as Simd>::V {
        let (f, format) = (s.float(), self.panels.format);
        let block = group / (format.block_len() / GROUP);
        let offset = f.load_f16(half_of(&self.panels.offsets[block].0, half));
        if !format.has_factors() {
            return offset;
        }
        let factors = s.load_u8(half_of(&self.panels.offset_factors[group], half));
        f.sub(f.splat(0.0), f.mul(offset, factors))
    }

    /// Adds the bias and stores the sums that stand for real output features.
    #[inline(always)]
    fn finish<S: Simd>(self, s: S, row: usize, column: usize, sums: S::V) {
        let count = LANES.min(self.panels.rows.len().saturating_sub(column));
        if count == 0 {
            return;
        }
        let column = self.panels.rows.start + column;
        let mut values = [0f32; LANES];
        s.store(sums, &mut values);
        if let Some(bias) = self.bias {
            for (value, bias) in values.iter_mut().zip(&bias[column..column + count]) {
                *value += bias;
            }
        }
        let start = row * self.outputs + column;
        // SAFETY: these are elements of one row and one tile; the parts of a run split rows and
        // tiles between them without overlap, and a part stores one segment at a time.
        let out = unsafe { self.y.slice(start..start + count) };
        out.copy_from_slice(&values[..count]);
    }
}

/// Bytes by which weights are asked for ahead of their use.
const AHEAD: usize = 4 << 10;

/// The codes of a quad, for 16 features.
#[inline(always)]
fn codes_of<S: IntSimd, const BITS: usize>(s: S, lines: &[Line], quad: usize) -> S::Bytes {
    if BITS == 8 {
        return s.bytes(&lines[quad].0);
    }
    let low = s.field(s.bytes(&lines[quad % 4].0), (quad / 4 * 4) as u32, 15);
    match BITS {
        5 => s.above(low, s.field(s.bytes(&lines[4].0), quad as u32, 1)),
        6 => {
            let high = s.bytes(&lines[4 + quad / 4].0);
            s.above(low, s.field(high, (quad % 4 * 2) as u32, 3))
        }
        _ => low,
    }
}

#[inline(always)]
fn half_of<E>(line: &[E; TILE], half: usize) -> &[E; LANES] {
    line[half * LANES..].first_chunk().expect("sixteen of a tile")
}

/// The plain loop: `x` holds whole rows.
pub(crate) fn reference(x: &[f32], panels: &[Panels], bias: Option<&[f32]>) -> Vec<f32> {
    let inputs = panels.first().map_or(1, |panels| panels.inputs);
    let mut y = Vec::new();
    for row in x.chunks_exact(inputs) {
        let groups = row.as_chunks::<GROUP>().0.iter();
        let groups: Vec<_> = groups.map(|x| quantize(crate::simd::Portable, x)).collect();
        for panels in panels {
            for n in panels.rows.clone() {
                y.push(element(&groups, panels, n) + bias.map_or(0.0, |bias| bias[n]));
            }
        }
    }
    y
}

fn element(groups: &[([i8; GROUP], f32)], panels: &Panels, row: usize) -> f32 {
    let (format, mut acc) = (panels.format, 0f32);
    let (tile, column) = ((row - panels.rows.start) / TILE, (row - panels.rows.start) % TILE);
    for (group, (x, x_scale)) in groups.iter().enumerate() {
        let len = format.scale_len();
        for (part, x) in x.chunks_exact(len).enumerate() {
            let first = group * GROUP + part * len;
            let term = |(i, &x): (usize, &i8)| {
                let code = i32::from(panels.code(tile, column, first + i));
                (code - format.center()) * i32::from(x)
            };
            let sum: i32 = x.iter().enumerate().map(term).sum();
            let (scale, _) = panels.scale(tile, column, first);
            acc = (sum as f32 * scale).mul_add(*x_scale, acc);
        }
        if format.has_offset() {
            let (_, offset) = panels.scale(tile, column, group * GROUP);
            let sum: i32 = x.iter().map(|&n| i32::from(n)).sum();
            acc = offset.mul_add(x_scale * sum as f32, acc);
        }
    }
    acc
}
