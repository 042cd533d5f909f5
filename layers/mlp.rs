//! The gated feed-forward part: down(silu(gate(x)) * up(x)).

use candle_core::{Result, Tensor};
use strand_kernels::{SiluMul, Threads};

use crate::linear::Linear;

pub struct Mlp {
    /// Gate and up as one product.
    gate_up_proj: Linear,
    down_proj: Linear,
    silu_mul: SiluMul,
}

impl Mlp {
    pub fn new(gate_up_proj: Linear, down_proj: Linear, threads: &Threads) -> Self {
        Self { gate_up_proj, down_proj, silu_mul: SiluMul { threads: threads.clone() } }
    }

    /// x (rows, hidden) -> (rows, hidden)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up_proj.forward(x)?;
        self.down_proj.forward(&gate_up.apply_op1_no_bwd(&self.silu_mul)?)
    }
}
