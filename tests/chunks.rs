//! E0, E1 and E3 for chunks on the device: whatever was asked before, in whatever order chunks
//! stand, logits are those of a fresh engine. Logits are compared through the log-probabilities
//! of the whole vocabulary, bit for bit, on the bundled model; the pool starts full of NaN.

use strand_engine::model_runner::ModelRunner;
use strand_engine::{Engine, EngineConfig, Event, Request, Reuse, Segment};
use strand_models::{ModelFiles, ModelSource};

use crate::random::Random;

/// A chunk as a context places it.
type Place = fn(Vec<u32>) -> Segment;

const PLACES: [Place; 2] = [Segment::new, Segment::independent];

fn engine(config: &EngineConfig) -> Engine<ModelRunner> {
    let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
    let config = EngineConfig {
        kv_memory: Some(2 << 20),
        max_model_len: Some(700),
        threads: Some(2),
        ..config.clone()
    };
    let mut engine =
        strand_engine::load(files, &config, None, &mut |_, _| {}).expect("it fits").engine;
    let blocks: Vec<u32> = (0..engine.plan().num_blocks as u32).collect();
    engine.runner_mut().poison(&blocks).expect("the pool can be written");
    engine
}

/// Two tokens, each with the bits of its whole distribution, and what was reused.
type Answer = (Vec<Vec<(u32, u32)>>, Reuse);

fn ask(engine: &mut Engine<ModelRunner>, prompt: Vec<Segment>) -> Answer {
    let vocabulary = engine.plan().vocab_size as u32;
    let mut request = Request::new(Vec::new());
    request.prompt = prompt;
    request.limits.max_tokens = Some(2);
    request.limits.ignore_eos = true;
    request.limits.logprobs = Some(vocabulary);
    engine.submit(&request).expect("it fits");
    let (mut tokens, mut used) = (Vec::new(), Reuse::default());
    while !engine.is_idle() {
        for (_, event) in engine.step().events {
            match event {
                Event::Token { logprobs, .. } => {
                    let top = logprobs.expect("they were asked for").top;
                    tokens.push(top.iter().map(|&(id, value)| (id, value.to_bits())).collect());
                }
                Event::Finished { reuse, .. } => used = reuse,
                Event::Failed(error) => panic!("{error}"),
                Event::Prompt { .. } | Event::Embedding { .. } => {}
            }
        }
    }
    (tokens, used)
}

/// Some chunks in some order, then one of a few turns.
fn random_prompt(random: &mut Random, chunks: &[Vec<u32>], place: Place) -> Vec<Segment> {
    let mut left: Vec<&Vec<u32>> = chunks.iter().collect();
    let mut prompt = Vec::new();
    for _ in 0..random.between(0, chunks.len() + 1) {
        let chosen = left.remove(random.between(0, left.len()));
        prompt.push(place(chosen.clone()));
    }
    let turn = random.between(0, 3) as u32;
    prompt.push(Segment::new((0..20).map(|n| 100 + 31 * turn + n).collect()));
    prompt
}

#[test]
fn after_any_history_the_logits_are_those_of_a_fresh_engine() {
    for (seed, place) in (0..6).flat_map(|seed| PLACES.map(|place| (seed, place))) {
        let mut random = Random::new(seed);
        let chunks: Vec<Vec<u32>> =
            [5, 16, 33, 80, 120].map(|length| random.tokens(length, 2000)).to_vec();
        let config = EngineConfig {
            block_size: [8, 16, 32][random.between(0, 3)],
            max_num_batched_tokens: [7, 64, 1024][random.between(0, 3)],
            ..EngineConfig::default()
        };
        let mut used = engine(&config);
        let mut reused = 0;
        for step in 0..12 {
            let prompt = random_prompt(&mut random, &chunks, place);
            let (found, reuse) = ask(&mut used, prompt.clone());
            let (expected, fresh) = ask(&mut engine(&EngineConfig::default()), prompt);
            assert!(found == expected, "seed {seed}, step {step}, {config:?}");
            assert_eq!(fresh.device, 0);
            reused += reuse.device;
        }
        assert!(reused > 0, "the history was meant to leave something to find");
    }
}

#[test]
fn an_independent_chunk_is_encoded_once_for_every_place() {
    let mut random = Random::new(1);
    let [a, b, c] = [40, 50, 60].map(|length| random.tokens(length, 2000));
    let turn = random.tokens(10, 2000);
    let mut engine = engine(&EngineConfig::default());
    let mut encoded = |chunks: &[&Vec<u32>]| {
        let mut prompt: Vec<Segment> =
            chunks.iter().map(|chunk| Segment::independent((*chunk).clone())).collect();
        prompt.push(Segment::new(turn.clone()));
        ask(&mut engine, prompt).1.encoded
    };
    assert_eq!(encoded(&[&a, &b, &c]), 150 + 10);
    assert_eq!(encoded(&[&c, &a, &b]), 10, "another order: the turn alone");
    assert_eq!(encoded(&[&b]), 10, "two switched off: the turn alone");
    assert_eq!(encoded(&[&a, &b, &c]), 10, "and back");
}

#[test]
fn an_inactive_chunk_leaves_no_trace() {
    let mut random = Random::new(2);
    let [a, b, other] = [40, 50, 60].map(|length| random.tokens(length, 2000));
    let turn = random.tokens(10, 2000);
    for place in PLACES {
        let asked = vec![place(a.clone()), Segment::new(turn.clone())];
        let mut answers = Vec::new();
        for inactive in [&b, &other] {
            let mut engine = engine(&EngineConfig::default());
            let both = vec![place(a.clone()), place(inactive.clone()), Segment::new(turn.clone())];
            ask(&mut engine, both);
            answers.push(ask(&mut engine, asked.clone()).0);
        }
        assert!(answers[0] == answers[1]);
    }
}
