//! Memory of the KV pool: one pair of tensors a layer.

use candle_core::{Device, Result, Tensor};
use half::{bf16, f16, vec::HalfBitsVecExt};
use strand_kernels::{Error, KvDtype, PoisonBlocks, ScatterRows, gather_rows};

/// K and V of all layers; which block holds what is the engine's business.
pub struct KvCache {
    pub layers: Vec<LayerCache>,
    pub block_size: usize,
    pub dtype: KvDtype,
}

/// Both (num_blocks, block_size, kv_heads, head_dim).
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
    pub fn new(shape: KvCacheShape, dtype: KvDtype) -> Result<Self> {
        let dims = (shape.num_blocks, shape.block_size, shape.kv_heads, shape.head_dim);
        let zeros = || {
            let count = dims.0 * dims.1 * dims.2 * dims.3;
            match dtype {
                KvDtype::F32 => Tensor::from_vec(vec![0f32; count], dims, &Device::Cpu),
                // From integers: only their zeros are known to be untouched memory.
                KvDtype::F16 => {
                    let rows: Vec<f16> = vec![0u16; count].reinterpret_into();
                    Tensor::from_vec(rows, dims, &Device::Cpu)
                }
                KvDtype::Bf16 => {
                    let rows: Vec<bf16> = vec![0u16; count].reinterpret_into();
                    Tensor::from_vec(rows, dims, &Device::Cpu)
                }
            }
        };
        let layers = (0..shape.layers)
            .map(|_| Ok(LayerCache { k: zeros()?, v: zeros()? }))
            .collect::<Result<_>>()?;
        Ok(Self { layers, block_size: shape.block_size, dtype })
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
    /// (layer, K or V), layer 0's K, layer 0's V, layer 1's K, ... A frame holds the rows in the
    /// order of the slots, each (kv_heads, head_dim) in the pool's type, little endian, bit for
    /// bit.
    pub fn gather(&self, slots: &[u32]) -> Result<Vec<Vec<u8>>> {
        self.caches().map(|cache| gather_rows(cache, slots)).collect()
    }

    /// Writes rows `[first_row, first_row + slots.len())` of every frame to `slots`; the frames
    /// are as [`Self::gather`] gives them. All is checked before anything is written.
    pub fn scatter(&mut self, slots: &[u32], frames: &[Vec<u8>], first_row: usize) -> Result<()> {
        let expected = 2 * self.layers.len();
        if frames.len() != expected {
            return Err(refused("the number of frames", frames.len(), expected.to_string()));
        }
        let mut ops = Vec::with_capacity(frames.len());
        for (cache, frame) in self.caches().zip(frames) {
            let (_, _, kv_heads, head_dim) = cache.dims4()?;
            let row_bytes = kv_heads * head_dim * self.dtype.size();
            let (start, end) = (first_row * row_bytes, (first_row + slots.len()) * row_bytes);
            if frame.len() < end || !frame.len().is_multiple_of(row_bytes) {
                let expected = format!("whole rows of {row_bytes}, at least {end}");
                return Err(refused("a frame's length in bytes", frame.len(), expected));
            }
            let op = ScatterRows { slots, rows: &frame[start..end] };
            op.check(cache)?;
            ops.push((cache, op));
        }
        ops.iter().try_for_each(|(cache, op)| cache.inplace_op1(op))
    }

    /// In the order of frames.
    fn caches(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|layer| [&layer.k, &layer.v])
    }
}

fn refused(what: &str, found: usize, expected: String) -> candle_core::Error {
    let found = i64::try_from(found).unwrap_or(i64::MAX);
    Error::Value { op: "scatter", what: what.into(), found, expected }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvCacheShape =
        KvCacheShape { layers: 3, num_blocks: 4, block_size: 4, kv_heads: 2, head_dim: 3 };

    fn cache(dtype: KvDtype) -> KvCache {
        KvCache::new(SHAPE, dtype).unwrap()
    }

    /// Six frames of `rows` rows; every byte 0xFF but for a number that tells them apart, so that
    /// each number is a NaN with a payload of its own.
    fn frames(dtype: KvDtype, rows: usize) -> Vec<Vec<u8>> {
        let numbers = rows * SHAPE.kv_heads * SHAPE.head_dim;
        let frame = |frame: usize| -> Vec<u8> {
            (0..numbers)
                .flat_map(|i| {
                    let mut bytes = vec![0xFF; dtype.size()];
                    bytes[0] = (frame * numbers + i) as u8 % 251;
                    bytes
                })
                .collect()
        };
        (0..2 * SHAPE.layers).map(frame).collect()
    }

    #[test]
    fn rows_leave_one_pool_and_enter_another_at_other_places_bit_for_bit() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
            let (mut one, mut other) = (cache(dtype), cache(dtype));
            let kv = frames(dtype, 6);
            one.scatter(&[8, 9, 10, 3, 2, 15], &kv, 0).unwrap();
            assert!(one.gather(&[8, 9, 10, 3, 2, 15]).unwrap() == kv, "{dtype:?}");
            let taken = one.gather(&[9, 10, 3]).unwrap();
            other.scatter(&[0, 1, 2], &taken, 0).unwrap();
            let row_bytes = kv[0].len() / 6;
            for (frame, found) in kv.iter().zip(other.gather(&[0, 1, 2]).unwrap()) {
                assert_eq!(found, frame[row_bytes..4 * row_bytes]);
            }
        }
    }

    #[test]
    fn frames_are_k_then_v_of_each_layer() {
        let mut cache = cache(KvDtype::F32);
        let frame = |n: usize| (0..6).flat_map(|_| (n as f32).to_le_bytes()).collect();
        cache.scatter(&[5], &(0..6).map(frame).collect::<Vec<_>>(), 0).unwrap();
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
        for (frame, found) in kv.iter().zip(cache.gather(&[12, 13]).unwrap()) {
            assert_eq!(found, frame[4 * 12..6 * 12]);
        }
        let others: Vec<u32> = (0..16).filter(|slot| !(12..14).contains(slot)).collect();
        assert!(cache.gather(&others).unwrap().iter().flatten().all(|&byte| byte == 0));
    }

    #[test]
    fn what_does_not_fit_is_refused_and_nothing_written() {
        let mut cache = cache(KvDtype::F16);
        let mut refuses = |expected: &str, slots: &[u32], frames: &[Vec<u8>], first_row: usize| {
            let text = cache.scatter(slots, frames, first_row).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        };
        let kv = frames(KvDtype::F16, 3);
        refuses("the number of frames is 4, must be 6", &[0, 1, 2], &kv[..4], 0);
        refuses("length in bytes is 36, must be whole rows of 12, at least 48", &[0, 1], &kv, 2);
        refuses("a slot is 16, must be below the cache's 16", &[0, 16], &kv, 0);
        // the last frame is found out before the first is written
        for length in [24, 35, 37] {
            let mut kv = kv.clone();
            kv[5].resize(length, 0);
            refuses(&format!("length in bytes is {length}"), &[0, 1, 2], &kv, 0);
        }
        let text = cache.gather(&[16]).unwrap_err().to_string();
        assert!(text.contains("a slot is 16"), "{text}");
        let all: Vec<u32> = (0..16).collect();
        assert!(cache.gather(&all).unwrap().iter().flatten().all(|&byte| byte == 0));
    }
}
