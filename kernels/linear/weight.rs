//! A weight matrix as products read it.

use crate::dtype::{Element, WeightDtype};
use crate::math::round_to_bf16;
use crate::pages::prefer_large_pages;
use crate::quantized::{BlockFormat, Panels};
use crate::simd::Bf16Pair;
use crate::threads::Threads;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Mutex;

/// Output features of a tile.
pub(crate) const TILE: usize = 32;

/// Weights of one k, or pair of them, for a tile: a cache line or two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Columns<E>(pub(crate) [E; TILE]);

pub(super) enum Tiles {
    F32(Vec<Columns<f32>>),
    F16(Vec<Columns<f16>>),
    Bf16(Vec<Columns<bf16>>),
    Bf16Pairs(Vec<Columns<Bf16Pair>>),
    /// In integers; see `quantized.rs`.
    Quantized(Vec<Panels>),
}

/// A weight matrix (out_features, in_features) in tiles. The last one is filled with zeros.
pub struct PackedWeight {
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) tiles: Tiles,
}

impl PackedWeight {
    /// `rows(range, out)` fills `out` with the f32 values of those output rows, row-major
    /// (`range.len()` x `in_features`). It is called in parallel for strips of at most 32 rows,
    /// each row once; `out` is zeroed. The first error ends the packing.
    pub fn pack<E: Send>(
        out_features: usize,
        in_features: usize,
        dtype: WeightDtype,
        threads: &Threads,
        rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let size = (out_features, in_features);
        let tiles = match dtype {
            WeightDtype::F32 => Tiles::F32(pack(size, threads, rows)?),
            // what doesn't come in blocks is no smaller in them
            WeightDtype::F16 | WeightDtype::Quantized => Tiles::F16(pack(size, threads, rows)?),
            WeightDtype::Bf16 if threads.isa().has_bf16_pairs() => {
                Tiles::Bf16Pairs(pack(size, threads, rows)?)
            }
            WeightDtype::Bf16 => Tiles::Bf16(pack(size, threads, rows)?),
        };
        Ok(Self { out_features, in_features, tiles })
    }

    /// Rows in blocks as they are stored: `parts` are a format and how many rows it has, one below
    /// the other; `read(row, bytes)` fills in the bytes of a row. In parallel, each row once; the
    /// first error ends the packing.
    pub fn pack_blocks<E: Send>(
        parts: &[(BlockFormat, usize)],
        in_features: usize,
        threads: &Threads,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut panels = Vec::with_capacity(parts.len());
        let mut rows = 0;
        for &(format, count) in parts.iter().filter(|(_, count)| *count > 0) {
            let range = rows..rows + count;
            panels.push(Panels::pack(format, range, in_features, threads, &read)?);
            rows += count;
        }
        Ok(Self { out_features: rows, in_features, tiles: Tiles::Quantized(panels) })
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn dtype(&self) -> WeightDtype {
        match self.tiles {
            Tiles::F32(_) => WeightDtype::F32,
            Tiles::F16(_) => WeightDtype::F16,
            Tiles::Bf16(_) | Tiles::Bf16Pairs(_) => WeightDtype::Bf16,
            Tiles::Quantized(_) => WeightDtype::Quantized,
        }
    }

    /// Memory the tiles take.
    pub fn bytes(&self) -> usize {
        match &self.tiles {
            Tiles::F32(tiles) => size_of_val(&tiles[..]),
            Tiles::F16(tiles) => size_of_val(&tiles[..]),
            Tiles::Bf16(tiles) => size_of_val(&tiles[..]),
            Tiles::Bf16Pairs(tiles) => size_of_val(&tiles[..]),
            Tiles::Quantized(panels) => panels.iter().map(Panels::bytes).sum(),
        }
    }

    /// The weight of output feature `row` for input `k`.
    pub(crate) fn value(&self, row: usize, k: usize) -> f32 {
        let (line, column) = (row / TILE * self.in_features + k, row % TILE);
        match &self.tiles {
            Tiles::F32(tiles) => tiles[line].0[column],
            Tiles::F16(tiles) => tiles[line].0[column].widen(),
            Tiles::Bf16(tiles) => tiles[line].0[column].widen(),
            Tiles::Bf16Pairs(tiles) => {
                let line = row / TILE * self.in_features.div_ceil(2) + k / 2;
                tiles[line].0[column].numbers()[k % 2]
            }
            Tiles::Quantized(panels) => {
                let holds = |panels: &&Panels| panels.rows.contains(&row);
                panels.iter().find(holds).expect("a row of the matrix").value(row, k)
            }
        }
    }
}

/// What a line of a tile has of a column.
pub(super) trait Cell: Copy + Default + Send + Sync {
    /// Inputs it is of.
    const INPUTS: usize;
    /// Of as many numbers, or of fewer at the end.
    fn of(x: &[f32]) -> Self;
}

impl<E: Element> Cell for E {
    const INPUTS: usize = 1;
    fn of(x: &[f32]) -> Self {
        E::narrow(x[0])
    }
}

impl Cell for Bf16Pair {
    const INPUTS: usize = 2;
    fn of(x: &[f32]) -> Self {
        let second = x.get(1).map_or(0.0, |x| round_to_bf16(*x));
        Bf16Pair::new(round_to_bf16(x[0]), second)
    }
}

pub(super) fn pack<T: Cell, E: Send>(
    (out_features, in_features): (usize, usize),
    threads: &Threads,
    rows: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<Vec<Columns<T>>, E> {
    let lines_per_tile = in_features.div_ceil(T::INPUTS);
    let lines = out_features.div_ceil(TILE) * lines_per_tile;
    let mut tiles = Vec::with_capacity(lines);
    prefer_large_pages(tiles.spare_capacity_mut());
    tiles.resize(lines, Columns([T::default(); TILE]));
    let failure = Mutex::new(None);
    let failed = || failure.lock().expect("nothing panics under this lock").is_some();
    threads.for_each_chunk(&mut tiles, lines_per_tile, |tile, lines| {
        if failed() {
            return;
        }
        let range = tile * TILE..out_features.min((tile + 1) * TILE);
        let mut values = vec![0f32; range.len() * in_features];
        if let Err(error) = rows(range, &mut values) {
            failure.lock().expect("nothing panics under this lock").get_or_insert(error);
            return;
        }
        for (column, row) in values.chunks_exact(in_features).enumerate() {
            for (line, values) in lines.iter_mut().zip(row.chunks(T::INPUTS)) {
                line.0[column] = T::of(values);
            }
        }
    });
    match failure.into_inner().expect("nothing panics under this lock") {
        Some(error) => Err(error),
        None => Ok(tiles),
    }
}
