//! The engine on a GPU: E1, E3 and E4 bit for bit in deterministic mode, steps that are captured,
//! what comes off the device and goes back.
//!
//! On the emulator where the program was built with it, on the first GPU where it was built with
//! CUDA and there is one. Where there is neither, each test says so and passes.

use strand_engine::context::{Chunk, ChunkKind, Context, Conversation, ReusePolicy};
use strand_engine::model_runner::ModelRunner;
use strand_engine::store::{Codec, Store};
use strand_engine::{
    ChunkId, Device, Engine, EngineConfig, Error, Event, IoDone, Request, Reuse, SamplingParams,
    Segment,
};
use strand_kernels::gpu::Gpu;
use strand_models::{ModelFiles, ModelSource};

use crate::exactness::{self, VOCAB, drain, engine, request};
use crate::histories::{self, Place};
use crate::random::Random;
use crate::{binary, endings};

/// What can be tested here; says so where that is nothing.
pub fn devices() -> Vec<Device> {
    let emulator = cfg!(feature = "cuda-emulator").then_some(Device::Emulator);
    let cuda = Gpu::cuda(0).is_ok().then_some(Device::Cuda(0));
    if emulator.is_none() && cuda.is_none() {
        eprintln!("skipped: built without the emulator, and there is no GPU");
    }
    emulator.into_iter().chain(cuda).collect()
}

fn deterministic(device: Device) -> EngineConfig {
    EngineConfig { device, deterministic: true, ..exactness::base() }
}

fn fast(device: Device) -> EngineConfig {
    EngineConfig { device, ..exactness::base() }
}

const MODELS: [&str; 4] =
    ["Qwen3ForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM:q8_0", "Qwen3ForCausalLM:q4_k_m"];

#[test]
fn gpu_logits_are_the_same_bits_alone_and_in_any_schedule() {
    for device in devices() {
        for (seed, model) in MODELS.into_iter().enumerate() {
            exactness::any_schedule(model, seed as u64, &deterministic(device));
        }
    }
}

#[test]
fn gpu_preemption_changes_no_bit() {
    devices().into_iter().for_each(|device| exactness::preempted(&deterministic(device)));
}

#[test]
fn gpu_prefill_and_decode_give_the_same_bits() {
    devices()
        .into_iter()
        .for_each(|device| exactness::prefilled_and_decoded(&deterministic(device)));
}

#[test]
fn gpu_embeddings_are_the_same_bits_alone_and_in_any_schedule() {
    for device in devices() {
        exactness::embedded_in_any_schedule(20, &deterministic(device));
    }
}

#[test]
fn gpu_numbers_that_are_none_name_their_layer() {
    for device in devices() {
        endings::not_a_number(&EngineConfig { device, ..endings::small() });
    }
}

/// A small network under the bundled model's tokenizer and template.
fn small_speaker() -> ModelFiles {
    let config_json = r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
        "vocab_size": 2048, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": true,
        "hidden_act": "silu", "sliding_window": null, "torch_dtype": "bfloat16"}"#;
    let source = ModelSource::Random { config_json: config_json.to_owned(), seed: 3, recipe: None };
    let random = ModelFiles::open(&source).expect("the config is sound");
    ModelFiles { config: random.config, weights: random.weights, ..histories::bundled() }
}

/// E1 and E3: load, switch, reorder, save, restore, unload, evict, erase, fork and restart, with
/// all that is free full of NaN.
#[test]
fn gpu_logits_after_any_history_are_those_of_a_fresh_engine() {
    for device in devices() {
        let seen = histories::run(Place { device, model: small_speaker, kv_dtype: None }, 0..12);
        println!("{device}: {seen:?}");
        let Reuse { device: there, disk, .. } = seen.reuse;
        assert!(seen.checks >= 12 && seen.saved > 0 && seen.unloaded > 0, "{seen:?}");
        assert!(there > 0 && disk > 0 && seen.restarts > 0, "{seen:?}");
    }
}

fn bundled(config: &EngineConfig) -> Engine<ModelRunner> {
    let config = EngineConfig {
        kv_memory: Some(2 << 20),
        max_model_len: Some(700),
        max_num_seqs: 8,
        ..config.clone()
    };
    strand_engine::load(histories::bundled(), &config, None, &mut |_, _| {})
        .expect("it fits")
        .engine
}

