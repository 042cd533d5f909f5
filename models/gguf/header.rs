//! A GGUF header's key-value pairs as a [`ModelConfig`].
//!
//! Keys are those of the GGUF specification (ggml/docs/gguf.md). As with config.json, a key of the
//! architecture that nobody here understands is refused by name.

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json};
use strand_kernels::WeightDtype;

use super::{GgufTensors, Metadata};
use crate::config::{Architecture, ModelConfig};
use crate::error::Error;
use crate::gguf_tokenizer::stop_tokens_from_metadata;
use crate::keys::Keys;
use crate::rope::{RopeConfig, RopeScaling, YarnScaling};

/// Whether llama.cpp's converter stores rows of q and k pair by pair.
pub(super) fn is_interleaved(architecture: Architecture) -> bool {
    match architecture {
        Architecture::Llama | Architecture::Mistral => true,
        Architecture::Qwen2 | Architecture::Qwen3 => false,
    }
}

pub(super) fn config(metadata: &Metadata, tensors: &GgufTensors) -> Result<ModelConfig, Error> {
    refuse_other_kinds(metadata)?;
    let architecture = architecture(metadata)?;
    // The converter names llama what Hugging Face does, and so for the others.
    let place = architecture.to_string();
    let mut keys = Keys::new(&place, keys_of(metadata, &format!("{place}.")));
    let hidden_size = keys.required_size("embedding_length")?;
    let heads = keys.required_size("attention.head_count")?;
    let kv_heads = keys.size("attention.head_count_kv")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("expected a divisor of attention.head_count = {heads}");
        return Err(keys.invalid("attention.head_count_kv", &kv_heads.into(), &expected));
    }
    let head_dim = take_head_dim(&mut keys, hidden_size, heads)?;
    let layers = keys.required_size("block_count")?;
    if layers > crate::config::MAX_LAYERS {
        let expected = format!("expected at most {}", crate::config::MAX_LAYERS);
        return Err(keys.invalid("block_count", &layers.into(), &expected));
    }
    let positions = keys.required_size("context_length")?;
    let rope = take_rope(&mut keys, tensors, head_dim, positions)?;
    let embedding = tensors.stored_shape("token_embd.weight");
    let vocab_size = match (keys.size("vocab_size")?, embedding) {
        (Some(size), _) => size,
        (None, Some(shape)) => shape.first().copied().unwrap_or(0),
        (None, None) => return Err(keys.missing("vocab_size")),
    };
    let qwen2 = architecture == Architecture::Qwen2;
    let config = ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: keys.required_size("feed_forward_length")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        rms_norm_eps: keys.required_positive("attention.layer_norm_rms_epsilon")? as f32,
        max_position_embeddings: positions,
        rope,
        qk_norm: architecture == Architecture::Qwen3,
        qkv_bias: qwen2 || tensors.has_stored("blk.0.attn_q.bias"),
        o_bias: tensors.has_stored("blk.0.attn_output.bias"),
        mlp_bias: tensors.has_stored("blk.0.ffn_gate.bias"),
        tie_word_embeddings: !tensors.has_stored("output.weight"),
        sliding_window: vec![None; layers],
        dtype: tensors.dtype("model.layers.0.mlp.down_proj.weight").unwrap_or(WeightDtype::F16),
        bos_token_id: bos_token_id(metadata),
        eos_token_ids: stop_tokens_from_metadata(metadata),
    };
    let causal = Json::Bool(true);
    keys.finish(|key, value| match key {
        "attention.causal" => *value == causal,
        "expert_count" | "expert_used_count" | "attention.sliding_window" => *value == 0,
        _ => false,
    })?;
    Ok(config)
}

fn take_head_dim(keys: &mut Keys, hidden: usize, heads: usize) -> Result<usize, Error> {
    let head_dim = match keys.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(keys.missing("attention.key_length")),
    };
    if !head_dim.is_multiple_of(2) {
        let expected = "expected an even number: rotation works on pairs";
        return Err(keys.invalid("attention.key_length", &head_dim.into(), expected));
    }
    for key in ["attention.value_length", "rope.dimension_count"] {
        match keys.size(key)? {
            Some(size) if size != head_dim => {
                let remedy = format!("only the size of a whole head, {head_dim}, is known");
                return Err(keys.unsupported(key, &size.into(), &remedy));
            }
            _ => {}
        }
    }
    Ok(head_dim)
}

