//! Memory of the KV pool on a GPU: one buffer, a frame for each (layer, K or V).
//!
//! Rows leave and enter on the copy stream, frame by frame, beside whatever is computed.

use std::sync::Arc;

use strand_kernels::gpu::{
    Buffer, Event, Gpu, HostBytes, KvFrames, MoveRows, Pinned, PoisonRows, Slice,
};
use strand_kernels::{Error, KvDtype};

use crate::kv_cache::KvCacheShape;

/// Frames start at multiples of this many bytes.
const ALIGNMENT: usize = 256;
/// Bytes of rows on their way that the device has room for at least.
const STAGE: usize = 32 << 20;
const WORD: usize = 4;

/// K and V of all layers; which block holds what is the engine's business.
pub struct GpuKvCache {
    gpu: Gpu,
    copies: Gpu,
    frames: KvFrames,
    pub block_size: usize,
    pub dtype: KvDtype,
    /// Rows on their way; and the slots they come from or go to, from the last move on.
    stage: Buffer,
    slots: Buffer,
    moving: Moving,
}

/// Moves on their way, which the compute stream has yet to wait for.
#[derive(Default)]
pub struct Moving {
    /// Behind all rows that leave: nothing may be written before.
    leaving: Option<Event>,
    /// Behind those that arrive, by layer, as far as there are some.
    arriving: Vec<Option<Event>>,
    /// Where those come from: to drop it before they have arrived is to wait for them.
    sources: Vec<Arc<Pinned>>,
}

impl Moving {
    /// Has `gpu` wait for a layer's rows on their way in, and before the first layer for all on
    /// their way out.
    pub fn settle_layer(&mut self, gpu: &Gpu, layer: usize) -> Result<(), Error> {
        let leaving = if layer == 0 { self.leaving.take() } else { None };
        let arriving = self.arriving.get_mut(layer).and_then(Option::take);
        leaving.iter().chain(&arriving).try_for_each(|event| gpu.wait(event))
    }

    /// The same for all layers. To be dropped when the work behind them is done.
    pub fn settle(&mut self, gpu: &Gpu) -> Result<(), Error> {
        (0..self.arriving.len().max(1)).try_for_each(|layer| self.settle_layer(gpu, layer))
    }
}

impl GpuKvCache {
    /// Zeroed memory; `dtype` is one a GPU computes with.
    pub fn new(gpu: &Gpu, shape: KvCacheShape, dtype: KvDtype) -> Result<Self, Error> {
        let slots = shape.num_blocks * shape.block_size;
        let row_bytes = shape.kv_heads * dtype.vector_bytes(shape.head_dim);
        let frame_stride = (slots * row_bytes).next_multiple_of(ALIGNMENT);
        let num_frames = 2 * shape.layers;
        let pool = gpu.zeros((num_frames * frame_stride).max(1))?.all();
        // rows may come by the other stream before the first step, and must not be zeroed again
        gpu.synchronize()?;
        Ok(Self {
            gpu: gpu.clone(),
            copies: gpu.copies(),
            frames: KvFrames { pool, frame_stride, num_frames, slots, row_bytes },
            block_size: shape.block_size,
            dtype,
            stage: gpu.alloc(STAGE)?,
            slots: gpu.alloc(WORD)?,
            moving: Moving::default(),
        })
    }

    pub fn num_frames(&self) -> usize {
        self.frames.num_frames
    }

    /// K and V of a layer: (slots, kv_heads, head_dim) each.
    pub fn layer(&self, index: usize) -> (Slice, Slice) {
        let frame = |frame: usize| {
            let bytes = self.frames.slots * self.frames.row_bytes;
            self.frames.pool.at(frame * self.frames.frame_stride).first(bytes)
        };
        (frame(2 * index), frame(2 * index + 1))
    }

    /// What the next step has to wait for.
    pub fn take_moving(&mut self) -> Moving {
        std::mem::take(&mut self.moving)
    }

    /// Leaves to a later step what one that failed did not wait for.
    pub fn put_back(&mut self, moving: Moving) {
        self.moving = moving;
    }

