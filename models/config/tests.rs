use serde_json::{Map, Value, json};

use super::*;
use crate::files::PRESETS;
use crate::rope::RopeScaling;

fn base(class: &str) -> Map<String, Value> {
    let config = json!({
        "architectures": [class],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    });
    config.as_object().unwrap().clone()
}

/// The base config of `class`, with keys replaced (or, by null, taken out).
fn parse(class: &str, changes: Value) -> Result<ModelConfig, Error> {
    let mut config = base(class);
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() && config.contains_key(key) {
            config.remove(key);
        } else {
            config.insert(key.clone(), value.clone());
        }
    }
    ModelConfig::from_json(&Value::Object(config).to_string())
}

const LLAMA: &str = "LlamaForCausalLM";
const MISTRAL: &str = "MistralForCausalLM";
const QWEN2: &str = "Qwen2ForCausalLM";
const QWEN3: &str = "Qwen3ForCausalLM";

#[test]
fn the_presets_have_their_models_shapes() {
    let count = |json: &str| {
        let tensors = ModelConfig::from_json(json).unwrap().tensors();
        tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>()
    };
    let sizes: Vec<(&str, usize)> =
        PRESETS.iter().map(|(name, json)| (*name, count(json))).collect();
    // The published parameter counts.
    let published =
        [("qwen3-0.6b", 596_049_920), ("qwen3-8b", 8_190_735_360), ("llama-3.2-1b", 1_235_814_400)];
    assert_eq!(sizes, published);
}

#[test]
fn absent_keys_mean_what_each_architecture_defaults_to() {
    let llama = parse(LLAMA, json!({"num_key_value_heads": null})).unwrap();
    assert_eq!((llama.num_key_value_heads, llama.head_dim), (4, 16));
    assert_eq!(llama.max_position_embeddings, 2048);
    assert_eq!(llama.rms_norm_eps, 1e-6);
    assert_eq!((llama.rope.theta, llama.rope.scaling), (10_000.0, RopeScaling::Unscaled));
    assert!(!llama.tie_word_embeddings && !llama.qk_norm && !llama.qkv_bias && !llama.mlp_bias);
    assert_eq!(llama.dtype, WeightDtype::F32);
    assert_eq!((llama.bos_token_id, llama.eos_token_ids), (None, vec![]));

    let wide = json!({"num_attention_heads": 32, "num_key_value_heads": null});
    let mistral = parse(MISTRAL, wide.clone()).unwrap();
    assert_eq!(mistral.num_key_value_heads, 8);
    assert_eq!(mistral.sliding_window, vec![Some(4096); 4]);
    let qwen = parse(QWEN2, wide.clone()).unwrap();
    assert_eq!(qwen.num_key_value_heads, 32);
    assert!(qwen.qkv_bias && !qwen.o_bias && !qwen.qk_norm);
    let qwen = parse(QWEN3, wide).unwrap();
    assert_eq!(qwen.head_dim, 128);
    assert!(qwen.qk_norm && !qwen.qkv_bias);
    assert_eq!(qwen.sliding_window, vec![None; 4]);
}

#[test]
fn attention_bias_is_on_all_four_products_and_mlp_bias_on_three() {
    for class in [LLAMA, QWEN3] {
        let config = parse(class, json!({"attention_bias": true})).unwrap();
        assert!(config.qkv_bias && config.o_bias && !config.mlp_bias);
    }
    let config = parse(LLAMA, json!({"mlp_bias": true})).unwrap();
    assert!(!config.qkv_bias && config.mlp_bias);
    let biases = config.tensors().into_iter().filter(|(name, _)| name.ends_with(".bias"));
    assert_eq!(biases.count(), 4 * 3);
}

#[test]
fn windows_lie_where_transformers_puts_them() {
    let window = |class, changes| parse(class, changes).unwrap().sliding_window;
    assert_eq!(window(MISTRAL, json!({"sliding_window": 32})), [Some(32); 4]);
    // null and absent differ: absent is the default of 4096.
    let mut config = base(MISTRAL);
    config.insert("sliding_window".into(), Value::Null);
    let config = ModelConfig::from_json(&Value::Object(config).to_string()).unwrap();
    assert_eq!(config.sliding_window, [None; 4]);

    for class in [QWEN2, QWEN3] {
        let off = json!({"sliding_window": 32, "max_window_layers": 1});
        assert_eq!(window(class, off), [None; 4]);
        let on = json!({
            "use_sliding_window": true, "sliding_window": 32, "max_window_layers": 3
        });
        assert_eq!(window(class, on), [None, None, None, Some(32)]);
        let typed = json!({
            "use_sliding_window": true,
            "sliding_window": 8,
            "layer_types":
                ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        });
        assert_eq!(window(class, typed), [Some(8), None, None, Some(8)]);
    }
    let same = json!({"layer_types": vec!["full_attention"; 4]});
    assert_eq!(window(LLAMA, same), [None; 4]);
}

#[test]
fn both_spellings_of_the_type_are_read() {
    for key in ["dtype", "torch_dtype"] {
        let config = parse(LLAMA, json!({key: "bfloat16"})).unwrap();
        assert_eq!(config.dtype, WeightDtype::Bf16);
    }
    let config = parse(LLAMA, json!({"dtype": "float16", "torch_dtype": "bfloat16"})).unwrap();
    assert_eq!(config.dtype, WeightDtype::F16);
}

