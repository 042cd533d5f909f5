//! Which tensors of a checkpoint make which part of the network, whatever computes with them.
//!
//! The one place that knows the tensors' names. Products that read the same rows are stacked: q, k
//! and v; gate and up. What a part is, [`Parts`] says: tiles for the CPU, device memory for a GPU.

use strand_kernels::{RotaryTable, WeightDtype};
use strand_layers::attention::{AttentionSettings, AttentionWeights};

use crate::config::ModelConfig;
use crate::error::Error;
use crate::weights::Weights;

/// Makes parts where they are computed with.
pub(crate) trait Parts {
    /// A weight, which the embedding and the last product may share.
    type Matrix: Clone;
    /// A product with a bias or without.
    type Linear;
    type Norm;

    /// `parts` are (name, output features) of tensors stacked on the output side.
    fn matrix(
        &mut self,
        weights: &Weights,
        parts: &[(&str, usize)],
        in_features: usize,
    ) -> Result<Self::Matrix, Error>;

    fn linear(
        &mut self,
        weight: Self::Matrix,
        bias: Option<Vec<f32>>,
    ) -> Result<Self::Linear, Error>;

    fn norm(&mut self, weight: Vec<f32>) -> Result<Self::Norm, Error>;
}

/// All parts of a network.
pub(crate) struct Network<M, L, N> {
    pub embed_tokens: M,
    pub layers: Vec<LayerParts<L, N>>,
    pub norm: N,
    pub lm_head: L,
}

/// Those of one layer.
pub(crate) struct LayerParts<L, N> {
    pub input_layernorm: N,
    pub attention: AttentionWeights<L, N>,
    pub settings: AttentionSettings,
    pub post_attention_layernorm: N,
    pub gate_up_proj: L,
    pub down_proj: L,
}

impl<M: Clone, L, N> Network<M, L, N> {
    /// `progress` hears (bytes made, bytes in all), counted in `dtype`.
    ///
    /// # Errors
    /// Any tensor missing, of another shape or type, or left over.
    pub fn load<P: Parts<Matrix = M, Linear = L, Norm = N>>(
        config: &ModelConfig,
        weights: &Weights,
        maker: P,
        dtype: WeightDtype,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let total = config.num_parameters().saturating_mul(dtype.size() as u64);
        let mut loader = Loader { config, weights, maker, dtype, progress, done: 0, total };
        let hidden = config.hidden_size;
        let embedding = [("model.embed_tokens.weight", config.vocab_size)];
        let embed_tokens = loader.matrix("", &embedding, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| loader.layer(index))
            .collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm.weight", hidden)?;
        let head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.matrix("", &[("lm_head.weight", config.vocab_size)], hidden)?
        };
        let unused = weights.unused();
        if !unused.is_empty() {
            return Err(Error::TensorsUnused { names: unused });
        }
        let lm_head = loader.maker.linear(head, None)?;
        Ok(Self { embed_tokens, layers, norm, lm_head })
    }
}

/// The rotation of all layers, for so many positions.
pub(crate) fn rotary(config: &ModelConfig, positions: usize) -> RotaryTable {
    let (frequencies, factor) = config.rope.inverse_frequencies(config.head_dim);
    RotaryTable::new(&frequencies, factor, positions)
}

/// The numbers of a layer's attention.
pub(crate) fn attention_settings(config: &ModelConfig, layer: usize) -> AttentionSettings {
    AttentionSettings {
        num_heads: config.num_attention_heads,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        sliding_window: config.sliding_window[layer],
        soft_cap: None,
    }
}

/// Builds the parts from tensors by name, and counts the bytes.
struct Loader<'a, P> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    maker: P,
    dtype: WeightDtype,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl<P: Parts> Loader<'_, P> {
    /// One product of tensors named behind `prefix`, stacked on the output side.
    fn matrix(
        &mut self,
        prefix: &str,
        parts: &[(&str, usize)],
        in_features: usize,
    ) -> Result<P::Matrix, Error> {
        let names: Vec<String> = parts.iter().map(|(name, _)| format!("{prefix}{name}")).collect();
        let parts: Vec<(&str, usize)> =
            names.iter().zip(parts).map(|(name, (_, out))| (name.as_str(), *out)).collect();
        let matrix = self.maker.matrix(self.weights, &parts, in_features)?;
        let rows: usize = parts.iter().map(|(_, out)| out).sum();
        self.done += (rows * in_features * self.dtype.size()) as u64;
        (self.progress)(self.done.min(self.total), self.total);
        Ok(matrix)
    }

    /// As [`Loader::matrix`], by the modules' names, with their biases where there are some.
    fn linear(
        &mut self,
        prefix: &str,
        parts: &[(&str, usize)],
        in_features: usize,
        has_bias: bool,
    ) -> Result<P::Linear, Error> {
        let names: Vec<String> = parts.iter().map(|(name, _)| format!("{name}.weight")).collect();
        let weights: Vec<(&str, usize)> =
            names.iter().zip(parts).map(|(name, (_, out))| (name.as_str(), *out)).collect();
        let matrix = self.matrix(prefix, &weights, in_features)?;
        let mut bias = Vec::new();
        if has_bias {
            for (name, out) in parts {
                bias.extend(self.weights.vector(&format!("{prefix}{name}.bias"), *out)?);
            }
        }
        self.maker.linear(matrix, has_bias.then_some(bias))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<P::Norm, Error> {
        let weight = self.weights.vector(name, len)?;
        self.maker.norm(weight)
    }

    fn layer(&mut self, index: usize) -> Result<LayerParts<P::Linear, P::Norm>, Error> {
        let prefix = format!("model.layers.{index}.");
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let has_bias = self.config.mlp_bias;
        let input_layernorm = self.norm(&format!("{prefix}input_layernorm.weight"), hidden)?;
        let attention = self.attention(&format!("{prefix}self_attn."))?;
        let name = format!("{prefix}post_attention_layernorm.weight");
        let post_attention_layernorm = self.norm(&name, hidden)?;
        let mlp = format!("{prefix}mlp.");
        let gate_up = [("gate_proj", inner), ("up_proj", inner)];
        Ok(LayerParts {
            input_layernorm,
            attention,
            settings: attention_settings(self.config, index),
            post_attention_layernorm,
            gate_up_proj: self.linear(&mlp, &gate_up, hidden, has_bias)?,
            down_proj: self.linear(&mlp, &[("down_proj", hidden)], inner, has_bias)?,
        })
    }

    fn attention(&mut self, prefix: &str) -> Result<AttentionWeights<P::Linear, P::Norm>, Error> {
        let config = self.config;
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let q = config.num_attention_heads * head_dim;
        let kv = config.num_key_value_heads * head_dim;
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let qkv_proj = self.linear(prefix, &parts, hidden, config.qkv_bias)?;
        let o_proj = self.linear(prefix, &[("o_proj", hidden)], q, config.o_bias)?;
        let mut norm = |name: &str| self.norm(&format!("{prefix}{name}.weight"), head_dim);
        let qk_norm = match config.qk_norm {
            true => Some((norm("q_norm")?, norm("k_norm")?)),
            false => None,
        };
        Ok(AttentionWeights { qkv_proj, o_proj, qk_norm })
    }
}
