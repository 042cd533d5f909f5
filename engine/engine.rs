//! The loop's body: schedule, run, postprocess.
//!
//! Owns all state of the requests it serves. Knows neither channels nor clocks: what happened in a
//! step is returned as events. Threads of its own look ahead in grammars, no more.

mod mean;
pub mod pins;
mod rules;
pub mod verbs;

use std::collections::HashMap;
use std::sync::Arc;

use strand_models::Tokenizer;

use crate::batch::{Batch, RowOutput, Runner, Sampled};
use crate::cache::{BlockId, BlockState, DiskFile, KvIdentity, KvVariant, Tiers, TiersOf};
use crate::config::EnginePlan;
use crate::error::Error;
use crate::grammar::{Guide, MaskWorkers};
use crate::output::OutputText;
use crate::queue_times::QueueTimes;
use crate::request::{Event, FinishReason, Request, Restore, Reuse, Segment};
use crate::scheduler::{Restored, Scheduler, SchedulerLimits};
use crate::sequence::{RequestId, Roots, Rules, Sequence, SequenceId};
use crate::store::{Codec, SavedFile};
use crate::tiering::Tiering;
use mean::Mean;
use pins::Pin;

/// Most threads that look ahead in grammars: a mask takes far less time than a forward.
const MAX_MASK_WORKERS: usize = 4;

/// Serves requests step by step.
pub struct Engine<R> {
    plan: EnginePlan,
    runner: R,
    scheduler: Scheduler,
    tokenizer: Option<Tokenizer>,
    /// Tokens that end an answer of this model.
    eos_token_ids: Vec<u32>,
    choices: HashMap<SequenceId, Choice>,
    requests: HashMap<RequestId, Vec<SequenceId>>,
    next_sequence: u64,
    next_request: u64,
    next_ticket: u64,
    pins: Vec<Pin>,
    tiering: Tiering,
    mask_workers: MaskWorkers,
    /// What all names of KV start from.
    identity: KvIdentity,
    counters: Counters,
}

/// What an engine is told of its tiers besides the pool.
#[derive(Debug, Default)]
pub struct TierSetup {
    pub identity: KvIdentity,
    pub host_memory: u64,
    /// How the host's overflow is written; `None` without a disk.
    pub disk: Option<DiskSetup>,
}

#[derive(Debug, Default)]
pub struct DiskSetup {
    /// For what is written unasked.
    pub codec: Codec,
    pub files: Vec<DiskFile>,
}

/// What a command that had to wait for the disk has come to.
#[derive(Debug)]
pub enum Outcome {
    Saved(Result<SavedFile, Error>),
    Erased(Result<(), Error>),
}

/// The part of a live sequence that the scheduler doesn't know.
struct Choice {
    request: RequestId,
    /// It has been part of a step.
    runs: bool,
    text: OutputText,
    guide: Option<Guide>,
    /// Of the hidden states so far, where they were asked for.
    mean: Mean,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    steps: u64,
    requests: u64,
    generated_tokens: u64,
}

/// What one step did.
#[derive(Debug, Default)]
pub struct Step {
    pub events: Vec<(RequestId, Event)>,
    /// Requests whose first rows were in it, a choice at a time.
    pub begun: Vec<RequestId>,
    /// Tokens of prompts (and of what is computed again) in the step.
    pub prefill_tokens: usize,
    /// Tokens of sequences that were one token behind.
    pub decode_tokens: usize,
}

/// A snapshot. Counts grow monotonically.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stats {
    pub running: usize,
    pub waiting: usize,
    pub blocks: usize,
    /// Free or idle.
    pub blocks_free: usize,
    /// Used by nobody, but findable.
    pub blocks_idle: usize,
    pub steps: u64,
    pub requests: u64,
    /// Tokens of prompts, and of those the ones whose KV was there.
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    /// The same by where their KV came from.
    pub reuse: Reuse,
    pub encoded_tokens: u64,
    pub generated_tokens: u64,
    pub preemptions: u64,
    /// Blocks that hold something, in bytes.
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub host_budget: u64,
    /// Of the files that may be of use.
    pub disk_bytes: u64,
    /// Blocks that lost what they held: the pool was full.
    pub evicted_blocks: u64,
    /// Segments that left the host: its budget was used up.
    pub evicted_segments: u64,
    /// Segments that came back to the pool.
    pub restored: Restored,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    /// Time of steps; one that did both counts by its share of tokens.
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    /// From a request's arrival to its first step.
    pub queue_times: QueueTimes,
}

