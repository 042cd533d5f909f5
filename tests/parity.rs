//! Parity with Hugging Face transformers on tiny random models, one for each architecture and
//! RoPE scaling. `tests/fixtures/make_models.py` made the models and what is expected of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use strand_engine::model_runner::ModelRunner;
use strand_engine::{Engine, EngineConfig, Event, Request};
use strand_kernels::{BlockTables, KvDtype, PageEntry, Threads, WeightDtype, filter_view};
use strand_layers::attention::AttentionMetadata;
use strand_layers::kv_cache::{KvCache, KvCacheShape};
use strand_models::{Decoder, ModelFiles, ModelSource};

use crate::random::Random;

const MODELS: [&str; 8] =
    ["qwen3", "qwen2", "llama2", "llama3", "linear", "yarn", "mistral", "smollm2"];
const LENGTHS: [usize; 3] = [1, 17, 300];
/// Of f32 against transformers in f32.
const TOLERANCE: f32 = 1e-3;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn model(name: &str) -> ModelFiles {
    let source = ModelSource::Folder(fixtures().join("models").join(name));
    ModelFiles::open(&source).expect("the fixture is sound")
}

/// What transformers computed.
struct Expected(HashMap<String, Tensor>);

impl Expected {
    fn read(path: &Path) -> Self {
        Self(candle_core::safetensors::load(path, &Device::Cpu).expect("the fixture is there"))
    }

    fn of(name: &str) -> Self {
        Self::read(&fixtures().join("models").join(name).join("expected.safetensors"))
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        self.0[key].to_vec1().expect("ids are u32")
    }

    fn rows(&self, key: &str) -> Vec<Vec<f32>> {
        self.0[key].to_vec2().expect("logits are f32")
    }
}

