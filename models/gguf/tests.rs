use std::path::PathBuf;

use candle_core::quantized::{QTensor, gguf_file};
use candle_core::{Device, Tensor};

use super::*;
use crate::config::Architecture;
use crate::rope::{RopeConfig, RopeScaling};
use crate::weights::Weights;

fn fixture(name: &str) -> PathBuf {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf");
    fixtures.join(name)
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("strand-{}-{name}.gguf", std::process::id()))
}

fn read(tensors: &GgufTensors, name: &str, shape: &[usize]) -> Vec<f32> {
    let mut values = vec![f32::NAN; shape.iter().product()];
    tensors.find(name, shape).unwrap().read(0..shape[0], &mut values);
    values
}

#[test]
fn the_header_becomes_a_config() {
    let llama = GgufFile::open(&fixture("llama-f16.gguf")).unwrap().config;
    assert_eq!(llama.architecture, Architecture::Llama);
    assert_eq!((llama.vocab_size, llama.hidden_size, llama.intermediate_size), (64, 32, 32));
    assert_eq!((llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim), (4, 2, 8));
    assert_eq!((llama.rms_norm_eps, llama.max_position_embeddings), (1e-5, 512));
    assert!(!llama.tie_word_embeddings && !llama.qk_norm && !llama.qkv_bias);
    assert_eq!((llama.bos_token_id, llama.eos_token_ids), (Some(1), vec![2]));
    assert_eq!(llama.dtype, WeightDtype::F16);
    let qwen3 = GgufFile::open(&fixture("qwen3-q4_0.gguf")).unwrap().config;
    assert!(qwen3.tie_word_embeddings && qwen3.qk_norm);
    assert_eq!(qwen3.rope.theta, 1_000_000.0);
}

#[test]
fn factors_for_each_frequency_equal_llama3_scaling() {
    let rope = GgufFile::open(&fixture("llama-f32.gguf")).unwrap().config.rope;
    assert!(matches!(rope.scaling, RopeScaling::Factors(_)));
    let same = RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        },
    };
    let pairs = rope.inverse_frequencies(8).0.into_iter().zip(same.inverse_frequencies(8).0);
    for (found, expected) in pairs {
        assert!((found - expected).abs() < 1e-6 * expected, "{found} {expected}");
    }
}

/// The permutation, spelt as the converter has it: (heads, 2, half) becomes (heads, half, 2).
#[test]
fn rows_of_q_and_k_come_back_in_halves() {
    let path = temporary("interleaved");
    let (heads, half, columns) = (2, 3, 2);
    let mut stored = vec![0f32; heads * 2 * half * columns];
    for head in 0..heads {
        for upper in 0..2 {
            for pair in 0..half {
                let row = (head * 2 + upper) * half + pair;
                let place = (head * half + pair) * 2 + upper;
                stored[place * columns..][..columns].fill(row as f32);
            }
        }
    }
    let rows = heads * 2 * half;
    let q = Tensor::from_vec(stored, (rows, columns), &Device::Cpu).unwrap();
    let q = QTensor::quantize(&q, GgmlDType::F32).unwrap();
    write(&path, &[("blk.0.attn_q.weight", &q)], &[]);
    let content = Content::read(&mut std::fs::File::open(&path).unwrap()).unwrap();
    let file = FileBytes::map(&path).unwrap();
    let info = &content.tensor_infos["blk.0.attn_q.weight"];
    let place = Place::new(&file, content.tensor_data_offset, "q", info).unwrap();
    let tensors = GgufTensors {
        file,
        tensors: BTreeMap::from([("blk.0.attn_q.weight".to_string(), place)]),
        interleaved_head: Some(2 * half),
    };
    let name = "model.layers.0.self_attn.q_proj.weight";
    let values = read(&tensors, name, &[rows, columns]);
    let expected: Vec<f32> = (0..rows).flat_map(|row| vec![row as f32; columns]).collect();
    assert_eq!(values, expected);
    let mut two = vec![0.0; 2 * columns];
    tensors.find(name, &[rows, columns]).unwrap().read(7..9, &mut two);
    assert_eq!(two, expected[7 * columns..9 * columns]);
    std::fs::remove_file(path).unwrap();
}