#[test]
fn the_model_type_alone_names_the_architecture() {
    let config = parse(LLAMA, json!({"architectures": null, "model_type": "qwen3"})).unwrap();
    assert_eq!(config.architecture, Architecture::Qwen3);
}

#[test]
fn keys_that_change_nothing_are_let_through() {
    let neutral = json!({
        "_name_or_path": "x", "transformers_version": "4.1", "use_cache": true,
        "initializer_range": 0.02, "pretraining_tp": 1, "pad_token_id": 0, "attention_dropout": 0.1,
        "is_llama_config": true, "rope_interleaved": false, "transformers.js_config": {"a": 1},
        "num_experts": 0, "final_logit_softcapping": null, "anything": null, "whatever": false,
        "pruned_heads": {}, "temperature": 0.6,
    });
    parse(LLAMA, neutral).unwrap();
}

#[test]
fn what_changes_the_result_is_refused_with_name_value_and_remedy() {
    let cases = [
        (LLAMA, json!({"hidden_act": "gelu"}), "hidden_act = \"gelu\""),
        (LLAMA, json!({"quantization_config": {"bits": 4}}), "take the unquantized checkpoint"),
        (LLAMA, json!({"num_local_experts": 8}), "num_local_experts = 8"),
        (LLAMA, json!({"logits_scaling": 8.0}), "logits_scaling = 8.0"),
        (LLAMA, json!({"pretraining_tp": 2}), "pretraining_tp = 2"),
        (LLAMA, json!({"auto_map": {"AutoModel": "x.Y"}}), "brings its own code"),
        (LLAMA, json!({"sliding_window": 32}), "sliding_window = 32"),
        (LLAMA, json!({"rope_interleaved": true}), "rope_interleaved = true"),
        (LLAMA, json!({"torch_dtype": "float64"}), "dtype = \"float64\""),
        (MISTRAL, json!({"attention_bias": true}), "attention_bias = true"),
        (MISTRAL, json!({"layer_types": vec!["full_attention"; 4]}), "same attention"),
        (QWEN2, json!({"mlp_bias": true}), "mlp_bias = true"),
        (QWEN3, json!({"layer_types": vec!["chunked_attention"; 4]}), "chunked_attention"),
        (QWEN3, json!({"layer_types": vec!["sliding_attention"; 4]}), "use_sliding_window"),
        (QWEN3, json!({"layer_types": ["full_attention"]}), "each of the 4 layers"),
        (QWEN3, json!({"rope_scaling": {"rope_type": "dynamic"}}), "dynamic"),
    ];
    for (class, changes, part) in cases {
        let text = parse(class, changes.clone()).unwrap_err().to_string();
        assert!(text.contains(part), "{changes}: {text}");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_by_name() {
    let cases = [
        (json!({"hidden_size": 0}), "hidden_size = 0"),
        (json!({"num_hidden_layers": -2}), "num_hidden_layers = -2"),
        (json!({"num_hidden_layers": 5000}), "at most 4096"),
        (json!({"vocab_size": 1.5}), "vocab_size = 1.5"),
        (json!({"vocab_size": 99999999999u64}), "vocab_size = 99999999999"),
        (json!({"intermediate_size": "96"}), "intermediate_size = \"96\""),
        (json!({"num_key_value_heads": 3}), "divisor of num_attention_heads = 4"),
        (json!({"hidden_size": 66}), "multiple of num_attention_heads = 4"),
        (json!({"head_dim": 15}), "head_dim = 15"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps = 0"),
        (json!({"max_position_embeddings": 0}), "max_position_embeddings = 0"),
        (json!({"vocab_size": null}), "lacks vocab_size"),
        (json!({"eos_token_id": -1}), "eos_token_id = -1"),
        (json!({"eos_token_id": ["</s>"]}), "eos_token_id"),
        (json!({"tie_word_embeddings": "yes"}), "true or false"),
    ];
    for (changes, part) in cases {
        let text = parse(LLAMA, changes.clone()).unwrap_err().to_string();
        assert!(text.contains(part), "{changes}: {text}");
    }
    let zero = parse(MISTRAL, json!({"sliding_window": 0})).unwrap_err().to_string();
    assert!(zero.contains("sliding_window = 0"), "{zero}");
}

#[test]
fn other_architectures_are_named_with_the_ones_that_work() {
    let refused = |class, changes| parse(class, changes).unwrap_err().to_string();
    assert_eq!(
        refused("GemmaForCausalLM", json!({})),
        "architecture GemmaForCausalLM is not supported; supported are LlamaForCausalLM, \
         MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    );
    assert_eq!(
        refused(LLAMA, json!({"model_type": "mistral"})),
        "the model's config has model_type = \"mistral\": LlamaForCausalLM needs llama"
    );
    assert_eq!(
        refused(LLAMA, json!({"architectures": null})),
        "the model's config lacks architectures"
    );
    let text = ModelConfig::from_json("{").unwrap_err().to_string();
    assert!(text.starts_with("config.json is not valid JSON"), "{text}");
    let text = ModelConfig::from_json("[]").unwrap_err().to_string();
    assert!(text.contains("expected an object"), "{text}");
}
