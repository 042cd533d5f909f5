//! `independent` against Hugging Face transformers under an explicit block mask: logits after a
//! turn over three chunks, and what greedy decoding says next. `tests/fixtures/make_block_masks.py`
//! says how transformers was made to compute it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use strand_engine::model_runner::ModelRunner;
use strand_engine::{Engine, EngineConfig, Event, Request, Sees, Segment};
use strand_kernels::{KvDtype, WeightDtype};
use strand_models::{ModelFiles, ModelSource};

const MODELS: [&str; 4] = ["qwen3", "llama3", "yarn", "mistral"];
const CASES: [&str; 2] = ["alone", "anchored"];
/// Of log-probabilities, f32 against transformers in f32.
const TOLERANCE: f32 = 1e-3;

/// A prompt and what transformers computed for it.
struct Case {
    name: String,
    prompt: Vec<Segment>,
    masked: Vec<f32>,
    causal: Vec<f32>,
    greedy: Vec<u32>,
}

fn folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(model)
}

impl Case {
    fn read(model: &str, case: &str) -> Self {
        let file = folder(model).join("block_mask.safetensors");
        let tensors: HashMap<String, Tensor> =
            candle_core::safetensors::load(file, &Device::Cpu).expect("the fixture is there");
        let of = |key: &str| &tensors[&format!("{case}_{key}")];
        let ids = |key: &str| of(key).to_vec1::<u32>().expect("ids are u32");
        let logprobs = |key: &str| log_softmax(&of(key).to_vec1().expect("logits are f32"));
        let anchor = ids("anchor");
        let mut prompt = match anchor.is_empty() {
            true => vec![],
            false => vec![Segment::anchor(anchor)],
        };
        prompt.extend((0..3).map(|i| Segment::independent(ids(&format!("chunk_{i}")))));
        prompt.push(Segment::new(ids("turn")));
        Self {
            name: format!("{model}, {case}"),
            prompt,
            masked: logprobs("masked"),
            causal: logprobs("causal"),
            greedy: ids("greedy"),
        }
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| x - max - sum.ln() as f32).collect()
}

fn engine(model: &str, block_size: usize) -> Engine<ModelRunner> {
    let source = ModelSource::Folder(folder(model));
    let files = ModelFiles::open(&source).expect("the fixture is sound");
    let config = EngineConfig {
        dtype: Some(WeightDtype::F32),
        kv_dtype: Some(KvDtype::F32),
        kv_memory: Some(4 << 20),
        max_model_len: Some(500),
        threads: Some(2),
        block_size,
        ..EngineConfig::default()
    };
    strand_engine::load(files, &config, None, &mut |_, _| {}).expect("it fits").engine
}

/// Log-probabilities after the prompt, and the greedy tokens from there on.
fn answer(
    engine: &mut Engine<ModelRunner>,
    prompt: &[Segment],
    vocabulary: usize,
    max_tokens: usize,
) -> (Vec<f32>, Vec<u32>) {
    let mut request = Request::new(Vec::new());
    request.prompt = prompt.to_vec();
    request.limits.max_tokens = Some(max_tokens);
    request.limits.ignore_eos = true;
    request.limits.logprobs = Some(vocabulary as u32);
    engine.submit(&request).expect("it fits");
    let (mut first, mut tokens) = (vec![f32::NAN; vocabulary], Vec::new());
    while !engine.is_idle() {
        for (_, event) in engine.step().events {
            match event {
                Event::Token { token, logprobs, .. } => {
                    if tokens.is_empty() {
                        for (id, value) in logprobs.expect("they were asked for").top {
                            first[id as usize] = value;
                        }
                    }
                    tokens.push(token);
                }
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
    }
    (first, tokens)
}

/// The largest difference; NaN is the largest there is.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}

#[test]
fn independent_chunks_equal_transformers_under_a_block_mask() {
    for (model, case) in MODELS.iter().flat_map(|model| CASES.map(|case| (*model, case))) {
        let Case { name, prompt, masked, greedy, .. } = Case::read(model, case);
        for block_size in [8, 16, 32] {
            let mut engine = engine(model, block_size);
            let (found, tokens) = answer(&mut engine, &prompt, masked.len(), greedy.len());
            let difference = apart(&found, &masked);
            println!("{name}, blocks of {block_size}: {difference:.1e}");
            assert!(difference < TOLERANCE, "{name}: {difference}");
            assert_eq!(tokens, greedy, "{name}");
        }
    }
}

/// The chunks' keys were stored when they stood elsewhere.
#[test]
fn chunks_that_were_encoded_in_another_order_equal_transformers_too() {
    for (model, case) in MODELS.iter().flat_map(|model| CASES.map(|case| (*model, case))) {
        let Case { name, prompt, masked, greedy, .. } = Case::read(model, case);
        let mut engine = engine(model, 16);
        let chunks = prompt.len() - 4..prompt.len() - 1;
        let mut reversed = prompt.clone();
        reversed[chunks.clone()].reverse();
        let (other, _) = answer(&mut engine, &reversed, masked.len(), 1);
        assert!(apart(&other, &masked) > 10.0 * TOLERANCE, "{name}: the order must matter");
        let before = engine.stats().cached_tokens;
        let (found, tokens) = answer(&mut engine, &prompt, masked.len(), greedy.len());
        let chunk_tokens: usize = prompt[chunks].iter().map(|chunk| chunk.tokens.len()).sum();
        let cached = engine.stats().cached_tokens - before;
        assert!(cached >= chunk_tokens as u64, "{name}: {cached} of {chunk_tokens} used again");
        assert!(apart(&found, &masked) < TOLERANCE, "{name}");
        assert_eq!(tokens, greedy, "{name}");
    }
}

#[test]
fn the_same_ids_with_nothing_hidden_equal_transformers_without_a_mask() {
    for (model, case) in MODELS.iter().flat_map(|model| CASES.map(|case| (*model, case))) {
        let Case { name, mut prompt, masked, causal, .. } = Case::read(model, case);
        assert!(apart(&masked, &causal) > 10.0 * TOLERANCE, "{name}: the mask must matter");
        prompt.iter_mut().for_each(|segment| segment.sees = Sees::Everything);
        let (found, _) = answer(&mut engine(model, 16), &prompt, causal.len(), 1);
        assert!(apart(&found, &causal) < TOLERANCE, "{name}");
    }
}
