//! Memory of the KV pool: one pair of tensors a layer.

use std::sync::OnceLock;

use candle_core::{Device, Result, Tensor};
use half::{bf16, f16, vec::HalfBitsVecExt};
use strand_kernels::{Error, KvDtype, PoisonBlocks, ScatterRows, Threads, gather_rows, zeros};

/// K and V of all layers; which block holds what is the engine's business.
pub struct KvCache {
    pub layers: Vec<LayerCache>,
    pub block_size: usize,
    pub dtype: KvDtype,
    /// Those who copy rows out and in.
    threads: Threads,
}

/// Both (num_blocks, block_size, kv_heads, head_dim), behind each int8 vector its scale.
pub struct LayerCache {
    pub k: Tensor,
    pub v: Tensor,
}

/// Sizes of a pool.
#[derive(Debug, Clone, Copy)]
pub struct KvCacheShape {
    pub layers: usize,
    pub num_blocks: usize,
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvCache {
    /// Zeroed memory, which the system provides page by page when it is first written.
    pub fn new(shape: KvCacheShape, dtype: KvDtype, threads: &Threads) -> Result<Self> {
        let stored_dim = dtype.stored_dim(shape.head_dim);
        let dims = (shape.num_blocks, shape.block_size, shape.kv_heads, stored_dim);
        let count = dims.0 * dims.1 * dims.2 * dims.3;
        let rows = || match dtype {
            KvDtype::F32 => Tensor::from_vec(zeros::<f32>(count), dims, &Device::Cpu),
            // From integers: only their zeros are known to be untouched memory.
            KvDtype::F16 => {
                let rows: Vec<f16> = zeros::<u16>(count).reinterpret_into();
                Tensor::from_vec(rows, dims, &Device::Cpu)
            }
            KvDtype::Bf16 => {
                let rows: Vec<bf16> = zeros::<u16>(count).reinterpret_into();
                Tensor::from_vec(rows, dims, &Device::Cpu)
            }
            KvDtype::Int8 => Tensor::from_vec(zeros::<u8>(count), dims, &Device::Cpu),
        };
        let layers = (0..shape.layers)
            .map(|_| Ok(LayerCache { k: rows()?, v: rows()? }))
            .collect::<Result<_>>()?;
        Ok(Self { layers, block_size: shape.block_size, dtype, threads: threads.clone() })
    }

    /// Fills blocks with NaN: whoever reads a row that holds nothing is found out.
    pub fn poison(&mut self, blocks: &[u32]) -> Result<()> {
        let op = PoisonBlocks { blocks: blocks.to_vec() };
        for layer in &self.layers {
            layer.k.inplace_op1(&op)?;
            layer.v.inplace_op1(&op)?;
        }
        Ok(())
    }

    /// The rows at `slots` (block x block size + offset) off the device: one frame for each
    /// (layer, K or V), layer 0's K, layer 0's V, layer 1's K, ..., one after another. A frame
    /// holds the rows in the order of the slots, each (kv_heads, head_dim) as the pool has them,
    /// little endian, bit for bit.
    pub fn gather(&self, slots: &[u32]) -> Result<Vec<u8>> {
        let caches = self.caches();
        let frame_bytes = slots.len() * self.row_bytes()?;
        let mut frames = zeros(caches.len() * frame_bytes);
        let failed = OnceLock::new();
        self.threads.for_each_chunk(&mut frames, frame_bytes, |index, frame| {
            if let Err(error) = gather_rows(caches[index], slots, frame) {
                failed.get_or_init(|| error);
            }
        });
        failed.into_inner().map_or(Ok(frames), Err)
    }

    /// Writes rows `[first_row, first_row + slots.len())` of every frame to `slots`; the frames
    /// are as [`Self::gather`] gives them. All is checked before anything is written.
    pub fn scatter(&mut self, slots: &[u32], frames: &[u8], first_row: usize) -> Result<()> {
        let caches = self.caches();
        let row_bytes = self.row_bytes()?;
        let (start, end) = (first_row * row_bytes, (first_row + slots.len()) * row_bytes);
        if frames.len() < caches.len() * end
            || !frames.len().is_multiple_of(caches.len() * row_bytes)
        {
            let what = "the frames' length in bytes".into();
            let found = i64::try_from(frames.len()).unwrap_or(i64::MAX);
            let expected =
                format!("{} frames of rows of {row_bytes}, at least {end}", caches.len());
            return Err(Error::Value { op: "scatter", what, found, expected }.into());
        }
        let frame_bytes = frames.len() / caches.len();
        let op = |index: usize| {
            let frame = &frames[index * frame_bytes..][..frame_bytes];
            ScatterRows { slots, rows: &frame[start..end] }
        };
        for (index, cache) in caches.iter().enumerate() {
            op(index).check(cache)?;
        }
        let failed = OnceLock::new();
        self.threads.run(caches.len(), |index| {
            if let Err(error) = caches[index].inplace_op1(&op(index)) {
                failed.get_or_init(|| error);
            }
        });
        failed.into_inner().map_or(Ok(()), Err)
    }

    pub fn num_frames(&self) -> usize {
        2 * self.layers.len()
    }

    /// Bytes of a row of a frame.
    fn row_bytes(&self) -> Result<usize> {
        let Some(layer) = self.layers.first() else { return Ok(0) };
        let (_, _, kv_heads, stored_dim) = layer.k.dims4()?;
        Ok(kv_heads * stored_dim * self.dtype.size())
    }

    /// In the order of frames.
    fn caches(&self) -> Vec<&Tensor> {
        self.layers.iter().flat_map(|layer| [&layer.k, &layer.v]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvCacheShape =
        KvCacheShape { layers: 3, num_blocks: 4, block_size: 4, kv_heads: 2, head_dim: 3 };

    fn cache(dtype: KvDtype) -> KvCache {
        KvCache::new(SHAPE, dtype, &Threads::new(3)).unwrap()
    }

    /// Six frames of `rows` rows; every byte 0xFF but for a number that tells them apart, so that
    /// each number is a NaN with a payload of its own.
    fn frames(dtype: KvDtype, rows: usize) -> Vec<u8> {
        let stored_dim = dtype.stored_dim(SHAPE.head_dim);
        let numbers = 2 * SHAPE.layers * rows * SHAPE.kv_heads * stored_dim;
        let number = |i: usize| {
            let mut bytes = vec![0xFF; dtype.size()];
            bytes[0] = i as u8 % 251;
            bytes
        };
        (0..numbers).flat_map(number).collect()
    }

    #[test]
    fn rows_leave_one_pool_and_enter_another_at_other_places_bit_for_bit() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
            let (mut one, mut other) = (cache(dtype), cache(dtype));
            let kv = frames(dtype, 6);
            one.scatter(&[8, 9, 10, 3, 2, 15], &kv, 0).unwrap();
            assert!(one.gather(&[8, 9, 10, 3, 2, 15]).unwrap() == kv, "{dtype:?}");
            let taken = one.gather(&[9, 10, 3]).unwrap();
            other.scatter(&[0, 1, 2], &taken, 0).unwrap();
            let (row_bytes, found) = (kv.len() / 36, other.gather(&[0, 1, 2]).unwrap());
            for (frame, found) in kv.chunks(6 * row_bytes).zip(found.chunks(3 * row_bytes)) {
                assert_eq!(found, &frame[row_bytes..4 * row_bytes]);
            }
        }
    }

    #[test]
    fn frames_are_k_then_v_of_each_layer() {
        let mut cache = cache(KvDtype::F32);
        let frame = |n: usize| (0..6).flat_map(move |_| (n as f32).to_le_bytes());
        cache.scatter(&[5], &(0..6).flat_map(frame).collect::<Vec<_>>(), 0).unwrap();
        for (n, layer) in cache.layers.iter().enumerate() {
            for (n, tensor) in [(2 * n, &layer.k), (2 * n + 1, &layer.v)] {
                let row: Vec<Vec<f32>> = tensor.get(1).unwrap().get(1).unwrap().to_vec2().unwrap();
                assert_eq!(row, vec![vec![n as f32; 3]; 2]);
            }
        }
    }

    #[test]
    fn a_part_of_the_frames_rows_is_written_and_no_other_slot() {
        let mut cache = cache(KvDtype::Bf16);
        let kv = frames(KvDtype::Bf16, 7);
        cache.scatter(&[12, 13], &kv, 4).unwrap();
        for (frame, found) in kv.chunks(7 * 12).zip(cache.gather(&[12, 13]).unwrap().chunks(24)) {
            assert_eq!(found, &frame[4 * 12..6 * 12]);
        }
        let others: Vec<u32> = (0..16).filter(|slot| !(12..14).contains(slot)).collect();
        assert!(cache.gather(&others).unwrap().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_does_not_fit_is_refused_and_nothing_written() {
        let mut cache = cache(KvDtype::F16);
        let mut refuses = |expected: &str, slots: &[u32], frames: &[u8], first_row: usize| {
            let text = cache.scatter(slots, frames, first_row).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        };
        let kv = frames(KvDtype::F16, 3);
        let expected = "length in bytes is 216, must be 6 frames of rows of 12, at least 48";
        refuses(expected, &[0, 1], &kv, 2);
        refuses("a slot is 16, must be below the cache's 16", &[0, 16], &kv, 0);
        for length in [0, 144, 215] {
            refuses(&format!("length in bytes is {length}"), &[0, 1, 2], &kv[..length], 0);
        }
        let text = cache.gather(&[16]).unwrap_err().to_string();
        assert!(text.contains("a slot is 16"), "{text}");
        let all: Vec<u32> = (0..16).collect();
        assert!(cache.gather(&all).unwrap().iter().all(|&byte| byte == 0));
    }
}
