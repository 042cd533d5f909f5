//! A product with a packed weight.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use strand_kernels::{Linear as LinearOp, PackedWeight, Threads};

/// y = x W^T + b.
pub struct Linear(LinearOp);

impl Linear {
    pub fn new(weight: Arc<PackedWeight>, bias: Option<Vec<f32>>, threads: &Threads) -> Self {
        Self(LinearOp { weight, bias: bias.map(Arc::new), threads: threads.clone() })
    }

    /// x (rows, in_features) -> (rows, out_features)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(&self.0)
    }
}
