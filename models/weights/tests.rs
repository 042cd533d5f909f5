use std::collections::BTreeMap;
use std::path::PathBuf;

use ::safetensors::tensor::{Dtype, TensorView};
use half::{bf16, f16};

use super::*;

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("strand-{name}-{}", std::process::id()));
        let _left_by_a_killed_run = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    fn error(&self) -> String {
        let error = Weights::open_safetensors(&self.0).err().expect("this must not open");
        error.to_string().replace(&self.0.display().to_string(), "FOLDER")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let bytes = |value: &f32| match dtype {
        Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn file(tensors: &[(&str, Dtype, &[usize], &[f32])]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors.iter().map(|t| encode(t.1, t.3)).collect();
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .zip(&data)
        .map(|(t, data)| (t.0, TensorView::new(t.1, t.2.to_vec(), data).unwrap()))
        .collect();
    ::safetensors::serialize(views, None).unwrap()
}

/// All rows of a stack, through strips as the packer asks for them.
fn rows_of(weights: &Weights, parts: &[(&str, usize)], columns: usize) -> Vec<f32> {
    let stack = weights.stack(parts, columns).unwrap();
    let mut all = vec![f32::NAN; stack.rows() * columns];
    for (strip, out) in all.chunks_mut(32 * columns).enumerate() {
        let rows = out.len() / columns;
        stack.read(32 * strip..32 * strip + rows, out);
    }
    all
}

fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 128) as f32 - 64.0).collect()
}

#[test]
fn every_stored_type_becomes_the_same_numbers() {
    let folder = Folder::new("types");
    let values = ramp(6);
    folder.write(
        "model.safetensors",
        file(&[
            ("a", Dtype::F32, &[3, 2], &values),
            ("b", Dtype::F16, &[3, 2], &values),
            ("c", Dtype::BF16, &[3, 2], &values),
        ]),
    );
    let weights = Weights::open_safetensors(&folder.0).unwrap();
    for name in ["a", "b", "c"] {
        assert_eq!(rows_of(&weights, &[(name, 3)], 2), values);
    }
    assert_eq!(weights.stored_dtype("b"), Some(WeightDtype::F16));
    assert_eq!(weights.stored_dtype("d"), None);
}

#[test]
fn parts_are_stacked_across_strips() {
    let folder = Folder::new("stack");
    let (q, k) = (ramp(40 * 3), vec![0.5; 30 * 3]);
    folder.write(
        "model.safetensors",
        file(&[("q", Dtype::F32, &[40, 3], &q), ("k", Dtype::F32, &[30, 3], &k)]),
    );
    let weights = Weights::open_safetensors(&folder.0).unwrap();
    assert_eq!(rows_of(&weights, &[("q", 40), ("k", 30)], 3), [q, k].concat());
    let threads = Threads::new(2);
    let parts = [("q", 40), ("k", 30)];
    let packed = weights.packed(&parts, 3, WeightDtype::F32, &threads).unwrap();
    assert_eq!((packed.out_features(), packed.in_features()), (70, 3));
}

#[test]
fn what_nobody_asked_for_is_named_and_stale_buffers_are_not() {
    let folder = Folder::new("unused");
    let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq";
    folder.write(
        "model.safetensors",
        file(&[
            ("norm", Dtype::F32, &[2], &[1.0, 2.0]),
            ("surprise.bias", Dtype::F32, &[2], &[1.0, 2.0]),
            (buffer, Dtype::F32, &[2], &[1.0, 2.0]),
        ]),
    );
    let weights = Weights::open_safetensors(&folder.0).unwrap();
    assert_eq!(weights.unused(), ["norm", "surprise.bias"]);
    assert_eq!(weights.vector("norm", 2).unwrap(), [1.0, 2.0]);
    assert_eq!(weights.unused(), ["surprise.bias"]);
    assert!(weights.contains("surprise.bias") && !weights.contains("weight"));
}

#[test]
fn a_tensor_that_is_not_what_was_asked_for_is_named_with_its_file() {
    let folder = Folder::new("wrong");
    let integers = TensorView::new(Dtype::I64, vec![1], &[0; 8]).unwrap();
    folder.write("model.safetensors", ::safetensors::serialize([("ids", integers)], None).unwrap());
    let weights = Weights::open_safetensors(&folder.0).unwrap();
    let error = |name: &str, len: usize| {
        let text = weights.vector(name, len).unwrap_err().to_string();
        text.replace(&folder.0.display().to_string(), "FOLDER")
    };
    assert_eq!(error("none", 1), "tensor none is missing from FOLDER/model.safetensors");
    assert_eq!(
        error("ids", 2),
        "tensor ids in FOLDER/model.safetensors has shape [1], the config asks for [2]"
    );
    assert_eq!(
        error("ids", 1),
        "tensor ids in FOLDER/model.safetensors has type I64, supported are F32, F16 and BF16"
    );
    let matrix = weights.packed(&[("ids", 1)], 1, WeightDtype::F32, &Threads::new(1));
    assert!(matches!(matrix.err(), Some(Error::TensorShape { .. })));
}

