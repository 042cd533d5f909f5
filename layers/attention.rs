//! Self-attention over paged K and V.
//!
//! Keys are rotated once, at the position they are stored under; the query turns to meet them.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use strand_kernels::{BlockTables, PagedAttention, Rope, RotaryTable, StoreKv, Threads};

use crate::kv_cache::LayerCache;
use crate::linear::Linear;
use crate::norm::RmsNorm;

/// Where the rows of a forward come from and what they see; vLLM's names.
#[derive(Debug, Clone)]
pub struct AttentionMetadata {
    /// Per row: physical KV row it is stored to.
    pub slot_mapping: Arc<Vec<u32>>,
    /// Per row: how many keys of its view come before it.
    pub positions: Arc<Vec<u32>>,
    /// Per row: position its key is rotated at.
    pub stored_positions: Arc<Vec<u32>>,
    /// Sequence i has rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`.
    pub cu_seqlens_q: Arc<Vec<u32>>,
    pub tables: Arc<BlockTables>,
}

/// The numbers of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSettings {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub sliding_window: Option<u32>,
    pub soft_cap: Option<f32>,
}

/// The weights of an attention layer, as whoever computes it holds them.
pub struct AttentionWeights<L = Linear, N = RmsNorm> {
    /// q, k and v as one product.
    pub qkv_proj: L,
    pub o_proj: L,
    /// Norms of each head of q and k before rotation, where the architecture has them.
    pub qk_norm: Option<(N, N)>,
}

pub struct Attention {
    weights: AttentionWeights,
    settings: AttentionSettings,
    rotary: Arc<RotaryTable>,
    threads: Threads,
}

impl Attention {
    pub fn new(
        weights: AttentionWeights,
        settings: AttentionSettings,
        rotary: &Arc<RotaryTable>,
        threads: &Threads,
    ) -> Self {
        Self { weights, settings, rotary: rotary.clone(), threads: threads.clone() }
    }

    /// x (rows, hidden) -> (rows, hidden); the rows' K and V are in the cache afterwards.
    pub fn forward(
        &self,
        x: &Tensor,
        metadata: &AttentionMetadata,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        let AttentionSettings { num_heads, num_kv_heads, head_dim, .. } = self.settings;
        let (q_len, kv_len) = (num_heads * head_dim, num_kv_heads * head_dim);
        let qkv = self.weights.qkv_proj.forward(x)?; // (rows, q_len + 2 kv_len)
        let mut q = qkv.narrow(1, 0, q_len)?;
        let mut k = qkv.narrow(1, q_len, kv_len)?;
        let v = qkv.narrow(1, q_len + kv_len, kv_len)?;
        if let Some((q_norm, k_norm)) = &self.weights.qk_norm {
            q = q_norm.forward(&q)?;
            k = k_norm.forward(&k)?;
        }
        let k = k.apply_op1_no_bwd(&Rope {
            table: self.rotary.clone(),
            positions: metadata.stored_positions.clone(),
            threads: self.threads.clone(),
        })?;
        let store = StoreKv { slot_mapping: metadata.slot_mapping.clone() };
        cache.k.inplace_op2(&k, &store)?;
        cache.v.inplace_op2(&v, &store)?;
        let attended = q.apply_op3_no_bwd(&cache.k, &cache.v, &self.paged(metadata))?;
        self.weights.o_proj.forward(&attended)
    }

    fn paged(&self, metadata: &AttentionMetadata) -> PagedAttention {
        PagedAttention {
            tables: metadata.tables.clone(),
            cu_seqlens_q: metadata.cu_seqlens_q.clone(),
            positions: metadata.positions.clone(),
            rotary: self.rotary.clone(),
            num_heads: self.settings.num_heads,
            scale: 1.0 / (self.settings.head_dim as f32).sqrt(),
            sliding_window: self.settings.sliding_window,
            soft_cap: self.settings.soft_cap,
            threads: self.threads.clone(),
        }
    }
}