impl<R: Runner> Engine<R> {
    pub fn new(
        plan: EnginePlan,
        runner: R,
        tokenizer: Option<Tokenizer>,
        eos_token_ids: Vec<u32>,
        tiers: TierSetup,
    ) -> Self {
        let limits = SchedulerLimits {
            max_num_seqs: plan.max_num_seqs,
            max_num_batched_tokens: plan.max_num_batched_tokens,
            block_size: plan.block_size,
            token_bytes: plan.token_bytes(),
            tenant: plan.tenant,
        };
        let mut books = Tiers::new(tiers.host_memory, plan.attention_scale as f64);
        let codec = tiers.disk.as_ref().map(|disk| disk.codec);
        for file in tiers.disk.into_iter().flat_map(|disk| disk.files) {
            books.put_disk(file);
        }
        Self {
            scheduler: Scheduler::new(limits, plan.num_blocks, books),
            mask_workers: MaskWorkers::new(plan.threads.clamp(1, MAX_MASK_WORKERS)),
            plan,
            runner,
            tokenizer,
            eos_token_ids,
            choices: HashMap::new(),
            requests: HashMap::new(),
            next_sequence: 0,
            next_request: 0,
            next_ticket: 0,
            pins: Vec::new(),
            tiering: Tiering::new(codec),
            identity: tiers.identity,
            counters: Counters::default(),
        }
    }

    /// Takes a request in, or says why not; nothing is kept of a refused one.
    pub fn submit(&mut self, request: &Request) -> Result<RequestId, Error> {
        let rules = Arc::new(self.rules(request)?);
        if self.scheduler.num_waiting() + request.limits.n as usize > self.plan.max_queue {
            return Err(Error::QueueFull { limit: self.plan.max_queue });
        }
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.counters.requests += 1;
        let roots = Roots::new(&self.identity, request);
        let lossy = request.allow_lossy.then(|| self.with_lossy(request, &rules, &roots));
        let request = lossy.as_ref().unwrap_or(request);
        let mut sequences = Vec::new();
        for choice in 0..request.limits.n {
            let sequence_id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            let block_size = self.plan.block_size;
            let mut sequence =
                Sequence::new(sequence_id, choice, request, &rules, &roots, block_size);
            let text = OutputText::new(self.tokenizer.as_ref(), &sequence.tokens, &request.limits);
            let guide = request.limits.grammar.clone().map(Guide::new);
            self.choices.insert(
                sequence_id,
                Choice { request: id, runs: false, text, guide, mean: Mean::default() },
            );
            if choice == 0 {
                // later choices find what the first has fetched
                self.fetch(&mut sequence, request.restore);
            }
            self.scheduler.add(sequence);
            sequences.push(sequence_id);
        }
        self.requests.insert(id, sequences);
        Ok(id)
    }

    /// The request with lossy KV named where that is all there is of a chunk.
    fn with_lossy(&self, request: &Request, rules: &Arc<Rules>, roots: &Roots) -> Request {
        let sequence_of = |request: &Request| {
            let id = SequenceId(u64::MAX); // named nowhere
            Sequence::new(id, 0, request, rules, roots, self.plan.block_size)
        };
        let there = self.scheduler.residency(&mut sequence_of(request));
        let mut lossy = request.clone();
        let is_chunk = |segment: &Segment| segment.chunk.is_some() && !segment.recomputed;
        let nowhere = |tiers: &TiersOf| *tiers == TiersOf::default();
        for (segment, tiers) in lossy.prompt.iter_mut().zip(&there) {
            if is_chunk(segment) && nowhere(tiers) {
                segment.variant = KvVariant::Int8;
            }
        }
        let there = self.scheduler.residency(&mut sequence_of(&lossy));
        for (segment, tiers) in lossy.prompt.iter_mut().zip(&there) {
            if nowhere(tiers) {
                segment.variant = KvVariant::Lossless;
            }
        }
        lossy
    }

