//! Weights in blocks of small integers with common scales, as GGUF files hold them.
//!
//! What a block means is decided here and nowhere else: inputs of 32 make a group, an input's
//! weight is `scale * (code - center)` or `scale * code + offset`. [`Panels`] hold the same codes
//! and scales in the order of the product, with nothing rounded.

/// Runs an expression for the format at hand as a constant, `F`: its place in [`BlockFormat::ALL`].
macro_rules! by_format {
    ($format:expr, $f:ident, $run:expr) => {
        $crate::quantized::by_format!($format, $f, $run, 0 1 2 3 4 5 6 7)
    };
    ($format:expr, $f:ident, $run:expr, $($index:literal)*) => {
        match $format as usize {
            $($index => {
                const $f: usize = $index;
                $run
            })*
            format => unreachable!("format {format}"),
        }
    };
}
use by_format;

mod panels;
mod product;
mod rows;
mod tiles;

use half::f16;

pub(crate) use panels::Panels;
pub(crate) use product::{product, reference};

/// Inputs of a group: what activations share a scale over.
pub(crate) const GROUP: usize = 32;

/// How a row is cut into blocks and a block into bytes; llama.cpp's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockFormat {
    pub const ALL: [Self; 8] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Inputs of a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            _ => GROUP,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of so many inputs, a multiple of [`BlockFormat::block_len`].
    pub fn row_bytes(self, inputs: usize) -> usize {
        inputs / self.block_len() * self.block_bytes()
    }

    /// What whole blocks are worth, each number rounded as [`Block`] says.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.chunks_exact(self.block_bytes());
        for (bytes, out) in blocks.zip(out.chunks_exact_mut(self.block_len())) {
            let block = Block::parse(self, bytes);
            for (k, out) in out.iter_mut().enumerate() {
                *out = block.weight(self, k);
            }
        }
    }

    /// Bits of a code.
    pub(crate) const fn bits(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q4K => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => 5,
            Self::Q6K => 6,
            Self::Q8_0 => 8,
        }
    }

    /// What is subtracted from every code.
    pub(crate) const fn center(self) -> i32 {
        match self {
            Self::Q4_0 => 8,
            Self::Q5_0 => 16,
            Self::Q6K => 32,
            Self::Q8_0 => 128,
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => 0,
        }
    }

    /// Whether a weight has an offset, and no center.
    pub(crate) const fn has_offset(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K)
    }

    /// Whether a block's scale is multiplied by small integers, one for each part of it.
    pub(crate) const fn has_factors(self) -> bool {
        self.block_len() > GROUP
    }

    /// What a code is worth: a product and, where there are offsets, a sum, each rounded.
    fn weight(self, code: u8, (scale, offset): (f32, f32)) -> f32 {
        match self.has_offset() {
            true => scale * f32::from(code) + offset,
            false => scale * (i32::from(code) - self.center()) as f32,
        }
    }

    /// Scale and offset of a weight, each from its block's number and its own factor (1 where the
    /// format has none): a product, rounded.
    fn scale(self, scale: (f16, u8), offset: (f16, u8)) -> (f32, f32) {
        let factor = match self {
            Self::Q6K => f32::from(scale.1.cast_signed()),
            _ => f32::from(scale.1),
        };
        let offset = offset.0.to_f32() * f32::from(offset.1);
        (scale.0.to_f32() * factor, if self.has_factors() { -offset } else { offset })
    }

    /// Inputs that share a scale.
    pub(crate) const fn scale_len(self) -> usize {
        if matches!(self, Self::Q6K) { 16 } else { GROUP }
    }
}

/// One block, taken apart.
pub(crate) struct Block {
    /// One per input, below 2^bits.
    pub codes: [u8; 256],
    pub scale: f16,
    /// Added to every weight, or what the offsets' factors multiply (and is subtracted).
    pub offset: f16,
    /// One for each [`BlockFormat::scale_len`] inputs; signed in Q6K alone.
    pub factors: [u8; 16],
    /// One for each group.
    pub offset_factors: [u8; 8],
}

