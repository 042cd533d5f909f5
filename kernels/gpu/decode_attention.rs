//! Attention of single rows over paged KV, split over runs of visible keys.
//!
//! The formula is that of [`crate::PagedAttention`]: the query turns to `position - delta` for
//! each run of entries, scores are per key, splits merge in ascending order. Query and weights are
//! rounded to the cache's type for the products, which accumulate in f32.
//!
//! A row's bits depend on its query, its keys and the plan's split alone: neither on other rows
//! nor on how keys lie in blocks.

use super::{AttentionOperands, Gpu, Launch, Slice, SplitPlan};
use crate::error::Error;

const OP: &str = "decode_attention";
/// Threads of a block: eight warps share the keys of a split.
const BLOCK: u32 = 256;
/// Query heads a block takes, all of one KV head: the width of a matrix instruction.
const HEADS: usize = 8;

/// out = attention of q over the tables' keys.
pub struct DecodeAttention<'a> {
    pub operands: AttentionOperands<'a>,
    /// u32 per row: which table is its own; `None`: row i has table i.
    pub row_sequence: Option<&'a Slice>,
    /// Filled for these rows and this layer's window.
    pub plan: &'a SplitPlan,
    pub rows: usize,
    /// As given to the plan.
    pub max_keys: usize,
}

impl DecodeAttention<'_> {
    /// # Errors
    /// Shapes there is no kernel for, operands that are too short, more splits than there is room
    /// for. Table rows outside the cache are not read: they make their row NaN.
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        let AttentionOperands { tables, rotary, partials, out, shape, .. } = &self.operands;
        let rows = self.rows;
        shape.check(OP)?;
        let items = self.plan.check(OP, rows, self.max_keys)?;
        let ([q, k, v, positions], max_position) = self.operands.check(OP, rows)?;
        partials.check(OP, items, shape)?;
        let count = if self.row_sequence.is_some() { 0 } else { rows };
        let [entries, starts, num_entries, num_keys] = tables.addresses(OP, count)?;
        let sequences = match self.row_sequence {
            Some(slice) => slice.operand((OP, "row_sequence"), rows, 4, 4)?,
            None => 0,
        };
        let groups = (shape.num_heads / shape.kv_heads).div_ceil(HEADS) * shape.kv_heads;
        let ([plan_items, plan_starts], [stats, outs]) = (self.plan.slices(), partials.slices());
        let [cos, sin] = rotary.slices();
        let args = [
            q,
            k,
            v,
            entries,
            starts,
            num_entries,
            num_keys,
            sequences,
            positions,
            cos.address(),
            sin.address(),
            max_position,
            plan_items.address(),
            plan_starts.address(),
            stats.address(),
            outs.address(),
            rows as u64,
            shape.num_heads as u64,
            shape.kv_heads as u64,
            shape.q_stride as u64,
            shape.slots as u64,
            u64::from(self.plan.split()),
            shape.window(),
            shape.scale(),
            shape.cap(),
        ];
        let kernel = format!("decode_attention_{}_{}", shape.float.suffix(), shape.head_dim);
        let blocks = (items * groups).min(gpu.multiprocessors() as usize * 16);
        let shared = shared_bytes(shape.head_dim, self.plan.split() as usize);
        let grid = [blocks as u32, 1, 1];
        let launch = Launch { kernel: &kernel, grid, block: BLOCK, shared, args: &args };
        let mut slices = self.operands.read();
        slices.extend(self.row_sequence);
        slices.extend([&plan_items, &plan_starts, &stats, &outs, &cos, &sin]);
        // SAFETY: the kernel's arguments, as long as it reads and writes them; it checks rows of
        // the cache and positions against `slots` and the rotations.
        unsafe { gpu.launch(&launch, &slices)? };
        partials.merge(gpu, (Some(&plan_starts), 0), out, rows, shape)
    }
}

/// As `decode_attention.cu` lays its shared memory out.
fn shared_bytes(head_dim: usize, split: usize) -> u32 {
    let warps = BLOCK as usize / 32;
    let q = HEADS * head_dim * 4;
    let keys = split * 8;
    let weights = HEADS * (split + 8) * 4;
    let reduce = warps * HEADS * (head_dim + 1) * 4;
    let ahead = if head_dim > 128 { 1 } else { 2 };
    let words = (2 * head_dim.div_ceil(32)).max(4 * head_dim.div_ceil(64));
    let tiles = warps * ahead * words * 32 * 16;
    // The reduction over warps happens when tiles are read no more.
    (q + keys + weights + tiles.max(reduce) + HEADS * 8 + 16) as u32
}
