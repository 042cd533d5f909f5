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

use super::panels::{Line, Panels, QUADS};
use super::{BlockFormat, GROUP};
use crate::isa::{IntKernel, Kernel};
use crate::linear::{Output, TILE};
use crate::memory::written;
use crate::simd::{IntSimd, LANES, ROUNDING, SMALLEST, Simd};
use crate::threads::{Disjoint, Threads};
use crate::view::Rows;

/// Rows of a block when 32 vectors fit the registers: 6 x 2 sums of integers, as many of f32.
const WIDE_ROWS: usize = 6;
/// Rows of a block when 8 do, one half of a tile at a time.
const NARROW_ROWS: usize = 2;
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
    /// What a weight's offset counts for: scale * sum, [block][group][row]
    worths: Vec<f32>,
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
            worths: vec![0.0; x.count * groups],
        };
        let quads = Disjoint::new(&mut rows.quads);
        let scales = Disjoint::new(&mut rows.scales);
        let sums = Disjoint::new(&mut rows.sums);
        let worths = Disjoint::new(&mut rows.worths);
        threads.run(x.count.div_ceil(block), |index| {
            let range = index * block..x.count.min((index + 1) * block);
            let part = |of: usize| range.start * of..range.end * of;
            // SAFETY: blocks of rows are disjoint, and each is written by one part.
            let quads = unsafe { quads.slice(part(groups * QUADS)) };
            // SAFETY: as above.
            let scales = unsafe { scales.slice(part(groups)) };
            // SAFETY: as above.
            let sums = unsafe { sums.slice(part(groups)) };
            // SAFETY: as above.
            let worths = unsafe { worths.slice(part(groups)) };
            let rows = range.clone();
            threads.isa().run(Quantize { x, rows, quads, scales, sums, worths });
        });
        rows
    }

    /// What the integer sums of each stretch of equal scale begin with, so that codes need not be
    /// centered: as `sums`; where a group is one stretch, the first of two.
    fn starts(&self, format: BlockFormat) -> Vec<[i32; 2]> {
        let start = |n: i32| -format.center() * n;
        let of = |&[a, b]: &[i32; 2]| match format.scale_len() {
            GROUP => [start(a + b), 0],
            _ => [start(a), start(b)],
        };
        self.sums.iter().map(of).collect()
    }
}

/// A block of rows on its way to integers.
struct Quantize<'a> {
    x: Rows<'a>,
    rows: Range<usize>,
    quads: &'a mut [i32],
    scales: &'a mut [f32],
    sums: &'a mut [[i32; 2]],
    worths: &'a mut [f32],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let count = self.rows.len();
        for (r, row) in self.rows.enumerate() {
            for (group, x) in self.x.row(row).as_chunks::<GROUP>().0.iter().enumerate() {
                let (bytes, scale, sums) = quantize(s, x);
                let at = group * count + r;
                self.scales[at] = scale;
                self.sums[at] = sums;
                self.worths[at] = scale * (sums[0] + sums[1]) as f32;
                for (quad, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    let four = four.map(i8::cast_unsigned);
                    self.quads[(group * QUADS + quad) * count + r] = i32::from_le_bytes(four);
                }
            }
        }
    }
}

/// A group's integers, their scale (NaN where a number is not finite), the sums of their halves.
#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32; GROUP]) -> ([i8; GROUP], f32, [i32; 2]) {
    let halves: [&[f32; LANES]; 2] = [
        x.first_chunk().expect("sixteen of thirty-two"),
        x.last_chunk().expect("sixteen of thirty-two"),
    ];
    let [a, b] = halves.map(|half| s.load(half));
    let size = |v| s.max(v, s.sub(s.splat(0.0), v));
    let largest = s.reduce_max(s.max(size(a), size(b)));
    let inverse = if largest >= SMALLEST { 127.0 / largest } else { 0.0 };
    let mut bytes = [0i8; GROUP];
    let mut sums = [0f32; 2];
    let halves = [a, b].into_iter().zip(bytes.as_chunks_mut::<LANES>().0);
    for ((half, bytes), sum) in halves.zip(&mut sums) {
        let rounded = s.mul_add(half, s.splat(inverse), s.splat(ROUNDING));
        let mut lanes = [0f32; LANES];
        s.store(rounded, &mut lanes);
        for (byte, lane) in bytes.iter_mut().zip(&lanes) {
            // the integer lies in the low bits
            *byte = lane.to_bits() as i8;
        }
        // exact, being of small integers; NaN from an infinity or a NaN
        *sum = s.reduce(s.sub(rounded, s.splat(ROUNDING)));
    }
    let scale = if largest >= SMALLEST { largest / 127.0 } else { 0.0 };
    let poison = (sums[0] + sums[1]) * 0.0;
    (bytes, scale + poison, sums.map(|sum| sum as i32))
}