    /// A copy of the rows at `slots`, as [`KvCache::gather`](crate::kv_cache::KvCache::gather)
    /// gives it. It is on its way: whoever reads it waits.
    ///
    /// All that computed the rows must be done.
    pub fn gather(&mut self, slots: &[u32]) -> Result<HostBytes, Error> {
        let total = slots.len() * self.frames.row_bytes * self.frames.num_frames;
        let mut host = HostBytes::new(Some(&self.gpu), total);
        self.gather_to(&mut host, slots)?;
        Ok(host)
    }

    /// The same, to memory that is there: as long as the rows are in all frames.
    pub fn gather_to(&mut self, host: &mut HostBytes, slots: &[u32]) -> Result<(), Error> {
        if slots.is_empty() {
            return Ok(());
        }
        let bytes = slots.len() * self.frames.row_bytes;
        let slots = self.prepare(slots, bytes)?;
        for frame in 0..self.frames.num_frames {
            self.moved(frame, &slots).gather(&self.copies)?;
            host.download(&self.copies, &slots.stage, frame * bytes)?;
        }
        self.moving.leaving = Some(self.copies.record()?);
        Ok(())
    }

    /// Writes rows `[first_row, first_row + slots.len())` of every frame to `slots`; a frame has
    /// `frame_bytes`. They arrive layer by layer, and each layer waits for its own.
    ///
    /// All that reads the rows that were there must be done.
    pub fn scatter(
        &mut self,
        slots: &[u32],
        host: &HostBytes,
        (first_row, frame_bytes): (usize, usize),
    ) -> Result<(), Error> {
        if slots.is_empty() {
            return Ok(());
        }
        let row_bytes = self.frames.row_bytes;
        let bytes = slots.len() * row_bytes;
        let slots = self.prepare(slots, bytes)?;
        self.moving.sources.extend(host.pinned());
        self.moving.arriving.resize_with(self.frames.num_frames / 2, || None);
        for frame in 0..self.frames.num_frames {
            let start = frame * frame_bytes + first_row * row_bytes;
            host.upload(&self.copies, (start, bytes), &slots.stage)?;
            self.moved(frame, &slots).scatter(&self.copies)?;
            if frame % 2 == 1 {
                self.moving.arriving[frame / 2] = Some(self.copies.record()?);
            }
        }
        Ok(())
    }

    /// Fills blocks with NaN.
    pub fn poison(&mut self, blocks: &[u32]) -> Result<(), Error> {
        if blocks.is_empty() {
            return Ok(());
        }
        self.take_moving().settle(&self.gpu)?;
        let size = self.block_size as u32;
        let slots: Vec<u32> =
            blocks.iter().flat_map(|block| block * size..(block + 1) * size).collect();
        let slots_there = self.gpu.uploaded(&words(&slots))?.all();
        let frames = &self.frames;
        PoisonRows { frames, slots: &slots_there, num_slots: slots.len() }.launch(&self.gpu)?;
        self.gpu.synchronize()
    }

    /// Slots on the device, and room for `bytes` of rows. Moves follow one another on one stream,
    /// so that the next may use the same places.
    fn prepare(&mut self, slots: &[u32], bytes: usize) -> Result<Slots, Error> {
        if self.stage.len() < bytes {
            self.stage = self.gpu.alloc(bytes.next_power_of_two())?;
        }
        let numbers = words(slots);
        if self.slots.len() < numbers.len() {
            self.slots = self.gpu.alloc(numbers.len().next_power_of_two())?;
        }
        let place = self.slots.all();
        self.copies.upload(&numbers, &place)?;
        Ok(Slots { place, count: slots.len(), stage: self.stage.all().first(bytes) })
    }

    fn moved<'a>(&'a self, frame: usize, slots: &'a Slots) -> MoveRows<'a> {
        MoveRows {
            frames: &self.frames,
            range: (frame, 1),
            slots: &slots.place,
            num_slots: slots.count,
            rows: &slots.stage,
        }
    }
}

/// Where a move's numbers lie on the device, and its rows on their way.
struct Slots {
    place: Slice,
    count: usize,
    stage: Slice,
}

/// Numbers as a device reads them.
fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
