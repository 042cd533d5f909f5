//! Quantized weights, computed in integers, against the f32 they stand for; and how far candle's
//! own quantized products are from that on the same files.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_qwen3::ModelWeights;
use strand_engine::{EngineConfig, Event, Request};
use strand_kernels::{KvDtype, WeightDtype};
use strand_models::{ModelFiles, ModelSource, Recipe};

use crate::random::Random;

/// The log-probabilities of the token behind each prompt.
fn next_tokens(
    source: &ModelSource,
    dtype: Option<WeightDtype>,
    prompts: &[Vec<u32>],
) -> Vec<Vec<f64>> {
    next_tokens_on(source, &in_f32(dtype), prompts)
}

/// On the CPU, with K and V as they were computed.
pub fn in_f32(dtype: Option<WeightDtype>) -> EngineConfig {
    EngineConfig {
        dtype,
        kv_dtype: Some(KvDtype::F32),
        kv_memory: Some(16 << 20),
        max_model_len: Some(256),
        threads: Some(2),
        ..EngineConfig::default()
    }
}

/// The same, wherever `config` says.
pub fn next_tokens_on(
    source: &ModelSource,
    config: &EngineConfig,
    prompts: &[Vec<u32>],
) -> Vec<Vec<f64>> {
    let files = ModelFiles::open(source).expect("the model is sound");
    let vocab = files.config.vocab_size;
    let loaded = strand_engine::load(files, config, None, &mut |_, _| {}).expect("it fits");
    let mut engine = loaded.engine;
    let mut all = Vec::new();
    for prompt in prompts {
        let mut request = Request::new(prompt.clone());
        request.limits.max_tokens = Some(1);
        request.limits.logprobs = Some(vocab as u32);
        engine.submit(&request).expect("it fits");
        while !engine.is_idle() {
            for (_, event) in engine.step().events {
                if let Event::Token { logprobs: Some(found), .. } = event {
                    let mut row = vec![0.0; vocab];
                    found.top.iter().for_each(|&(id, x)| row[id as usize] = f64::from(x));
                    all.push(row);
                }
            }
        }
    }
    all
}

/// Mean KL divergence from `exact` and the share of prompts with the same likeliest token.
pub fn deviation(exact: &[Vec<f64>], found: &[Vec<f64>]) -> (f64, f64) {
    assert_eq!(exact.len(), found.len());
    let likeliest = |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let divergence = |(exact, found): (&Vec<f64>, &Vec<f64>)| -> f64 {
        exact.iter().zip(found).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    let pairs = || exact.iter().zip(found);
    let same = pairs().filter(|(a, b)| likeliest(a) == likeliest(b)).count();
    let count = exact.len() as f64;
    (pairs().map(divergence).sum::<f64>() / count, same as f64 / count)
}

pub fn prompts(vocab: usize, count: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(11);
    (0..count).map(|_| random.tokens(24, vocab)).collect()
}

#[test]
fn every_recipe_is_near_the_weights_it_stands_for() {
    let config = r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
        "vocab_size": 500, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": true,
        "hidden_act": "silu", "torch_dtype": "bfloat16"}"#;
    let prompts = prompts(500, 60);
    for recipe in Recipe::ALL {
        let source =
            ModelSource::Random { config_json: config.to_owned(), seed: 3, recipe: Some(recipe) };
        let exact = next_tokens(&source, Some(WeightDtype::F32), &prompts);
        let found = next_tokens(&source, None, &prompts);
        let (divergence, same) = deviation(&exact, &found);
        println!("{}: KL {divergence:.1e}, top-1 {:.0} %", recipe.as_str(), 100.0 * same);
        assert!(found != exact, "it is not the same arithmetic");
        assert!(divergence < 1e-3 && same >= 0.9, "{recipe:?}: {divergence:e}, {same}");
    }
}

pub fn gguf(kind: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
    fixtures.join(format!("qwen3-{kind}.gguf"))
}

/// What candle's quantized Qwen3 makes of the file.
fn candle(path: &Path, prompts: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let mut file = File::open(path).expect("the fixture is there");
    let content = Content::read(&mut file).expect("the fixture is sound");
    let model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu);
    let mut model = model.expect("candle knows this architecture");
    let row = |prompt: &Vec<u32>| -> Vec<f64> {
        model.clear_kv_cache();
        let ids = Tensor::new(prompt.as_slice(), &Device::Cpu).and_then(|ids| ids.unsqueeze(0));
        let logits = model.forward(&ids.expect("a row"), 0).expect("it runs");
        let logits: Vec<f32> = logits.flatten_all().and_then(|x| x.to_vec1()).expect("one row");
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        logits.iter().map(|&x| f64::from(x) - sum.ln()).collect()
    };
    prompts.iter().map(row).collect()
}

#[test]
fn quantized_files_deviate_no_more_than_candles_own_products_do() {
    for kind in ["q8_0", "q4_0"] {
        let source = ModelSource::Gguf(gguf(kind));
        let vocab = ModelFiles::open(&source).expect("the fixture is sound").config.vocab_size;
        let prompts = prompts(vocab, 200);
        let exact = next_tokens(&source, Some(WeightDtype::F32), &prompts);
        let ours = deviation(&exact, &next_tokens(&source, None, &prompts));
        let candle = deviation(&exact, &candle(&gguf(kind), &prompts));
        for (who, (divergence, same)) in [("ours", ours), ("candle's", candle)] {
            println!("{kind}, {who}: KL {divergence:.2e}, top-1 {:.1} %", 100.0 * same);
        }
        assert!(ours.0 <= 1.1 * candle.0, "{kind}: {ours:?} against {candle:?}");
        assert!(ours.1 >= candle.1 - 0.02, "{kind}: {ours:?} against {candle:?}");
    }
}
