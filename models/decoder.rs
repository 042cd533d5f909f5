//! The network: one config-driven decoder for every supported architecture.
//!
//! Token ids and attention metadata in, logits of the rows asked for out; K and V of every row
//! are written to the cache on the way. Knows neither sequences nor scheduling.

use std::sync::Arc;

use candle_core::{Result as TensorResult, Tensor};
use strand_kernels::{PackedWeight, RotaryTable, Threads, WeightDtype, embedding};
use strand_layers::attention::{Attention, AttentionMetadata, AttentionSettings, AttentionWeights};
use strand_layers::kv_cache::KvCache;
use strand_layers::linear::Linear;
use strand_layers::mlp::Mlp;
use strand_layers::norm::RmsNorm;

use crate::config::ModelConfig;
use crate::error::Error;
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
        let mut loader = Loader::new(config, weights, dtype, threads, progress);
        let (frequencies, factor) = config.rope.inverse_frequencies(config.head_dim);
        let rotary = Arc::new(RotaryTable::new(&frequencies, factor, positions));
        let hidden = config.hidden_size;
        let embedding_part = [("model.embed_tokens.weight", config.vocab_size)];
        let embed_tokens = loader.packed("", &embedding_part, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| loader.layer(index, &rotary))
            .collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm.weight", hidden)?;
        let head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.packed("", &[("lm_head.weight", config.vocab_size)], hidden)?
        };
        let unused = weights.unused();
        if !unused.is_empty() {
            return Err(Error::TensorsUnused { names: unused });
        }
        let lm_head = Linear::new(head, None, threads);
        Ok(Self { embed_tokens, layers, norm, lm_head, rotary, threads: threads.clone() })
    }

    /// The rotation of all layers.
    pub fn rotary(&self) -> &Arc<RotaryTable> {
        &self.rotary
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

/// Builds the parts of the network from tensors by name, and counts the bytes.
struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    dtype: WeightDtype,
    threads: &'a Threads,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl<'a> Loader<'a> {
    fn new(
        config: &'a ModelConfig,
        weights: &'a Weights,
        dtype: WeightDtype,
        threads: &'a Threads,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let total = config.num_parameters().saturating_mul(dtype.size() as u64);
        Self { config, weights, dtype, threads, progress, done: 0, total }
    }

    /// One product of tensors named behind `prefix`, stacked on the output side.
    fn packed(
        &mut self,
        prefix: &str,
        parts: &[(&str, usize)],
        in_features: usize,
    ) -> Result<Arc<PackedWeight>, Error> {
        let names: Vec<String> = parts.iter().map(|(name, _)| format!("{prefix}{name}")).collect();
        let parts: Vec<(&str, usize)> =
            names.iter().zip(parts).map(|(name, (_, out))| (name.as_str(), *out)).collect();
        let packed = self.weights.packed(&parts, in_features, self.dtype, self.threads)?;
        let rows: usize = parts.iter().map(|(_, out)| out).sum();
        self.done += (rows * in_features * self.dtype.size()) as u64;
        (self.progress)(self.done.min(self.total), self.total);
        Ok(Arc::new(packed))
    }

    /// As [`Loader::packed`], by the modules' names, with their biases where there are some.
    fn linear(
        &mut self,
        prefix: &str,
        parts: &[(&str, usize)],
        in_features: usize,
        has_bias: bool,
    ) -> Result<Linear, Error> {
        let names: Vec<String> = parts.iter().map(|(name, _)| format!("{name}.weight")).collect();
        let weights: Vec<(&str, usize)> =
            names.iter().zip(parts).map(|(name, (_, out))| (name.as_str(), *out)).collect();
        let packed = self.packed(prefix, &weights, in_features)?;
        let mut bias = Vec::new();
        if has_bias {
            for (name, out) in parts {
                bias.extend(self.weights.vector(&format!("{prefix}{name}.bias"), *out)?);
            }
        }
        Ok(Linear::new(packed, has_bias.then_some(bias), self.threads))
    }

    fn norm(&self, name: &str, len: usize) -> Result<RmsNorm, Error> {
        let weight = self.weights.vector(name, len)?;
        Ok(RmsNorm::new(weight, self.config.rms_norm_eps, self.threads))
    }

    fn layer(&mut self, index: usize, rotary: &Arc<RotaryTable>) -> Result<DecoderLayer, Error> {
        let prefix = format!("model.layers.{index}.");
        let hidden = self.config.hidden_size;
        Ok(DecoderLayer {
            input_layernorm: self.norm(&format!("{prefix}input_layernorm.weight"), hidden)?,
            self_attn: self.attention(index, &format!("{prefix}self_attn."), rotary)?,
            post_attention_layernorm: self
                .norm(&format!("{prefix}post_attention_layernorm.weight"), hidden)?,
            mlp: self.mlp(&format!("{prefix}mlp."))?,
        })
    }

    fn attention(
        &mut self,
        index: usize,
        prefix: &str,
        rotary: &Arc<RotaryTable>,
    ) -> Result<Attention, Error> {
        let config = self.config;
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let q = config.num_attention_heads * head_dim;
        let kv = config.num_key_value_heads * head_dim;
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let qkv_proj = self.linear(prefix, &parts, hidden, config.qkv_bias)?;
        let o_proj = self.linear(prefix, &[("o_proj", hidden)], q, config.o_bias)?;
        let norm = |name: &str| self.norm(&format!("{prefix}{name}.weight"), head_dim);
        let qk_norm = match config.qk_norm {
            true => Some((norm("q_norm")?, norm("k_norm")?)),
            false => None,
        };
        let settings = AttentionSettings {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim,
            sliding_window: config.sliding_window[index],
            soft_cap: None,
        };
        let weights = AttentionWeights { qkv_proj, o_proj, qk_norm };
        Ok(Attention::new(weights, settings, rotary, self.threads))
    }

    fn mlp(&mut self, prefix: &str) -> Result<Mlp, Error> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let has_bias = self.config.mlp_bias;
        let parts = [("gate_proj", inner), ("up_proj", inner)];
        let gate_up = self.linear(prefix, &parts, hidden, has_bias)?;
        let down = self.linear(prefix, &[("down_proj", hidden)], inner, has_bias)?;
        Ok(Mlp::new(gate_up, down, self.threads))
    }
}
