//! Quantized rows in the order of the product: tiles of 32 output features, inputs sequential.
//!
//! A group (32 inputs) of a tile has, for each half of 16 features, as many lines of 64 bytes as a
//! code has bits; a byte belongs to feature `i / 4` and, within four inputs (a quad), to input
//! `i % 4`.
//!
//! ```text
//! bits  lines of a group and half
//! 8     8: line q is quad q
//! 4     4: line q is quad q in the low bits, quad q + 4 in the high ones
//! 5     4 as above, then 1: bit q of a byte is the fifth bit of quad q
//! 6     4 as above, then 2: bits 2 q and 2 q + 1 of line l are the high bits of quad 4 l + q
//! ```

use half::f16;
use std::ops::Range;

use super::{Block, BlockFormat, GROUP};
use crate::linear::{Columns, TILE};
use crate::pages::prefer_large_pages;
use crate::simd::LANES;
use crate::threads::Threads;

/// Inputs that are multiplied together.
pub(crate) const QUAD: usize = 4;
/// Quads of a group.
pub(crate) const QUADS: usize = GROUP / QUAD;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// A byte for each feature of a tile.
pub(crate) type Factors = [u8; TILE];

/// Rows of one format that follow each other.
pub(crate) struct Panels {
    pub format: BlockFormat,
    /// Which output features.
    pub rows: Range<usize>,
    pub inputs: usize,
    /// [tile][group][half][line]
    pub codes: Vec<Line>,
    /// [tile][block]
    pub scales: Vec<Columns<f16>>,
    /// [tile][block], where the format has them; else empty, also below.
    pub offsets: Vec<Columns<f16>>,
    /// [tile][input / scale_len]
    pub factors: Vec<Factors>,
    /// [tile][group]
    pub offset_factors: Vec<Factors>,
}

/// What one thread packs.
struct Tile<'a> {
    codes: &'a mut [Line],
    scales: &'a mut [Columns<f16>],
    offsets: &'a mut [Columns<f16>],
    factors: &'a mut [Factors],
    offset_factors: &'a mut [Factors],
}

impl Panels {
    /// `read(row, bytes)` fills in the bytes of one of the rows, counted as in `rows`.
    pub fn pack<E: Send>(
        format: BlockFormat,
        rows: Range<usize>,
        inputs: usize,
        threads: &Threads,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(inputs.is_multiple_of(format.block_len()), "rows are whole blocks");
        let mut panels = Self::empty(format, rows.clone(), inputs);
        let failure = std::sync::Mutex::new(None);
        let lock = || failure.lock().expect("nothing panics under this lock");
        let tiles: Vec<_> = panels.tiles().map(|tile| std::sync::Mutex::new(Some(tile))).collect();
        threads.run(tiles.len(), |index| {
            let tile = tiles[index].lock().expect("taken by one").take();
            let mut tile = tile.expect("each part runs once");
            let mut bytes = vec![0; format.row_bytes(inputs)];
            let first = rows.start + index * TILE;
            for row in first..rows.end.min(first + TILE) {
                if lock().is_some() {
                    return;
                }
                if let Err(error) = read(row, &mut bytes) {
                    lock().get_or_insert(error);
                    return;
                }
                tile.put(format, row - first, &bytes);
            }
        });
        drop(tiles);
        match failure.into_inner().expect("nothing panics under this lock") {
            Some(error) => Err(error),
            None => Ok(panels),
        }
    }

    fn empty(format: BlockFormat, rows: Range<usize>, inputs: usize) -> Self {
        let tiles = rows.len().div_ceil(TILE);
        let zeros = Columns([f16::ZERO; TILE]);
        let blocks = tiles * (inputs / format.block_len());
        let some = |there: bool, count: usize| if there { count } else { 0 };
        let factors = some(format.has_factors(), tiles * (inputs / format.scale_len()));
        let offset_factors =
            some(format.has_factors() && format.has_offset(), tiles * (inputs / GROUP));
        let lines = tiles * (inputs / GROUP) * 2 * format.bits();
        let mut codes = Vec::with_capacity(lines);
        prefer_large_pages(codes.spare_capacity_mut());
        codes.resize(lines, Line([0; 64]));
        Self {
            format,
            inputs,
            codes,
            scales: vec![zeros; blocks],
            offsets: vec![zeros; some(format.has_offset(), blocks)],
            factors: vec![[0; TILE]; factors],
            offset_factors: vec![[0; TILE]; offset_factors],
            rows,
        }
    }

