//! Rows of KV out of the pool and back, of any run of layers in one launch, bit for bit.

use super::{Gpu, Launch, Slice};
use crate::error::Error;

/// A pool of KV: `num_frames` frames, one for each (layer, K or V), layer 0's K, layer 0's V,
/// layer 1's K, ... Frame i starts at `i * frame_stride` bytes and has `slots` rows of `row_bytes`.
#[derive(Clone)]
pub struct KvFrames {
    pub pool: Slice,
    pub frame_stride: usize,
    pub num_frames: usize,
    pub slots: usize,
    /// A multiple of 16.
    pub row_bytes: usize,
}

impl KvFrames {
    fn check(&self, op: &'static str) -> Result<u64, Error> {
        let frame = self.slots * self.row_bytes;
        if !self.row_bytes.is_multiple_of(16) {
            return Err(Error::value(op, "row_bytes", self.row_bytes, "a multiple of 16"));
        }
        if self.frame_stride < frame || !self.frame_stride.is_multiple_of(16) {
            let expected = format!("a multiple of 16 and at least a frame's {frame}");
            return Err(Error::value(op, "frame_stride", self.frame_stride, expected));
        }
        let bytes = match self.num_frames {
            0 => 0,
            frames => (frames - 1) * self.frame_stride + frame,
        };
        self.pool.operand((op, "the pool"), bytes, 1, 16)
    }
}

/// Copies rows between the pool and `rows`, which holds frames `[first, first + count)`, one after
/// another, each with the rows in the order of `slots`.
pub struct MoveRows<'a> {
    pub frames: &'a KvFrames,
    /// First frame and number of frames.
    pub range: (usize, usize),
    /// u32 each; past the pool: zeros are gathered, nothing is scattered.
    pub slots: &'a Slice,
    pub num_slots: usize,
    pub rows: &'a Slice,
}

impl MoveRows<'_> {
    /// From the pool to `rows`.
    pub fn gather(&self, gpu: &Gpu) -> Result<(), Error> {
        self.launch(gpu, "gather_kv")
    }

    /// From `rows` to the pool. Two rows for one slot: any of them stays.
    pub fn scatter(&self, gpu: &Gpu) -> Result<(), Error> {
        self.launch(gpu, "scatter_kv")
    }

    fn launch(&self, gpu: &Gpu, op: &'static str) -> Result<(), Error> {
        let (first, count) = self.range;
        let frames = self.frames;
        let pool = frames.check(op)?;
        if first + count > frames.num_frames || count > 65_535 {
            let expected = format!("at most the pool's {}", frames.num_frames);
            return Err(Error::value(op, "the end of the frames", first + count, expected));
        }
        let bytes = count * self.num_slots * frames.row_bytes;
        let args = [
            pool,
            self.slots.operand((op, "slots"), self.num_slots, 4, 4)?,
            self.rows.operand((op, "rows"), bytes, 1, 16)?,
            first as u64,
            (frames.frame_stride / 16) as u64,
            frames.slots as u64,
            (frames.row_bytes / 16) as u64,
            self.num_slots as u64,
        ];
        let words = self.num_slots * (frames.row_bytes / 16);
        let grid = [words.div_ceil(256 * 4) as u32, count as u32, 1];
        let launch = Launch { kernel: op, grid, block: 256, shared: 0, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes; it checks slots.
        unsafe { gpu.launch(&launch, &[&frames.pool, self.slots, self.rows]) }
    }
}

/// Fills rows of all frames with NaN (of bf16 and of f16): what is read by mistake shows.
pub struct PoisonRows<'a> {
    pub frames: &'a KvFrames,
    /// u32 each; what is past the pool is left out.
    pub slots: &'a Slice,
    pub num_slots: usize,
}

impl PoisonRows<'_> {
    pub fn launch(&self, gpu: &Gpu) -> Result<(), Error> {
        const OP: &str = "poison_kv";
        let frames = self.frames;
        let args = [
            frames.check(OP)?,
            self.slots.operand((OP, "slots"), self.num_slots, 4, 4)?,
            (frames.frame_stride / 16) as u64,
            frames.slots as u64,
            (frames.row_bytes / 16) as u64,
            self.num_slots as u64,
        ];
        if frames.num_frames > 65_535 {
            return Err(Error::value(OP, "num_frames", frames.num_frames, "at most 65535"));
        }
        let words = self.num_slots * (frames.row_bytes / 16);
        let grid = [words.div_ceil(256 * 4) as u32, frames.num_frames as u32, 1];
        let launch = Launch { kernel: OP, grid, block: 256, shared: 0, args: &args };
        // SAFETY: the kernel's arguments, each as long as it reads or writes; it checks slots.
        unsafe { gpu.launch(&launch, &[&frames.pool, self.slots]) }
    }
}
