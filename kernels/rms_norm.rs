//! y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), alone and with a sum before.
//!
//! The squares are summed in the order of [`crate::math::dot`]; y is `(x * scale) * weight` with
//! `scale = 1 / sqrt(sum / n + eps)`.

use crate::error::Error;
use crate::isa::Kernel;
use crate::math::{Map2, dot, map2_lanes, square_sum_lanes};
use crate::memory::by_pieces;
use crate::simd::Simd;
use crate::threads::Threads;
use crate::view::{Rows, refused};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape};
use std::sync::Arc;

/// Values below which another thread costs more than it saves.
pub(crate) const PIECE: usize = 8192;

/// x (rows, groups * n), any row stride -> the same shape. Each run of n = `weight.len()` values
/// along a row is a group of its own, so a norm per head works.
pub struct RmsNorm {
    pub weight: Arc<Vec<f32>>,
    pub eps: f32,
    pub threads: Threads,
}

/// (x, residual), both (rows, n) -> (2, rows, n): `[0] = x + residual`, `[1]` its norm.
pub struct AddRmsNorm {
    pub weight: Arc<Vec<f32>>,
    pub eps: f32,
    pub threads: Threads,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = Rows::new("rms_norm", "x", storage, layout)?;
        let n = self.weight.len();
        if n == 0 || x.width % n != 0 {
            let expected = format!("a multiple of the weight's length {n}");
            return Err(Error::value("rms_norm", "x's width", x.width, expected).into());
        }
        let rows = (PIECE / x.width.max(1)).max(1);
        let size = (rows * x.width).max(1);
        let out = by_pieces(&self.threads, x.count * x.width, size, |i, out| {
            for (r, out) in out.chunks_exact_mut(x.width).enumerate() {
                let norm =
                    Norm { x: x.row(i * rows + r), weight: &self.weight, eps: self.eps, out };
                self.threads.isa().run(norm);
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((x.count, x.width))))
    }
}

impl CustomOp2 for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = Rows::new("add_rms_norm", "x", s1, l1)?;
        let residual = Rows::new("add_rms_norm", "residual", s2, l2)?;
        let n = self.weight.len();
        if n == 0 || x.width != n {
            let expected = format!("the weight's length {n}");
            return Err(Error::value("add_rms_norm", "x's width", x.width, expected).into());
        }
        if (residual.count, residual.width) != (x.count, x.width) {
            let expected = format!("of x's shape {:?}", (x.count, x.width));
            return Err(refused("add_rms_norm", "residual", expected, l2).into());
        }
        let mut out = vec![0f32; 2 * x.count * n];
        let (sums, norms) = out.split_at_mut(x.count * n);
        let rows = (PIECE / n).max(1);
        self.threads.for_each_chunk(sums, rows * n, |i, sums| {
            for (r, out) in sums.chunks_exact_mut(n).enumerate() {
                let (x, residual) = (x.row(i * rows + r), residual.row(i * rows + r));
                self.threads.isa().run(Add { x, residual, out });
            }
        });
        let sums: &[f32] = sums;
        self.threads.for_each_chunk(norms, rows * n, |i, norms| {
            for (r, out) in norms.chunks_exact_mut(n).enumerate() {
                let x = &sums[(i * rows + r) * n..][..n];
                self.threads.isa().run(Norm { x, weight: &self.weight, eps: self.eps, out });
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((2, x.count, n))))
    }
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.weight.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            let scale = scale(square_sum_lanes(s, x), n, self.eps);
            map2_lanes(s, &ScaleBy(scale), (x, self.weight), out);
        }
    }
}

struct ScaleBy(f32);

impl Map2 for ScaleBy {
    #[inline(always)]
    fn map<S: Simd>(&self, s: S, x: S::V, weight: S::V) -> S::V {
        s.mul(s.mul(x, s.splat(self.0)), weight)
    }
}

struct Add<'a> {
    x: &'a [f32],
    residual: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((out, x), residual) in self.out.iter_mut().zip(self.x).zip(self.residual) {
            *out = x + residual;
        }
    }
}

