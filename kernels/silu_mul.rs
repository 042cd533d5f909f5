//! silu(gate) * up, the middle of a gated MLP: x (rows, 2n) = [gate | up] -> (rows, n).

use crate::error::Error;
use crate::isa::Kernel;
use crate::math::{Map2, map2_lanes, silu, silu_lanes};
use crate::memory::by_pieces;
use crate::rms_norm::PIECE;
use crate::simd::Simd;
use crate::threads::Threads;
use crate::view::Rows;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape};

/// The op; x may have any row stride.
pub struct SiluMul {
    pub threads: Threads,
}

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Rows::new("silu_mul", "x", storage, layout)?;
        if x.width % 2 != 0 {
            return Err(Error::value("silu_mul", "x's width", x.width, "even").into());
        }
        let n = x.width / 2;
        let rows = (PIECE / x.width.max(1)).max(1);
        let out = by_pieces(&self.threads, x.count * n, (rows * n).max(1), |i, out| {
            for (r, out) in out.chunks_exact_mut(n).enumerate() {
                self.threads.isa().run(Row { x: x.row(i * rows + r), out });
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((x.count, n))))
    }
}

struct Row<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        map2_lanes(s, &SiluTimes, self.x.split_at(self.out.len()), self.out);
    }
}

struct SiluTimes;

impl Map2 for SiluTimes {
    #[inline(always)]
    fn map<S: Simd>(&self, s: S, gate: S::V, up: S::V) -> S::V {
        s.mul(silu_lanes(s, gate), up)
    }
}

/// The plain loop over one row.
pub fn silu_mul_reference(x: &[f32]) -> Vec<f32> {
    let (gate, up) = x.split_at(x.len() / 2);
    gate.iter().zip(up).map(|(&gate, up)| silu(gate) * up).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::testing::{Random, assert_same_bits};
    use candle_core::{Device, Tensor};

    #[test]
    fn equals_the_reference_on_ragged_and_strided_rows() {
        let mut random = Random::new(21);
        for (rows, n) in [(1, 1), (2, 16), (3, 37), (130, 100)] {
            let mut x = random.normals(rows * (2 * n + 5));
            x.iter_mut().for_each(|x| *x *= 20.0);
            let x = Tensor::from_vec(x, (rows, 2 * n + 5), &Device::Cpu).unwrap();
            let x = x.narrow(1, 2, 2 * n).unwrap();
            let expected: Vec<Vec<f32>> = x.to_vec2().unwrap();
            let expected: Vec<f32> = expected.iter().flat_map(|x| silu_mul_reference(x)).collect();
            for isa in Isa::available() {
                let op = SiluMul { threads: Threads::new(2).with_isa(isa) };
                let found = x.apply_op1_no_bwd(&op).unwrap();
                assert_eq!(found.dims(), [rows, n]);
                let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
                assert_same_bits(&expected, &found, isa.name());
            }
        }
    }

    #[test]
    fn nan_passes_through_and_odd_widths_are_refused() {
        let x = Tensor::new(&[[f32::NAN, 1.0, 1.0, f32::NAN, 2.0, 3.0]], &Device::Cpu).unwrap();
        let op = SiluMul { threads: Threads::new(1) };
        let y: Vec<Vec<f32>> = x.apply_op1_no_bwd(&op).unwrap().to_vec2().unwrap();
        assert_eq!(y[0].iter().map(|y| y.is_nan()).collect::<Vec<_>>(), [true, false, false]);
        let odd = x.narrow(1, 0, 5).unwrap();
        let refusal = odd.apply_op1_no_bwd(&op).unwrap_err().to_string();
        assert!(refusal.contains("x's width is 5, must be even"));
    }
}
