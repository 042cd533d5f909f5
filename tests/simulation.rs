//! The scheduler and the block manager under random load, with a runner whose "KV" is a digest of
//! a token and of all it saw: written through the slot mapping, read back through the page
//! entries, so a wrong block, or a right one with a wrong past, shows as a wrong token.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use strand_engine::batch::{Batch, BatchRow, RowOutput, Runner, Sampled};
use strand_engine::cache::{ChunkId, KvId, KvSegment, KvVariant};
use strand_engine::sequence::RequestId;
use strand_engine::store::{Codec, SavedFile};
use strand_engine::{
    DiskSetup, Engine, EnginePlan, Error, Event, FinishReason, IoDone, IoJob, Limits, PinOutcome,
    Request, Restore, Reuse, SamplingParams, Sees, Segment, SegmentKv, TierSetup,
};
use strand_kernels::{KvDtype, WeightDtype};

use crate::random::Random;
use crate::shares::plan_with_shares;

const VOCAB: usize = 50;
const EOS: u32 = 7;
/// Whose KV it is: three of four requests have the first.
const SALTS: [&str; 2] = ["", "other"];

/// A KV row: what its token is and what it saw, as a digest, and where it was rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    digest: u64,
    position: u32,
}

pub const ROW_BYTES: usize = 12;

/// Stores digests as KV rows.
pub struct FakeRunner {
    rows: Vec<Option<Row>>,
    block_size: usize,
    /// Fails the first row of every so many-th run.
    fail_every: Option<u64>,
    runs: u64,
}

impl FakeRunner {
    pub fn new(plan: &EnginePlan, fail_every: Option<u64>) -> Self {
        let rows = vec![None; plan.num_blocks * plan.block_size];
        Self { rows, block_size: plan.block_size, fail_every, runs: 0 }
    }

