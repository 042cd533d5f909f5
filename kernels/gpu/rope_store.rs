//! Between the fused product and attention, in one pass: norms per head, rotation, KV write.

use super::attention::{MAX_ROWS, word};
use super::{AttentionShape, Float, Gpu, Launch, Rotary, Slice};
use crate::error::Error;

/// qkv (rows, stride) holds per row num_heads heads of q, kv_heads of k and as many of v, side by
/// side; the stride is `shape.q_stride`.
///
/// - q is normed in place, not rotated: the query turns in attention;
/// - k is normed, rotated to `stored_positions` and stored; v is stored. Row r goes to cache row
///   `slot_mapping[r]`; a slot past the cache stores nothing, as rows of padding want it. Two rows
///   for one slot: any of them stays.
pub struct RopeStore<'a> {
    pub qkv: &'a Slice,
    /// Weights (head_dim) f32 of q's and k's norms, and their eps.
    pub qk_norm: Option<(&'a Slice, &'a Slice, f32)>,
    pub rotary: &'a Rotary,
    /// u32 per row; past the rotations: the key is NaN.
    pub stored_positions: &'a Slice,
    /// u32 per row.
    pub slot_mapping: &'a Slice,
    /// (slots, kv_heads, head_dim)
    pub k_cache: &'a Slice,
    pub v_cache: &'a Slice,
    pub shape: AttentionShape,
    pub rows: usize,
}

impl RopeStore<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "rope_store";
        let (shape, rows) = (&self.shape, self.rows);
        shape.check(OP)?;
        let width = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim;
        if shape.q_stride < width {
            let expected = format!("at least {width}: q, k and v side by side");
            return Err(Error::value(OP, "q_stride", shape.q_stride, expected));
        }
        if rows > MAX_ROWS {
            let expected = format!("at most {MAX_ROWS}");
            return Err(Error::value(OP, "the number of rows", rows, expected));
        }
        let positions = self.rotary.check(OP, shape.head_dim)?;
        let values = rows.checked_sub(1).map_or(0, |before| before * shape.q_stride + width);
        let cache = shape.slots * shape.kv_width();
        let norms = match self.qk_norm {
            Some((q, k, _)) => [
                q.operand((OP, "q_norm"), shape.head_dim, 4, 4)?,
                k.operand((OP, "k_norm"), shape.head_dim, 4, 4)?,
            ],
            None => [0, 0],
        };
        let [cos, sin] = self.rotary.slices();
        let args = [
            self.qkv.operand((OP, "qkv"), values, Float::SIZE, 4)?,
            norms[0],
            norms[1],
            word(self.qk_norm.map_or(0.0, |(_, _, eps)| eps)),
            cos.address(),
            sin.address(),
            positions,
            self.stored_positions.operand((OP, "stored_positions"), rows, 4, 4)?,
            self.slot_mapping.operand((OP, "slot_mapping"), rows, 4, 4)?,
            self.k_cache.operand((OP, "the K cache"), cache, Float::SIZE, 4)?,
            self.v_cache.operand((OP, "the V cache"), cache, Float::SIZE, 4)?,
            shape.slots as u64,
            shape.num_heads as u64,
            shape.kv_heads as u64,
            shape.head_dim as u64,
            shape.q_stride as u64,
        ];
        let kernel = format!("rope_store_{}", shape.float.suffix());
        // A warp takes a head, a block four of them.
        let heads = shape.num_heads + 2 * shape.kv_heads;
        let grid = [heads.div_ceil(4) as u32, rows as u32, 1];
        let launch = Launch { kernel: &kernel, grid, block: 128, shared: 0, args: &args };
        let (q, k) = self.qk_norm.map_or((self.qkv, self.qkv), |(q, k, _)| (q, k));
        let (positions, slots) = (self.stored_positions, self.slot_mapping);
        let slices = [self.qkv, q, k, &cos, &sin, positions, slots, self.k_cache, self.v_cache];
        // SAFETY: the kernel's arguments, each as long as it reads or writes; it checks slots and
        // positions against the numbers given.
        unsafe { gpu.launch(&launch, &slices) }
    }
}
