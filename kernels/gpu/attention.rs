//! What both attention kernels take: shapes, rotations, tables, and room for parts of results.

use super::{Buffer, Float, Gpu, Launch, Slice};
use crate::error::Error;
use crate::rope::RotaryTable;

/// Widths of heads there are kernels for.
const HEAD_DIMS: [usize; 6] = [16, 32, 64, 96, 128, 256];

/// Rows of a launch: what a grid has of blocks in its second direction.
pub(super) const MAX_ROWS: usize = 65_535;

/// The numbers of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    pub num_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Rows the caches have room for: blocks x block size.
    pub slots: usize,
    /// Values from one row of q to the next, at least num_heads * head_dim.
    pub q_stride: usize,
    pub scale: f32,
    pub sliding_window: Option<u32>,
    pub soft_cap: Option<f32>,
    /// Of q, of K and V and of the result.
    pub float: Float,
}

impl AttentionShape {
    /// Values of a row of K or V.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Refuses what there is no kernel for.
    pub fn check(&self, op: &'static str) -> Result<(), Error> {
        if !HEAD_DIMS.contains(&self.head_dim) {
            let expected = format!("one of {HEAD_DIMS:?} on a GPU");
            return Err(Error::value(op, "head_dim", self.head_dim, expected));
        }
        if self.kv_heads == 0
            || self.num_heads == 0
            || !self.num_heads.is_multiple_of(self.kv_heads)
        {
            let expected = format!("a multiple of the {} KV heads", self.kv_heads);
            return Err(Error::value(op, "num_heads", self.num_heads, expected));
        }
        let width = self.num_heads * self.head_dim;
        if self.q_stride < width || !self.q_stride.is_multiple_of(8) {
            let expected = format!("a multiple of 8 and at least {width}");
            return Err(Error::value(op, "q_stride", self.q_stride, expected));
        }
        if self.sliding_window == Some(0) {
            return Err(Error::value(op, "sliding_window", 0, "at least 1"));
        }
        if u32::try_from(self.slots).is_err() {
            return Err(Error::value(op, "the cache's rows", self.slots, "below 2^32"));
        }
        Ok(())
    }

    /// Values of q up to the end of the last of `rows`.
    pub(super) fn q_len(&self, rows: usize) -> usize {
        match rows {
            0 => 0,
            rows => (rows - 1) * self.q_stride + self.num_heads * self.head_dim,
        }
    }

    /// As kernels take it: 0 is none.
    pub(super) fn window(&self) -> u64 {
        self.sliding_window.map_or(0, u64::from)
    }

    /// As kernels take it: 0 is none.
    pub(super) fn cap(&self) -> u64 {
        word(self.soft_cap.unwrap_or(0.0))
    }

    pub(super) fn scale(&self) -> u64 {
        word(self.scale)
    }
}

/// What both attention kernels read, and where the result goes.
#[derive(Clone, Copy)]
pub struct AttentionOperands<'a> {
    /// (rows, num_heads * head_dim with `shape.q_stride`), normed but not rotated.
    pub q: &'a Slice,
    /// (slots, kv_heads, head_dim)
    pub k_cache: &'a Slice,
    pub v_cache: &'a Slice,
    pub tables: &'a Tables,
    /// u32 per row: how many keys of its view come before its own.
    pub positions: &'a Slice,
    pub rotary: &'a Rotary,
    /// Room for parts of results.
    pub partials: &'a Partials,
    /// (rows, num_heads * head_dim), contiguous.
    pub out: &'a Slice,
    pub shape: AttentionShape,
}

impl AttentionOperands<'_> {
    /// Refuses what there is no kernel for, and operands too short for rows before `rows`; else
    /// the addresses of q, K, V and the positions, and the positions there are rotations for.
    pub(super) fn check(&self, op: &'static str, rows: usize) -> Result<([u64; 4], u64), Error> {
        let shape = &self.shape;
        shape.check(op)?;
        let max_position = self.rotary.check(op, shape.head_dim)?;
        let cache = shape.slots * shape.kv_width();
        let addresses = [
            self.q.operand((op, "q"), shape.q_len(rows), Float::SIZE, 16)?,
            self.k_cache.operand((op, "the K cache"), cache, Float::SIZE, 16)?,
            self.v_cache.operand((op, "the V cache"), cache, Float::SIZE, 16)?,
            self.positions.operand((op, "positions"), rows, 4, 4)?,
        ];
        Ok((addresses, max_position))
    }

    /// All that is read.
    pub(super) fn read(&self) -> Vec<&Slice> {
        let mut slices = vec![self.q, self.k_cache, self.v_cache, self.positions];
        slices.extend(self.tables.slices());
        slices
    }
}

/// A number as an argument of a kernel.
pub(super) fn word(x: f32) -> u64 {
    u64::from(x.to_bits())
}

/// The rotations of every position on a device.
pub struct Rotary {
    cos: Buffer,
    sin: Buffer,
    positions: u32,
    head_dim: usize,
}