fn write(path: &Path, tensors: &[(&str, &QTensor)], extra: &[(&str, gguf_file::Value)]) {
    use gguf_file::Value;
    let mut metadata: BTreeMap<&str, Value> = BTreeMap::from([
        ("general.architecture", Value::String("qwen3".to_string())),
        ("qwen3.embedding_length", Value::U32(256)),
        ("qwen3.block_count", Value::U32(1)),
        ("qwen3.context_length", Value::U32(128)),
        ("qwen3.feed_forward_length", Value::U32(512)),
        ("qwen3.attention.head_count", Value::U32(2)),
        ("qwen3.attention.head_count_kv", Value::U32(1)),
        ("qwen3.attention.key_length", Value::U32(128)),
        ("qwen3.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("qwen3.rope.freq_base", Value::F32(10_000.0)),
        ("qwen3.vocab_size", Value::U32(96)),
    ]);
    metadata.extend(extra.iter().cloned());
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, tensors).unwrap();
}

/// Rows read in strips equal candle's dequantization of the whole tensor, for every block type.
#[test]
fn quantized_rows_equal_the_dequantized_tensor() {
    let kinds = [
        GgmlDType::Q8_0,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    for kind in kinds {
        let path = temporary(&format!("{kind:?}"));
        let values: Vec<f32> =
            (0..70 * 512).map(|i| ((i * 2_654_435_761u64 % 1000) as f32 - 500.0) / 250.0).collect();
        let tensor = Tensor::from_vec(values.clone(), (70, 512), &Device::Cpu).unwrap();
        let quantized = QTensor::quantize(&tensor, kind).unwrap();
        write(&path, &[("blk.0.ffn_down.weight", &quantized)], &[]);
        let whole = quantized.dequantize(&Device::Cpu).unwrap();
        let whole = whole.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = whole.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 0.3, "{kind:?} {error}");

        let tensors = GgufFile::open(&path).unwrap().tensors;
        let name = "model.layers.0.mlp.down_proj.weight";
        let matrix = tensors.find(name, &[70, 512]).unwrap();
        let mut found = vec![f32::NAN; whole.len()];
        for (strip, out) in found.chunks_mut(32 * 512).enumerate() {
            matrix.read(strip * 32..strip * 32 + out.len() / 512, out);
        }
        assert_eq!(found, whole);
        let weights = Weights::from_gguf(tensors);
        assert_eq!(weights.stored_dtype(name), Some(WeightDtype::Quantized));
        assert_eq!(weights.unused(), ["blk.0.ffn_down.weight"]);
        std::fs::remove_file(path).unwrap();
    }
}

fn open_error(path: &Path) -> String {
    let text = GgufFile::open(path).err().expect("this must not open").to_string();
    text.replace(&path.display().to_string(), "FILE")
}

fn refused(name: &str, extra: &[(&str, gguf_file::Value)]) -> String {
    let path = temporary(name);
    write(&path, &[], extra);
    let text = open_error(&path);
    std::fs::remove_file(path).unwrap();
    text
}