#[inline(always)]
fn scale(square_sum: f32, n: usize, eps: f32) -> f32 {
    1.0 / (square_sum / n as f32 + eps).sqrt()
}

/// The plain loop over whole groups of `weight.len()`.
pub fn rms_norm_reference(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(weight.len()) {
        let scale = scale(dot(x, x), weight.len(), eps);
        out.extend(x.iter().zip(weight).map(|(x, weight)| x * scale * weight));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::testing::{Random, assert_same_bits};
    use candle_core::{Device, Tensor};

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn equals_the_reference_on_strided_rows_and_groups() {
        let mut random = Random::new(11);
        for (rows, groups, n) in [(1, 1, 1), (3, 2, 15), (5, 4, 64), (70, 3, 100)] {
            let weight = Arc::new(random.normals(n));
            let wide = groups * n + 7;
            let all = Tensor::from_vec(random.normals(rows * wide), (rows, wide), &Device::Cpu);
            let x = all.unwrap().narrow(1, 3, groups * n).unwrap();
            let expected = rms_norm_reference(&values(&x), &weight, 1e-6);
            for isa in Isa::available() {
                let threads = Threads::new(2).with_isa(isa);
                let op = RmsNorm { weight: Arc::clone(&weight), eps: 1e-6, threads };
                let found = x.apply_op1_no_bwd(&op).unwrap();
                assert_eq!(found.dims(), [rows, groups * n]);
                assert_same_bits(&expected, &values(&found), isa.name());
            }
        }
    }

    #[test]
    fn a_norm_is_close_to_its_f64_value() {
        let mut random = Random::new(12);
        let x = random.normals(1000);
        let weight = random.normals(1000);
        let square: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = 1.0 / (square / 1000.0 + 1e-5).sqrt();
        for (i, y) in rms_norm_reference(&x, &weight, 1e-5).iter().enumerate() {
            let exact = f64::from(x[i]) * scale * f64::from(weight[i]);
            assert!((exact - f64::from(*y)).abs() < 1e-6 * (1.0 + exact.abs()));
        }
    }

    #[test]
    fn adding_first_gives_the_sum_and_its_norm() {
        let mut random = Random::new(13);
        let weight = Arc::new(random.normals(33));
        for rows in [0, 1, 4, 600] {
            let (x, residual) = (random.normals(rows * 33), random.normals(rows * 33));
            let sum: Vec<f32> = x.iter().zip(&residual).map(|(a, b)| a + b).collect();
            let norm = rms_norm_reference(&sum, &weight, 1e-6);
            let x = Tensor::from_vec(x, (rows, 33), &Device::Cpu).unwrap();
            let residual = Tensor::from_vec(residual, (rows, 33), &Device::Cpu).unwrap();
            let op =
                AddRmsNorm { weight: Arc::clone(&weight), eps: 1e-6, threads: Threads::new(2) };
            let found = x.apply_op2_no_bwd(&residual, &op).unwrap();
            assert_eq!(found.dims(), [2, rows, 33]);
            assert_same_bits(&[sum, norm].concat(), &values(&found), "sum and norm");
        }
    }

    #[test]
    fn nan_makes_its_group_nan() {
        let x = [1.0, f32::NAN, 1.0, 1.0];
        let y = rms_norm_reference(&x, &[1.0, 1.0], 1e-6);
        assert!(y[0].is_nan() && y[1].is_nan() && y[2] == y[3] && !y[2].is_nan());
    }

    #[test]
    fn a_width_that_is_no_multiple_is_refused() {
        let weight = Arc::new(vec![1.0; 3]);
        let op = RmsNorm { weight, eps: 1e-6, threads: Threads::new(1) };
        let x = Tensor::zeros((2, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let refusal = x.apply_op1_no_bwd(&op).unwrap_err().to_string();
        assert!(refusal.contains("x's width is 4, must be a multiple of the weight's length 3"));
    }
}