impl Rotary {
    pub fn new(gpu: &Gpu, table: &RotaryTable) -> Result<Self, Error> {
        let (cos, sin) = table.values();
        Ok(Self {
            cos: gpu.uploaded_floats(cos)?,
            sin: gpu.uploaded_floats(sin)?,
            positions: u32::try_from(table.max_position()).unwrap_or(u32::MAX),
            head_dim: table.head_dim(),
        })
    }

    pub(super) fn slices(&self) -> [Slice; 2] {
        [self.cos.all(), self.sin.all()]
    }

    pub(super) fn check(&self, op: &'static str, head_dim: usize) -> Result<u64, Error> {
        if self.head_dim != head_dim {
            let expected = format!("the heads' {head_dim}");
            return Err(Error::value(op, "the rotary width", self.head_dim, expected));
        }
        Ok(u64::from(self.positions))
    }
}

/// The filtered tables of a batch's sequences, as `FilterView` writes them.
#[derive(Clone)]
pub struct Tables {
    /// 16 bytes each: row u32, first u32, delta i32, num_valid u32, at the places of their pages.
    pub entries: Slice,
    /// u32 per sequence: its first entry.
    pub starts: Slice,
    /// u32 per sequence: how many entries it has.
    pub num_entries: Slice,
    /// u32 per sequence: how many keys are visible in all.
    pub num_keys: Slice,
}

impl Tables {
    /// The tables from sequence `sequence` on.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn at(&self, sequence: usize) -> Self {
        Self {
            entries: self.entries.clone(),
            starts: self.starts.at(4 * sequence),
            num_entries: self.num_entries.at(4 * sequence),
            num_keys: self.num_keys.at(4 * sequence),
        }
    }

    pub(super) fn addresses(&self, op: &'static str, count: usize) -> Result<[u64; 4], Error> {
        Ok([
            self.entries.operand((op, "entries"), 0, 16, 16)?,
            self.starts.operand((op, "starts"), count, 4, 4)?,
            self.num_entries.operand((op, "num_entries"), count, 4, 4)?,
            self.num_keys.operand((op, "num_keys"), count, 4, 4)?,
        ])
    }

    pub(super) fn slices(&self) -> [&Slice; 4] {
        [&self.entries, &self.starts, &self.num_entries, &self.num_keys]
    }
}

/// Room for what splits of rows come to before they are merged: for each of `items`
/// (row, split) and each head the maximum, the sum and `head_dim` values, f32.
pub struct Partials {
    stats: Buffer,
    outs: Buffer,
    items: usize,
    num_heads: usize,
    head_dim: usize,
}

impl Partials {
    pub fn new(gpu: &Gpu, items: usize, num_heads: usize, head_dim: usize) -> Result<Self, Error> {
        let stats = gpu.alloc(items * num_heads * 8)?;
        let outs = gpu.alloc(items * num_heads * head_dim * 4)?;
        Ok(Self { stats, outs, items, num_heads, head_dim })
    }

    /// Bytes that [`Partials::new`] takes.
    pub fn bytes(items: usize, num_heads: usize, head_dim: usize) -> usize {
        items * num_heads * (8 + 4 * head_dim)
    }

    pub fn items(&self) -> usize {
        self.items
    }

    pub(super) fn slices(&self) -> [Slice; 2] {
        [self.stats.all(), self.outs.all()]
    }

    /// Refuses more `items` than there is room for.
    pub(super) fn check(
        &self,
        op: &'static str,
        items: usize,
        shape: &AttentionShape,
    ) -> Result<(), Error> {
        let room = self.items * self.num_heads * self.head_dim.min(shape.head_dim);
        if items > self.items || items * shape.num_heads * shape.head_dim > room {
            let expected = format!("at most {}, the room for partial results", self.items);
            return Err(Error::value(op, "the number of (row, split) items", items, expected));
        }
        Ok(())
    }

    /// Row r's partial results are items `starts[r]..starts[r + 1]`, or `stride` from
    /// `r * stride` on without `starts`. They are merged in ascending order into
    /// out (rows, num_heads * head_dim); a row without any is zeros.
    pub(super) fn merge(
        &self,
        gpu: &Gpu,
        (starts, stride): (Option<&Slice>, u32),
        out: &Slice,
        rows: usize,
        shape: &AttentionShape,
    ) -> Result<(), Error> {
        const OP: &str = "merge_partials";
        let width = shape.num_heads * shape.head_dim;
        let address = out.operand((OP, "out"), rows * width, Float::SIZE, 4)?;
        let starts_at = match starts {
            Some(starts) => starts.operand((OP, "starts"), rows + 1, 4, 4)?,
            None => 0,
        };
        let kernel = format!("merge_partials_{}", shape.float.suffix());
        let [stats, outs] = self.slices();
        let args = [
            stats.address(),
            outs.address(),
            starts_at,
            u64::from(stride),
            address,
            shape.num_heads as u64,
            shape.head_dim as u64,
        ];
        let grid = [shape.num_heads as u32, rows as u32, 1];
        let block = shape.head_dim.max(32) as u32;
        let launch = Launch { kernel: &kernel, grid, block, shared: 0, args: &args };
        // SAFETY: the kernel's arguments; it reads items that were counted when they were written.
        unsafe { gpu.launch(&launch, &[&stats, &outs, out, starts.unwrap_or(out)]) }
    }
}

