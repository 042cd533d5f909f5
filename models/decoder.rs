//! The network: one config-driven decoder for every supported architecture.
//!
//! Token ids and attention metadata in, logits of the rows asked for out; K and V of every row
//! are written to the cache on the way. Knows neither sequences nor scheduling.

use std::sync::Arc;

use candle_core::{Result as TensorResult, Tensor};
use strand_kernels::{PackedWeight, RotaryTable, Threads, WeightDtype, embedding};
use strand_layers::attention::{Attention, AttentionMetadata};
use strand_layers::kv_cache::KvCache;
use strand_layers::linear::Linear;
use strand_layers::mlp::Mlp;
use strand_layers::norm::RmsNorm;

use crate::config::ModelConfig;
use crate::error::Error;
use crate::network::{LayerParts, Network, Parts, rotary};
use crate::weights::Weights;

/// A loaded network.
pub struct Decoder {
    embed_tokens: Arc<PackedWeight>,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
    rotary: Arc<RotaryTable>,
    threads: Threads,
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Decoder {
    /// Packs the weights in `dtype` and prepares rotations for `positions` positions.
    ///
    /// `progress` hears (bytes packed, bytes in all).
    ///
    /// # Errors
    /// Any tensor missing, of another shape or type, or left over.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtype: WeightDtype,
        positions: usize,
        threads: &Threads,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let rotary = Arc::new(rotary(config, positions));
        let maker = Packer { dtype, eps: config.rms_norm_eps, threads };
        let network = Network::load(config, weights, maker, dtype, progress)?;
        let layers = network.layers.into_iter();
        Ok(Self {
            embed_tokens: network.embed_tokens,
            layers: layers.map(|parts| DecoderLayer::new(parts, &rotary, threads)).collect(),
            norm: network.norm,
            lm_head: network.lm_head,
            rotary,
            threads: threads.clone(),
        })
    }

    /// The rotation of all layers.
    pub fn rotary(&self) -> &Arc<RotaryTable> {
        &self.rotary
    }

    /// What the forward runs on.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    pub fn vocab_size(&self) -> usize {
        self.embed_tokens.out_features()
    }

    /// Logits (`logits_rows.len()`, vocab_size) of the rows named by index.
    pub fn forward(
        &self,
        input_ids: &[u32],
        metadata: &AttentionMetadata,
        kv_cache: &mut KvCache,
        logits_rows: &[u32],
    ) -> TensorResult<Tensor> {
        let outputs = self.forward_with_hidden(input_ids, metadata, kv_cache, logits_rows, &[])?;
        Ok(outputs.0)
    }

    /// The same, and what the last norm makes of `hidden_rows`: (`hidden_rows.len()`, hidden_size).
    pub fn forward_with_hidden(
        &self,
        input_ids: &[u32],
        metadata: &AttentionMetadata,
        kv_cache: &mut KvCache,
        logits_rows: &[u32],
        hidden_rows: &[u32],
    ) -> TensorResult<(Tensor, Tensor)> {
        let hidden = self.hidden_states(input_ids, metadata, kv_cache, &mut |_, _| Ok(()))?;
        let normed = |rows: &[u32]| {
            let rows = Tensor::from_slice(rows, rows.len(), hidden.device())?;
            self.norm.forward(&hidden.index_select(&rows, 0)?)
        };
        Ok((self.lm_head.forward(&normed(logits_rows)?)?, normed(hidden_rows)?))
    }

    /// The first part of the network whose output is not all finite, if any.
    pub fn first_non_finite(
        &self,
        input_ids: &[u32],
        metadata: &AttentionMetadata,
        kv_cache: &mut KvCache,
    ) -> TensorResult<Option<String>> {
        let mut found = None;
        self.hidden_states(input_ids, metadata, kv_cache, &mut |name, tensor| {
            if found.is_none() {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                found = values.iter().any(|value| !value.is_finite()).then(|| name.to_string());
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The residual stream after the last layer; `observe` sees every part's output.
    fn hidden_states(
        &self,
        input_ids: &[u32],
        metadata: &AttentionMetadata,
        kv_cache: &mut KvCache,
        observe: &mut dyn FnMut(&dyn std::fmt::Display, &Tensor) -> TensorResult<()>,
    ) -> TensorResult<Tensor> {
        let mut residual = embedding(&self.embed_tokens, input_ids, &self.threads)?;
        observe(&"model.embed_tokens", &residual)?;
        // What the layer before added last; summed and normed in one pass.
        let mut pending: Option<Tensor> = None;
        for (index, (layer, cache)) in self.layers.iter().zip(&mut kv_cache.layers).enumerate() {
            let normed = match pending {
                None => layer.input_layernorm.forward(&residual)?,
                Some(pending) => {
                    let (sum, normed) = layer.input_layernorm.forward_sum(&pending, &residual)?;
                    residual = sum;
                    normed
                }
            };
            let attended = layer.self_attn.forward(&normed, metadata, cache)?;
            observe(&format_args!("model.layers.{index}.self_attn"), &attended)?;
            let (sum, normed) = layer.post_attention_layernorm.forward_sum(&attended, &residual)?;
            residual = sum;
            let output = layer.mlp.forward(&normed)?;
            observe(&format_args!("model.layers.{index}.mlp"), &output)?;
            pending = Some(output);
        }
        pending.map_or(Ok(residual.clone()), |pending| pending + &residual)
    }
}

impl DecoderLayer {
    fn new(
        parts: LayerParts<Linear, RmsNorm>,
        rotary: &Arc<RotaryTable>,
        threads: &Threads,
    ) -> Self {
        Self {
            input_layernorm: parts.input_layernorm,
            self_attn: Attention::new(parts.attention, parts.settings, rotary, threads),
            post_attention_layernorm: parts.post_attention_layernorm,
            mlp: Mlp::new(parts.gate_up_proj, parts.down_proj, threads),
        }
    }
}

/// The parts on the CPU: weights in tiles.
struct Packer<'a> {
    dtype: WeightDtype,
    eps: f32,
    threads: &'a Threads,
}

impl Parts for Packer<'_> {
    type Matrix = Arc<PackedWeight>;
    type Linear = Linear;
    type Norm = RmsNorm;

    fn matrix(
        &mut self,
        weights: &Weights,
        parts: &[(&str, usize)],
        in_features: usize,
    ) -> Result<Arc<PackedWeight>, Error> {
        Ok(Arc::new(weights.packed(parts, in_features, self.dtype, self.threads)?))
    }

    fn linear(
        &mut self,
        weight: Arc<PackedWeight>,
        bias: Option<Vec<f32>>,
    ) -> Result<Linear, Error> {
        Ok(Linear::new(weight, bias, self.threads))
    }

    fn norm(&mut self, weight: Vec<f32>) -> Result<RmsNorm, Error> {
        Ok(RmsNorm::new(weight, self.eps, self.threads))
    }
}
