//! Rotary positions (Su et al. 2021), half-split pairs: (i, i + d/2) turn by position * f_i.
//!
//! With c, s from the table: `a' = a * c - b * s` as `a.mul_add(c, -(b * s))`, and
//! `b' = b.mul_add(c, a * s)`.

use crate::error::Error;
use crate::isa::Kernel;
use crate::memory::by_pieces;
use crate::rms_norm::PIECE;
use crate::simd::Simd;
use crate::threads::Threads;
use crate::view::Rows;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape};
use std::sync::Arc;

/// cos and sin of every position and pair, computed in f64 and rounded once.
pub struct RotaryTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    positions: usize,
}

impl RotaryTable {
    /// For positions `0..positions`; `inverse_frequencies` holds head_dim / 2 numbers, and cos
    /// and sin are multiplied with `attention_factor` (1 but for YaRN).
    pub fn new(inverse_frequencies: &[f64], attention_factor: f64, positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let mut cos = Vec::with_capacity(positions * half);
        let mut sin = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for frequency in inverse_frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * attention_factor) as f32);
                sin.push((s * attention_factor) as f32);
            }
        }
        Self { cos, sin, half, positions }
    }

    /// The number of positions: the first one that has no rotation.
    pub fn max_position(&self) -> usize {
        self.positions
    }

    /// Width of the heads it rotates.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// cos and sin of all positions, one after another.
    pub(crate) fn values(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// cos and sin of each pair at a position, both times the attention factor.
    #[inline(always)]
    pub fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// x (rows, heads * d), any row stride -> contiguous, row r rotated to `positions[r]`.
pub struct Rope {
    pub table: Arc<RotaryTable>,
    pub positions: Arc<Vec<u32>>,
    pub threads: Threads,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Rows::new("rope", "x", storage, layout)?;
        let d = self.table.head_dim();
        if d == 0 || x.width % d != 0 {
            let expected = format!("a multiple of the rotary width {d}");
            return Err(Error::value("rope", "x's width", x.width, expected).into());
        }
        if self.positions.len() != x.count {
            let expected = format!("x's {} rows", x.count);
            return Err(Error::value("rope", "positions", self.positions.len(), expected).into());
        }
        let limit = self.table.max_position();
        if let Some(position) = self.positions.iter().find(|&&p| p as usize >= limit) {
            let expected = format!("below the table's {limit}");
            return Err(Error::value("rope", "a position", *position, expected).into());
        }
        let rows = (PIECE / x.width.max(1)).max(1);
        let size = (rows * x.width).max(1);
        let out = by_pieces(&self.threads, x.count * x.width, size, |i, out| {
            for (r, out) in out.chunks_exact_mut(x.width).enumerate() {
                let row = i * rows + r;
                let angles = self.table.angles(self.positions[row] as usize);
                self.threads.isa().run(Rotate { x: x.row(row), angles, out });
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((x.count, x.width))))
    }
}

/// All heads of a row.
struct Rotate<'a> {
    x: &'a [f32],
    angles: (&'a [f32], &'a [f32]),
    out: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let d = 2 * self.angles.0.len();
        for (x, out) in self.x.chunks_exact(d).zip(self.out.chunks_exact_mut(d)) {
            rotate(x, self.angles, out);
        }
    }
}

/// One head; elementwise, so that any vector width gives the same bits.
#[inline(always)]
pub(crate) fn rotate(x: &[f32], (cos, sin): (&[f32], &[f32]), out: &mut [f32]) {
    let half = cos.len();
    let (a, b) = x.split_at(half);
    let (out_a, out_b) = out.split_at_mut(half);
    let (b, sin) = (&b[..half], &sin[..half]);
    let (out_a, out_b) = (&mut out_a[..half], &mut out_b[..half]);
    for i in 0..half {
        out_a[i] = a[i].mul_add(cos[i], -(b[i] * sin[i]));
        out_b[i] = b[i].mul_add(cos[i], a[i] * sin[i]);
    }
}

/// The plain loop over the heads of one row.
pub fn rope_reference(x: &[f32], table: &RotaryTable, position: usize) -> Vec<f32> {
    let (cos, sin) = table.angles(position);
    let half = table.half;
    let mut out = x.to_vec();
    for (x, out) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
        for i in 0..half {
            let (a, b) = (x[i], x[i + half]);
            out[i] = a.mul_add(cos[i], -(b * sin[i]));
            out[i + half] = b.mul_add(cos[i], a * sin[i]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::testing::{Random, assert_same_bits};
    use candle_core::{Device, Tensor};

    fn table(half: usize, positions: usize) -> RotaryTable {
        let frequencies: Vec<f64> =
            (0..half).map(|i| 10_000f64.powf(-(i as f64) / half as f64)).collect();
        RotaryTable::new(&frequencies, 1.0, positions)
    }

    #[test]
    fn equals_the_reference_on_strided_rows() {
        let mut random = Random::new(31);
        for (rows, heads, half) in [(1, 1, 1), (5, 3, 9), (9, 2, 32), (64, 4, 64)] {
            let table = Arc::new(table(half, 50));
            let width = heads * half * 2;
            let all = random.normals(rows * (width + 3));
            let all = Tensor::from_vec(all, (rows, width + 3), &Device::Cpu).unwrap();
            let x = all.narrow(1, 1, width).unwrap();
            let positions: Vec<u32> = (0..rows).map(|_| random.below(50) as u32).collect();
            let plain: Vec<Vec<f32>> = x.to_vec2().unwrap();
            let expected: Vec<f32> = (plain.iter().zip(&positions))
                .flat_map(|(x, &p)| rope_reference(x, &table, p as usize))
                .collect();
            let positions = Arc::new(positions);
            for isa in Isa::available() {
                let threads = Threads::new(2).with_isa(isa);
                let (table, positions) = (Arc::clone(&table), Arc::clone(&positions));
                let found = x.apply_op1_no_bwd(&Rope { table, positions, threads }).unwrap();
                let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
                assert_same_bits(&expected, &found, isa.name());
            }
        }
    }

    #[test]
    fn pairs_turn_by_position_times_frequency() {
        let table = RotaryTable::new(&[0.5], 2.0, 4);
        let out = rope_reference(&[1.0, 0.0], &table, 3);
        assert_eq!(out, [2.0 * 1.5f64.cos() as f32, 2.0 * 1.5f64.sin() as f32]);
    }

    #[test]
    fn positions_past_the_table_are_refused() {
        let x = Tensor::zeros((2, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let refusal = |positions: Vec<u32>| {
            let (positions, threads) = (Arc::new(positions), Threads::new(1));
            let op = Rope { table: Arc::new(table(2, 7)), positions, threads };
            x.apply_op1_no_bwd(&op).unwrap_err().to_string()
        };
        assert!(refusal(vec![0, 7]).contains("a position is 7, must be below the table's 7"));
        assert!(refusal(vec![0]).contains("positions is 1, must be x's 2 rows"));
    }
}
