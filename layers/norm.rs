//! Root mean square norm, alone and behind a residual sum.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use strand_kernels::{AddRmsNorm, RmsNorm as RmsNormOp, Threads};

/// y = x / rms(x) * weight, over groups of `weight.len()` values of a row.
pub struct RmsNorm {
    alone: RmsNormOp,
    behind_sum: AddRmsNorm,
}

impl RmsNorm {
    pub fn new(weight: Vec<f32>, eps: f32, threads: &Threads) -> Self {
        let weight = Arc::new(weight);
        Self {
            alone: RmsNormOp { weight: weight.clone(), eps, threads: threads.clone() },
            behind_sum: AddRmsNorm { weight, eps, threads: threads.clone() },
        }
    }

    /// x (rows, n) -> (rows, n)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(&self.alone)
    }

    /// x, residual (rows, n) -> (x + residual, its norm)
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        let both = x.apply_op2_no_bwd(residual, &self.behind_sum)?;
        Ok((both.get(0)?, both.get(1)?))
    }
}
