//! Rows of a product with [`Panels`](super::Panels) as integers of 8 bits.
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
    /// Four inputs' integers: [block][quad][row]. The last block is as narrow as its rows.
    pub quads: Vec<i32>,
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

    /// What the integer sums of each stretch of equal scale begin with: what centers the codes, and
    /// [`ROUNDING`]'s bits. As `sums`; where a group is one stretch, the first of two.
    pub fn starts(&self, format: BlockFormat) -> Vec<[i32; 2]> {
        let start = |n: i32| ROUNDING.to_bits().cast_signed() - format.center() * n;
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
pub(super) fn quantize<S: Simd>(s: S, x: &[f32; GROUP]) -> ([i8; GROUP], f32, [i32; 2]) {
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
