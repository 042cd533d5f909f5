//! Some groups of a tile of [`Panels`] as the product reads them: as they lie, or taken apart for
//! many rows.

use std::ops::Range;

use super::panels::{Line, Panels, QUADS};
use super::{BlockFormat, GROUP};
use crate::linear::{Columns, TILE};
use crate::simd::{IntSimd, LANES, Simd};

/// Some groups of a tile.
pub(super) struct Slab {
    pub tile: usize,
    pub groups: Range<usize>,
}

impl Slab {
    /// The first of its groups, counted from the first tile's.
    fn start(&self, panels: &Panels) -> usize {
        self.tile * (panels.inputs / GROUP) + self.groups.start
    }
}

/// A slab's vectors by the group: the codes of a quad, a scale, an offset, for 16 features each.
pub(super) trait Tile: Copy {
    /// Stretches of equal scale in a group.
    const PARTS: usize;
    const HAS_OFFSETS: bool;

    /// Asks for weights ahead of their use, across page borders, where the processor's own
    /// prefetching stops.
    fn ask_ahead<S: IntSimd>(self, s: S, group: usize);
    fn codes<S: IntSimd>(self, s: S, group: usize, half: usize, quad: usize) -> S::Bytes;
    fn scale<S: IntSimd>(self, s: S, group: usize, part: usize, half: usize) -> Lanes<S>;
    /// What is added to the weights of a group.
    fn offset<S: IntSimd>(self, s: S, group: usize, half: usize) -> Lanes<S>;
}

type Lanes<S> = <<S as IntSimd>::Float as Simd>::V;

/// A format as a type, by its place in [`BlockFormat::ALL`].
struct Format<const F: usize>;

impl<const F: usize> Format<F> {
    const FORMAT: BlockFormat = BlockFormat::ALL[F];
    /// Lines of a group and half.
    const LINES: usize = Self::FORMAT.bits();
    const PARTS: usize = GROUP / Self::FORMAT.scale_len();
}

/// A slab of a format as it lies.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a, const F: usize> {
    panels: &'a Panels,
    /// [`Slab::start`], and the codes of its groups.
    first: usize,
    codes: &'a [Line],
    ahead: Ahead,
}

impl<'a, const F: usize> Packed<'a, F> {
    #[inline(always)]
    pub fn new(panels: &'a Panels, slab: &Slab, ahead: Ahead) -> Self {
        let (first, each) = (slab.start(panels), 2 * Format::<F>::LINES);
        let codes = &panels.codes[first * each..][..slab.groups.len() * each];
        Self { panels, first, codes, ahead }
    }

    #[inline(always)]
    fn lines(self, group: usize, half: usize) -> &'a [Line] {
        &self.codes[(group * 2 + half) * Format::<F>::LINES..][..Format::<F>::LINES]
    }
}

impl<const F: usize> Tile for Packed<'_, F> {
    const PARTS: usize = Format::<F>::PARTS;
    const HAS_OFFSETS: bool = Format::<F>::FORMAT.has_offset();

    #[inline(always)]
    fn ask_ahead<S: IntSimd>(self, s: S, group: usize) {
        self.ahead.ask(s, group);
    }

    #[inline(always)]
    fn codes<S: IntSimd>(self, s: S, group: usize, half: usize, quad: usize) -> S::Bytes {
        let lines = self.lines(group, half);
        if Format::<F>::LINES == QUADS {
            return s.bytes(&lines[quad].0);
        }
        let low = s.field(s.bytes(&lines[quad % 4].0), (quad / 4 * 4) as u32, 15);
        match Format::<F>::LINES {
            5 => s.above(low, s.field(s.bytes(&lines[4].0), quad as u32, 1)),
            6 => {
                let high = s.bytes(&lines[4 + quad / 4].0);
                s.above(low, s.field(high, (quad % 4 * 2) as u32, 3))
            }
            _ => low,
        }
    }

    #[inline(always)]
    fn scale<S: IntSimd>(self, s: S, group: usize, part: usize, half: usize) -> Lanes<S> {
        let (f, format) = (s.float(), Format::<F>::FORMAT);
        let at = (self.first + group) * Self::PARTS + part;
        let block = at / (format.block_len() / format.scale_len());
        let scale = f.load_f16(half_of(&self.panels.scales[block].0, half));
        if !format.has_factors() {
            return scale;
        }
        let factors = half_of(&self.panels.factors[at], half);
        let is_signed = format as usize == BlockFormat::Q6K as usize;
        let factors = if is_signed { f.load_i8(factors) } else { f.load_u8(factors) };
        f.mul(scale, factors)
    }

    #[inline(always)]
    fn offset<S: IntSimd>(self, s: S, group: usize, half: usize) -> Lanes<S> {
        let (f, format) = (s.float(), Format::<F>::FORMAT);
        let at = self.first + group;
        let offset = &self.panels.offsets[at / (format.block_len() / GROUP)].0;
        let offset = f.load_f16(half_of(offset, half));
        if !format.has_factors() {
            return offset;
        }
        let factors = f.load_u8(half_of(&self.panels.offset_factors[at], half));
        f.sub(f.splat(0.0), f.mul(offset, factors))
    }
}