fn take_rope(
    keys: &mut Keys,
    tensors: &GgufTensors,
    head_dim: usize,
    positions: usize,
) -> Result<RopeConfig, Error> {
    let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    if theta <= 1.0 {
        return Err(keys.invalid("rope.freq_base", &theta.into(), "expected a number above 1"));
    }
    let kind = keys.text("rope.scaling.type")?;
    let factor = keys.positive("rope.scaling.factor")?;
    let length = keys.size("rope.scaling.original_context_length")?;
    keys.take("rope.scaling.finetuned");
    let scaling = match (kind.as_deref(), factor) {
        (None | Some("none"), None | Some(1.0)) => RopeScaling::Unscaled,
        // Before there was a type, a factor meant linear.
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some("yarn"), Some(factor)) => {
            let weight = keys.positive("rope.scaling.yarn_attn_factor")?;
            let weight = keys.positive("rope.scaling.attn_factor")?.or(weight).unwrap_or(1.0);
            RopeScaling::Yarn(YarnScaling {
                factor,
                original_max_position_embeddings: length.unwrap_or(positions),
                beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                truncate: true,
                attention_factor: weight * YarnScaling::recommended_attention_factor(factor, 1.0),
            })
        }
        (Some("linear" | "yarn"), None) => return Err(keys.missing("rope.scaling.factor")),
        (Some(other), _) => {
            let remedy = "supported are none, linear and yarn";
            return Err(keys.unsupported("rope.scaling.type", &other.into(), remedy));
        }
    };
    match (scaling, tensors.rope_factors(head_dim)?) {
        (scaling, None) => Ok(RopeConfig { theta, scaling }),
        (RopeScaling::Unscaled, Some(factors)) => {
            Ok(RopeConfig { theta, scaling: RopeScaling::Factors(factors) })
        }
        (_, Some(_)) => {
            let remedy = "the file also holds a factor for each frequency; keep one of the two";
            Err(keys.unsupported("rope.scaling.type", &kind.into(), remedy))
        }
    }
}

fn architecture(metadata: &Metadata) -> Result<Architecture, Error> {
    let found = match metadata.get("general.architecture") {
        Some(Value::String(name)) => name.as_str(),
        _ => {
            return Err(Error::ConfigMissing { key: "general.architecture".to_string() });
        }
    };
    match found {
        "llama" => Ok(Architecture::Llama),
        "qwen2" => Ok(Architecture::Qwen2),
        "qwen3" => Ok(Architecture::Qwen3),
        other => Err(Error::Architecture {
            found: other.to_string(),
            supported: "llama, qwen2 and qwen3".to_string(),
        }),
    }
}

/// Adapters, and models split over several files.
fn refuse_other_kinds(metadata: &Metadata) -> Result<(), Error> {
    let mut keys = Keys::new("split", keys_of(metadata, "split."));
    match keys.take("count") {
        Some(count) if count.as_u64() > Some(1) => {
            let remedy = "join the parts with llama-gguf-split --merge";
            return Err(keys.unsupported("count", &count, remedy));
        }
        _ => {}
    }
    let mut keys = Keys::new("general", keys_of(metadata, "general."));
    match keys.text("type")? {
        Some(kind) if kind != "model" => {
            Err(keys.unsupported("type", &kind.into(), "only whole models are loaded"))
        }
        _ => Ok(()),
    }
}

fn bos_token_id(metadata: &Metadata) -> Option<u32> {
    let value = metadata.get("tokenizer.ggml.bos_token_id")?;
    value.to_u64().ok().and_then(|id| u32::try_from(id).ok())
}

/// The pairs whose key starts with `prefix`, without it, as JSON.
fn keys_of(metadata: &Metadata, prefix: &str) -> Map<String, Json> {
    let mut names: Vec<&String> = metadata.keys().filter(|key| key.starts_with(prefix)).collect();
    names.sort();
    let pair = |key: &String| (key[prefix.len()..].to_string(), to_json(&metadata[key]));
    names.into_iter().map(pair).collect()
}

fn to_json(value: &Value) -> Json {
    match value {
        Value::U8(number) => (*number).into(),
        Value::I8(number) => (*number).into(),
        Value::U16(number) => (*number).into(),
        Value::I16(number) => (*number).into(),
        Value::U32(number) => (*number).into(),
        Value::I32(number) => (*number).into(),
        Value::U64(number) => (*number).into(),
        Value::I64(number) => (*number).into(),
        Value::F32(number) => f64::from(*number).into(),
        Value::F64(number) => (*number).into(),
        Value::Bool(flag) => (*flag).into(),
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(to_json).collect(),
    }
}