    fn compute(&mut self, row: &BatchRow) -> RowOutput {
        let mut slots = Vec::new();
        for entry in row.view.iter().filter(|entry| entry.active) {
            let first = entry.block as usize * self.block_size + usize::from(entry.first_row);
            let rows = (0..entry.num_valid).map(|n| (first + usize::from(n), n));
            slots.extend(rows.map(|(slot, n)| (slot, entry.stored_position + u32::from(n))));
        }
        let (seen, own) = slots.split_at(row.start as usize);
        assert_eq!(own.len(), row.tokens.len(), "the run's own rows end its view");
        let read = |rows: &[Option<Row>], (slot, position): (usize, u32)| {
            let row = rows[slot].expect("a visible row was written");
            assert_eq!(row.position, position, "a row rotated elsewhere");
            row.digest
        };
        let mut state = SEED;
        for &slot in seen {
            state = mix(state, read(&self.rows, slot));
        }
        for (((slot, position), &token), &mapped) in
            own.iter().zip(&row.tokens).zip(&row.slot_mapping)
        {
            assert_eq!(*slot, mapped as usize);
            let digest = mix(state, u64::from(token));
            self.rows[*slot] = Some(Row { digest, position: *position });
            state = mix(state, digest);
        }
        let sampled = row
            .sample
            .as_ref()
            .map(|wanted| Sampled { token: next_token(state, wanted.choice), logprobs: None });
        RowOutput { id: row.id, sampled, prompt_logprobs: Vec::new(), hidden: Vec::new() }
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

    fn gather(&mut self, slots: &[u32]) -> Result<SegmentKv, Error> {
        let mut frame = Vec::new();
        for &slot in slots {
            let row = self.rows[slot as usize].expect("a row that leaves was written");
            frame.extend(row.digest.to_le_bytes());
            frame.extend(row.position.to_le_bytes());
        }
        Ok(SegmentKv::of_frames(&[frame]))
    }

    fn scatter(&mut self, kv: &SegmentKv, first_row: usize, slots: &[u32]) -> Result<(), Error> {
        let rows = kv.bytes().chunks_exact(ROW_BYTES).skip(first_row);
        for (row, &slot) in rows.zip(slots) {
            let (digest, position) = row.split_at(8);
            let digest = u64::from_le_bytes(digest.try_into().expect("eight bytes"));
            let position = u32::from_le_bytes(position.try_into().expect("four bytes"));
            self.rows[slot as usize] = Some(Row { digest, position });
        }
        Ok(())
    }
}

const SEED: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(state: u64, value: u64) -> u64 {
    Random::new(state.rotate_left(5) ^ value).next()
}

/// The "model": a function of all digests in sight, and of the choice.
fn next_token(state: u64, choice: u32) -> u32 {
    (mix(state, u64::from(choice)) % VOCAB as u64) as u32
}

/// What a request must answer, computed without any engine.
fn oracle(request: &Request, choice: u32, max_tokens: usize) -> (Vec<u32>, FinishReason) {
    let mut digests: Vec<Vec<u64>> = Vec::new();
    let mut state = SEED;
    for segment in &request.prompt {
        let before = request.prompt.iter().zip(&digests);
        let seen: Vec<u64> = match &segment.sees {
            Sees::Everything => {
                before.flat_map(|(other, rows)| &rows[other.hidden..]).copied().collect()
            }
            Sees::Anchor => {
                let anchor = before.take(1).filter(|(first, _)| first.is_anchor);
                anchor.flat_map(|(_, rows)| rows).copied().collect()
            }
            Sees::Listed(list) => {
                list.iter().flat_map(|&other| &digests[usize::from(other)]).copied().collect()
            }
        };
        state = seen.iter().fold(SEED, |state, &digest| mix(state, digest));
        let rows = segment.tokens.iter().map(|&token| {
            let digest = mix(state, u64::from(token));
            state = mix(state, digest);
            digest
        });
        let rows = rows.collect();
        digests.push(rows);
    }
    let mut output = Vec::new();
    loop {
        let token = next_token(state, choice);
        state = mix(state, mix(state, u64::from(token)));
        output.push(token);
        if token == EOS && !request.limits.ignore_eos {
            return (output, FinishReason::Stop);
        }
        if output.len() == max_tokens {
            return (output, FinishReason::Length);
        }
    }
}

pub fn plan(random: &mut Random) -> EnginePlan {
    let block_size = [1, 2, 4, 16][random.between(0, 4)];
    let max_model_len = random.between(20, 80);
    let least = max_model_len.div_ceil(block_size);
    EnginePlan {
        device: "cpu".to_owned(),
        deterministic: true,
        dtype: WeightDtype::F32,
        weight_bytes: 0,
        kv_dtype: KvDtype::F32,
        block_size,
        num_blocks: least + random.between(0, 3 * least),
        block_bytes: (block_size * ROW_BYTES) as u64,
        max_num_seqs: random.between(1, 12),
        max_num_batched_tokens: random.between(1, 60),
        max_model_len,
        max_queue: random.between(4, 30),
        tenant: None,
        threads: 1,
        vocab_size: VOCAB,
        host_memory: 0,
        kv_codec: Codec::Raw,
        disk_space: 0,
        attention_scale: 100,
    }
}

fn request(random: &mut Random, plan: &EnginePlan, texts: &[Vec<u32>]) -> Request {
    let prompt = match random.between(0, 10) {
        0..2 => chunks_and_turn(random, texts),
        2..4 => blended_chunks(random, texts),
        4..6 => masked_chunks(random, texts),
        _ => shared_prefix(random, plan, texts),
    };
    let max_tokens = random.chance(80).then(|| random.between(1, 30));
    let limits = Limits {
        max_tokens,
        ignore_eos: random.chance(50),
        n: if random.chance(15) { random.between(1, 4) as u32 } else { 1 },
        ..Limits::default()
    };
    let sampling = SamplingParams::default();
    Request {
        prompt,
        sampling,
        limits,
        priority: random.between(0, 3) as i32,
        salt: SALTS[random.between(0, 4) / 3].into(),
        restore: Restore::ALL[random.between(0, 3)],
        allow_lossy: false,
    }
}

/// Some of a few chunks in any order, then a turn.
fn chunks_and_turn(random: &mut Random, texts: &[Vec<u32>]) -> Vec<Segment> {
    let mut prompt = maybe_anchor(random);
    for _ in 0..random.between(0, 5) {
        let sees = [Sees::Anchor, Sees::Everything][random.between(0, 2)].clone();
        prompt.push(Segment { sees, ..chunk(random, texts) });
    }
    prompt.push(Segment::new(random.tokens(3, VOCAB)));
    prompt
}

fn maybe_anchor(random: &mut Random) -> Vec<Segment> {
    if random.chance(50) { vec![Segment::anchor(vec![1])] } else { Vec::new() }
}

fn chunk(random: &mut Random, texts: &[Vec<u32>]) -> Segment {
    let text = random.between(0, texts.len());
    let start = [0, 3][random.between(0, 2)];
    let end = start + [1, 4, 9][random.between(0, 3)];
    let segment = Segment::independent(texts[text][start..end].to_vec());
    Segment { chunk: Some(chunk_id(text, start, end)), ..segment }
}

/// Chunks whose first rows are recomputed behind those before them.
fn blended_chunks(random: &mut Random, texts: &[Vec<u32>]) -> Vec<Segment> {
    let mut prompt = maybe_anchor(random);
    prompt.push(chunk(random, texts));
    for _ in 0..random.between(0, 3) {
        let whole = chunk(random, texts);
        let hidden = random.between(1, whole.tokens.len() + 1);
        let head = Segment::new(whole.tokens[..hidden].to_vec());
        prompt.push(Segment { recomputed: true, chunk: whole.chunk, ..head });
        if hidden < whole.tokens.len() {
            prompt.push(Segment { hidden, ..whole });
        }
    }
    prompt.push(Segment::new(random.tokens(3, VOCAB)));
    prompt
}

/// Chunks of which each saw some of those before it, and some of which are switched off now.
fn masked_chunks(random: &mut Random, texts: &[Vec<u32>]) -> Vec<Segment> {
    let mut prompt = maybe_anchor(random);
    for _ in 0..random.between(1, 5) {
        let listed = listing(random, prompt.len());
        let one = Segment { sees: listed, ..chunk(random, texts) };
        let hidden = if random.chance(30) { one.tokens.len() } else { 0 };
        prompt.push(Segment { hidden, ..one });
    }
    let listed = listing(random, prompt.len());
    prompt.push(Segment { sees: listed, ..Segment::new(random.tokens(3, VOCAB)) });
    prompt
}

fn listing(random: &mut Random, before: usize) -> Sees {
    Sees::Listed((0..before as u16).filter(|_| random.chance(70)).collect())
}

fn chunk_id(text: usize, start: usize, end: usize) -> ChunkId {
    ChunkId::of(&[text as u8, start as u8, end as u8])
}

/// The beginning of a text and something of its own, in one segment or two.
fn shared_prefix(random: &mut Random, plan: &EnginePlan, texts: &[Vec<u32>]) -> Vec<Segment> {
    let text = &texts[random.between(0, texts.len())];
    let shared = random.between(0, text.len());
    let mut tokens = text[..shared].to_vec();
    let own = random_len(random, (plan.max_model_len + 2 - shared).max(2));
    tokens.extend(random.tokens(own, VOCAB));
    let cut = random.between(0, tokens.len());
    if cut > 0 && random.chance(40) {
        let (first, second) = tokens.split_at(cut);
        return vec![Segment::new(first.to_vec()), Segment::new(second.to_vec())];
    }
    vec![Segment::new(tokens)]
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

/// Files that take their time, fail now and then, and are read in any order.
#[derive(Default)]
struct Disk {
    files: HashMap<KvId, (Arc<KvSegment>, SegmentKv)>,
    writes: VecDeque<IoJob>,
    reads: Vec<IoJob>,
}

impl Disk {
    fn take(&mut self, jobs: Vec<IoJob>) {
        for job in jobs {
            match job {
                IoJob::Load { .. } => self.reads.push(job),
                IoJob::Save { .. } | IoJob::Erase { .. } => self.writes.push_back(job),
            }
        }
    }

    /// Carries out one job, if there is one.
    fn work(&mut self, random: &mut Random) -> Option<IoDone> {
        let reads = !self.reads.is_empty() && (self.writes.is_empty() || random.chance(50));
        let job = match reads {
            true => self.reads.swap_remove(random.between(0, self.reads.len())),
            false => self.writes.pop_front()?,
        };
        Some(match job {
            IoJob::Load { segment } => {
                if random.chance(10) {
                    self.files.remove(&segment.kv); // damaged, and set aside
                }
                let data = self.files.get(&segment.kv).map(|(_, data)| data.clone());
                IoDone::Loaded { segment, data, seconds: 0.01 }
            }
            IoJob::Save { ticket, segment, .. } if random.chance(10) => {
                let result = Err(Error::WriteBudget { budget: 0 });
                IoDone::Saved { ticket, segment, result, removed: Vec::new() }
            }
            IoJob::Save { ticket, segment, data, .. } => {
                self.files.insert(segment.kv, (segment.clone(), (*data).clone()));
                let (kv_id, bytes) = (segment.kv, data.num_bytes());
                let saved =
                    SavedFile { kv_id, file_bytes: bytes, payload_bytes: bytes, raw_bytes: bytes };
                IoDone::Saved { ticket, segment, result: Ok(saved), removed: Vec::new() }
            }
            IoJob::Erase { ticket, kv } => {
                self.files.retain(|_, (segment, _)| !segment.is_of(&kv));
                IoDone::Erased { ticket, result: Ok(()) }
            }
        })
    }
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
    erased_blocks: usize,
    saved: u64,
    unloaded: u64,
    pinned: u64,
    reuse: Reuse,
}

/// A chunk, and whose KV of it.
fn what_to_erase(random: &mut Random) -> (ChunkId, Option<&'static str>) {
    let chunk = chunk_id(random.between(0, 3), 0, [1, 4, 9][random.between(0, 3)]);
    (chunk, [None, Some(SALTS[0]), Some(SALTS[1])][random.between(0, 3)])
}

fn simulate(seed: u64, steps: u64, seen: &mut Seen) {
    let mut random = Random::new(seed);
    let plan = plan_with_shares(&mut random);
    let runner = FakeRunner::new(&plan, random.chance(20).then_some(97));
    let disk = random.chance(60).then(DiskSetup::default);
    let host_memory = (random.between(0, 60) * ROW_BYTES) as u64;
    let tiers = TierSetup { host_memory, disk, ..TierSetup::default() };
    let mut engine = Engine::new(plan.clone(), runner, None, vec![EOS], tiers);
    let mut disk = Disk::default();
    let texts: Vec<Vec<u32>> = (0..3).map(|_| random.tokens(plan.max_model_len, VOCAB)).collect();
    let mut live: HashMap<RequestId, Live> = HashMap::new();
    let load = random.between(5, 60);
    for _ in 0..steps {
        while random.chance(load) {
            let request = request(&mut random, &plan, &texts);
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
        if random.chance(5) {
            let (chunk, salt) = what_to_erase(&mut random);
            seen.erased_blocks += engine.erase(chunk, salt).0.blocks;
            assert_eq!(engine.erase(chunk, salt).0.blocks, 0, "erased is erased");
        }
        if random.chance(5) {
            let placed = vec![self::chunk(&mut random, &texts)];
            let (time, now) = (random.between(0, 50) as u64, seen.steps);
            let (time, now) = (Duration::from_secs(time), Duration::from_secs(now));
            let outcome = engine.pin(placed, "", KvVariant::Lossless, time, now);
            seen.pinned += u64::from(outcome.is_ok_and(|outcome| outcome == PinOutcome::Accepted));
        }
        if random.chance(10) {
            let placed = vec![self::chunk(&mut random, &texts)];
            match random.chance(50) {
                true => seen.saved += u64::from(engine.save(placed, "", Codec::Raw).is_ok()),
                false => {
                    let unloaded = engine.unload(placed, "", KvVariant::Lossless);
                    seen.unloaded += u64::from(unloaded.is_ok());
                }
            }
        }
        step(&mut engine, &plan, &mut live, seen);
        disk.take(engine.take_jobs());
        while random.chance(30) {
            disk.work(&mut random).map(|done| engine.io_done(done));
            disk.take(engine.take_jobs());
        }
    }
    while !engine.is_idle() {
        step(&mut engine, &plan, &mut live, seen);
        disk.take(engine.take_jobs());
        disk.work(&mut random).map(|done| engine.io_done(done));
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
    let had_work = engine.has_work();
    let step = engine.step();
    engine.check_invariants();
    let tokens = step.prefill_tokens + step.decode_tokens;
    assert!(tokens <= plan.max_num_batched_tokens, "over the token budget");
    assert_eq!(had_work, tokens > 0, "a step without progress, or progress without work");
    let stats = engine.stats();
    assert!(stats.host_bytes <= stats.host_budget, "the host is over its budget: {stats:?}");
    seen.steps += 1;
    for (id, event) in step.events {
        let entry = live.get_mut(&id).expect("events of live requests only");
        match event {
            Event::Token { choice, token, .. } => {
                entry.outputs.entry(choice).or_default().push(token);
            }
            Event::Finished { choice, reason, reuse, .. } => {
                seen.reuse.host += reuse.host;
                seen.reuse.disk += reuse.disk;
                seen.reuse.recomputed += reuse.recomputed;
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
            Event::Prompt { .. } | Event::Embedding { .. } => panic!("nobody asked for it"),
        }
    }
}

/// As documented: what was asked, else the room in the model's length and in the pool.
fn max_tokens(request: &Request, plan: &EnginePlan) -> usize {
    // a segment is in the pool if it is seen in the end, or by one that may have to be computed
    let mut held = vec![false; request.prompt.len()];
    for (index, segment) in request.prompt.iter().enumerate().rev() {
        held[index] |= segment.num_shown() > 0;
        if let (true, Sees::Listed(list)) = (held[index], &segment.sees) {
            list.iter().for_each(|&other| held[usize::from(other)] = true);
        }
    }
    let lens = request.prompt.iter().zip(held).filter(|(_, held)| *held);
    let lens: Vec<usize> = lens.map(|(segment, _)| segment.tokens.len()).collect();
    let (last, before) = lens.split_last().expect("a prompt has a segment");
    let blocks: usize = before.iter().map(|len| len.div_ceil(plan.block_size)).sum();
    let in_pool = (plan.num_blocks - blocks) * plan.block_size - last;
    let room = plan.max_model_len - request.prompt_tokens();
    request.limits.max_tokens.unwrap_or(room.min(in_pool))
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
    assert!(seen.cached_tokens > 10_000 && seen.erased_blocks > 100, "{seen:?}");
    assert!(seen.saved > 100 && seen.unloaded > 100 && seen.pinned > 50, "{seen:?}");
    assert!(seen.reuse.host > 500 && seen.reuse.disk > 500, "{seen:?}");
    assert!(seen.reuse.recomputed > 500, "{seen:?}");
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
    let runner = FakeRunner::new(&plan, None);
    let mut engine = Engine::new(plan.clone(), runner, None, vec![], TierSetup::default());
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
    let runner = FakeRunner::new(&plan, None);
    let mut engine = Engine::new(plan, runner, None, vec![], TierSetup::default());
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