/// The splits of rows that decode attention works on, listed on the device once per step and
/// sliding window: a captured step needs no numbers of the host.
pub struct SplitPlan {
    /// Four u32 each: row, split, its first entry, and one that is unused.
    items: Buffer,
    /// u32: the first item of each row, and the number of items.
    starts: Buffer,
    max_rows: usize,
    max_items: usize,
    split: u32,
}

impl SplitPlan {
    /// For up to `max_rows` rows with `max_items` splits of `split` keys in all. 512 keys are the
    /// contract of the deterministic mode.
    ///
    /// # Errors
    /// If `split` is not 64, 128, 256 or 512.
    pub fn new(gpu: &Gpu, max_rows: usize, max_items: usize, split: u32) -> Result<Self, Error> {
        if !matches!(split, 64 | 128 | 256 | 512) {
            return Err(Error::value("split_plan", "split", split, "64, 128, 256 or 512"));
        }
        let items = gpu.alloc(max_items.max(1) * 16)?;
        let starts = gpu.alloc((max_rows + 1) * 4)?;
        Ok(Self { items, starts, max_rows, max_items, split })
    }

    pub fn split(&self) -> u32 {
        self.split
    }

    /// How many items `rows` rows with at most `max_keys` visible keys may have.
    pub fn items_for(&self, rows: usize, max_keys: usize) -> usize {
        rows * max_keys.div_ceil(self.split as usize)
    }

    pub(super) fn slices(&self) -> [Slice; 2] {
        [self.items.all(), self.starts.all()]
    }

    pub(super) fn check(
        &self,
        op: &'static str,
        rows: usize,
        max_keys: usize,
    ) -> Result<usize, Error> {
        if rows > self.max_rows {
            let expected = format!("at most the plan's {}", self.max_rows);
            return Err(Error::value(op, "the number of rows", rows, expected));
        }
        if rows > MAX_ROWS {
            let expected = format!("at most {MAX_ROWS}");
            return Err(Error::value(op, "the number of rows", rows, expected));
        }
        let items = self.items_for(rows, max_keys);
        if items > self.max_items {
            let expected = format!("at most the plan's {}", self.max_items);
            return Err(Error::value(op, "the number of (row, split) items", items, expected));
        }
        Ok(items)
    }

    /// Lists the splits of `rows` rows. Row i belongs to sequence `row_sequence[i]` (u32), or i,
    /// and stands at `positions[i]` (u32): it sees the keys `[first, min(position + 1, keys))`,
    /// `first` being 0 or, with a window w, max(0, position + 1 - w).
    ///
    /// `max_keys` is a bound on the keys any of them sees, promised by the caller: rows that see
    /// more are cut off there.
    pub fn fill(
        &self,
        gpu: &Gpu,
        tables: &Tables,
        (row_sequence, positions): (Option<&Slice>, &Slice),
        (rows, max_keys): (usize, usize),
        sliding_window: Option<u32>,
    ) -> Result<(), Error> {
        const OP: &str = "split_plan";
        self.check(OP, rows, max_keys)?;
        let sequences = match row_sequence {
            Some(slice) => slice.operand((OP, "row_sequence"), rows, 4, 4)?,
            None => 0,
        };
        let count = if row_sequence.is_some() { 0 } else { rows };
        let [entries, table_starts, num_entries, num_keys] = tables.addresses(OP, count)?;
        let positions_at = positions.operand((OP, "positions"), rows, 4, 4)?;
        let [items, starts] = self.slices();
        let (items_at, starts_at) = (items.address(), starts.address());
        let (split, window) = (u64::from(self.split), sliding_window.map_or(0, u64::from));
        let max_splits = max_keys.div_ceil(self.split as usize);
        let row_sequence = row_sequence.unwrap_or(positions);
        let mut slices = vec![row_sequence, positions, &items, &starts];
        slices.extend(tables.slices());
        let args = [
            sequences,
            positions_at,
            num_keys,
            items_at,
            starts_at,
            rows as u64,
            max_splits as u64,
            split,
            window,
        ];
        let launch =
            Launch { kernel: "split_plan", grid: [1, 1, 1], block: 1024, shared: 128, args: &args };
        // SAFETY: the kernel's arguments; a row writes at most `max_splits` items, for which
        // there is room.
        unsafe { gpu.launch(&launch, &slices)? };
        let args = [
            sequences,
            positions_at,
            entries,
            table_starts,
            num_entries,
            num_keys,
            items_at,
            starts_at,
            rows as u64,
            split,
            window,
        ];
        let blocks = (rows * max_splits).div_ceil(128).min(gpu.multiprocessors() as usize * 4);
        let grid = [blocks as u32, 1, 1];
        let launch = Launch { kernel: "split_entries", grid, block: 128, shared: 0, args: &args };
        // SAFETY: the kernel's arguments; it reads and writes the items of the launch before.
        unsafe { gpu.launch(&launch, &slices) }
    }
}