    /// Has the disk read what a sequence's chunks need of it.
    fn fetch(&mut self, sequence: &mut Sequence, restore: Restore) {
        let there = self.scheduler.residency(sequence);
        let needed = sequence.layout.needed(|segment| {
            let tiers = there[usize::from(segment)];
            !(tiers.device || tiers.host || tiers.disk && restore != Restore::Never)
        });
        for segment in (0..sequence.layout.num_segments()).filter(|&s| needed[usize::from(s)]) {
            let tiers = there[usize::from(segment)];
            let Some(kv) = sequence.kv(segment).filter(|_| !tiers.device && tiers.disk).cloned()
            else {
                continue;
            };
            let tokens = kv.tokens.len();
            let wanted = match restore {
                Restore::Always => true,
                // what was computed with loss can't be computed again
                Restore::Auto | Restore::Never if kv.variant == KvVariant::Int8 => true,
                Restore::Auto => {
                    let bytes = tokens as u64 * self.plan.token_bytes();
                    self.tiering.speeds.prefer_loading(tokens, bytes)
                }
                Restore::Never => false,
            };
            if wanted && !tiers.host {
                self.tiering.load(&kv, sequence.id);
                sequence.loading.insert(kv.kv);
            }
        }
    }

    /// Ends a request without another word.
    pub fn cancel(&mut self, id: RequestId) {
        for sequence in self.requests.remove(&id).into_iter().flatten() {
            self.end(sequence);
        }
    }

    pub fn plan(&self) -> &EnginePlan {
        &self.plan
    }

    /// What all its names of KV start from, but for a request's anchor and salt.
    pub fn identity(&self) -> &KvIdentity {
        &self.identity
    }

    pub fn is_idle(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// True when a step would compute something: some requests only wait for the disk.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    pub fn is_alive(&self, id: RequestId) -> bool {
        self.requests.contains_key(&id)
    }

    /// One forward for whoever is next.
    pub fn step(&mut self) -> Step {
        let mut batch = self.scheduler.schedule();
        let mut step = Step::default();
        self.tiering.carry_out(&batch.moves, &mut self.runner);
        if batch.rows.is_empty() {
            return step;
        }
        self.counters.steps += 1;
        self.count_rows(&batch, &mut step);
        self.hand_out_masks(&mut batch);
        let outputs = match self.runner.run(&batch) {
            Ok(outputs) => outputs,
            Err(error) => batch.rows.iter().map(|_| Err(error.clone())).collect(),
        };
        assert_eq!(outputs.len(), batch.rows.len(), "one result a row");
        for (row, output) in batch.rows.iter().zip(outputs) {
            let Some(choice) = self.choices.get(&row.id) else {
                continue; // a sibling failed in this step and took the request with it
            };
            let request = choice.request;
            match output {
                Ok(output) => self.postprocess(request, row.tokens.len(), output, &mut step),
                Err(error) => self.fail(request, error, &mut step),
            }
        }
        step
    }

    fn hand_out_masks(&self, batch: &mut Batch) {
        for row in &mut batch.rows {
            let guide = self.choices.get(&row.id).and_then(|choice| choice.guide.as_ref());
            if let (Some(sample), Some(guide)) = (&mut row.sample, guide) {
                sample.allowed = Some(guide.mask().clone());
            }
        }
    }

    fn count_rows(&mut self, batch: &Batch, step: &mut Step) {
        for row in &batch.rows {
            let choice = self.choices.get_mut(&row.id).expect("every live sequence is here");
            if !std::mem::replace(&mut choice.runs, true) {
                step.begun.push(choice.request);
            }
            let decodes = row.tokens.len() == 1 && row.start > 0;
            *(if decodes { &mut step.decode_tokens } else { &mut step.prefill_tokens }) +=
                row.tokens.len();
        }
    }

    fn fail(&mut self, request: RequestId, error: Error, step: &mut Step) {
        self.cancel(request);
        step.events.push((request, Event::Failed(error)));
    }

    fn postprocess(
        &mut self,
        request: RequestId,
        computed: usize,
        output: RowOutput,
        step: &mut Step,
    ) {
        self.scheduler.computed(output.id, computed);
        if !output.prompt_logprobs.is_empty() {
            let logprobs = output.prompt_logprobs;
            step.events.push((request, Event::Prompt { logprobs }));
        }
        if !output.hidden.is_empty() {
            self.embed(request, output.id, &output.hidden, step);
        }
        if let Some(sampled) = output.sampled {
            self.accept(request, output.id, sampled, step);
        }
    }