/// Memory for a slab taken apart: codes of eight bits, scales and offsets multiplied out.
#[derive(Default)]
pub(super) struct Buffer {
    /// [group][half][quad]
    codes: Vec<Line>,
    /// [group][part]
    scales: Vec<Columns<f32>>,
    /// [group]; may be empty.
    offsets: Vec<Columns<f32>>,
}

impl Buffer {
    /// Takes a slab apart. Where codes have eight bits they stay where they are.
    #[inline(always)]
    pub fn fill<S: IntSimd>(&mut self, s: S, panels: &Panels, slab: &Slab) {
        super::by_format!(panels.format, F, self.unpack::<S, F>(s, panels, slab));
    }

    #[inline(always)]
    fn unpack<S: IntSimd, const F: usize>(&mut self, s: S, panels: &Panels, slab: &Slab) {
        let (f, Self { codes, scales, offsets }) = (s.float(), self);
        let tile = Packed::<F>::new(panels, slab, Ahead::NOTHING);
        let groups = slab.groups.len();
        if Format::<F>::LINES != QUADS {
            unpack_codes(s, tile, groups, codes);
        }
        scales.clear();
        offsets.clear();
        for group in 0..groups {
            for part in 0..Packed::<F>::PARTS {
                let halves = [tile.scale(s, group, part, 0), tile.scale(s, group, part, 1)];
                scales.push(both(f, halves));
            }
            if Packed::<F>::HAS_OFFSETS {
                let halves = [tile.offset(s, group, 0), tile.offset(s, group, 1)];
                offsets.push(both(f, halves));
            }
        }
    }
}

#[inline(always)]
fn unpack_codes<S: IntSimd>(s: S, tile: impl Tile, groups: usize, codes: &mut Vec<Line>) {
    let lines = groups * 2 * QUADS;
    codes.clear();
    codes.reserve(lines);
    let halves = codes.spare_capacity_mut()[..lines].as_chunks_mut::<QUADS>().0;
    for (index, half) in halves.iter_mut().enumerate() {
        for (quad, line) in half.iter_mut().enumerate() {
            line.write(Line(s.to_array(tile.codes(s, index / 2, index % 2, quad))));
        }
    }
    // SAFETY: as many lines were just written.
    unsafe { codes.set_len(lines) };
}

/// A slab taken apart.
#[derive(Clone, Copy)]
pub(super) struct Unpacked<'a, const PARTS: usize, const HAS_OFFSETS: bool> {
    codes: &'a [[[Line; QUADS]; 2]],
    scales: &'a [[Columns<f32>; PARTS]],
    offsets: &'a [Columns<f32>],
    ahead: Ahead,
}

impl<'a, const PARTS: usize, const HAS_OFFSETS: bool> Unpacked<'a, PARTS, HAS_OFFSETS> {
    /// What [`Buffer::fill`] made of a slab.
    #[inline(always)]
    pub fn new(panels: &'a Panels, slab: &Slab, buffer: &'a Buffer, ahead: Ahead) -> Self {
        let codes = match panels.format.bits() {
            8 => &panels.codes[slab.start(panels) * 2 * QUADS..],
            _ => &buffer.codes[..],
        };
        let codes = codes.as_chunks::<QUADS>().0.as_chunks::<2>().0;
        let scales = buffer.scales.as_chunks::<PARTS>().0;
        Self { codes: &codes[..slab.groups.len()], scales, offsets: &buffer.offsets, ahead }
    }
}

