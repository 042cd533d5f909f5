//! What switching, sharing and moving chunks costs, in tokens and blocks.

use std::time::Duration;

use strand_engine::context::{Chunk, ChunkKind, Context, Conversation, ReusePolicy};
use strand_engine::{
    EngineConfig, EngineHandle, Event, KvVariant, PinOutcome, Request, Reuse, Segment,
};
use strand_models::{ModelFiles, ModelSource};

fn engine() -> EngineHandle {
    engine_of(256 << 20)
}

fn engine_of(kv_memory: u64) -> EngineHandle {
    let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
    let config = EngineConfig {
        kv_memory: Some(kv_memory),
        max_model_len: Some(512),
        host_memory: Some(16 << 20),
        ..EngineConfig::default()
    };
    strand_engine::start(files, &config, None, &mut |_, _| {}).expect("it fits")
}

fn chunk(engine: &EngineHandle, number: usize) -> Chunk {
    let template = engine.chat_template().expect("it has one");
    let tokenizer = engine.tokenizer().expect("it has one");
    let text = format!("LIMIT_{number} = {}\n", number * 7).into_bytes();
    let name = format!("{number}.py");
    Chunk::new(&name, ChunkKind::File, text, template, tokenizer).expect("it is text")
}

fn context(policy: ReusePolicy) -> Context {
    Context::new(policy, Conversation::default(), Vec::new())
}

fn ask(engine: &EngineHandle, prompt: Vec<Segment>) -> Reuse {
    let mut request = Request::new(Vec::new());
    request.prompt = prompt;
    request.limits.max_tokens = Some(1);
    let mut events = engine.submit(request).expect("it is taken");
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Finished { reuse, .. } => return reuse,
            Event::Failed(error) => panic!("{error}"),
            Event::Token { .. } | Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
    panic!("no end")
}

/// What an answer about the active chunks costs.
fn answer(engine: &EngineHandle, context: &Context, text: &str) -> Reuse {
    let mut asked = context.clone();
    asked.say(text);
    let template = engine.chat_template().expect("it has one");
    let tokenizer = engine.tokenizer().expect("it has one");
    let prompt = asked.prompt(template, tokenizer, engine.plan().max_model_len - 1);
    ask(engine, prompt.expect("it fits").segments)
}

#[test]
fn with_a_thousand_chunks_a_toggle_encodes_nothing() {
    let engine = engine();
    let mut context = context(ReusePolicy::Independent);
    for number in 0..1000 {
        context.load(chunk(&engine, number), false);
        ask(&engine, context.encode(number).prompt);
    }
    // all that fit into the model's length
    let mut length = 0;
    for index in 0..1000 {
        length += context.entries()[index].chunk.ids.len();
        context.set_active(index, length < engine.plan().max_model_len / 2);
    }
    answer(&engine, &context, "What is LIMIT_3?");
    let before = engine.stats().expect("it runs").encoded_tokens;
    for index in 0..1000 {
        let active = context.entries()[index].active;
        context.set_active(index, !active);
        context.set_active(index, active);
    }
    let resident = engine.residency(context.all_chunks(), "", KvVariant::Lossless);
    assert!(resident.expect("it can be asked").iter().all(|tiers| tiers.device));
    assert_eq!(engine.stats().expect("it runs").encoded_tokens, before, "nothing was encoded");

    // one off: the turns; back on: what closes the prompt and can't be found, and no more
    context.set_active(3, false);
    let off = answer(&engine, &context, "What is LIMIT_3?");
    context.set_active(3, true);
    let on = answer(&engine, &context, "What is LIMIT_3?");
    assert!(off.encoded < 40 && on.encoded < off.encoded, "{off:?} {on:?}");
    let last = engine.tokenizer().expect("it has one").encode("<|im_start|>assistant\n");
    assert_eq!(on.encoded, last.expect("it is text").len(), "the opening of the answer");
}

#[test]
fn fifty_contexts_share_one_copy_of_a_chunk_wherever_it_stands() {
    let engine = engine();
    let idle = || engine.stats().expect("it runs").blocks_idle;
    let chunks: Vec<Chunk> = (0..51).map(|number| chunk(&engine, number)).collect();
    let mut alone = context(ReusePolicy::Independent);
    for (index, chunk) in chunks.iter().enumerate() {
        alone.load(chunk.clone(), true);
        ask(&engine, alone.encode(index).prompt);
    }
    let encoded = engine.stats().expect("it runs").encoded_tokens;
    let copies = idle();
    for number in 1..51 {
        // the shared one stands behind another chunk in each
        let mut context = context(ReusePolicy::Independent);
        context.load(chunks[number].clone(), true);
        context.load(chunks[0].clone(), true);
        let reuse = ask(&engine, context.chunk_segments().into_iter().chain(turn()).collect());
        let tokens = chunks[number].ids.len() + chunks[0].ids.len();
        assert_eq!((reuse.device, reuse.encoded), (tokens, 1));
    }
    assert_eq!(idle(), copies, "no block more than before");
    assert_eq!(engine.stats().expect("it runs").encoded_tokens, encoded + 50);
}

