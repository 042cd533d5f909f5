//! Weights in blocks of small integers on a device, packed in the shape of matrix instructions.
//!
//! Sixteen rows (output features) make a tile, whose planes lie one behind the other; the last
//! tile is filled with zeros. Nothing is rounded, and nothing grows but the factors of Q4_K and
//! Q5_K, which take 8 bits instead of 6. Inputs come in groups of 32:
//!
//! ```text
//! codes    [group][lane]         8 bytes: the low four bits; with eight bits 16 bytes
//! high     [group][lane]         2 bytes with five bits, 4 with six: those above
//! scales   [block][16] f16       and as many offsets, where the format has them
//! factors  [group][16] u8        of scales (Q6_K: two of a group), then those of offsets
//!
//! lane 4 g + c    row 8 t + g, inputs 16 j + 4 c + i, for t and j below 2, i below 4:
//!                 eight bits: byte 8 t + 4 j + i
//!                 else: nibble p + 4 e of word t, where p = 2 j + i / 2 and e = i % 2
//!                 five bits: bit 8 e + 4 t + p; six: bits 16 e + 8 t + 2 p and the next
//! [16]            row 8 t + 2 c + e at 4 c + 2 t + e
//! ```

use std::ops::Range;

use super::{Buffer, Gpu};
use crate::error::Error;
use crate::quantized::{Block, BlockFormat, GROUP};
use crate::threads::Threads;

/// Rows of a tile.
pub(super) const TILE: usize = 16;
const LANES: usize = 32;
/// Tiles that are packed and uploaded at a time.
const STRIP: usize = 64;
/// A scale's bytes.
const HALF: usize = 2;

/// Rows of one format, one below the other.
pub(super) struct Blocks {
    pub format: BlockFormat,
    pub rows: usize,
    pub tiles: Buffer,
}

impl Blocks {
    /// `read(row, bytes)` fills in the bytes of one of `rows`, in parallel.
    pub fn pack(
        (gpu, threads): (&Gpu, &Threads),
        format: BlockFormat,
        (rows, inputs): (Range<usize>, usize),
        read: &(impl Fn(usize, &mut [u8]) + Sync),
    ) -> Result<Self, Error> {
        if inputs == 0 || !inputs.is_multiple_of(format.block_len()) {
            let expected = format!("a multiple of {}", format.block_len());
            return Err(Error::value("weight", "in_features", inputs, expected));
        }
        let layout = Layout::new(format, inputs);
        let count = rows.len().div_ceil(TILE);
        let tiles = gpu.alloc((count * layout.bytes).max(1))?;
        let mut staged = vec![0; count.min(STRIP) * layout.bytes];
        for start in (0..count).step_by(STRIP) {
            let staged = &mut staged[..STRIP.min(count - start) * layout.bytes];
            staged.fill(0);
            threads.for_each_chunk(staged, layout.bytes, |index, tile| {
                let first = rows.start + (start + index) * TILE;
                let mut bytes = vec![0; format.row_bytes(inputs)];
                for row in first..rows.end.min(first + TILE) {
                    read(row, &mut bytes);
                    layout.put(tile, row - first, &bytes);
                }
            });
            gpu.upload(staged, &tiles.at(start * layout.bytes))?;
        }
        Ok(Self { format, rows: rows.len(), tiles })
    }
}

/// Bytes that so many rows of `inputs` take on a device.
pub fn block_bytes(format: BlockFormat, rows: usize, inputs: usize) -> usize {
    rows.div_ceil(TILE) * Layout::new(format, inputs).bytes
}

/// As kernels' names end.
pub(super) fn suffix(format: BlockFormat) -> &'static str {
    match format {
        BlockFormat::Q4_0 => "q4_0",
        BlockFormat::Q4_1 => "q4_1",
        BlockFormat::Q5_0 => "q5_0",
        BlockFormat::Q5_1 => "q5_1",
        BlockFormat::Q8_0 => "q8_0",
        BlockFormat::Q4K => "q4_k",
        BlockFormat::Q5K => "q5_k",
        BlockFormat::Q6K => "q6_k",
    }
}

/// Where a tile's planes begin.
struct Layout {
    format: BlockFormat,
    high: usize,
    scales: usize,
    offsets: usize,
    factors: usize,
    offset_factors: usize,
    /// Of a tile.
    bytes: usize,
}

impl Layout {
    fn new(format: BlockFormat, inputs: usize) -> Self {
        let (groups, blocks) = (inputs / GROUP, inputs / format.block_len());
        let some = |there: bool, bytes: usize| if there { bytes } else { 0 };
        let high = groups * LANES * if format.bits() == 8 { 16 } else { 8 };
        let high_bytes = match format.bits() {
            5 => 2,
            6 => 4,
            _ => 0,
        };
        let scales = high + groups * LANES * high_bytes;
        let offsets = scales + blocks * TILE * HALF;
        let factors = offsets + some(format.has_offset(), blocks * TILE * HALF);
        let parts = inputs / format.scale_len();
        let offset_factors = factors + some(format.has_factors(), parts * TILE);
        let has_both = format.has_factors() && format.has_offset();
        let bytes = offset_factors + some(has_both, groups * TILE);
        Self { format, high, scales, offsets, factors, offset_factors, bytes }
    }

    /// Puts a row's blocks in its place; the tile is zeros there.
    fn put(&self, tile: &mut [u8], row: usize, bytes: &[u8]) {
        let format = self.format;
        let len = format.block_len();
        let place = row % 8 / 2 * 4 + row / 8 * 2 + row % 2;
        for (number, bytes) in bytes.chunks_exact(format.block_bytes()).enumerate() {
            let block = Block::parse(format, bytes);
            let half = HALF * (number * TILE + place);
            let mut put_half = |at: usize, bytes: [u8; HALF]| {
                tile[at + half..at + half + HALF].copy_from_slice(&bytes);
            };
            put_half(self.scales, block.scale.to_le_bytes());
            if format.has_offset() {
                put_half(self.offsets, block.offset.to_le_bytes());
            }
            let spread = |tile: &mut [u8], at: usize, factors: &[u8]| {
                for (part, factor) in factors.iter().enumerate() {
                    tile[at + (number * factors.len() + part) * TILE + place] = *factor;
                }
            };
            if format.has_factors() {
                spread(tile, self.factors, &block.factors[..len / format.scale_len()]);
                if format.has_offset() {
                    spread(tile, self.offset_factors, &block.offset_factors);
                }
            }
            for (k, code) in block.codes[..len].iter().enumerate() {
                self.put_code(tile, row, number * len + k, *code);
            }
        }
    }

    fn put_code(&self, tile: &mut [u8], row: usize, k: usize, code: u8) {
        let (group, j, c, i) = (k / GROUP, k % GROUP / 16, k % 16 / 4, k % 4);
        let (t, lane) = (row / 8, group * LANES + row % 8 * 4 + c);
        if self.format.bits() == 8 {
            tile[lane * 16 + 8 * t + 4 * j + i] = code;
            return;
        }
        let (p, e) = (2 * j + i / 2, i % 2);
        tile[lane * 8 + 4 * t + 2 * e + p / 2] |= (code & 15) << (p % 2 * 4);
        match self.format.bits() {
            5 => tile[self.high + lane * 2 + e] |= (code >> 4) << (4 * t + p),
            6 => tile[self.high + lane * 4 + 2 * e + t] |= (code >> 4) << (2 * p),
            _ => {}
        }
    }
}
