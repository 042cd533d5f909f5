//! [`crate::RmsNorm`] on a device: the residual stream in f32, what goes into products narrow.

use super::attention::word;
use super::{Float, Gpu, Launch, Slice};
use crate::error::Error;

const BLOCK: u32 = 256;

/// out (rows, width) = the norm of x (rows, width) f32, times weight (width) f32.
pub struct RmsNorm<'a> {
    pub x: &'a Slice,
    pub weight: &'a Slice,
    pub eps: f32,
    pub out: &'a Slice,
    /// Of out.
    pub float: Float,
    pub rows: usize,
    pub width: usize,
}

/// residual (rows, width) f32 += x (rows, width); out = the norm of the sum, times weight f32.
pub struct AddRmsNorm<'a> {
    pub x: &'a Slice,
    pub residual: &'a Slice,
    pub weight: &'a Slice,
    pub eps: f32,
    pub out: &'a Slice,
    pub float: Float,
    pub rows: usize,
    pub width: usize,
}

impl RmsNorm<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "rms_norm";
        let count = self.rows * self.width;
        check_width(OP, self.width)?;
        let args = [
            self.x.operand((OP, "x"), count, 4, 4)?,
            self.weight.operand((OP, "weight"), self.width, 4, 4)?,
            self.out.operand((OP, "out"), count, Float::SIZE, 4)?,
            self.width as u64,
            word(self.eps),
        ];
        let kernel = format!("rms_norm_{}", self.float.suffix());
        let grid = [self.rows as u32, 1, 1];
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared: 64, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &[self.x, self.weight, self.out]) }
    }
}

impl AddRmsNorm<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "add_rms_norm";
        let count = self.rows * self.width;
        check_width(OP, self.width)?;
        let args = [
            self.x.operand((OP, "x"), count, Float::SIZE, 4)?,
            self.residual.operand((OP, "residual"), count, 4, 8)?,
            self.weight.operand((OP, "weight"), self.width, 4, 4)?,
            self.out.operand((OP, "out"), count, Float::SIZE, 4)?,
            self.width as u64,
            word(self.eps),
        ];
        let kernel = format!("add_rms_norm_{}", self.float.suffix());
        let grid = [self.rows as u32, 1, 1];
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared: 64, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &[self.x, self.residual, self.weight, self.out]) }
    }
}

/// Rows are read two values at a time.
fn check_width(op: &'static str, width: usize) -> Result<(), Error> {
    match width > 0 && width.is_multiple_of(2) {
        true => Ok(()),
        false => Err(Error::value(op, "the width", width, "even and at least 2")),
    }
}