#[test]
fn a_header_that_asks_for_something_else_is_refused_by_name() {
    use gguf_file::Value;
    let text = |value: &str| Value::String(value.to_string());
    let cases = [
        ("general.architecture", text("gemma3"), "gemma3 is not supported"),
        ("general.type", text("adapter"), "general.type = \"adapter\""),
        ("split.count", Value::U16(3), "split.count = 3"),
        ("general.alignment", Value::U32(0), "its alignment is 0"),
        ("qwen3.embedding_length", Value::U32(0), "qwen3.embedding_length = 0"),
        ("qwen3.block_count", Value::U32(9999), "qwen3.block_count = 9999"),
        ("qwen3.attention.head_count_kv", Value::U32(3), "divisor of attention.head_count = 2"),
        ("qwen3.attention.key_length", Value::U32(7), "attention.key_length = 7"),
        ("qwen3.attention.value_length", Value::U32(64), "attention.value_length = 64"),
        ("qwen3.rope.dimension_count", Value::U32(64), "rope.dimension_count = 64"),
        ("qwen3.rope.scaling.type", text("longrope"), "rope.scaling.type = \"longrope\""),
        ("qwen3.rope.scaling.type", text("yarn"), "lacks qwen3.rope.scaling.factor"),
        ("qwen3.expert_count", Value::U32(8), "qwen3.expert_count = 8"),
        ("qwen3.attention.sliding_window", Value::U32(8), "qwen3.attention.sliding_window = 8"),
        ("qwen3.logit_scale", Value::F32(2.0), "qwen3.logit_scale = 2.0"),
    ];
    for (number, (key, value, part)) in cases.into_iter().enumerate() {
        let found = refused(&format!("refused-{number}"), &[(key, value)]);
        assert!(found.contains(part), "{key}: {found}");
    }
}

#[test]
fn scaled_rotations_are_read_from_the_header() {
    use gguf_file::Value;
    let scaling = |kind: &str| {
        let path = temporary(kind);
        let extra = [
            ("qwen3.rope.scaling.type", Value::String(kind.to_string())),
            ("qwen3.rope.scaling.factor", Value::F32(4.0)),
            ("qwen3.rope.scaling.original_context_length", Value::U32(32)),
        ];
        write(&path, &[], &extra);
        let config = GgufFile::open(&path).unwrap().config;
        std::fs::remove_file(path).unwrap();
        config.rope
    };
    assert_eq!(scaling("linear").scaling, RopeScaling::Linear { factor: 4.0 });
    let json = r#"{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 96, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "rope_scaling":
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}"#;
    assert_eq!(scaling("yarn"), ModelConfig::from_json(json).unwrap().rope);
}

#[test]
fn damaged_files_and_other_types_are_told_apart() {
    let whole = std::fs::read(fixture("llama-f32.gguf")).unwrap();
    let path = temporary("damaged");
    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        open_error(&path)
    };
    let cut = with(&whole[..whole.len() - 100]);
    assert!(cut.starts_with("FILE is damaged: tensor "), "{cut}");
    assert!(cut.contains("it may be cut short"), "{cut}");
    for length in [0, 3, 10, 100, 1000] {
        let text = with(&whole[..length]);
        assert!(text.contains("FILE"), "{length}: {text}");
    }
    assert_eq!(
        with(b"not a gguf file"),
        "FILE is damaged: unknown magic 0x20746f6e; download or copy it again"
    );

    // The type follows the name, the number of dimensions and the dimensions.
    let name = b"blk.0.ffn_up.weight";
    let at = whole.windows(name.len()).position(|window| window == name).unwrap();
    let mut other = whole.clone();
    other[at + name.len() + 4 + 16] = 20;
    let other = with(&other);
    assert!(other.contains("has type IQ4_NL, supported are F32, F16"), "{other}");
    let mut other = whole.clone();
    other[at + name.len() + 4 + 16] = 9;
    std::fs::write(&path, &other).unwrap();
    let tensors = GgufFile::open(&path).unwrap().tensors;
    let error = tensors.find("model.layers.0.mlp.up_proj.weight", &[32, 32]).err().unwrap();
    assert!(error.to_string().contains("has type Q8_1"), "{error}");
    let mut shifted = whole.clone();
    shifted[at + name.len() + 4 + 16 + 4] = 4;
    let shifted = with(&shifted);
    assert!(shifted.contains("blk.0.ffn_up.weight is not aligned"), "{shifted}");
    std::fs::remove_file(&path).unwrap();
}
