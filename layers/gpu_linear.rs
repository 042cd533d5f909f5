//! A product with a weight in a GPU's memory.

use std::sync::Arc;

use strand_kernels::Error;
use strand_kernels::gpu::{Float, Gpu, Product, Slice, Weight};

/// y = x W^T + b.
pub struct GpuLinear {
    weight: Arc<Weight>,
    /// f32
    bias: Option<Slice>,
    /// A row's bits don't depend on how many rows there are.
    deterministic: bool,
}

impl GpuLinear {
    pub fn new(weight: Arc<Weight>, bias: Option<Slice>, deterministic: bool) -> Self {
        Self { weight, bias, deterministic }
    }

    pub fn out_features(&self) -> usize {
        self.weight.out_features()
    }

    /// x (rows, in_features) -> y (rows, out_features), both of the weight's type.
    pub fn forward(&self, gpu: &Gpu, x: &Slice, y: &Slice, rows: usize) -> Result<(), Error> {
        self.launch(gpu, (x, y), Some(self.weight.float()), rows)
    }

    /// The same with y in f32.
    pub fn forward_wide(&self, gpu: &Gpu, x: &Slice, y: &Slice, rows: usize) -> Result<(), Error> {
        self.launch(gpu, (x, y), None, rows)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        (x, y): (&Slice, &Slice),
        y_float: Option<Float>,
        rows: usize,
    ) -> Result<(), Error> {
        let (weight, bias) = (&*self.weight, self.bias.as_ref());
        let product = Product { x, weight, bias, y, y_float, rows };
        if self.deterministic { product.deterministic(gpu) } else { product.fast(gpu) }
    }
}
