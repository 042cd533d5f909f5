//! What config.json says about a model, resolved into the numbers the network is built from.
//!
//! Defaults are those of each architecture's configuration class in transformers 5. A key that
//! changes the result and is not understood is refused by name (see [`crate::keys`]), so a config
//! that parses describes the model completely.

use std::fmt;

use serde_json::Value;
use strand_kernels::WeightDtype;

use crate::error::Error;
use crate::keys::Keys;
use crate::rope::RopeConfig;

mod neutral;

/// More layers than any dense model has; it keeps per-layer lists small before weights are read.
pub(crate) const MAX_LAYERS: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3.x, SmolLM2
    Llama,
    Mistral,
    /// Qwen2 and Qwen2.5
    Qwen2,
    Qwen3,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    /// Not always `hidden_size / num_attention_heads`; even.
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub max_position_embeddings: usize,
    pub rope: RopeConfig,
    /// RMS norm of each head of q and k before rotation.
    pub qk_norm: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// The output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// One per layer: how many keys a row sees, itself included; `None` is all.
    pub sliding_window: Vec<Option<u32>>,
    /// The type the weights were published in.
    pub dtype: WeightDtype,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Json`], [`Error::Architecture`], and [`Error::ConfigMissing`],
    /// [`Error::ConfigInvalid`] or [`Error::ConfigUnsupported`] with the key's name and value.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let (config, declared) = Self::parse(text)?;
        Ok(ModelConfig { dtype: declared.unwrap_or(WeightDtype::F32), ..config })
    }

    /// The config, and the type of the weights if the text names one.
    pub(crate) fn parse(text: &str) -> Result<(Self, Option<WeightDtype>), Error> {
        let mut keys = Keys::parse("config.json", text)?;
        let architecture = Architecture::take(&mut keys)?;
        let sizes = Sizes::take(&mut keys, architecture)?;
        let biases = Biases::take(&mut keys, architecture)?;
        let sliding_window = take_windows(&mut keys, architecture, sizes.layers)?;
        let rope = RopeConfig::take(&mut keys, sizes.positions)?;
        let dtype = take_dtype(&mut keys)?;
        refuse_other_activation(&mut keys)?;
        let config = ModelConfig {
            architecture,
            vocab_size: sizes.vocab,
            hidden_size: sizes.hidden,
            intermediate_size: sizes.intermediate,
            num_hidden_layers: sizes.layers,
            num_attention_heads: sizes.heads,
            num_key_value_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_position_embeddings: sizes.positions,
            rope,
            qk_norm: architecture == Architecture::Qwen3,
            qkv_bias: biases.qkv,
            o_bias: biases.o,
            mlp_bias: biases.mlp,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            sliding_window,
            dtype: dtype.unwrap_or(WeightDtype::F32),
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id")?,
        };
        keys.finish(neutral::is_neutral)?;
        Ok((config, dtype))
    }

    /// Every tensor the network asks for, by its name in a safetensors checkpoint, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut all = vec![
            ("model.embed_tokens.weight".to_string(), vec![self.vocab_size, hidden]),
            ("model.norm.weight".to_string(), vec![hidden]),
        ];
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_string(), vec![self.vocab_size, hidden]));
        }
        for layer in 0..self.num_hidden_layers {
            let of_layer = self.layer_tensors().into_iter();
            all.extend(
                of_layer.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)),
            );
        }
        all
    }

    /// Numbers in all tensors; the largest one where sizes are beyond any machine.
    pub fn num_parameters(&self) -> u64 {
        let numbers = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>();
        let all = self.tensors();
        all.iter().fold(0, |sum, (_, shape)| sum.saturating_add(numbers(shape)))
    }

    fn layer_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let products = [
            ("self_attn.q_proj", q, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, q, self.o_bias),
            ("mlp.gate_proj", self.intermediate_size, hidden, self.mlp_bias),
            ("mlp.up_proj", self.intermediate_size, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, self.intermediate_size, self.mlp_bias),
        ];
        let mut tensors = vec![
            ("input_layernorm.weight".to_string(), vec![hidden]),
            ("post_attention_layernorm.weight".to_string(), vec![hidden]),
        ];
        for (name, outputs, inputs, bias) in products {
            tensors.push((format!("{name}.weight"), vec![outputs, inputs]));
            if bias {
                tensors.push((format!("{name}.bias"), vec![outputs]));
            }
        }
        if self.qk_norm {
            for name in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                tensors.push((name.to_string(), vec![self.head_dim]));
            }
        }
        tensors
    }
}

impl Architecture {
    const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

    /// The class in `architectures`, and the `model_type` that must agree with it.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Architecture::Llama => ("LlamaForCausalLM", "llama"),
            Architecture::Mistral => ("MistralForCausalLM", "mistral"),
            Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        }
    }

    fn take(keys: &mut Keys) -> Result<Self, Error> {
        let classes = keys.texts("architectures")?.unwrap_or_default();
        let model_type = keys.text("model_type")?;
        let found = match (classes.as_slice(), &model_type) {
            ([], None) => return Err(keys.missing("architectures")),
            ([], Some(kind)) => Self::ALL.into_iter().find(|a| a.names().1 == kind),
            ([class], _) => Self::ALL.into_iter().find(|a| a.names().0 == class),
            _ => None,
        };
        let Some(architecture) = found else {
            let found = if classes.is_empty() { model_type.into_iter().collect() } else { classes };
            return Err(Error::Architecture {
                found: found.join(", "),
                supported: Self::ALL.map(|a| a.names().0).join(", "),
            });
        };
        match model_type {
            Some(kind) if kind != architecture.names().1 => {
                let expected =
                    format!("{} needs {}", architecture.names().0, architecture.names().1);
                Err(keys.invalid("model_type", &kind.into(), &expected))
            }
            _ => Ok(architecture),
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.names().1)
    }
}

struct Sizes {
    vocab: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
}

impl Sizes {
    fn take(keys: &mut Keys, architecture: Architecture) -> Result<Self, Error> {
        let hidden = keys.required_size("hidden_size")?;
        let heads = keys.required_size("num_attention_heads")?;
        let kv_default = match architecture {
            _ if keys.contains("num_key_value_heads") => heads,
            Architecture::Llama => heads,
            Architecture::Mistral => 8,
            Architecture::Qwen2 | Architecture::Qwen3 => 32,
        };
        let kv_heads = keys.size("num_key_value_heads")?.unwrap_or(kv_default);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("expected a divisor of num_attention_heads = {heads}");
            return Err(keys.invalid("num_key_value_heads", &kv_heads.into(), &expected));
        }
        let positions = match architecture {
            Architecture::Llama => 2048,
            Architecture::Mistral => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
        };
        let sizes = Sizes {
            vocab: keys.required_size("vocab_size")?,
            hidden,
            intermediate: keys.required_size("intermediate_size")?,
            layers: keys.required_size("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim: take_head_dim(keys, architecture, hidden, heads)?,
            positions: keys.size("max_position_embeddings")?.unwrap_or(positions),
        };
        if sizes.layers > MAX_LAYERS {
            let expected = format!("expected at most {MAX_LAYERS}");
            return Err(keys.invalid("num_hidden_layers", &sizes.layers.into(), &expected));
        }
        Ok(sizes)
    }
}

fn take_head_dim(
    keys: &mut Keys,
    architecture: Architecture,
    hidden: usize,
    heads: usize,
) -> Result<usize, Error> {
    let head_dim = match keys.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if architecture == Architecture::Qwen3 => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("expected a multiple of num_attention_heads = {heads}");
            return Err(keys.invalid("hidden_size", &hidden.into(), &expected));
        }
    };
    if !head_dim.is_multiple_of(2) {
        let expected = "expected an even number: rotation works on pairs";
        return Err(keys.invalid("head_dim", &head_dim.into(), expected));
    }
    Ok(head_dim)
}

struct Biases {
    qkv: bool,
    o: bool,
    mlp: bool,
}

impl Biases {
    fn take(keys: &mut Keys, architecture: Architecture) -> Result<Self, Error> {
        let mut biases = Biases { qkv: false, o: false, mlp: false };
        match architecture {
            Architecture::Llama => {
                biases.qkv = keys.flag("attention_bias")?.unwrap_or(false);
                biases.o = biases.qkv;
                biases.mlp = keys.flag("mlp_bias")?.unwrap_or(false);
            }
            Architecture::Qwen3 => {
                biases.qkv = keys.flag("attention_bias")?.unwrap_or(false);
                biases.o = biases.qkv;
            }
            // Not a key of this architecture, whose q, k and v always have one.
            Architecture::Qwen2 => biases.qkv = true,
            Architecture::Mistral => {}
        }
        Ok(biases)
    }
}

fn take_windows(
    keys: &mut Keys,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<u32>>, Error> {
    let given = keys.contains("sliding_window");
    let uses_windows = match architecture {
        // An unknown key here: left for the check of leftovers.
        Architecture::Llama => false,
        Architecture::Mistral => true,
        Architecture::Qwen2 | Architecture::Qwen3 => {
            keys.flag("use_sliding_window")?.unwrap_or(false)
        }
    };
    let window = match architecture {
        Architecture::Llama => None,
        _ if !uses_windows => {
            keys.take("sliding_window");
            None
        }
        _ if given => keys.size("sliding_window")?,
        _ => Some(4096),
    };
    // Larger than any position, so the cast cannot lose what matters.
    let window = window.map(|size| u32::try_from(size).unwrap_or(u32::MAX));
    let first_windowed = match architecture {
        Architecture::Llama | Architecture::Mistral => 0,
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let first = keys.take("max_window_layers").unwrap_or(Value::from(28));
            first.as_u64().map_or(layers, |first| first as usize)
        }
    };
    let by_index = |layer: usize| window.filter(|_| layer >= first_windowed);
    let windows: Vec<Option<u32>> = (0..layers).map(by_index).collect();
    let Some(types) = keys.texts("layer_types")? else {
        return Ok(windows);
    };
    let typed = windows_by_type(keys, &types, window, layers)?;
    let free = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
    if !free && typed != windows {
        let remedy = format!("{architecture} has the same attention in every layer");
        return Err(keys.unsupported("layer_types", &types.into(), &remedy));
    }
    Ok(typed)
}

fn windows_by_type(
    keys: &Keys,
    types: &[String],
    window: Option<u32>,
    layers: usize,
) -> Result<Vec<Option<u32>>, Error> {
    if types.len() != layers {
        let expected = format!("expected one entry for each of the {layers} layers");
        return Err(keys.invalid("layer_types", &types.into(), &expected));
    }
    let window_of = |kind: &String| match (kind.as_str(), window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => {
            let expected = "sliding layers need sliding_window and, for qwen, use_sliding_window";
            Err(keys.invalid("layer_types", &types.into(), expected))
        }
        (other, _) => {
            let remedy = "supported are full_attention and sliding_attention";
            Err(keys.unsupported("layer_types", &other.into(), remedy))
        }
    };
    types.iter().map(window_of).collect()
}

/// `dtype` is the newer spelling of `torch_dtype`, and wins.
fn take_dtype(keys: &mut Keys) -> Result<Option<WeightDtype>, Error> {
    let old = keys.text("torch_dtype")?;
    let Some(name) = keys.text("dtype")?.or(old) else {
        return Ok(None);
    };
    match name.as_str() {
        "float32" => Ok(Some(WeightDtype::F32)),
        "float16" => Ok(Some(WeightDtype::F16)),
        "bfloat16" => Ok(Some(WeightDtype::Bf16)),
        other => {
            let remedy = "supported are float32, float16 and bfloat16";
            Err(keys.unsupported("dtype", &other.into(), remedy))
        }
    }
}

fn refuse_other_activation(keys: &mut Keys) -> Result<(), Error> {
    match keys.text("hidden_act")?.as_deref() {
        // Two names of one function.
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => Err(keys.unsupported("hidden_act", &other.into(), "only silu is known")),
    }
}

#[cfg(test)]
mod tests;