#[test]
fn damaged_files_are_told_from_missing_ones() {
    let folder = Folder::new("damaged");
    assert_eq!(
        folder.error(),
        "no model at FOLDER: it holds neither model.safetensors nor \
         model.safetensors.index.json"
    );
    let whole = file(&[("norm", Dtype::F32, &[2], &[1.0, 2.0])]);
    folder.write("model.safetensors", &whole[..whole.len() - 3]);
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors is damaged: its 77 bytes are not what its header describes, \
         it may be cut short; download or copy it again"
    );
    folder.write("model.safetensors", &whole[..20]);
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors is damaged: its header does not fit into its 20 bytes; \
         download or copy it again"
    );
    folder.write("model.safetensors", &whole[..4]);
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors is damaged: its header does not fit into its 4 bytes; \
         download or copy it again"
    );
    folder.write("model.safetensors", []);
    assert!(folder.error().contains("FOLDER/model.safetensors"), "{}", folder.error());
    folder.write("model.safetensors", [0xff; 64]);
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors is damaged: its header claims more than 100 MB, it is no \
         safetensors file; download or copy it again"
    );
    let mut garbled = whole.clone();
    garbled[8] = b'x';
    folder.write("model.safetensors", garbled);
    assert!(folder.error().contains("invalid JSON in header"), "{}", folder.error());
}

#[test]
fn shards_are_found_through_their_index() {
    let folder = Folder::new("shards");
    let index = |map: &str| format!(r#"{{"metadata": {{}}, "weight_map": {map}}}"#);
    let name = "model.safetensors.index.json";
    folder.write("one.safetensors", file(&[("a", Dtype::F32, &[1], &[1.0])]));
    folder.write("two.safetensors", file(&[("b", Dtype::F32, &[1], &[2.0])]));
    folder.write(name, index(r#"{"a": "one.safetensors", "b": "two.safetensors"}"#));
    let weights = Weights::open_safetensors(&folder.0).unwrap();
    assert_eq!(weights.vector("a", 1).unwrap(), [1.0]);
    assert_eq!(weights.vector("b", 1).unwrap(), [2.0]);

    folder.write(name, index(r#"{"a": "one.safetensors", "b": "one.safetensors"}"#));
    assert_eq!(folder.error(), "tensor b is missing from FOLDER/one.safetensors");
    folder.write(name, index(r#"{"a": "one.safetensors", "c": "three.safetensors"}"#));
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors.index.json names shard three.safetensors for tensor c, but \
         that file is missing"
    );
    folder.write(name, index(r#"{"a": "../one.safetensors"}"#));
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors.index.json is damaged: \"../one.safetensors\" is not the \
         name of a shard; download or copy it again"
    );
    folder.write(name, index("{}"));
    assert_eq!(
        folder.error(),
        "FOLDER/model.safetensors.index.json is damaged: its weight_map is empty; download or \
         copy it again"
    );
    folder.write(name, "{");
    assert!(folder.error().contains("is not valid JSON"), "{}", folder.error());
}

fn tiny() -> ModelConfig {
    let text = r#"{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 50, "hidden_size": 8,
        "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 6,
        "num_key_value_heads": 1, "tie_word_embeddings": true}"#;
    ModelConfig::from_json(text).unwrap()
}

#[test]
fn a_saved_copy_of_the_tied_embedding_is_set_aside_if_it_is_a_copy() {
    let folder = Folder::new("tied");
    let values = ramp(50 * 8);
    let mut other = values.clone();
    other[399] = 1e9;
    for (head, same) in [(&values, true), (&other, false)] {
        folder.write(
            "model.safetensors",
            file(&[
                ("model.embed_tokens.weight", Dtype::F32, &[50, 8], &values),
                ("lm_head.weight", Dtype::F32, &[50, 8], head),
            ]),
        );
        let weights = Weights::open_safetensors(&folder.0).unwrap();
        assert_eq!(weights.set_tied_copy_aside(&tiny()).is_ok(), same);
        if same {
            assert_eq!(weights.unused(), ["model.embed_tokens.weight"]);
        }
    }
}

#[test]
fn random_weights_depend_on_seed_name_and_row_alone() {
    let config = tiny();
    let weights = Weights::random(&config, 7, None);
    let name = "model.embed_tokens.weight";
    let all = rows_of(&weights, &[(name, 50)], 8);
    let mut row = [0.0; 8];
    weights.find(name, &[50, 8]).unwrap().read(41..42, &mut row);
    assert_eq!(row, all[41 * 8..42 * 8]);
    assert_eq!(rows_of(&Weights::random(&config, 7, None), &[(name, 50)], 8), all);
    assert_ne!(rows_of(&Weights::random(&config, 8, None), &[(name, 50)], 8), all);
    let gate = rows_of(&weights, &[("model.layers.0.mlp.gate_proj.weight", 12)], 8);
    let up = rows_of(&weights, &[("model.layers.0.mlp.up_proj.weight", 12)], 8);
    assert_ne!(gate, up);

    let squares: f32 = all.iter().map(|value| value * value).sum();
    let deviation = (squares / all.len() as f32).sqrt();
    assert!((deviation - 0.02).abs() < 0.003, "{deviation}");
    assert_eq!(weights.vector("model.norm.weight", 8).unwrap(), [1.0; 8]);
    assert_eq!(weights.vector("model.layers.1.self_attn.q_norm.weight", 6).unwrap(), [1.0; 6]);
}

#[test]
fn random_weights_are_exactly_those_the_config_asks_for() {
    let config = tiny();
    let weights = Weights::random(&config, 7, None);
    assert!(!weights.contains("lm_head.weight"));
    assert!(weights.contains("model.layers.1.mlp.down_proj.weight"));
    assert!(!weights.contains("model.layers.2.mlp.down_proj.weight"));
    assert!(matches!(weights.vector("model.norm.weight", 9), Err(Error::TensorShape { .. })));
    assert!(matches!(weights.vector("model.mean", 9), Err(Error::TensorMissing { .. })));
    assert_eq!(weights.unused().len(), config.tensors().len());
}
