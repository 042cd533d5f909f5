//! One token of a row of logits, on the device: greedy, or a draw behind min-p, top-k and top-p.
//!
//! The choice is that of the sampler on the processor: the same order of steps, the same random
//! numbers (SplitMix64's finalizer over seed, choice and position), the first of equal maxima.
//! Weights `exp((logit - max) / temperature)` are f64, cut to multiples of 2^-44, so that their
//! sums are exact and have no order; a draw within 2^-26 of a border may fall to its other side.

use super::{Gpu, Launch, Slice};
use crate::error::Error;

const BLOCK: u32 = 1024;

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    /// 0 is greedy.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// In [0, 1].
    pub min_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    pub seed: u64,
    /// Index of the choice.
    pub choice: u32,
    /// How many tokens were generated before this one.
    pub position: u32,
}

impl SampleRow {
    /// Bytes of a row on the device.
    pub const BYTES: usize = 32;

    /// As the device takes it.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&self.temperature.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.top_p.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.min_p.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.top_k.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.seed.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.choice.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.position.to_le_bytes());
        bytes
    }
}

/// tokens (rows) u32 = the choices from logits (rows, vocab) f32.
pub struct SampleRows<'a> {
    pub logits: &'a Slice,
    /// [`SampleRow::to_bytes`] of each row.
    pub params: &'a Slice,
    pub tokens: &'a Slice,
    pub rows: usize,
    pub vocab: usize,
}

impl SampleRows<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "sample_rows";
        if self.vocab == 0 || self.vocab > 1 << 19 {
            return Err(Error::value(OP, "vocab", self.vocab, "in 1..=524288"));
        }
        let args = [
            self.logits.operand((OP, "logits"), self.rows * self.vocab, 4, 4)?,
            self.params.operand((OP, "params"), self.rows, SampleRow::BYTES, 8)?,
            self.tokens.operand((OP, "tokens"), self.rows, 4, 4)?,
            self.vocab as u64,
        ];
        let grid = [self.rows as u32, 1, 1];
        // Eight histograms of 256 masses, one of counts, and what warps tell each other.
        let shared = 8 * 256 * 8 + 256 * 4 + 32 * 8 + 64;
        let launch = Launch { kernel: OP, grid, block: BLOCK, shared, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &[self.logits, self.params, self.tokens]) }
    }
}

/// flags (rows) u32 = 1 where a row of x (rows, width) f32 has a number that is not finite, else 0.
pub struct CheckFinite<'a> {
    pub x: &'a Slice,
    pub flags: &'a Slice,
    pub rows: usize,
    pub width: usize,
}

impl CheckFinite<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "check_finite";
        let args = [
            self.x.operand((OP, "x"), self.rows * self.width, 4, 4)?,
            self.flags.operand((OP, "flags"), self.rows, 4, 4)?,
            self.width as u64,
        ];
        let grid = [self.rows as u32, 1, 1];
        let launch = Launch { kernel: OP, grid, block: BLOCK, shared: 128, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes.
        unsafe { gpu.launch(&launch, &[self.x, self.flags]) }
    }
}
