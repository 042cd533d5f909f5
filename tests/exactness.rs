//! E4: a request's logits are the same bits whatever happens around it.
//!
//! Logits are compared through the log-probabilities of the whole vocabulary.

use std::collections::HashMap;

use strand_engine::model_runner::ModelRunner;
use strand_engine::sequence::RequestId;
use strand_engine::{Engine, EngineConfig, Event, Request, TokenLogprobs};
use strand_kernels::{KvDtype, WeightDtype};
use strand_models::{ModelFiles, ModelSource, Recipe};

use crate::random::Random;

pub const VOCAB: usize = 96;

/// An architecture, and how its weights are quantized where `:` and a recipe follow.
const MODELS: [&str; 4] =
    ["Qwen3ForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM:q8_0", "Qwen3ForCausalLM:q4_k_m"];

pub fn source(model: &str, length: usize) -> ModelSource {
    let (architecture, recipe) = model.split_once(':').unwrap_or((model, ""));
    let recipe = Recipe::parse(recipe);
    ModelSource::Random { config_json: config(architecture, recipe, length), seed: 1, recipe }
}

/// Small, but with everything that could depend on a schedule: grouped heads, a sliding window
/// shorter than the prompts, norms on q and k where the architecture has them.
pub fn config(architecture: &str, recipe: Option<Recipe>, length: usize) -> String {
    let (hidden, inner) = match recipe {
        None => (48, 80),
        Some(Recipe::Q4KM) => (256, 256), // whole blocks
        Some(_) => (64, 96),
    };
    let (model_type, window) = match architecture {
        "MistralForCausalLM" => ("mistral", "40"),
        _ => ("qwen3", "null"),
    };
    format!(
        r#"{{"architectures": ["{architecture}"], "model_type": "{model_type}",
        "vocab_size": {VOCAB}, "hidden_size": {hidden}, "intermediate_size": {inner},
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": {length}, "tie_word_embeddings": false,
        "hidden_act": "silu", "sliding_window": {window}, "torch_dtype": "bfloat16"}}"#
    )
}

pub fn engine(model: &str, config_: &EngineConfig) -> Engine<ModelRunner> {
    let files = ModelFiles::open(&source(model, 1024)).expect("the config is sound");
    strand_engine::load(files, config_, None, &mut |_, _| {}).expect("it fits").engine
}

pub fn base() -> EngineConfig {
    EngineConfig {
        kv_memory: Some(4 << 20),
        max_model_len: Some(1024),
        threads: Some(2),
        ..EngineConfig::default()
    }
}

pub fn request(prompt: &[u32], max_tokens: usize) -> Request {
    let mut request = Request::new(prompt.to_vec());
    request.limits.max_tokens = Some(max_tokens);
    request.limits.ignore_eos = true;
    request.limits.logprobs = Some(VOCAB as u32);
    request
}

pub type Answer = Vec<(u32, Vec<(u32, u32)>)>;

/// Tokens, each with its whole distribution as bits.
pub fn bits(logprobs: &TokenLogprobs) -> Vec<(u32, u32)> {
    logprobs.top.iter().map(|&(id, logprob)| (id, logprob.to_bits())).collect()
}

/// Runs until idle; answers by request.
pub fn drain(engine: &mut Engine<ModelRunner>) -> HashMap<RequestId, Answer> {
    let mut answers: HashMap<RequestId, Answer> = HashMap::new();
    while !engine.is_idle() {
        collect(engine.step().events, &mut answers);
        engine.check_invariants();
    }
    answers
}