impl Block {
    pub fn parse(format: BlockFormat, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), format.block_bytes(), "a block of {format:?}");
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut block = Self {
            codes: [0; 256],
            scale: half(if format == BlockFormat::Q6K { 208 } else { 0 }),
            offset: if format.has_offset() { half(2) } else { f16::ZERO },
            factors: [1; 16],
            offset_factors: [1; 8],
        };
        let codes = &mut block.codes;
        match format {
            BlockFormat::Q4_0 => nibbles(&bytes[2..], codes),
            BlockFormat::Q4_1 => nibbles(&bytes[4..], codes),
            BlockFormat::Q5_0 => five_bits(&bytes[2..], codes),
            BlockFormat::Q5_1 => five_bits(&bytes[4..], codes),
            BlockFormat::Q8_0 => {
                for (code, byte) in codes.iter_mut().zip(&bytes[2..]) {
                    *code = byte ^ 0x80;
                }
            }
            BlockFormat::Q4K => {
                block.take_factors(&bytes[4..16]);
                pairs_of_groups(&bytes[16..], &mut block.codes);
            }
            BlockFormat::Q5K => {
                block.take_factors(&bytes[4..16]);
                pairs_of_groups(&bytes[48..], &mut block.codes);
                for (group, codes) in block.codes.chunks_exact_mut(GROUP).enumerate() {
                    for (code, high) in codes.iter_mut().zip(&bytes[16..48]) {
                        *code |= (high >> group & 1) << 4;
                    }
                }
            }
            BlockFormat::Q6K => {
                six_bits(&bytes[..128], &bytes[128..192], &mut block.codes);
                block.factors.copy_from_slice(&bytes[192..208]);
            }
        }
        block
    }

    /// The weight of input `k`.
    fn weight(&self, format: BlockFormat, k: usize) -> f32 {
        let scale = (self.scale, self.factors[k / format.scale_len()]);
        let offset = (self.offset, self.offset_factors[k / GROUP]);
        format.weight(self.codes[k], format.scale(scale, offset))
    }

    /// Eight factors of scales and eight of offsets, six bits each, in twelve bytes: the low four
    /// of the last four of each lie together, their high two above the six of the first ones.
    fn take_factors(&mut self, packed: &[u8]) {
        for group in 0..4 {
            self.factors[group] = packed[group] & 63;
            self.offset_factors[group] = packed[group + 4] & 63;
            let low = packed[group + 8];
            self.factors[group + 4] = low & 15 | packed[group] >> 6 << 4;
            self.offset_factors[group + 4] = low >> 4 | packed[group + 4] >> 6 << 4;
        }
    }
}

/// Sixteen bytes: the first half of a group in the low bits, the second in the high ones.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    for (at, byte) in bytes[..GROUP / 2].iter().enumerate() {
        codes[at] = byte & 15;
        codes[at + GROUP / 2] = byte >> 4;
    }
}

/// The fifth bits of a group, then its nibbles.
fn five_bits(bytes: &[u8], codes: &mut [u8]) {
    nibbles(&bytes[4..], codes);
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (at, code) in codes[..GROUP].iter_mut().enumerate() {
        *code |= ((high >> at & 1) as u8) << 4;
    }
}

/// Thirty-two bytes for two groups: one in the low bits, the next in the high ones.
fn pairs_of_groups(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(GROUP).zip(codes.chunks_exact_mut(2 * GROUP)) {
        for (at, byte) in bytes.iter().enumerate() {
            codes[at] = byte & 15;
            codes[at + GROUP] = byte >> 4;
        }
    }
}

/// Halves of 128: four groups, whose low four bits fill 64 bytes and whose high two fill 32.
fn six_bits(low: &[u8], high: &[u8], codes: &mut [u8]) {
    let halves = low.chunks_exact(64).zip(high.chunks_exact(GROUP));
    for ((low, high), codes) in halves.zip(codes.chunks_exact_mut(128)) {
        for (at, high) in high.iter().enumerate() {
            codes[at] = low[at] & 15 | (high & 3) << 4;
            codes[at + GROUP] = low[at + GROUP] & 15 | (high >> 2 & 3) << 4;
            codes[at + 2 * GROUP] = low[at] >> 4 | (high >> 4 & 3) << 4;
            codes[at + 3 * GROUP] = low[at + GROUP] >> 4 | (high >> 6) << 4;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