impl<const PARTS: usize, const HAS_OFFSETS: bool> Tile for Unpacked<'_, PARTS, HAS_OFFSETS> {
    const PARTS: usize = PARTS;
    const HAS_OFFSETS: bool = HAS_OFFSETS;

    #[inline(always)]
    fn ask_ahead<S: IntSimd>(self, s: S, group: usize) {
        self.ahead.ask(s, group);
    }
    #[inline(always)]
    fn codes<S: IntSimd>(self, s: S, group: usize, half: usize, quad: usize) -> S::Bytes {
        s.bytes(&self.codes[group][half][quad].0)
    }
    #[inline(always)]
    fn scale<S: IntSimd>(self, s: S, group: usize, part: usize, half: usize) -> Lanes<S> {
        s.float().load(half_of(&self.scales[group][part].0, half))
    }
    #[inline(always)]
    fn offset<S: IntSimd>(self, s: S, group: usize, half: usize) -> Lanes<S> {
        s.float().load(half_of(&self.offsets[group].0, half))
    }
}

/// Which weights a block of rows asks for: some lines with every group.
///
/// A single block those some groups ahead. Of several blocks only the first would wait for a slab;
/// so that it need not, all ask for the next one, each for its stretch of it.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    first: *const Line,
    /// Lines with a group: one for use soon, or 2 to [`Ahead::MOST`].
    lines: usize,
    /// From the first line of a group to that of the next.
    step: usize,
    groups: usize,
}

impl Ahead {
    const MOST: usize = 8;
    /// Lines by which a single block asks ahead.
    const DISTANCE: usize = 64;
    const NOTHING: Self = Self { first: std::ptr::null(), lines: 0, step: 0, groups: 0 };

    /// For the first of `blocks` blocks.
    pub fn new(panels: &Panels, slab: &Slab, blocks: usize) -> Self {
        let (groups, step) = (slab.groups.len(), 2 * panels.format.bits());
        let at = |line: usize| panels.codes.as_ptr().wrapping_add(slab.start(panels) * step + line);
        if blocks == 1 {
            return Self { first: at(Self::DISTANCE), lines: 1, step, groups };
        }
        let stretch = (groups * step).div_ceil(blocks);
        let each = stretch.div_ceil(groups).clamp(2, Self::MOST);
        Self { first: at(groups * step), lines: each, step: each, groups: stretch.div_ceil(each) }
    }

    /// The stretch of a later block.
    #[inline(always)]
    pub fn of_block(self, index: usize) -> Self {
        Self { first: self.first.wrapping_add(index * self.groups * self.step), ..self }
    }

    #[inline(always)]
    fn ask<S: IntSimd>(self, s: S, group: usize) {
        if group >= self.groups {
            return;
        }
        let first = self.first.wrapping_add(group * self.step);
        if self.lines == 1 {
            s.prefetch(first);
            return;
        }
        // a loop of known length, which costs less than one that ends at `lines`
        for line in 0..Self::MOST {
            if line < self.lines {
                s.prefetch_far(first.wrapping_add(line));
            }
        }
    }
}

#[inline(always)]
fn both<S: Simd>(s: S, [a, b]: [S::V; 2]) -> Columns<f32> {
    let mut columns = Columns([0.0; TILE]);
    s.store(a, half_of_mut(&mut columns.0, 0));
    s.store(b, half_of_mut(&mut columns.0, 1));
    columns
}

#[inline(always)]
pub(super) fn half_of<E>(line: &[E; TILE], half: usize) -> &[E; LANES] {
    line[half * LANES..].first_chunk().expect("sixteen of a tile")
}

#[inline(always)]
pub(super) fn half_of_mut<E>(line: &mut [E; TILE], half: usize) -> &mut [E; LANES] {
    line[half * LANES..].first_chunk_mut().expect("sixteen of a tile")
}
