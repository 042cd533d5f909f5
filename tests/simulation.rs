//! The scheduler and the block manager under random load, with a runner whose "KV" is the
//! tokens themselves: it writes them through the slot mapping and reads them back through the
//! page entries, so a wrong block shows as a wrong token.

use std::collections::HashMap;

use strand_engine::batch::{Batch, BatchRow, RowOutput, Runner, Sampled};
use strand_engine::cache::Layout;
use strand_engine::sequence::RequestId;
use strand_engine::{
    Engine, EnginePlan, Error, Event, FinishReason, Limits, Request, SamplingParams, Segment,
};
use strand_kernels::{KvDtype, WeightDtype};

use crate::random::Random;

const VOCAB: usize = 50;
const EOS: u32 = 7;

/// Stores token ids as KV rows.
struct FakeRunner {
    rows: Vec<Option<u32>>,
    block_size: usize,
    /// Fails the row of every so many-th run.
    fail_every: Option<u64>,
    runs: u64,
}

impl FakeRunner {
    fn compute(&mut self, row: &BatchRow) -> RowOutput {
        for (&slot, &token) in row.slot_mapping.iter().zip(&row.tokens) {
            self.rows[slot as usize] = Some(token);
        }
        let mut seen = Vec::new();
        for entry in &row.view {
            assert_eq!(entry.stored_position as usize, seen.len(), "a gap in the view");
            let first = entry.block as usize * self.block_size;
            let rows = &self.rows[first..first + usize::from(entry.num_valid)];
            seen.extend(rows.iter().map(|row| row.expect("a visible row was written")));
        }
        assert_eq!(seen.len(), row.start as usize + row.tokens.len());
        let sampled = row
            .sample
            .as_ref()
            .map(|wanted| Sampled { token: next_token(&seen, wanted.choice), logprobs: None });
        RowOutput { id: row.id, sampled, prompt_logprobs: Vec::new() }
    }
}

impl Runner for FakeRunner {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error> {
        self.runs += 1;
        let fails = self.fail_every.is_some_and(|every| self.runs.is_multiple_of(every));
        let mut outputs: Vec<_> = batch.rows.iter().map(|row| Ok(self.compute(row))).collect();
        if fails {
            outputs[0] = Err(Error::NotANumber { layer: "layers.0".into() });
        }
        Ok(outputs)
    }
}

/// The "model": a function of everything before, and of the choice.
fn next_token(seen: &[u32], choice: u32) -> u32 {
    let mut state = Random::new(u64::from(choice) + 1);
    let hash = seen.iter().fold(state.next(), |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01B3).rotate_left(23)
    });
    (hash % VOCAB as u64) as u32
}

/// What a request must answer, computed without any engine.
fn oracle(request: &Request, choice: u32, max_tokens: usize) -> (Vec<u32>, FinishReason) {
    let mut tokens: Vec<u32> =
        request.prompt.iter().flat_map(|segment| segment.tokens.clone()).collect();
    let mut output = Vec::new();
    loop {
        let token = next_token(&tokens, choice);
        tokens.push(token);
        output.push(token);
        if token == EOS && !request.limits.ignore_eos {
            return (output, FinishReason::Stop);
        }
        if output.len() == max_tokens {
            return (output, FinishReason::Length);
        }
    }
}

fn plan(random: &mut Random) -> EnginePlan {
    let block_size = [1, 2, 4, 16][random.between(0, 4)];
    let max_model_len = random.between(20, 80);
    let least = max_model_len.div_ceil(block_size);
    EnginePlan {
        dtype: WeightDtype::F32,
        kv_dtype: KvDtype::F32,
        block_size,
        num_blocks: least + random.between(0, 3 * least),
        block_bytes: 1,
        max_num_seqs: random.between(1, 12),
        max_num_batched_tokens: random.between(1, 60),
        max_model_len,
        max_queue: random.between(4, 30),
        threads: 1,
        vocab_size: VOCAB,
    }
}

