//! Attention of many rows of a sequence over paged KV: tiles of rows against tiles of keys.
//!
//! The formula is that of [`crate::PagedAttention`] with a running maximum (Dao,
//! "FlashAttention-2", 2023) instead of splits. The query turns to each run of equal delta; tiles
//! of keys end where a run ends. For the deterministic mode there is [`super::DecodeAttention`],
//! which takes any rows.

use super::attention::MAX_ROWS;
use super::{AttentionOperands, Float, Gpu, Launch, Slice};
use crate::error::Error;

const OP: &str = "prefill_attention";
/// Keys of a tile; parts of the key range are multiples of it.
const KEYS: usize = 64;
/// Parts the key range is cut in at most.
const MAX_PARTS: usize = 32;
const BLOCK: u32 = 128;

/// out = attention of the sequences' rows of q. With room in the partials more blocks can work,
/// where there are few rows over many keys.
pub struct PrefillAttention<'a> {
    /// The tables are those of these sequences, the rows are all there are.
    pub operands: AttentionOperands<'a>,
    /// u32: sequence i has the rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]` of q, positions and out.
    pub cu_seqlens_q: &'a Slice,
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
        let AttentionOperands { tables, rotary, partials, out, shape, .. } = &self.operands;
        let (first, count) = self.rows;
        let rows = first + count;
        let ([q, k, v, positions], max_position) = self.operands.check(OP, rows)?;
        if count == 0 || self.num_sequences == 0 {
            return Ok(());
        }
        if self.num_sequences > 65_535 {
            let found = self.num_sequences;
            return Err(Error::value(OP, "the number of sequences", found, "at most 65535"));
        }
        let [entries, starts, num_entries, num_keys] = tables.addresses(OP, self.num_sequences)?;
        let width = shape.num_heads * shape.head_dim;
        let row_tiles =
            (self.max_rows * (shape.num_heads / shape.kv_heads)).div_ceil(pairs(shape.head_dim));
        let parts = self.parts(gpu, row_tiles);
        let part_keys = self.max_keys.div_ceil(parts).next_multiple_of(KEYS);
        let [stats, outs] = partials.slices();
        let [cos, sin] = rotary.slices();
        let args = [
            q,
            k,
            v,
            entries,
            starts,
            num_entries,
            num_keys,
            self.cu_seqlens_q.operand((OP, "cu_seqlens_q"), self.num_sequences + 1, 4, 4)?,
            positions,
            cos.address(),
            sin.address(),
            max_position,
            out.operand((OP, "out"), rows * width, Float::SIZE, 16)?,
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
        let grid = [(row_tiles * parts) as u32, shape.kv_heads as u32, self.num_sequences as u32];
        let shared = shared_bytes(shape.head_dim);
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared, args: &args };
        let mut slices = self.operands.read();
        slices.extend([self.cu_seqlens_q, *out, &stats, &outs, &cos, &sin]);
        // SAFETY: the kernel's arguments, as long as it reads and writes them; it checks rows of
        // the cache and positions against `slots` and the rotations, and rows against `rows`.
        unsafe { gpu.launch(&launch, &slices)? };
        if parts == 1 {
            return Ok(());
        }
        let out = out.at(first * width * Float::SIZE);
        partials.merge(gpu, (None, parts as u32), &out, count, shape)
    }

    /// How many parts of the keys different blocks take: as many as fill the device twice, where
    /// tiles alone don't, and where there is room.
    fn parts(&self, gpu: &Gpu, tiles: usize) -> usize {
        let AttentionOperands { partials, shape, .. } = &self.operands;
        let blocks = (tiles * shape.kv_heads * self.num_sequences).max(1);
        let wanted = (2 * gpu.multiprocessors() as usize).div_ceil(blocks);
        let useful = self.max_keys.div_ceil(4 * KEYS);
        let room = partials.items() / self.rows.1;
        let parts = wanted.min(useful).min(room).clamp(1, MAX_PARTS);
        let fits =
            self.rows.1 <= MAX_ROWS && partials.check(OP, parts * self.rows.1, shape).is_ok();
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