fn tokens(engine: &mut Engine<ModelRunner>, request: &Request) -> Vec<u32> {
    engine.submit(request).expect("it fits");
    let mut tokens = Vec::new();
    while !engine.is_idle() {
        for (_, event) in engine.step().events {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        engine.check_invariants();
    }
    tokens
}

fn gpu(engine: &mut Engine<ModelRunner>) -> Gpu {
    engine.runner_mut().gpu().expect("it computes on one").clone()
}

/// A question over a file, as the bundled model was trained for.
fn question(name: &str, content: &str, question: &str) -> Vec<Segment> {
    let model = histories::bundled();
    let (template, tokenizer) = histories::language(&model);
    let mut context = Context::new(ReusePolicy::Independent, Conversation::default(), Vec::new());
    let content = content.as_bytes().to_vec();
    let chunk = Chunk::new(name, ChunkKind::File, content, template, tokenizer);
    context.load(chunk.expect("it is text"), true);
    context.say(question);
    context.prompt(template, tokenizer, 600).expect("there is room").segments
}

#[test]
fn gpu_answers_of_the_bundled_model_are_those_of_the_cpu() {
    let prompts = [
        question("a.py", "MAX_RETRIES = 47\n", "What is MAX_RETRIES?"),
        question("b.txt", "Anna Berg lives in Lisbon.", "Where does Anna Berg live?"),
        question("c.txt", "The gate is green.", "Who is Mira?"),
    ];
    for device in devices() {
        for deterministic in [false, true] {
            let mut here = bundled(&EngineConfig::default());
            let mut there =
                bundled(&EngineConfig { device, deterministic, ..EngineConfig::default() });
            for prompt in &prompts {
                let mut asked = Request::new(Vec::new());
                asked.prompt = prompt.clone();
                asked.limits.max_tokens = Some(12);
                asked.limits.ignore_eos = true;
                let expected = tokens(&mut here, &asked);
                assert_eq!(tokens(&mut there, &asked), expected, "deterministic: {deterministic}");
            }
        }
    }
}

#[test]
fn gpu_decode_steps_are_captured_once_and_replayed_bit_for_bit() {
    for device in devices() {
        let mut random = Random::new(4);
        let chunks = [random.tokens(30, VOCAB), random.tokens(40, VOCAB)];
        let turn = random.tokens(9, VOCAB);
        let asked = |active: &[usize]| {
            let mut asked = request(&[], 6);
            asked.limits.logprobs = None;
            asked.prompt =
                active.iter().map(|&index| Segment::independent(chunks[index].clone())).collect();
            asked.prompt.push(Segment::new(turn.clone()));
            asked
        };
        let mut engine = engine("Qwen3ForCausalLM", &fast(device));
        let both = tokens(&mut engine, &asked(&[0, 1]));
        let gpu = gpu(&mut engine);
        // of five decode steps one was carried out, one captured, four replayed
        assert_eq!((gpu.counters().captures(), gpu.counters().replays()), (1, 4));
        // toggled, and reordered: nothing is captured again
        for active in [&[0][..], &[1, 0], &[], &[0, 1]] {
            let answer = tokens(&mut engine, &asked(active));
            assert!(active != [0, 1] || answer == both);
        }
        assert_eq!((gpu.counters().captures(), gpu.counters().replays()), (1, 4 + 4 * 5));
    }
}

#[test]
fn gpu_replayed_steps_give_the_bits_of_steps_that_were_not() {
    for config in devices().into_iter().flat_map(|device| [fast(device), deterministic(device)]) {
        let prompt = Random::new(8).tokens(21, VOCAB);
        let mut engine = engine("Qwen3ForCausalLM", &config);
        let mut answers = Vec::new();
        for _ in 0..3 {
            // the first answer begins before anything is captured, the last is all replayed
            let id = engine.submit(&request(&prompt, 8)).expect("it fits");
            answers.push(drain(&mut engine).remove(&id).expect("it answers"));
        }
        assert!(gpu(&mut engine).counters().replays() > 10);
        // what was found in the cache is not what differs: of the first token, only decode steps
        assert!(answers[0] == answers[1] && answers[1] == answers[2], "{config:?}");
    }
}

#[test]
fn gpu_steps_upload_once_and_wait_once() {
    for device in devices() {
        let mut engine = engine("Qwen3ForCausalLM", &fast(device));
        let gpu = gpu(&mut engine);
        let mut asked = request(&Random::new(9).tokens(30, VOCAB), 20);
        asked.limits.logprobs = None;
        engine.submit(&asked).expect("it fits");
        while !engine.is_idle() {
            let before = (gpu.counters().uploads(), gpu.counters().synchronizations());
            engine.step();
            let after = (gpu.counters().uploads(), gpu.counters().synchronizations());
            assert_eq!(after, (before.0 + 1, before.1 + 1));
        }
    }
}

/// With log-probabilities rows come to the host's sampler, without them the device draws.
#[test]
fn gpu_draws_are_those_of_the_host() {
    for device in devices() {
        for (number, params) in [
            SamplingParams { temperature: 1.0, ..SamplingParams::default() },
            SamplingParams { temperature: 0.7, top_k: Some(9), ..SamplingParams::default() },
            SamplingParams {
                temperature: 1.3,
                top_p: 0.8,
                min_p: 0.02,
                ..SamplingParams::default()
            },
        ]
        .into_iter()
        .enumerate()
        {
            let prompt = Random::new(10).tokens(12, VOCAB);
            let mut asked = request(&prompt, 24);
            asked.sampling = SamplingParams { seed: number as u64, ..params };
            let mut engine = engine("Qwen3ForCausalLM", &deterministic(device));
            let by_host = tokens(&mut engine, &asked);
            asked.limits.logprobs = None;
            assert_eq!(tokens(&mut engine, &asked), by_host);
        }
    }
}

#[test]
fn gpu_requests_that_end_early_or_wait_for_room_leave_the_pool_whole() {
    for device in devices() {
        let row = 2 * 2 * 2 * 16 * 2; // layers x (K, V) x heads x head_dim x bytes
        let config = EngineConfig {
            kv_memory: Some(16 * 16 * row),
            max_model_len: Some(128),
            max_num_seqs: 3,
            ..fast(device)
        };
        let mut engine = engine("Qwen3ForCausalLM", &config);
        let mut random = Random::new(11);
        for round in 0..8 {
            let asked = request(&random.tokens(40, VOCAB), 30);
            let id = engine.submit(&asked).expect("it fits");
            (0..random.between(0, 6)).for_each(|_| drop(engine.step()));
            if round % 3 == 0 {
                engine.cancel(id);
            }
            engine.check_invariants();
        }
        drain(&mut engine);
        assert_eq!(engine.stats().blocks_free, engine.stats().blocks);
    }
}

/// What a GPU computed is read again by the same arithmetic, and by no other.
#[test]
fn gpu_kv_files_are_read_by_the_same_arithmetic_alone() {
    for device in devices() {
        let folder = binary::scratch("gpu-files").join(device.to_string());
        drop(std::fs::remove_dir_all(&folder));
        let tokens = Random::new(12).tokens(50, VOCAB);
        let id = Some(ChunkId::of(b"fifty tokens"));
        let chunk = vec![Segment { chunk: id, ..Segment::independent(tokens) }];
        let ask = |config: &EngineConfig, save: bool| {
            let store = Store::open(&folder).expect("the folder can be written");
            let files = ModelFiles::open(&exactness::source("Qwen3ForCausalLM", 1024));
            let files = files.expect("the config is sound");
            let loaded = strand_engine::load(files, config, Some(store), &mut |_, _| {});
            let mut loaded = loaded.expect("it fits");
            let mut asked = request(&[], 1);
            asked.prompt = chunk.clone();
            asked.prompt.push(Segment::new(vec![7, 8]));
            asked.restore = strand_engine::Restore::Always;
            let engine = &mut loaded.engine;
            engine.submit(&asked).expect("it fits");
            let mut used = Reuse::default();
            while !engine.is_idle() {
                for job in engine.take_jobs() {
                    let files = loaded.files.as_ref().expect("it has a folder");
                    engine.io_done(files.writer.carry_out(job));
                }
                for (_, event) in engine.step().events {
                    if let Event::Finished { reuse, .. } = event {
                        used = reuse;
                    }
                }
            }
            if save {
                engine.save(chunk.clone(), "", Codec::Planes).expect("it has KV");
                let files = loaded.files.as_ref().expect("it has a folder");
                for job in engine.take_jobs() {
                    let done = files.writer.carry_out(job);
                    assert!(matches!(&done, IoDone::Saved { result: Ok(_), .. }), "{done:?}");
                    engine.io_done(done);
                }
            }
            used
        };
        assert_eq!(ask(&deterministic(device), true).disk, 0);
        assert_eq!(ask(&deterministic(device), false).disk, 50);
        assert_eq!(ask(&exactness::base(), false).disk, 0, "the CPU has bits of its own");
        assert_eq!(ask(&fast(device), false).disk, 0, "and so has the fast mode");
    }
}

#[test]
fn gpu_that_is_not_there_is_an_error_with_a_remedy() {
    let config = EngineConfig { device: Device::Cuda(99), ..EngineConfig::default() };
    let error = strand_engine::load(histories::bundled(), &config, None, &mut |_, _| {});
    let error = error.err().expect("no machine has that many");
    assert!(matches!(&error, Error::Device(_)), "{error}");
    assert!(error.to_string().contains("cuda") || error.to_string().contains("CUDA"), "{error}");
}
