//! Kernels that only pick and combine: rows of the embedding, rows of activations, silu * up.

use super::{Float, Gpu, Launch, Slice, Weight};
use crate::error::Error;

const BLOCK: u32 = 256;

/// out (count, in_features) f32 = rows `ids` (u32) of the weight. An id past the last row gives a
/// row of NaN.
pub struct Embedding<'a> {
    pub ids: &'a Slice,
    pub weight: &'a Weight,
    pub out: &'a Slice,
    pub count: usize,
}

impl Embedding<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "embedding";
        let (count, width) = (self.count, self.weight.in_features());
        let mut parts = self.weight.parts();
        let (Some(table), None) = (parts.next(), parts.next()) else {
            return Err(Error::device(OP, "the weight must have one format"));
        };
        let args = [
            self.ids.operand((OP, "ids"), count, 4, 4)?,
            table.values.operand((OP, "weight"), 1, table.values.len(), 16)?,
            self.out.operand((OP, "out"), count * width, 4, 4)?,
            self.weight.out_features() as u64,
            width as u64,
        ];
        let kernel = format!("embedding_{}", table.suffix);
        let grid = [count as u32, 1, 1];
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared: 0, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes; it checks ids.
        unsafe { gpu.launch(&launch, &[self.ids, &table.values, self.out]) }
    }
}

/// out row i = row `rows[i]` (u32) of x, `width_bytes` each, a multiple of 4; x has `limit` rows,
/// and a row past them is zeros.
pub struct GatherRows<'a> {
    pub x: &'a Slice,
    pub rows: &'a Slice,
    pub out: &'a Slice,
    pub count: usize,
    pub limit: usize,
    pub width_bytes: usize,
}

impl GatherRows<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "gather_rows";
        if !self.width_bytes.is_multiple_of(4) {
            return Err(Error::value(OP, "width_bytes", self.width_bytes, "a multiple of 4"));
        }
        let words = self.width_bytes / 4;
        let args = [
            self.x.operand((OP, "x"), self.limit * words, 4, 4)?,
            self.rows.operand((OP, "rows"), self.count, 4, 4)?,
            self.out.operand((OP, "out"), self.count * words, 4, 4)?,
            self.limit as u64,
            words as u64,
        ];
        let grid = [self.count as u32, 1, 1];
        let launch = Launch { kernel: "gather_rows", grid, block: BLOCK, shared: 0, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes; it checks rows.
        unsafe { gpu.launch(&launch, &[self.x, self.rows, self.out]) }
    }
}

/// out (rows, inner) = silu(gate) * up of gate_up (rows, 2 * inner), gate first.
pub struct SiluMul<'a> {
    pub gate_up: &'a Slice,
    pub out: &'a Slice,
    pub float: Float,
    pub rows: usize,
    pub inner: usize,
}

impl SiluMul<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "silu_mul";
        let (rows, inner) = (self.rows, self.inner);
        if !inner.is_multiple_of(2) {
            return Err(Error::value(OP, "inner", inner, "even"));
        }
        let args = [
            self.gate_up.operand((OP, "gate_up"), rows * 2 * inner, Float::SIZE, 4)?,
            self.out.operand((OP, "out"), rows * inner, Float::SIZE, 4)?,
            rows as u64,
            inner as u64,
        ];
        let kernel = format!("silu_mul_{}", self.float.suffix());
        let blocks = (rows * inner / 2).div_ceil(BLOCK as usize);
        let grid = [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1];
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared: 0, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &[self.gate_up, self.out]) }
    }
}