    fn tiles(&mut self) -> impl Iterator<Item = Tile<'_>> {
        let tiles = self.rows.len().div_ceil(TILE);
        let each = |len: usize| len / tiles;
        let codes = each(self.codes.len());
        let scales = each(self.scales.len());
        let (factors, offset_factors) = (each(self.factors.len()), each(self.offset_factors.len()));
        let mut offsets = self.offsets.chunks_mut(scales);
        let mut factors = self.factors.chunks_mut(factors.max(1));
        let mut offset_factors = self.offset_factors.chunks_mut(offset_factors.max(1));
        let tiles = self.codes.chunks_mut(codes).zip(self.scales.chunks_mut(scales));
        tiles.map(move |(codes, scales)| Tile {
            codes,
            scales,
            offsets: offsets.next().unwrap_or_default(),
            factors: factors.next().unwrap_or_default(),
            offset_factors: offset_factors.next().unwrap_or_default(),
        })
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.codes[..])
            + size_of_val(&self.scales[..])
            + size_of_val(&self.offsets[..])
            + size_of_val(&self.factors[..])
            + size_of_val(&self.offset_factors[..])
    }

    /// The weight of output feature `row`, one of `rows`, for input `k`.
    pub fn value(&self, row: usize, k: usize) -> f32 {
        let (tile, column) = ((row - self.rows.start) / TILE, (row - self.rows.start) % TILE);
        self.format.weight(self.code(tile, column, k), self.scale(tile, column, k))
    }

    pub fn code(&self, tile: usize, column: usize, k: usize) -> u8 {
        let lines = self.format.bits();
        let (group, quad) = (tile * (self.inputs / GROUP) + k / GROUP, k % GROUP / QUAD);
        let half = &self.codes[(group * 2 + column / LANES) * lines..][..lines];
        let byte = column % LANES * QUAD + k % QUAD;
        if self.format.bits() == 8 {
            return half[quad].0[byte];
        }
        let low = half[quad % 4].0[byte] >> (quad / 4 * 4) & 15;
        let high = match self.format.bits() {
            5 => half[4].0[byte] >> quad & 1,
            6 => half[4 + quad / 4].0[byte] >> (quad % 4 * 2) & 3,
            _ => 0,
        };
        low | high << 4
    }

    /// Scale and offset of a weight.
    pub fn scale(&self, tile: usize, column: usize, k: usize) -> (f32, f32) {
        let at = |every: usize| tile * (self.inputs / every) + k / every;
        let block = at(self.format.block_len());
        let of_block = |lines: &[Columns<f16>]| lines.get(block).map_or(f16::ZERO, |l| l.0[column]);
        let factor = |lines: &[Factors], at: usize| lines.get(at).map_or(1, |line| line[column]);
        self.format.scale(
            (of_block(&self.scales), factor(&self.factors, at(self.format.scale_len()))),
            (of_block(&self.offsets), factor(&self.offset_factors, at(GROUP))),
        )
    }
}

impl Tile<'_> {
    /// Takes in a row of the file as a column.
    fn put(&mut self, format: BlockFormat, column: usize, row: &[u8]) {
        let groups = format.block_len() / GROUP;
        for (index, bytes) in row.chunks_exact(format.block_bytes()).enumerate() {
            let block = Block::parse(format, bytes);
            self.scales[index].0[column] = block.scale;
            if let Some(offsets) = self.offsets.get_mut(index) {
                offsets.0[column] = block.offset;
            }
            let per_block = format.block_len() / format.scale_len();
            let factors = self.factors.iter_mut().skip(index * per_block);
            for (line, factor) in factors.zip(&block.factors[..per_block]) {
                line[column] = *factor;
            }
            let factors = self.offset_factors.iter_mut().skip(index * groups);
            for (line, factor) in factors.zip(&block.offset_factors[..groups]) {
                line[column] = *factor;
            }
            let codes = block.codes.chunks_exact(GROUP).take(groups);
            for (group, codes) in codes.enumerate() {
                self.put_group(format.bits(), column, index * groups + group, codes);
            }
        }
    }

    fn put_group(&mut self, bits: usize, column: usize, group: usize, codes: &[u8]) {
        let half = (group * 2 + column / LANES) * bits;
        let lines = &mut self.codes[half..half + bits];
        for (k, &code) in codes.iter().enumerate() {
            let (quad, byte) = (k / QUAD, column % LANES * QUAD + k % QUAD);
            if bits == 8 {
                lines[quad].0[byte] = code;
                continue;
            }
            lines[quad % 4].0[byte] |= (code & 15) << (quad / 4 * 4);
            match bits {
                5 => lines[4].0[byte] |= (code >> 4) << quad,
                6 => lines[4 + quad / 4].0[byte] |= (code >> 4) << (quad % 4 * 2),
                _ => {}
            }
        }
    }
}