fn request(random: &mut Random, plan: &EnginePlan, prefixes: &[Vec<u32>]) -> Request {
    let prefix = &prefixes[random.between(0, prefixes.len())];
    let shared = random.between(0, prefix.len());
    let mut tokens = prefix[..shared].to_vec();
    let most = (plan.max_model_len + 2 - shared).max(2);
    let own = random_len(random, most);
    tokens.extend(random.tokens(own, VOCAB));
    let cut = random.between(0, tokens.len());
    let prompt = if cut > 0 && random.chance(40) {
        let (first, second) = tokens.split_at(cut);
        vec![Segment { tokens: first.to_vec() }, Segment { tokens: second.to_vec() }]
    } else {
        vec![Segment { tokens }]
    };
    let max_tokens = random.chance(80).then(|| random.between(1, 30));
    let limits = Limits {
        max_tokens,
        ignore_eos: random.chance(50),
        n: if random.chance(15) { random.between(1, 4) as u32 } else { 1 },
        ..Limits::default()
    };
    let sampling = SamplingParams::default();
    Request { prompt, sampling, limits, priority: random.between(0, 3) as i32 }
}

fn random_len(random: &mut Random, most: usize) -> usize {
    let most = if random.chance(70) { most.min(20) } else { most };
    random.between(1, most.max(2))
}

#[derive(Debug)]
struct Live {
    request: Request,
    outputs: HashMap<u32, Vec<u32>>,
    finished: u32,
}

/// Totals of a run, to see that it reached what it is for.
#[derive(Debug, Default)]
struct Seen {
    steps: u64,
    finished: u64,
    cancelled: u64,
    refused: u64,
    failed: u64,
    preemptions: u64,
    cached_tokens: u64,
}

fn simulate(seed: u64, steps: u64, seen: &mut Seen) {
    let mut random = Random::new(seed);
    let plan = plan(&mut random);
    let runner = FakeRunner {
        rows: vec![None; plan.num_blocks * plan.block_size],
        block_size: plan.block_size,
        fail_every: random.chance(20).then_some(97),
        runs: 0,
    };
    let mut engine = Engine::new(plan.clone(), runner, None, vec![EOS]);
    let prefixes: Vec<Vec<u32>> =
        (0..3).map(|_| random.tokens(plan.max_model_len, VOCAB)).collect();
    let mut live: HashMap<RequestId, Live> = HashMap::new();
    let load = random.between(5, 60);
    for _ in 0..steps {
        while random.chance(load) {
            let request = request(&mut random, &plan, &prefixes);
            match engine.submit(&request) {
                Ok(id) => {
                    live.insert(id, Live { request, outputs: HashMap::new(), finished: 0 });
                }
                Err(_) => seen.refused += 1,
            }
        }
        if random.chance(3) && !live.is_empty() {
            let mut ids: Vec<RequestId> = live.keys().copied().collect();
            ids.sort();
            let id = ids[random.between(0, ids.len())];
            engine.cancel(id);
            live.remove(&id);
            seen.cancelled += 1;
        }
        step(&mut engine, &plan, &mut live, seen);
    }
    while !engine.is_idle() {
        step(&mut engine, &plan, &mut live, seen);
    }
    assert!(live.is_empty(), "requests without an end: {live:?}");
    let stats = engine.stats();
    assert_eq!(stats.blocks_free, stats.blocks, "the pool is whole again");
    seen.preemptions += stats.preemptions;
    seen.cached_tokens += stats.cached_tokens;
}

fn step(
    engine: &mut Engine<FakeRunner>,
    plan: &EnginePlan,
    live: &mut HashMap<RequestId, Live>,
    seen: &mut Seen,
) {
    let was_idle = engine.is_idle();
    let step = engine.step();
    engine.check_invariants();
    let tokens = step.prefill_tokens + step.decode_tokens;
    assert!(tokens <= plan.max_num_batched_tokens, "over the token budget");
    assert!(was_idle || tokens > 0, "a step without progress");
    seen.steps += 1;
    for (id, event) in step.events {
        let entry = live.get_mut(&id).expect("events of live requests only");
        match event {
            Event::Token { choice, token, .. } => {
                entry.outputs.entry(choice).or_default().push(token);
            }
            Event::Finished { choice, reason, .. } => {
                let max_tokens = max_tokens(&entry.request, plan);
                let expected = oracle(&entry.request, choice, max_tokens);
                assert_eq!((entry.outputs[&choice].clone(), reason), expected);
                entry.finished += 1;
                if entry.finished == entry.request.limits.n {
                    live.remove(&id);
                    seen.finished += 1;
                }
            }
            Event::Failed(_) => {
                live.remove(&id);
                seen.failed += 1;
            }
            Event::Prompt { .. } => panic!("nobody asked for it"),
        }
    }
}