#[derive(Clone, Copy)]
struct Job<'a> {
    x: &'a IntRows,
    /// [`IntRows::starts`]
    starts: &'a [[i32; 2]],
    panels: &'a Panels,
    output: &'a Output<'a>,
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
        // Compiled for each format: what depends on it is not asked again for every group.
        macro_rules! by_format {
            ($($format:literal)*) => {
                match self.job.panels.format as usize {
                    $($format => self.tiles::<S, $format>(s),)*
                    format => unreachable!("format {format}"),
                }
            };
        }
        by_format!(0 1 2 3 4 5 6 7)
    }
}

impl Part<'_> {
    #[inline(always)]
    fn tiles<S: IntSimd, const F: usize>(self, s: S) {
        let block = self.job.x.block;
        let lines = self.job.x.inputs / GROUP * 2;
        let unpacks = Format::<F>::IS_SCATTERED && self.rows.len() >= 2 * block;
        let mut unpacked = vec![Line([0; 64]); if unpacks { lines * QUADS } else { 0 }];
        for tile in self.tiles.clone() {
            let packed = &self.job.panels.codes[tile * lines * Codes::<F, false>::LINES..];
            if unpacks {
                unpack::<S, F>(s, packed, &mut unpacked);
            }
            for row in self.rows.clone().step_by(block) {
                let rows = (self.rows.end - row).min(block);
                let at = At { row, tile, ahead: self.ahead(row, Codes::<F, false>::LINES) };
                if unpacks && rows == block {
                    self.job.whole_block::<S, F>(s, &unpacked, at);
                } else {
                    self.job.block_of_rows::<S, F>(s, packed, rows, at);
                }
            }
        }
    }

    /// Only the first rows wait for a tile; so that they need not, all rows ask for the next one,
    /// each for its stretch of it.
    #[inline(always)]
    fn ahead(&self, row: usize, lines: usize) -> Ahead {
        let block = self.job.x.block;
        let (index, blocks) = ((row - self.rows.start) / block, self.rows.len().div_ceil(block));
        match blocks {
            1 => Ahead::SameTile,
            _ => {
                let tile = 2 * lines * (self.job.x.inputs / GROUP);
                let (first, end) = (tile * index / blocks, tile * (index + 1) / blocks);
                Ahead::NextTile { first, end, each: (2 * lines).div_ceil(blocks) }
            }
        }
    }
}

/// Codes of a tile as those of eight bits lie: many rows need not take them apart again.
#[inline(always)]
fn unpack<S: IntSimd, const F: usize>(s: S, packed: &[Line], unpacked: &mut [Line]) {
    let halves = packed.chunks_exact(Codes::<F, false>::LINES);
    for (lines, out) in halves.zip(unpacked.as_chunks_mut::<QUADS>().0) {
        for (quad, out) in out.iter_mut().enumerate() {
            s.store_bytes(codes_of::<S, F>(s, lines, quad), &mut out.0);
        }
    }
}

/// What a block of rows is multiplied with.
#[derive(Clone, Copy)]
struct At {
    row: usize,
    tile: usize,
    ahead: Ahead,
}

/// Which weights are asked for ahead of their use, across page borders, where the processor's own
/// prefetching stops.
#[derive(Clone, Copy)]
enum Ahead {
    SameTile,
    /// Lines from `first` on, `each` with every group, until all are asked for.
    NextTile {
        first: usize,
        end: usize,
        each: usize,
    },
}

/// A format as a type, by its place in [`BlockFormat::ALL`].
struct Format<const F: usize>;

