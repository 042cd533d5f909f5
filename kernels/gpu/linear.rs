//! Matrix products on a device: by its library, or by our own kernels, whose bits depend on no
//! other row. Of weights in blocks there are only our own.

use std::ops::Range;

use super::driver::MatrixProduct;
use super::quantized::{Blocks, TILE, suffix};
use super::{Buffer, Float, Gpu, Launch, Slice};
use crate::error::Error;
use crate::quantized::BlockFormat;
use crate::threads::Threads;
use half::{bf16, f16};

const OP: &str = "product";
/// Rows that are uploaded at a time.
const STRIP: usize = 256;
/// Rows up to which a warp takes a slice of k instead of all of it.
const FEW: usize = 32;
/// Warps of a block: a slice of k each, or a tile each.
const WARPS: usize = 8;
/// Rows of a block, with many; the inputs of a stage, and stages that are under way.
const ROWS: usize = 64;
const STAGE: usize = 64;
const STAGES: usize = 3;

/// A weight (out_features, in_features) on a device.
pub struct Weight {
    values: Values,
    out_features: usize,
    in_features: usize,
    float: Float,
}

enum Values {
    /// Row-major.
    Dense(Buffer),
    /// One below the other.
    Blocks(Vec<Blocks>),
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
        Ok(Self { values: Values::Dense(values), out_features, in_features, float })
    }

    /// Rows in blocks as they are stored, multiplied with f16: `parts` are a format and how many
    /// rows it has; `read(row, bytes)` fills in the bytes of a row, in parallel.
    ///
    /// # Errors
    /// in_features that are no whole blocks; no memory.
    pub fn blocks(
        (gpu, threads): (&Gpu, &Threads),
        parts: &[(BlockFormat, usize)],
        in_features: usize,
        read: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Result<Self, Error> {
        let mut blocks = Vec::with_capacity(parts.len());
        let mut out_features = 0;
        for &(format, rows) in parts {
            let range = (out_features..out_features + rows, in_features);
            blocks.push(Blocks::pack((gpu, threads), format, range, &read)?);
            out_features += rows;
        }
        Ok(Self { values: Values::Blocks(blocks), out_features, in_features, float: Float::F16 })
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
        self.parts().map(|part| part.values.len()).sum()
    }

    /// What has one kernel, from the first row on.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> {
        let (dense, blocks) = match &self.values {
            Values::Dense(values) => (Some(values), &[][..]),
            Values::Blocks(blocks) => (None, &blocks[..]),
        };
        let dense = dense.map(|values| Part {
            suffix: self.float.suffix(),
            values: values.all(),
            rows: 0..self.out_features,
        });
        let mut first = 0;
        dense.into_iter().chain(blocks.iter().map(move |blocks| {
            let rows = first..first + blocks.rows;
            first = rows.end;
            Part { suffix: suffix(blocks.format), values: blocks.tiles.all(), rows }
        }))
    }
}

/// Rows of a weight.
pub(super) struct Part {
    /// As kernels' names end.
    pub suffix: &'static str,
    pub values: Slice,
    pub rows: Range<usize>,
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
    /// By the device's library, where the weight is dense: fast; a row's bits may depend on how
    /// many there are.
    pub fn fast(&self, gpu: &Gpu) -> Result<(), Error> {
        let weight = self.weight;
        let Values::Dense(values) = &weight.values else {
            return self.deterministic(gpu);
        };
        let [x, y, bias] = self.check()?;
        if self.rows == 0 {
            return Ok(());
        }
        if let Some(slice) = self.bias {
            self.spread(gpu, slice, bias, y)?;
        }
        let (n, k) = (weight.out_features, weight.in_features);
        let product = MatrixProduct {
            x,
            w: values.all().operand((OP, "the weight"), n * k, Float::SIZE, 16)?,
            y,
            m: self.rows,
            n,
            k,
            float: weight.float,
            wide: self.y_float.is_none(),
            accumulate: self.bias.is_some(),
        };
        // SAFETY: the operands are as long as the product is large.
        unsafe { gpu.product(&product, &[self.x, &values.all(), self.y]) }
    }

    /// By our own kernels: every element is summed over k in one order, whatever the number of
    /// rows.
    pub fn deterministic(&self, gpu: &Gpu) -> Result<(), Error> {
        let [x, y, bias] = self.check()?;
        if self.rows > 65_535 * ROWS {
            let expected = format!("at most {}", 65_535 * ROWS);
            return Err(Error::value(OP, "the number of rows", self.rows, expected));
        }
        let size = if self.y_float.is_some() { Float::SIZE } else { 4 };
        let (width, k) = (self.weight.out_features, self.weight.in_features);
        for part in self.weight.parts() {
            let (first, n) = (part.rows.start as u64, part.rows.len());
            let args = [
                x,
                part.values.operand((OP, "the weight"), 1, part.values.len(), 16)?,
                if bias == 0 { 0 } else { bias + 4 * first },
                y + size as u64 * first,
                self.rows as u64,
                n as u64,
                k as u64,
                width as u64,
                u64::from(self.y_float.is_none()),
            ];
            let (way, columns, rows, shared) = match self.rows <= FEW {
                true => ("few", TILE, 16, WARPS * 16 * TILE * 4),
                false => ("many", WARPS * TILE, ROWS, STAGES * ROWS * STAGE * Float::SIZE),
            };
            let kernel = format!("product_{way}_{}", part.suffix);
            let grid = [n.div_ceil(columns) as u32, self.rows.div_ceil(rows) as u32, 1];
            let (block, shared) = (32 * WARPS as u32, shared as u32);
            let launch = Launch { kernel: &kernel, grid, block, shared, args: &args };
            let slices = [self.x, &part.values, self.bias.unwrap_or(self.x), self.y];
            // SAFETY: the kernel's arguments, each as long as it reads or writes.
            unsafe { gpu.launch(&launch, &slices)? };
        }
        Ok(())
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

    fn check(&self) -> Result<[u64; 3], Error> {
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
            self.y.operand((OP, "y"), self.rows * n, size, size as u64)?,
            bias,
        ])
    }
}