    /// Adds rows to a request's embedding, and ends it where they are all there.
    fn embed(&mut self, request: RequestId, id: SequenceId, rows: &[Vec<f32>], step: &mut Step) {
        let choice = self.choices.get_mut(&id).expect("every live sequence is here");
        rows.iter().for_each(|row| choice.mean.add(row));
        let prompt_len = self.scheduler.get(id).expect("it was just computed").prompt_len;
        if choice.mean.count() == prompt_len {
            let vector = choice.mean.get();
            self.cancel(request);
            step.events.push((request, Event::Embedding { vector }));
        }
    }

    /// Adds a sampled token to its choice, and ends the choice where it must end.
    fn accept(&mut self, request: RequestId, id: SequenceId, sampled: Sampled, step: &mut Step) {
        let Sampled { token, logprobs } = sampled;
        self.scheduler.push(id, token);
        self.counters.generated_tokens += 1;
        let sequence = self.scheduler.get(id).expect("it was just extended");
        let choice = sequence.choice;
        let reuse = sequence.reuse.expect("it has been admitted");
        let exactness = sequence.exactness();
        let is_stop_token = sequence.rules.stop_token_ids.contains(&token);
        let is_full = sequence.output().len() >= sequence.rules.max_tokens;
        let live = self.choices.get_mut(&id).expect("every live sequence is here");
        let guided = live.guide.as_mut().filter(|_| !is_stop_token);
        let guided = guided.map(|guide| guide.accept(token, &mut self.mask_workers));
        let is_complete = match guided.transpose() {
            Ok(complete) => complete.unwrap_or(false),
            Err(error) => return self.fail(request, error, step),
        };
        let output = &mut live.text;
        let (text, met_stop_string) =
            if is_stop_token { (String::new(), false) } else { output.push(token) };
        step.events.push((request, Event::Token { choice, token, text, logprobs }));
        let reason = match (is_stop_token || met_stop_string || is_complete, is_full) {
            (true, _) => FinishReason::Stop,
            (false, true) => FinishReason::Length,
            (false, false) => return,
        };
        let text = if met_stop_string { String::new() } else { output.finish() };
        step.events.push((request, Event::Finished { choice, reason, text, reuse, exactness }));
        self.end(id);
        let left = self.requests.get_mut(&request).expect("it is alive");
        left.retain(|&other| other != id);
        if left.is_empty() {
            self.requests.remove(&request);
        }
    }

    fn end(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.choices.remove(&id);
        self.trim_host(); // what it had leased
    }

    /// Counts so far; the times are the caller's.
    pub fn stats(&self) -> Stats {
        let (counted, blocks) = (self.scheduler.counters(), self.scheduler.blocks());
        let (tiers, idle) = (self.scheduler.tiers(), blocks.num_idle());
        let held = blocks.num_blocks() - (blocks.available() - idle);
        Stats {
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting(),
            blocks: blocks.num_blocks(),
            blocks_free: blocks.available(),
            blocks_idle: idle,
            steps: self.counters.steps,
            requests: self.counters.requests,
            prompt_tokens: counted.prompt_tokens,
            cached_tokens: counted.reuse.cached() as u64,
            reuse: counted.reuse,
            encoded_tokens: counted.encoded_tokens,
            generated_tokens: self.counters.generated_tokens,
            preemptions: counted.preemptions,
            device_bytes: held as u64 * self.plan.block_bytes,
            host_bytes: tiers.host_bytes(),
            host_budget: tiers.host_budget(),
            disk_bytes: tiers.disk_bytes(),
            evicted_blocks: blocks.evictions(),
            evicted_segments: tiers.evictions(),
            restored: counted.restored,
            ..Stats::default()
        }
    }

    /// Panics where the books don't balance.
    pub fn check_invariants(&self) {
        self.scheduler.check_invariants();
        let live: usize = self.requests.values().map(Vec::len).sum();
        assert_eq!(live, self.choices.len());
        assert_eq!(live, self.scheduler.num_waiting() + self.scheduler.num_running());
    }

    /// Blocks that hold nothing, for tests that poison them.
    pub fn free_blocks(&self) -> Vec<u32> {
        let blocks = self.scheduler.blocks();
        let ids = 0..blocks.num_blocks() as u32;
        ids.filter(|&id| blocks.state(BlockId(id)) == BlockState::Free).collect()
    }

    pub fn runner_mut(&mut self) -> &mut R {
        &mut self.runner
    }
}
