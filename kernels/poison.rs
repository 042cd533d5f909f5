//! Fills blocks of the KV cache with NaN: what is freed and read again by mistake shows.

use crate::error::Error;
use crate::store_kv::not_kv;
use crate::view::CacheShape;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result};
use half::{bf16, f16};

/// cache (blocks, block_size, kv_heads, d); all rows of these blocks become NaN.
pub struct PoisonBlocks {
    pub blocks: Vec<u32>,
}

impl InplaceOp1 for PoisonBlocks {
    fn name(&self) -> &'static str {
        "poison_blocks"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let shape = CacheShape::of("poison_blocks", "cache", cache.dtype(), layout)?;
        if let Some(block) = self.blocks.iter().find(|&&b| b as usize >= shape.blocks) {
            let expected = format!("below the cache's {}", shape.blocks);
            return Err(Error::value("poison_blocks", "a block", *block, expected).into());
        }
        let size = shape.block_size * shape.width();
        for block in &self.blocks {
            let start = layout.start_offset() + *block as usize * size;
            match cache {
                CpuStorage::F32(cache) => cache[start..start + size].fill(f32::NAN),
                CpuStorage::F16(cache) => cache[start..start + size].fill(f16::NAN),
                CpuStorage::BF16(cache) => cache[start..start + size].fill(bf16::NAN),
                // with all bits set, a scale is a NaN
                CpuStorage::U8(cache) => cache[start..start + size].fill(0xFF),
                other => return Err(not_kv("poison_blocks", other.dtype()).into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn only_the_named_blocks_become_nan() {
        let cache = Tensor::zeros((4, 2, 1, 3), DType::F16, &Device::Cpu).unwrap();
        cache.inplace_op1(&PoisonBlocks { blocks: vec![1, 3] }).unwrap();
        let rows = cache.to_dtype(DType::F32).unwrap().reshape((4, 6)).unwrap();
        for (block, row) in rows.to_vec2::<f32>().unwrap().iter().enumerate() {
            assert!(row.iter().all(|x| x.is_nan() == (block % 2 == 1)));
        }
        let int8 = Tensor::zeros((4, 2, 1, 3 + 4), DType::U8, &Device::Cpu).unwrap();
        int8.inplace_op1(&PoisonBlocks { blocks: vec![2] }).unwrap();
        let vectors: Vec<Vec<u8>> = int8.reshape((8, 7)).unwrap().to_vec2().unwrap();
        for (row, vector) in vectors.iter().enumerate() {
            let scale = f32::from_le_bytes(*vector.last_chunk().unwrap());
            assert_eq!(scale.is_nan(), row / 2 == 2);
        }
        let refusal = cache.inplace_op1(&PoisonBlocks { blocks: vec![4] }).unwrap_err();
        assert!(refusal.to_string().contains("a block is 4, must be below the cache's 4"));
    }
}
