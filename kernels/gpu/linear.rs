//! Matrix products on a device: by its library, or by our own kernel whose bits depend on no
//! other row.

use std::ops::Range;

use super::driver::MatrixProduct;
use super::{Buffer, Float, Gpu, Launch, Slice};
use crate::error::Error;
use half::{bf16, f16};

/// Rows that are uploaded at a time.
const STRIP: usize = 256;
/// Rows and columns of a block's part of the result, and the k of a stage.
const TILE: usize = 64;
const STAGE: usize = 64;
const STAGES: usize = 3;

/// A weight (out_features, in_features), row-major, on a device.
pub struct Weight {
    values: Buffer,
    out_features: usize,
    in_features: usize,
    float: Float,
}

impl Weight {
    /// `rows(range, out)` fills `out` with the f32 values of those output rows, as for
    /// [`crate::PackedWeight::pack`]; rounded to nearest even.
    ///
    /// # Errors
    /// The first of `rows`; in_features that is no multiple of 8; no memory.
    pub fn dense<E: From<Error>>(
        gpu: &Gpu,
        float: Float,
        out_features: usize,
        in_features: usize,
        mut rows: impl FnMut(Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        if in_features == 0 || !in_features.is_multiple_of(8) {
            let expected = "a multiple of 8 on a GPU";
            return Err(Error::value("weight", "in_features", in_features, expected).into());
        }
        let row_bytes = in_features * Float::SIZE;
        let values = gpu.alloc((out_features * row_bytes).max(1))?;
        let mut strip = vec![0f32; STRIP.min(out_features) * in_features];
        let mut bytes = vec![0; strip.len() * Float::SIZE];
        for start in (0..out_features).step_by(STRIP) {
            let range = start..out_features.min(start + STRIP);
            let strip = &mut strip[..range.len() * in_features];
            strip.fill(0.0);
            rows(range, strip)?;
            let bytes = &mut bytes[..strip.len() * Float::SIZE];
            let places = bytes.as_chunks_mut().0.iter_mut().zip(&*strip);
            match float {
                Float::Bf16 => places.for_each(|(to, x)| *to = bf16::from_f32(*x).to_le_bytes()),
                Float::F16 => places.for_each(|(to, x)| *to = f16::from_f32(*x).to_le_bytes()),
            }
            gpu.upload(bytes, &values.at(start * row_bytes))?;
        }
        Ok(Self { values, out_features, in_features, float })
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn float(&self) -> Float {
        self.float
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.values.len()
    }

    /// (out_features, in_features): an embedding, too.
    pub fn values(&self) -> Slice {
        self.values.all()
    }
}

/// y (rows, out_features) = x (rows, in_features) times the weight transposed, plus bias.
pub struct Product<'a> {
    pub x: &'a Slice,
    pub weight: &'a Weight,
    /// (out_features) f32
    pub bias: Option<&'a Slice>,
    pub y: &'a Slice,
    /// `None`: y is f32; else the weight's.
    pub y_float: Option<Float>,
    pub rows: usize,
}

impl Product<'_> {
    /// By the device's library: fast; a row's bits may depend on how many there are.
    pub fn fast(&self, gpu: &Gpu) -> Result<(), Error> {
        let [x, w, y, bias] = self.check()?;
        let weight = self.weight;
        if self.rows == 0 {
            return Ok(());
        }
        if let Some(slice) = self.bias {
            self.spread(gpu, slice, bias, y)?;
        }
        let product = MatrixProduct {
            x,
            w,
            y,
            m: self.rows,
            n: weight.out_features,
            k: weight.in_features,
            float: weight.float,
            wide: self.y_float.is_none(),
            accumulate: self.bias.is_some(),
        };
        // SAFETY: the operands are as long as the product is large.
        unsafe { gpu.product(&product, &[self.x, &weight.values(), self.y]) }
    }

    /// By our own kernel: every element is summed over k in ascending order, in steps of one
    /// matrix instruction, whatever the number of rows.
    pub fn deterministic(&self, gpu: &Gpu) -> Result<(), Error> {
        let [x, w, y, bias] = self.check()?;
        let (n, k) = (self.weight.out_features, self.weight.in_features);
        let args = [x, w, bias, y, self.rows as u64, n as u64, k as u64];
        let kernel = format!("product_{}_{}", self.weight.float.suffix(), self.y_suffix());
        let grid = [n.div_ceil(TILE) as u32, self.rows.div_ceil(TILE) as u32, 1];
        if grid[1] > 65_535 {
            return Err(Error::value("product", "the number of rows", self.rows, "below 4194241"));
        }
        let shared = (STAGES * 2 * TILE * STAGE * Float::SIZE) as u32;
        let launch = Launch { kernel: &kernel, grid, block: 128, shared, args: &args };
        let slices = [self.x, &self.weight.values(), self.bias.unwrap_or(self.x), self.y];
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &slices) }
    }

    /// Writes the bias to every row of y.
    fn spread(&self, gpu: &Gpu, slice: &Slice, bias: u64, y: u64) -> Result<(), Error> {
        let n = self.weight.out_features;
        let args = [bias, y, self.rows as u64, n as u64];
        let kernel = format!("spread_bias_{}", self.y_suffix());
        let blocks = (self.rows * n).div_ceil(256);
        let grid = [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1];
        let launch = Launch { kernel: &kernel, grid, block: 256, shared: 0, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &[slice, self.y]) }
    }

    fn y_suffix(&self) -> &'static str {
        self.y_float.map_or("f32", Float::suffix)
    }

    fn check(&self) -> Result<[u64; 4], Error> {
        const OP: &str = "product";
        let (n, k) = (self.weight.out_features, self.weight.in_features);
        if self.y_float.is_some_and(|float| float != self.weight.float) {
            return Err(Error::device(OP, "y must be f32 or of the weight's type"));
        }
        let size = if self.y_float.is_some() { Float::SIZE } else { 4 };
        let bias = match self.bias {
            Some(bias) => bias.operand((OP, "bias"), n, 4, 4)?,
            None => 0,
        };
        Ok([
            self.x.operand((OP, "x"), self.rows * k, Float::SIZE, 16)?,
            self.weight.values().operand((OP, "the weight"), n * k, Float::SIZE, 16)?,
            self.y.operand((OP, "y"), self.rows * n, size, size as u64)?,
            bias,
        ])
    }
}
