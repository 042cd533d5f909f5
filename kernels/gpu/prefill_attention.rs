//! Attention of many rows of a sequence over paged KV: tiles of rows against tiles of keys.
//!
//! The formula is that of [`crate::PagedAttention`] with a running maximum (Dao,
//! "FlashAttention-2", 2023) instead of splits. The query turns to each run of equal delta; tiles
//! of keys end where a run ends. For the deterministic mode there is [`super::DecodeAttention`],
//! which takes any rows.

use super::attention::MAX_ROWS;
use super::{AttentionShape, Float, Gpu, Launch, Partials, Rotary, Slice, Tables};
use crate::error::Error;

const OP: &str = "prefill_attention";
/// Keys of a tile; parts of the key range are multiples of it.
const KEYS: usize = 64;
/// Parts the key range is cut in at most.
const MAX_PARTS: usize = 32;
const BLOCK: u32 = 128;

/// out (.., num_heads * head_dim), contiguous = attention of the sequences' rows of q.
pub struct PrefillAttention<'a> {
    /// (.., num_heads * head_dim with `shape.q_stride`), normed but not rotated.
    pub q: &'a Slice,
    /// (slots, kv_heads, head_dim)
    pub k_cache: &'a Slice,
    pub v_cache: &'a Slice,
    /// Of these sequences.
    pub tables: &'a Tables,
    /// u32: sequence i has the rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]` of q, positions and out.
    pub cu_seqlens_q: &'a Slice,
    /// u32 per row of q: how many keys of its view come before its own.
    pub positions: &'a Slice,
    pub rotary: &'a Rotary,
    /// Room for parts of results; with few rows over many keys, more blocks can work.
    pub partials: &'a Partials,
    pub out: &'a Slice,
    pub shape: AttentionShape,
    pub num_sequences: usize,
    /// The rows of all these sequences, `[first, first + count)`.
    pub rows: (usize, usize),
    /// Of the longest of these sequences.
    pub max_rows: usize,
    /// A bound on the keys any of them sees.
    pub max_keys: usize,
}

impl PrefillAttention<'_> {
    /// # Errors
    /// Shapes there is no kernel for, operands that are too short.
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        let (shape, (first, count)) = (&self.shape, self.rows);
        shape.check(OP)?;
        if count == 0 || self.num_sequences == 0 {
            return Ok(());
        }
        if self.num_sequences > 65_535 {
            let found = self.num_sequences;
            return Err(Error::value(OP, "the number of sequences", found, "at most 65535"));
        }
        let rows = first + count;
        let positions = self.rotary.check(OP, shape.head_dim)?;
        let cache = shape.slots * shape.kv_width();
        let [entries, starts, num_entries, num_keys] =
            self.tables.addresses(OP, self.num_sequences)?;
        let width = shape.num_heads * shape.head_dim;
        let tiles =
            (self.max_rows * (shape.num_heads / shape.kv_heads)).div_ceil(pairs(shape.head_dim));
        let parts = self.parts(gpu, tiles);
        let part_keys = self.max_keys.div_ceil(parts).next_multiple_of(KEYS);
        let [stats, outs] = self.partials.slices();
        let [cos, sin] = self.rotary.slices();
        let args = [
            self.q.operand((OP, "q"), shape.q_len(rows), Float::SIZE, 16)?,
            self.k_cache.operand((OP, "the K cache"), cache, Float::SIZE, 16)?,
            self.v_cache.operand((OP, "the V cache"), cache, Float::SIZE, 16)?,
            entries,
            starts,
            num_entries,
            num_keys,
            self.cu_seqlens_q.operand((OP, "cu_seqlens_q"), self.num_sequences + 1, 4, 4)?,
            self.positions.operand((OP, "positions"), rows, 4, 4)?,
            cos.address(),
            sin.address(),
            positions,
            self.out.operand((OP, "out"), rows * width, Float::SIZE, 16)?,
            stats.address(),
            outs.address(),
            first as u64,
            rows as u64,
            shape.num_heads as u64,
            shape.kv_heads as u64,
            shape.q_stride as u64,
            shape.slots as u64,
            parts as u64,
            part_keys as u64,
            shape.window(),
            shape.scale(),
            shape.cap(),
        ];
        let kernel = format!("prefill_attention_{}_{}", shape.float.suffix(), shape.head_dim);
        let grid = [(tiles * parts) as u32, shape.kv_heads as u32, self.num_sequences as u32];
        let shared = shared_bytes(shape.head_dim);
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared, args: &args };
        let mut slices = vec![self.q, self.k_cache, self.v_cache, self.cu_seqlens_q];
        slices.extend(self.tables.slices());
        slices.extend([self.positions, self.out, &stats, &outs, &cos, &sin]);
        // SAFETY: the kernel's arguments, as long as it reads and writes them; it checks rows of
        // the cache and positions against `slots` and the rotations, and rows against `rows`.
        unsafe { gpu.launch(&launch, &slices)? };
        if parts == 1 {
            return Ok(());
        }
        let out = self.out.at(first * width * Float::SIZE);
        self.partials.merge(gpu, (None, parts as u32), &out, count, shape)
    }

    /// How many parts of the keys different blocks take: as many as fill the device twice, where
    /// tiles alone don't, and where there is room.
    fn parts(&self, gpu: &Gpu, tiles: usize) -> usize {
        let blocks = (tiles * self.shape.kv_heads * self.num_sequences).max(1);
        let wanted = (2 * gpu.multiprocessors() as usize).div_ceil(blocks);
        let useful = self.max_keys.div_ceil(4 * KEYS);
        let room = self.partials.items() / self.rows.1;
        let parts = wanted.min(useful).min(room).clamp(1, MAX_PARTS);
        let fits = self.rows.1 <= MAX_ROWS
            && self.partials.check(OP, parts * self.rows.1, &self.shape).is_ok();
        if fits { parts } else { 1 }
    }
}

/// (row, head) pairs of a tile: the heads that share K and V share tiles.
fn pairs(head_dim: usize) -> usize {
    if head_dim > 128 { 64 } else { 128 }
}

/// As `prefill_attention.cu` lays its shared memory out.
fn shared_bytes(head_dim: usize) -> u32 {
    let row = head_dim.next_power_of_two().max(64) * Float::SIZE;
    let list = if head_dim > 128 { 256 } else { 1024 };
    ((pairs(head_dim) + 2 * KEYS) * row + list * 8 + pairs(head_dim) * 8 + 32) as u32
}