/// Logits of every position of a prompt, in one forward.
fn logits(
    files: &ModelFiles,
    dtype: WeightDtype,
    kv_dtype: KvDtype,
    prompt: &[u32],
) -> Vec<Vec<f32>> {
    let (config, threads) = (&files.config, Threads::new(1));
    let positions = config.max_position_embeddings;
    let decoder = Decoder::load(config, &files.weights, dtype, positions, &threads, &mut |_, _| {})
        .expect("the fixture is sound");
    let block_size = 16;
    let shape = KvCacheShape {
        layers: config.num_hidden_layers,
        num_blocks: prompt.len().div_ceil(block_size),
        block_size,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    let mut kv_cache = KvCache::new(shape, kv_dtype, &Threads::new(1)).expect("it fits");
    let rows: Vec<u32> = (0..prompt.len() as u32).collect();
    let view: Vec<PageEntry> = (0..shape.num_blocks)
        .map(|block| PageEntry {
            block: block as u32,
            first_row: 0,
            stored_position: (block * block_size) as u32,
            num_valid: block_size.min(prompt.len() - block * block_size) as u16,
            active: true,
            segment: 0,
        })
        .collect();
    let mut tables = BlockTables { entries: Vec::new(), cu_entries: vec![0] };
    filter_view(&view, block_size, &mut tables.entries);
    tables.cu_entries.push(tables.entries.len() as u32);
    let positions = Arc::new(rows.clone());
    let metadata = AttentionMetadata {
        slot_mapping: positions.clone(),
        positions: positions.clone(),
        stored_positions: positions,
        cu_seqlens_q: Arc::new(vec![0, prompt.len() as u32]),
        tables: Arc::new(tables),
    };
    let logits = decoder.forward(prompt, &metadata, &mut kv_cache, &rows).expect("it runs");
    logits.to_vec2().expect("logits are f32")
}

/// The largest difference at any position, in the columns that are known.
fn largest_difference(found: &[Vec<f32>], expected: &Expected, length: usize) -> f32 {
    let rows = expected.rows(&format!("logits_{length}"));
    let all: Vec<u32> = (0..found[0].len() as u32).collect();
    let columns = if length == 300 { expected.ids("columns_300") } else { all };
    let mut largest = 0f32;
    for (found, expected) in found.iter().zip(&rows) {
        assert_eq!(columns.len(), expected.len());
        for (&column, value) in columns.iter().zip(expected) {
            let difference = (found[column as usize] - value).abs();
            assert!(!difference.is_nan());
            largest = largest.max(difference);
        }
    }
    largest
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("not empty") as u32
}

#[test]
fn f32_logits_agree_with_transformers_at_every_position() {
    for name in MODELS {
        let expected = Expected::of(name);
        for length in LENGTHS {
            let prompt = expected.ids(&format!("prompt_{length}"));
            let found = logits(&model(name), WeightDtype::F32, KvDtype::F32, &prompt);
            let difference = largest_difference(&found, &expected, length);
            println!("{name} {length}: {difference:.1e}");
            assert!(difference < TOLERANCE, "{name}, {length} tokens: {difference}");
            let best: Vec<u32> = found.iter().map(|row| argmax(row)).collect();
            assert_eq!(best, expected.ids(&format!("argmax_{length}")), "{name}");
        }
    }
}

/// E2: at most 1.5 x what transformers itself loses by computing in bf16, and the same choice
/// wherever the reference decides by more than twice that.
#[test]
fn bf16_logits_are_within_the_reference_s_own_error() {
    for name in MODELS {
        within_the_reference_s_own_error(name, &|files, prompt| {
            logits(files, WeightDtype::Bf16, KvDtype::Bf16, prompt)
        });
    }
}

/// Of every position of a prompt.
type Logits = Vec<Vec<f32>>;

/// The same for whoever computes the logits.
pub fn within_the_reference_s_own_error(
    name: &str,
    logits: &dyn Fn(&ModelFiles, &[u32]) -> Logits,
) {
    let expected = Expected::of(name);
    let errors: Vec<f32> = expected.0["bf16_error"].to_vec1().expect("three numbers");
    for (length, error) in LENGTHS.into_iter().zip(errors) {
        let allowed = 1.5 * error;
        let prompt = expected.ids(&format!("prompt_{length}"));
        let found = logits(&model(name), &prompt);
        let difference = largest_difference(&found, &expected, length);
        println!("{name} {length}: {difference:.3} of {allowed:.3} allowed");
        assert!(difference <= allowed, "{name}, {length} tokens: {difference} > {allowed}");
        let margins: Vec<f32> =
            expected.0[&format!("margin_{length}")].to_vec1().expect("one a row");
        let best = expected.ids(&format!("argmax_{length}"));
        for ((row, margin), best) in found.iter().zip(margins).zip(best) {
            assert!(margin < 2.0 * allowed || argmax(row) == best, "{name}, {length} tokens");
        }
    }
}

fn f32_engine(files: ModelFiles, config: EngineConfig) -> Engine<ModelRunner> {
    let config = EngineConfig {
        dtype: Some(WeightDtype::F32),
        kv_dtype: Some(KvDtype::F32),
        kv_memory: Some(8 << 20),
        max_model_len: Some(500),
        threads: Some(2),
        ..config
    };
    strand_engine::load(files, &config, None, &mut |_, _| {}).expect("it fits").engine
}

/// Greedy tokens of every prompt, all submitted at once.
fn greedy(engine: &mut Engine<ModelRunner>, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let ids: Vec<_> = prompts
        .iter()
        .map(|prompt| {
            let mut request = Request::new(prompt.clone());
            request.limits.max_tokens = Some(64);
            request.limits.ignore_eos = true;
            engine.submit(&request).expect("it fits")
        })
        .collect();
    let mut outputs: HashMap<_, Vec<u32>> = HashMap::new();
    while !engine.is_idle() {
        for (id, event) in engine.step().events {
            match event {
                Event::Token { token, .. } => outputs.entry(id).or_default().push(token),
                Event::Failed(error) => panic!("{error}"),
                Event::Finished { .. } | Event::Prompt { .. } | Event::Embedding { .. } => {}
            }
        }
    }
    ids.iter().map(|id| outputs.remove(id).expect("it answered")).collect()
}

#[test]
fn greedy_tokens_are_those_of_transformers_alone_and_in_a_batch_of_nine() {
    for name in MODELS {
        let expected = Expected::of(name);
        let prompts = LENGTHS.map(|length| expected.ids(&format!("prompt_{length}")));
        let answers = LENGTHS.map(|length| expected.ids(&format!("greedy_{length}")));
        for block_size in [8, 16, 32] {
            for max_num_batched_tokens in [1, 7, 64] {
                let config =
                    EngineConfig { block_size, max_num_batched_tokens, ..EngineConfig::default() };
                let what = format!("{name}, {config:?}");
                for (prompt, answer) in prompts.iter().zip(&answers) {
                    let mut engine = f32_engine(model(name), config.clone());
                    let found = greedy(&mut engine, std::slice::from_ref(prompt));
                    assert_eq!(found[0], *answer, "{what}");
                }
                let mut random = Random::new(block_size as u64);
                let mut nine = prompts.to_vec();
                nine.extend((0..6).map(|n| random.tokens(5 + 11 * n, 128)));
                let found = greedy(&mut f32_engine(model(name), config), &nine);
                assert_eq!(found[..3], answers, "{what}");
            }
        }
    }
}

#[test]
fn gguf_files_give_the_logits_of_the_weights_they_dequantize_to() {
    for name in ["llama", "qwen3"] {
        for kind in ["f32", "f16", "bf16", "q8_0", "q4_0"] {
            let stem = fixtures().join("gguf").join(format!("{name}-{kind}"));
            let expected = Expected::read(&stem.with_extension("safetensors"));
            let open = || {
                let source = ModelSource::Gguf(stem.with_extension("gguf"));
                ModelFiles::open(&source).expect("the fixture is sound")
            };
            let prompt = expected.ids("prompt_17");
            let found = logits(&open(), WeightDtype::F32, KvDtype::F32, &prompt);
            let difference = largest_difference(&found, &expected, 17);
            println!("{name} {kind}: {difference:.1e}");
            assert!(difference < TOLERANCE, "{name} {kind}: {difference}");
            let mut engine = f32_engine(open(), EngineConfig::default());
            let tokens = greedy(&mut engine, &[prompt]);
            assert_eq!(tokens[0], expected.ids("greedy_17"), "{name} {kind}");
        }
    }
}
