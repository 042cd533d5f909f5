//! Rows of a product with `Panels` as integers of 8 bits.
//!
//! A group of 32 inputs is `scale * n`, where scale is its largest number / 127, n to nearest even.

use std::ops::Range;

use super::panels::QUADS;
use super::{BlockFormat, GROUP};
use crate::isa::Kernel;
use crate::simd::{LANES, ROUNDING, SMALLEST, Simd};
use crate::threads::{Disjoint, Threads};
use crate::view::Rows;

/// Rows of a block when 32 vectors fit the registers: 6 x 2 sums of integers, as many of f32.
pub(super) const WIDE_ROWS: usize = 6;
/// Rows of a block when 8 do, one half of a tile at a time.
pub(super) const NARROW_ROWS: usize = 2;

/// Rows as integers, in blocks of neighbours.
pub(super) struct IntRows {
    pub count: usize,
    pub inputs: usize,
    pub block: usize,
    /// Four inputs' integers: [block][group][row][quad]. The last block is as narrow as its rows.
    pub quads: Vec<[i32; QUADS]>,
    /// [block][group][row]
    pub scales: Vec<f32>,
    /// Sums of the integers of each half of a group: [block][group][row]
    pub sums: Vec<[i32; 2]>,
    /// What a weight's offset counts for: scale * sum, [block][group][row]
    pub worths: Vec<f32>,
}

impl IntRows {
    pub fn new(x: Rows, threads: &Threads) -> Self {
        let block = if threads.isa().is_wide_int() { WIDE_ROWS } else { NARROW_ROWS };
        let (inputs, groups) = (x.width, x.width / GROUP);
        let mut rows = Self {
            count: x.count,
            inputs,
            block,
            quads: vec![[0; QUADS]; x.count * groups],
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
            let quads = unsafe { quads.slice(part(groups)) };
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

    /// What the integer sums of each stretch of equal scale begin with: what centers the codes, and
    /// [`ROUNDING`]'s bits. As `sums`; where a group is one stretch, the first of two.
    pub fn starts(&self, format: BlockFormat) -> Vec<[i32; 2]> {
        let zero = ROUNDING.to_bits().cast_signed();
        let start = |n: i32| zero.wrapping_sub(n.wrapping_mul(format.center()));
        let of = |&[a, b]: &[i32; 2]| match format.scale_len() {
            GROUP => [start(a.wrapping_add(b)), 0],
            _ => [start(a), start(b)],
        };
        self.sums.iter().map(of).collect()
    }
}

/// A block of rows on its way to integers.
struct Quantize<'a> {
    x: Rows<'a>,
    rows: Range<usize>,
    quads: &'a mut [[i32; QUADS]],
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
            let groups = self.x.row(row).as_chunks::<GROUP>().0;
            for (some, first) in groups.chunks(LANES).zip((0..).step_by(LANES)) {
                let Groups { bytes, scales, sums, worths } = quantize(s, some);
                for group in 0..some.len() {
                    let at = (first + group) * count + r;
                    self.scales[at] = scales[group];
                    self.sums[at] = [sums[0][group], sums[1][group]];
                    self.worths[at] = worths[group];
                    let fours = bytes[group].as_chunks::<4>().0;
                    for (quad, four) in self.quads[at].iter_mut().zip(fours) {
                        *quad = i32::from_le_bytes(*four);
                    }
                }
            }
        }
    }
}

/// As many groups as there are lanes.
pub(super) struct Groups {
    /// Their integers, signed.
    pub bytes: [[u8; GROUP]; LANES],
    /// NaN where a number is not finite.
    pub scales: [f32; LANES],
    /// Sums of the integers of each half; any where the scale is NaN.
    pub sums: [[i32; LANES]; 2],
    /// Scale times the sum of both halves.
    pub worths: [f32; LANES],
}

/// At most as many groups; the rest is zeros. Several at a time: a sum or a maximum over the lanes
/// of one vector takes as long as over those of sixteen.
#[inline(always)]
pub(super) fn quantize<S: Simd>(s: S, groups: &[[f32; GROUP]]) -> Groups {
    let mut largest = [s.splat(0.0); LANES];
    for (largest, x) in largest.iter_mut().zip(groups) {
        for x in x.as_chunks::<LANES>().0 {
            let x = s.load(x);
            *largest = s.max(s.max(x, s.sub(s.splat(0.0), x)), *largest);
        }
    }
    let largest = s.reduce_max_all(largest);
    let (mut inverse, mut scales) = ([0.0; LANES], [0.0; LANES]);
    for (i, &largest) in largest.iter().enumerate() {
        if largest >= SMALLEST {
            inverse[i] = 127.0 / largest;
            scales[i] = largest / 127.0;
        }
    }
    let mut bytes = [[0; GROUP]; LANES];
    let mut integers = [[s.splat(0.0); LANES]; 2];
    for (i, x) in groups.iter().enumerate().take(LANES) {
        let halves = x.as_chunks::<LANES>().0.iter().zip(bytes[i].as_chunks_mut::<LANES>().0);
        for (half, (x, bytes)) in halves.enumerate() {
            let rounded = s.mul_add(s.load(x), s.splat(inverse[i]), s.splat(ROUNDING));
            let mut lanes = [0f32; LANES];
            s.store(rounded, &mut lanes);
            for (byte, lane) in bytes.iter_mut().zip(&lanes) {
                // the integer lies in the low bits
                *byte = lane.to_bits() as u8;
            }
            integers[half][i] = s.sub(rounded, s.splat(ROUNDING));
        }
    }
    // exact, being of small integers; NaN from an infinity or a NaN
    let halves = [s.reduce_all(integers[0]), s.reduce_all(integers[1])];
    let mut sums = [[0; LANES]; 2];
    for (sums, halves) in sums.iter_mut().zip(&halves) {
        for (sum, half) in sums.iter_mut().zip(halves) {
            *sum = (half + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits()).cast_signed();
        }
    }
    let mut worths = [0.0; LANES];
    for i in 0..LANES {
        let sum = halves[0][i] + halves[1][i];
        scales[i] += sum * 0.0;
        worths[i] = scales[i] * sum;
    }
    Groups { bytes, scales, sums, worths }
}