/// As documented: what was asked, else the room in the model's length and in the pool.
fn max_tokens(request: &Request, plan: &EnginePlan) -> usize {
    let lens: Vec<usize> = request.prompt.iter().map(|segment| segment.tokens.len()).collect();
    let mut layout = Layout::new(plan.block_size, lens);
    let room = plan.max_model_len - request.prompt_tokens();
    let fits = |layout: &Layout| layout.num_blocks() <= plan.num_blocks;
    let mut count = 0;
    while count < room {
        layout.push();
        if !fits(&layout) {
            break;
        }
        count += 1;
    }
    request.limits.max_tokens.unwrap_or(count)
}

#[test]
fn random_load_answers_right_and_gives_every_block_back() {
    let mut seen = Seen::default();
    let mut seed = 0;
    while seen.steps < 100_000 {
        simulate(seed, 500, &mut seen);
        seed += 1;
    }
    println!("{seen:?} over {seed} seeds");
    assert!(seen.finished > 5_000 && seen.cancelled > 500 && seen.refused > 500, "{seen:?}");
    assert!(seen.failed > 50 && seen.preemptions > 1_000, "{seen:?}");
    assert!(seen.cached_tokens > 10_000, "{seen:?}");
}

#[test]
fn the_youngest_gives_way_when_blocks_run_out() {
    let mut random = Random::new(1);
    let plan = EnginePlan {
        block_size: 4,
        num_blocks: 5,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 20,
        max_queue: 8,
        ..plan(&mut random)
    };
    let runner = FakeRunner { rows: vec![None; 20], block_size: 4, fail_every: None, runs: 0 };
    let mut engine = Engine::new(plan.clone(), runner, None, vec![]);
    let ids: Vec<RequestId> = (0..2)
        .map(|n| {
            let mut request = Request::new(vec![n; 8]);
            request.limits.max_tokens = Some(8);
            engine.submit(&request).expect("it fits")
        })
        .collect();
    let mut order = Vec::new();
    while !engine.is_idle() {
        let events = engine.step().events;
        order.extend(
            events
                .iter()
                .filter_map(|(id, event)| matches!(event, Event::Finished { .. }).then_some(*id)),
        );
    }
    assert_eq!(order, ids, "the older one is never held up");
    assert_eq!(engine.stats().preemptions, 1);
}

#[test]
fn the_same_prompt_again_computes_only_what_must_be_computed() {
    let mut random = Random::new(2);
    let plan = EnginePlan {
        block_size: 16,
        num_blocks: 300,
        max_num_seqs: 4,
        max_num_batched_tokens: 512,
        max_model_len: 4096,
        max_queue: 8,
        ..plan(&mut random)
    };
    let runner = FakeRunner { rows: vec![None; 4800], block_size: 16, fail_every: None, runs: 0 };
    let mut engine = Engine::new(plan, runner, None, vec![]);
    let prompt = random.tokens(2003, VOCAB);
    let encoded = |engine: &mut Engine<FakeRunner>, tokens: usize| {
        let before = engine.stats().encoded_tokens;
        let mut request = Request::new(prompt[..tokens].to_vec());
        request.limits.max_tokens = Some(1);
        engine.submit(&request).expect("it fits");
        while !engine.is_idle() {
            engine.step();
        }
        engine.stats().encoded_tokens - before
    };
    assert_eq!(encoded(&mut engine, 2000), 2000);
    assert_eq!(encoded(&mut engine, 2000), 16);
    assert_eq!(encoded(&mut engine, 2003), 3);
    assert_eq!(engine.stats().cached_tokens, 1984 + 2000);
}