#[test]
fn a_pin_is_soft_and_has_a_budget_and_a_time_limit() {
    let engine = engine_of(2 << 20);
    let mut context = context(ReusePolicy::Independent);
    context.load(chunk(&engine, 0), true);
    let place = context.segments_to(0);
    let pin = |seconds| {
        let time = Duration::from_secs(seconds);
        engine.pin(place.clone(), "", KvVariant::Lossless, time).expect("it can be asked")
    };
    assert_eq!(pin(60), PinOutcome::Absent);
    ask(&engine, context.encode(0).prompt);
    assert_eq!(pin(60), PinOutcome::Accepted);
    assert_eq!(pin(1_000_000), PinOutcome::Clipped(Duration::from_hours(1)));

    // all chunks are in the pool, half of which may be pinned
    let blocks = context.entries()[0].chunk.ids.len().div_ceil(engine.plan().block_size);
    let fitting = engine.plan().num_blocks / 2 / blocks;
    let mut budget = Vec::new();
    for number in 1..=fitting {
        context.load(chunk(&engine, number), true);
        ask(&engine, context.encode(number).prompt);
        let place = context.segments_to(number);
        let time = Duration::from_secs(60);
        budget.push(engine.pin(place, "", KvVariant::Lossless, time).expect("it can be asked"));
    }
    let accepted = budget.iter().filter(|&&outcome| outcome == PinOutcome::Accepted).count();
    assert_eq!(accepted, fitting - 1, "the first one is pinned too");
    assert!(matches!(budget.last(), Some(PinOutcome::OverBudget { .. })), "{budget:?}");
}

/// The shortest of turns.
fn turn() -> Option<Segment> {
    Some(Segment::new(vec![1]))
}

#[test]
fn unloading_frees_blocks_and_restoring_brings_the_same_rows_to_others() {
    let engine = engine();
    let mut context = context(ReusePolicy::Independent);
    context.load(chunk(&engine, 0), true);
    ask(&engine, context.encode(0).prompt);
    let idle = || engine.stats().expect("it runs").blocks_idle;
    let (before, place) = (idle(), context.segments_to(0));
    let unloaded = engine.unload(place.clone(), "", KvVariant::Lossless).expect("it is there");
    let blocks = context.entries()[0].chunk.ids.len().div_ceil(engine.plan().block_size);
    assert_eq!((unloaded.blocks, idle()), (blocks, before - blocks));
    let tiers =
        engine.residency(place.clone(), "", KvVariant::Lossless).expect("it can be asked")[0];
    assert_eq!((tiers.device, tiers.host), (false, true));
    let reuse = ask(&engine, place.into_iter().chain(turn()).collect());
    assert_eq!((reuse.host, reuse.encoded), (context.entries()[0].chunk.ids.len(), 1));
}

#[test]
fn a_salt_has_its_own_kv_and_loses_no_other() {
    let engine = engine();
    let mut context = context(ReusePolicy::Independent);
    context.load(chunk(&engine, 0), true);
    let (place, id) = (context.segments_to(0), context.entries()[0].chunk.id);
    let is_there = |salt| {
        let tiers = engine.residency(place.clone(), salt, KvVariant::Lossless);
        let tiers = tiers.expect("it can be asked")[0];
        tiers.device || tiers.host
    };
    let encode = |salt: &str| {
        let mut request = context.encode(0);
        request.salt = salt.into();
        let mut events = engine.submit(request).expect("it is taken");
        while events.next_blocking().is_some() {}
    };
    for salt in ["", "a", "b"] {
        assert!(!is_there(salt), "not by another's work");
        encode(salt);
        assert!(is_there(salt));
    }
    engine.unload(place.clone(), "b", KvVariant::Lossless).expect("it is there");
    assert!(is_there("b"), "in the host");
    assert!(engine.erase(id, Some("a")).expect("it runs").blocks > 0);
    assert_eq!(["", "a", "b"].map(is_there), [true, false, true]);
    engine.forget(id, Some("b")).expect("it runs");
    assert_eq!(["", "a", "b"].map(is_there), [true, false, false]);
    encode("a");
    engine.erase(id, None).expect("it runs");
    assert_eq!(["", "a", "b"].map(is_there), [false; 3]);
}

#[test]
fn statistics_say_where_tokens_came_from_and_what_had_to_go() {
    let engine = engine_of(4 << 20);
    let mut context = context(ReusePolicy::Independent);
    let stats = || engine.stats().expect("it runs");
    for number in 0..60 {
        context.load(chunk(&engine, number), true);
        ask(&engine, context.encode(number).prompt);
    }
    let full = stats();
    assert!(full.evicted_blocks > 0 && full.host_bytes > 0, "{full:?}");
    assert!(full.device_bytes > 3 << 20 && full.device_bytes <= 4 << 20, "{full:?}");
    assert_eq!(full.reuse.cached() as u64, full.cached_tokens);
    assert_eq!((full.restored.from_host, full.reuse.host), (0, 0));
    ask(&engine, context.segments_to(0).into_iter().chain(turn()).collect());
    let restored = stats();
    let tokens = context.entries()[0].chunk.ids.len();
    assert_eq!((restored.restored.from_host, restored.reuse.host), (1, tokens));
    assert_eq!(restored.reuse.encoded, full.reuse.encoded + 1, "the turn alone");
}