pub fn collect(events: Vec<(RequestId, Event)>, answers: &mut HashMap<RequestId, Answer>) {
    for (id, event) in events {
        match event {
            Event::Token { token, logprobs, .. } => {
                let logprobs = logprobs.expect("they were asked for");
                answers.entry(id).or_default().push((token, bits(&logprobs)));
            }
            Event::Failed(error) => panic!("{error}"),
            Event::Finished { .. } | Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
}

pub fn alone(model: &str, config: &EngineConfig, request: &Request) -> Answer {
    let mut engine = engine(model, config);
    let id = engine.submit(request).expect("it fits");
    drain(&mut engine).remove(&id).expect("it answers")
}

fn random_config(random: &mut Random, base: &EngineConfig) -> EngineConfig {
    EngineConfig {
        block_size: [8, 16, 32][random.between(0, 3)],
        max_num_batched_tokens: [1, 7, 64, 1024][random.between(0, 4)],
        max_num_seqs: random.between(1, 12),
        threads: Some(random.between(1, 3)),
        ..base.clone()
    }
}

#[test]
fn logits_are_the_same_bits_alone_and_in_any_schedule() {
    for architecture in MODELS {
        for seed in 0..8 {
            any_schedule(architecture, seed, &base());
        }
    }
}

/// Requests in a schedule of chance, against each alone; `base` says on what.
pub fn any_schedule(architecture: &str, seed: u64, base: &EngineConfig) {
    let mut random = Random::new(seed);
    let prefix = random.tokens(70, VOCAB);
    let requests: Vec<Request> = (0..9)
        .map(|_| {
            let shared = random.between(0, prefix.len());
            let own = random.between(1, 60);
            let mut prompt = prefix[..shared].to_vec();
            prompt.extend(random.tokens(own, VOCAB));
            request(&prompt, random.between(1, 24))
        })
        .collect();
    let expected: Vec<Answer> =
        requests.iter().map(|request| alone(architecture, base, request)).collect();
    let config = random_config(&mut random, base);
    let mut engine = engine(architecture, &config);
    // twice: the second time prompts are found in the cache
    for _ in 0..2 {
        let mut answers = HashMap::new();
        let mut ids = Vec::new();
        for request in &requests {
            ids.push(engine.submit(request).expect("it fits"));
            for _ in 0..random.between(0, 4) {
                collect(engine.step().events, &mut answers);
            }
        }
        answers = merge(answers, drain(&mut engine));
        for (id, expected) in ids.iter().zip(&expected) {
            assert!(answers[id] == *expected, "seed {seed}, {architecture}, {config:?}");
        }
    }
    assert!(engine.stats().cached_tokens > 0, "the second round hits the cache");
}

pub fn merge(
    mut first: HashMap<RequestId, Answer>,
    second: HashMap<RequestId, Answer>,
) -> HashMap<RequestId, Answer> {
    for (id, answer) in second {
        first.entry(id).or_default().extend(answer);
    }
    first
}

#[test]
fn preemption_changes_no_bit() {
    preempted(&base());
}

/// Requests that a small pool can't hold at once, against each alone; `base` says on what.
pub fn preempted(base: &EngineConfig) {
    let mut random = Random::new(99);
    let requests: Vec<Request> = (0..6).map(|_| request(&random.tokens(30, VOCAB), 60)).collect();
    let expected: Vec<Answer> =
        requests.iter().map(|request| alone("Qwen3ForCausalLM", base, request)).collect();
    let row = 2 * 2 * 2 * 16 * 2; // layers x (K, V) x heads x head_dim x bytes
    let config = EngineConfig {
        block_size: 8,
        kv_memory: Some(30 * 8 * row),
        max_model_len: Some(100),
        ..base.clone()
    };
    let mut engine = engine("Qwen3ForCausalLM", &config);
    let ids: Vec<RequestId> =
        requests.iter().map(|request| engine.submit(request).expect("it fits")).collect();
    let answers = drain(&mut engine);
    assert!(engine.stats().preemptions > 0, "the pool was meant to be too small");
    for (id, expected) in ids.iter().zip(&expected) {
        assert!(answers[id] == *expected);
    }
}

#[test]
fn prefill_and_decode_give_the_same_bits() {
    for (dtype, kv_dtype) in [
        (WeightDtype::Bf16, KvDtype::Bf16),
        (WeightDtype::F32, KvDtype::F32),
        (WeightDtype::F16, KvDtype::F16),
        (WeightDtype::Bf16, KvDtype::Int8),
    ] {
        let config = EngineConfig { dtype: Some(dtype), kv_dtype: Some(kv_dtype), ..base() };
        prefilled_and_decoded(&config);
    }
}

/// Logits of an answer's tokens as they were generated, and as the prompt of another request.
pub fn prefilled_and_decoded(config: &EngineConfig) {
    let mut random = Random::new(5);
    let prompt = random.tokens(33, VOCAB);
    let decoded = alone("Qwen3ForCausalLM", config, &request(&prompt, 40));
    let mut whole = prompt.clone();
    whole.extend(decoded.iter().map(|(token, _)| token));
    let mut again = request(&whole, 1);
    again.limits.prompt_logprobs = Some(VOCAB as u32);
    let mut engine = engine("Qwen3ForCausalLM", config);
    engine.submit(&again).expect("it fits");
    let mut prefilled = Vec::new();
    while !engine.is_idle() {
        for (_, event) in engine.step().events {
            if let Event::Prompt { logprobs } = event {
                prefilled.extend(logprobs.iter().map(bits));
            }
        }
    }
    let decoded: Vec<_> = decoded.into_iter().map(|(_, bits)| bits).collect();
    assert!(prefilled[prompt.len() - 1..] == decoded[..], "{config:?}");
}

#[test]
fn choices_share_the_prompt_and_draw_apart() {
    let mut random = Random::new(6);
    let prompt = random.tokens(64, VOCAB);
    let mut asked = request(&prompt, 12);
    asked.limits.n = 4;
    asked.sampling.temperature = 1.0;
    asked.sampling.seed = 3;
    let mut engine = engine("Qwen3ForCausalLM", &base());
    engine.submit(&asked).expect("it fits");
    let mut outputs: HashMap<u32, Vec<u32>> = HashMap::new();
    while !engine.is_idle() {
        for (_, event) in engine.step().events {
            if let Event::Token { choice, token, .. } = event {
                outputs.entry(choice).or_default().push(token);
            }
        }
    }
    assert_eq!(outputs.len(), 4);
    assert!(outputs[&0] != outputs[&1] && outputs[&1] != outputs[&2]);
    let stats = engine.stats();
    // 64 tokens are 4 blocks; the last is computed again by each choice
    assert_eq!((stats.prompt_tokens, stats.cached_tokens), (4 * 64, 3 * 48));
    let first = alone("Qwen3ForCausalLM", &base(), &{
        let mut one = asked.clone();
        one.limits.n = 1;
        one
    });
    assert_eq!(first.iter().map(|(token, _)| *token).collect::<Vec<_>>(), outputs[&0]);
}

#[test]
fn the_same_prompt_again_computes_one_block_or_what_is_new() {
    let mut random = Random::new(7);
    let prompt = random.tokens(2003, VOCAB);
    let config = EngineConfig { max_model_len: Some(2048), ..base() };
    let files = ModelFiles::open(&source("Qwen3ForCausalLM", 2048)).expect("the config is sound");
    let mut engine =
        strand_engine::load(files, &config, None, &mut |_, _| {}).expect("it fits").engine;
    let mut encoded = |tokens: usize| {
        let before = engine.stats();
        engine.submit(&request(&prompt[..tokens], 1)).expect("it fits");
        drain(&mut engine);
        let after = engine.stats();
        let computed = after.encoded_tokens - before.encoded_tokens;
        (computed, after.cached_tokens - before.cached_tokens)
    };
    assert_eq!(encoded(2000), (2000, 0));
    assert_eq!(encoded(2000), (16, 1984));
    assert_eq!(encoded(2003), (3, 2000));
}

pub fn embeddings(engine: &mut Engine<ModelRunner>) -> HashMap<RequestId, Vec<u32>> {
    let mut found = HashMap::new();
    while !engine.is_idle() {
        for (id, event) in engine.step().events {
            match event {
                Event::Embedding { vector } => {
                    let bits = vector.iter().map(|value| value.to_bits()).collect();
                    assert!(found.insert(id, bits).is_none(), "once");
                }
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        engine.check_invariants();
    }
    found
}

#[test]
fn an_embedding_is_the_same_bits_alone_and_in_any_schedule() {
    for seed in 20..26 {
        embedded_in_any_schedule(seed, &base());
    }
}

/// Embeddings among other requests, against each alone; `base` says on what.
pub fn embedded_in_any_schedule(seed: u64, base: &EngineConfig) {
    let architecture = "Qwen3ForCausalLM";
    let mut random = Random::new(seed);
    let prefix = random.tokens(70, VOCAB);
    let prompts: Vec<Vec<u32>> = (0..6)
        .map(|_| {
            let shared = random.between(0, prefix.len());
            let own = random.between(1, 90);
            [&prefix[..shared], &random.tokens(own, VOCAB)].concat()
        })
        .collect();
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            let mut engine = engine(architecture, base);
            engine.submit(&Request::embedding(prompt.clone())).expect("it fits");
            embeddings(&mut engine).into_values().next().expect("one")
        })
        .collect();
    // few blocks, so that some give way in the middle; other requests fill the cache
    let row = 2 * 2 * 2 * 16 * 2; // layers x (K, V) x heads x head_dim x bytes
    let kv_memory = Some(340 * row);
    let config =
        EngineConfig { kv_memory, max_model_len: Some(170), ..random_config(&mut random, base) };
    let mut engine = engine(architecture, &config);
    for _ in 0..2 {
        let ids: Vec<RequestId> = prompts
            .iter()
            .map(|prompt| {
                engine.submit(&request(prompt, 8)).expect("it fits");
                engine.submit(&Request::embedding(prompt.clone())).expect("it fits")
            })
            .collect();
        let found = embeddings(&mut engine);
        for (id, alone) in ids.iter().zip(&alone) {
            assert!(found[id] == *alone, "seed {seed}, {config:?}");
        }
    }
}