impl<const F: usize> Format<F> {
    const FORMAT: BlockFormat = BlockFormat::ALL[F];
    /// Stretches of equal scale in a group.
    const PARTS: usize = GROUP / Self::FORMAT.scale_len();
    /// Whether a code's bits lie in two lines.
    const IS_SCATTERED: bool = matches!(Self::FORMAT.bits(), 5 | 6);
}

/// How codes of a format lie.
struct Codes<const F: usize, const UNPACKED: bool>;

impl<const F: usize, const UNPACKED: bool> Codes<F, UNPACKED> {
    /// Lines of a group and half.
    const LINES: usize = if UNPACKED { QUADS } else { BlockFormat::ALL[F].bits() };
}

impl Job<'_> {
    /// A tile, unpacked, for as many rows as a block has.
    #[inline(always)]
    fn whole_block<S: IntSimd, const F: usize>(self, s: S, codes: &[Line], at: At) {
        if S::Float::WIDE {
            Sums::<F, true, WIDE_ROWS, 2> { job: self, codes, at, first: 0 }.run(s);
        } else {
            Sums::<F, true, NARROW_ROWS, 1> { job: self, codes, at, first: 0 }.run(s);
            Sums::<F, true, NARROW_ROWS, 1> { job: self, codes, at, first: 1 }.run(s);
        }
    }

    /// A tile for `rows` rows.
    #[inline(always)]
    fn block_of_rows<S: IntSimd, const F: usize>(self, s: S, codes: &[Line], rows: usize, at: At) {
        // A constant condition, so that only the half in use is compiled.
        macro_rules! by_rows {
            ($halves:literal, $first:expr, $($n:literal)*) => {
                match rows {
                    $($n => {
                        let job = self;
                        Sums::<F, false, $n, $halves> { job, codes, at, first: $first }.run(s);
                    })*
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
}

/// `H` halves of a tile, from the one named on, for `R` rows.
struct Sums<'a, const F: usize, const UNPACKED: bool, const R: usize, const H: usize> {
    job: Job<'a>,
    codes: &'a [Line],
    at: At,
    first: usize,
}

impl<const F: usize, const UNPACKED: bool, const R: usize, const H: usize> IntKernel
    for Sums<'_, F, UNPACKED, R, H>
{
    #[inline(always)]
    fn run<S: IntSimd>(self, s: S) {
        let Self { job, codes, at: At { row, tile, ahead }, first } = self;
        let f = s.float();
        let groups = job.x.inputs / GROUP;
        let quads = job.x.quads[row * groups * QUADS..].as_chunks::<R>().0;
        let quads = quads.as_chunks::<QUADS>().0;
        let scales = job.x.scales[row * groups..].as_chunks::<R>().0;
        let worths = job.x.worths[row * groups..].as_chunks::<R>().0;
        let starts = job.starts[row * groups..].as_chunks::<R>().0;
        let lines = Codes::<F, UNPACKED>::LINES;
        let mut acc = [[f.splat(0.0); H]; R];
        for (group, codes) in codes.chunks_exact(2 * lines).take(groups).enumerate() {
            let at = tile * groups + group;
            let codes = &codes[first * lines..][..H * lines];
            job.ask_for::<S, F>(s, (tile, group), ahead);
            for part in 0..Format::<F>::PARTS {
                let mut sums = [[s.splat(0); H]; R];
                if Format::<F>::FORMAT.center() != 0 {
                    for (sums, start) in sums.iter_mut().zip(&starts[group]) {
                        *sums = [s.splat(start[part]); H];
                    }
                }
                let part_quads = QUADS / Format::<F>::PARTS;
                let x = quads[group].chunks_exact(part_quads).nth(part).unwrap_or_default();
                for (quad, x) in (part * part_quads..).zip(x) {
                    let mut weights = [s.bytes(&codes[0].0); H];
                    for (h, weights) in weights.iter_mut().enumerate() {
                        *weights = match UNPACKED {
                            true => s.bytes(&codes[h * lines + quad].0),
                            false => codes_of::<S, F>(s, &codes[h * lines..][..lines], quad),
                        };
                    }
                    for (sums, x) in sums.iter_mut().zip(x) {
                        for (sum, weights) in sums.iter_mut().zip(&weights) {
                            *sum = s.dot(*sum, *weights, *x);
                        }
                    }
                }
                let at = at * Format::<F>::PARTS + part;
                let mut scale = [f.splat(0.0); H];
                for (h, scale) in scale.iter_mut().enumerate() {
                    *scale = job.scale::<S, F>(s, at, first + h);
                }
                for ((acc, sums), x) in acc.iter_mut().zip(&sums).zip(&scales[group]) {
                    for h in 0..H {
                        let product = f.mul(s.to_float(sums[h]), scale[h]);
                        acc[h] = f.mul_add(product, f.splat(*x), acc[h]);
                    }
                }
            }
            if Format::<F>::FORMAT.has_offset() {
                for h in 0..H {
                    let offset = job.offset::<S, F>(s, at, first + h);
                    for (acc, x) in acc.iter_mut().zip(&worths[group]) {
                        acc[h] = f.mul_add(offset, f.splat(*x), acc[h]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (h, acc) in acc.iter().enumerate() {
                job.finish(f, row + r, tile * TILE + (first + h) * LANES, *acc);
            }
        }
    }
}

impl Job<'_> {
    #[inline(always)]
    fn ask_for<S: IntSimd, const F: usize>(
        self,
        s: S,
        (tile, group): (usize, usize),
        ahead: Ahead,
    ) {
        let lines = 2 * Codes::<F, false>::LINES;
        let codes = self.panels.codes.as_ptr();
        match ahead {
            Ahead::SameTile => {
                let group = tile * (self.x.inputs / GROUP) + group;
                s.prefetch(codes.wrapping_add(group * lines).wrapping_byte_add(AHEAD));
            }
            Ahead::NextTile { first, end, each } => {
                let next = codes.wrapping_add((tile + 1) * (self.x.inputs / GROUP) * lines);
                let first = first + group * each;
                for line in first..end.min(first + each) {
                    s.prefetch_far(next.wrapping_add(line));
                }
            }
        }
    }

    /// The scales of 16 features; `at` counts stretches of equal scale from the first tile's.
    #[inline(always)]
    fn scale<S: IntSimd, const F: usize>(
        self,
        s: S,
        at: usize,
        half: usize,
    ) -> <S::Float as Simd>::V {
        let (f, format) = (s.float(), Format::<F>::FORMAT);
        let block = at / (format.block_len() / format.scale_len());
        let scale = f.load_f16(half_of(&self.panels.scales[block].0, half));
        if !format.has_factors() {
            return scale;
        }
        let factors = half_of(&self.panels.factors[at], half);
        let is_signed = format == BlockFormat::Q6K;
        let factors = if is_signed { f.load_i8(factors) } else { f.load_u8(factors) };
        f.mul(scale, factors)
    }

    /// What is added to the weights of a group, for 16 features.
    #[inline(always)]
    fn offset<S: IntSimd, const F: usize>(
        self,
        s: S,
        group: usize,
        half: usize,
    ) -> <S::Float as Simd>::V {
        let (f, format) = (s.float(), Format::<F>::FORMAT);
        let block = group / (format.block_len() / GROUP);
        let offset = f.load_f16(half_of(&self.panels.offsets[block].0, half));
        if !format.has_factors() {
            return offset;
        }
        let factors = f.load_u8(half_of(&self.panels.offset_factors[group], half));
        f.sub(f.splat(0.0), f.mul(offset, factors))
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

/// Bytes by which weights are asked for ahead of their use.
const AHEAD: usize = 4 << 10;

/// The codes of a quad, for 16 features.
#[inline(always)]
fn codes_of<S: IntSimd, const F: usize>(s: S, lines: &[Line], quad: usize) -> S::Bytes {
    if Codes::<F, false>::LINES == QUADS {
        return s.bytes(&lines[quad].0);
    }
    let low = s.field(s.bytes(&lines[quad % 4].0), (quad / 4 * 4) as u32, 15);
    match Codes::<F, false>::LINES {
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

fn element(groups: &[([i8; GROUP], f32, [i32; 2])], panels: &Panels, row: usize) -> f32 {
    let (format, mut acc) = (panels.format, 0f32);
    let (tile, column) = ((row - panels.rows.start) / TILE, (row - panels.rows.start) % TILE);
    for (group, (x, x_scale, _)) in groups.iter().enumerate() {
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
