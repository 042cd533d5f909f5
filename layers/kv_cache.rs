//! Memory of the KV pool: one pair of tensors a layer.

use candle_core::{Device, Result, Tensor};
use half::{bf16, f16, vec::HalfBitsVecExt};
use strand_kernels::{KvDtype, PoisonBlocks};

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
}
