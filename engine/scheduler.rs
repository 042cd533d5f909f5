//! Who computes what in the next step.
//!
//! Continuous batching: sequences that decode and (parts of) prompts share a step under a token
//! budget. Rank is priority, then arrival. When blocks run out the last in rank gives its own
//! back and is computed again later. Pure bookkeeping: no tensors, no clock, no channels.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;

use strand_kernels::PageEntry;

use crate::batch::{Batch, BatchRow, PromptLogprobs, SampleRequest};
use crate::cache::{BlockId, BlockManager, ChunkId};
use crate::sequence::{Sequence, SequenceId};

type Rank = (i32, SequenceId);

/// Limits of a step.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub block_size: usize,
}

/// All live sequences, and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    sequences: HashMap<SequenceId, Sequence>,
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    counters: Counters,
}

/// Monotonic counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub prompt_tokens: u64,
    /// Prompt tokens found in the cache at first admission.
    pub cached_tokens: u64,
    /// Tokens computed, again after preemption included.
    pub encoded_tokens: u64,
    pub preemptions: u64,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits, num_blocks: usize) -> Self {
        Self {
            limits,
            blocks: BlockManager::new(num_blocks),
            sequences: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            counters: Counters::default(),
        }
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.insert(sequence.rank());
        let earlier = self.sequences.insert(sequence.id, sequence);
        assert!(earlier.is_none(), "a sequence id is used once");
    }

    /// Ends a sequence and takes its blocks back. One that has ended already is no news.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        let rank = sequence.rank();
        assert!(self.running.remove(&rank) || self.waiting.remove(&rank), "{id:?} is nowhere");
        self.blocks.release(sequence.take_table());
    }

    /// How many tokens of each segment of a sequence are in the pool.
    pub fn resident(&self, mut sequence: Sequence) -> Vec<usize> {
        let mut tokens = Vec::new();
        for block in 0..sequence.layout.num_blocks() {
            let segment = usize::from(sequence.layout.segment(block));
            tokens.resize(tokens.len().max(segment + 1), 0);
            let range = sequence.layout.tokens(block);
            if sequence.layout.is_complete(block) {
                let hash = sequence.hash(block);
                if self.blocks.holds(hash, &sequence.tokens[range.clone()]) {
                    tokens[segment] += range.len();
                }
            }
        }
        tokens
    }

    /// Makes a chunk's blocks unfindable, those that live sequences have yet to compute too.
    pub fn erase(&mut self, chunk: ChunkId) -> usize {
        self.sequences.values_mut().for_each(|sequence| sequence.erased.push(chunk));
        self.blocks.erase(chunk)
    }

    /// Plans the next step: first those that run, in rank, then those that wait.
    pub fn schedule(&mut self) -> Batch {
        let mut batch = Batch::default();
        let mut budget = self.limits.max_num_batched_tokens;
        let preempted = self.schedule_running(&mut batch, &mut budget);
        if !preempted {
            self.schedule_waiting(&mut batch, &mut budget);
        }
        self.counters.encoded_tokens += batch.num_tokens() as u64;
        batch
    }

    /// Returns whether somebody had to give way.
    fn schedule_running(&mut self, batch: &mut Batch, budget: &mut usize) -> bool {
        let before = self.counters.preemptions;
        let mut left: VecDeque<Rank> = self.running.iter().copied().collect();
        while let Some(rank) = left.pop_front() {
            if *budget == 0 {
                break;
            }
            while let Some(sequence) = self.sequences.get_mut(&rank.1) {
                let count = sequence.num_todo().min(*budget);
                if grow(&mut self.blocks, sequence, count) {
                    *budget -= count;
                    batch.rows.extend(rows(sequence, count, self.limits.block_size));
                    break;
                }
                let victim = left.pop_back().unwrap_or(rank);
                self.preempt(victim);
                if victim == rank {
                    break;
                }
            }
        }
        self.counters.preemptions > before
    }

    fn preempt(&mut self, rank: Rank) {
        let victim = self.sequences.get_mut(&rank.1).expect("a running sequence exists");
        self.blocks.release(victim.take_table());
        self.running.remove(&rank);
        self.waiting.insert(rank);
        self.counters.preemptions += 1;
    }

    fn schedule_waiting(&mut self, batch: &mut Batch, budget: &mut usize) {
        let ranks: Vec<Rank> = self.waiting.iter().copied().collect();
        for rank in ranks {
            if *budget == 0 || self.running.len() >= self.limits.max_num_seqs {
                break;
            }
            if self.waits_for_first_choice(&self.sequences[&rank.1]) {
                continue;
            }
            let sequence = self.sequences.get_mut(&rank.1).expect("a waiting sequence exists");
            let cached = acquire_cached(&mut self.blocks, sequence);
            let count = sequence.num_todo().min(*budget);
            if !grow(&mut self.blocks, sequence, count) {
                self.blocks.release(sequence.take_table());
                break;
            }
            if sequence.found.is_none() {
                sequence.found = Some(cached);
                self.counters.prompt_tokens += sequence.prompt_len as u64;
                self.counters.cached_tokens += cached as u64;
            }
            *budget -= count;
            batch.rows.extend(rows(sequence, count, self.limits.block_size));
            self.waiting.remove(&rank);
            self.running.insert(rank);
        }
    }

    /// Later choices of a request start when the first has computed the prompt they share.
    fn waits_for_first_choice(&self, sequence: &Sequence) -> bool {
        let first = SequenceId(sequence.id.0 - u64::from(sequence.choice));
        sequence.choice > 0 && self.get(first).is_some_and(|first| !first.has_prompt())
    }

    /// Books the next `count` tokens of a sequence as computed: blocks that are complete by
    /// that become findable.
    pub fn computed(&mut self, id: SequenceId, count: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let runs = sequence.next_runs(count);
        sequence.advance(count);
        for run in runs {
            sequence.reported = sequence.reported.max(run.end.min(sequence.prompt_len - 1));
            let blocks = sequence.layout.block_of(run.start)..sequence.layout.block_of(run.end - 1);
            for block in blocks.start..=blocks.end {
                let tokens = sequence.layout.tokens(block);
                let chunk = sequence.layout.chunk(block);
                let is_erased = chunk.is_some_and(|chunk| sequence.erased.contains(&chunk));
                if tokens.end <= run.end && sequence.layout.is_complete(block) && !is_erased {
                    let hash = sequence.hash(block);
                    let id = sequence.table[block].expect("computed rows have a block");
                    self.blocks.seal(id, hash, &sequence.tokens[tokens], chunk);
                }
            }
        }
    }

    /// Adds a generated token.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        self.sequences.get_mut(&id).expect("only a live sequence is sampled").push(token);
    }

    /// Panics where the books don't balance.
    pub fn check_invariants(&self) {
        assert_eq!(self.waiting.len() + self.running.len(), self.sequences.len());
        assert!(self.running.len() <= self.limits.max_num_seqs);
        for rank in &self.waiting {
            let sequence = &self.sequences[&rank.1];
            assert!(sequence.table.iter().all(Option::is_none), "{sequence:?}");
            assert_eq!(sequence.num_todo(), sequence.len(), "{sequence:?}");
        }
        for sequence in self.sequences.values() {
            assert_eq!(sequence.layout.num_tokens(), sequence.len());
            assert_eq!(sequence.layout.num_blocks(), sequence.table.len());
            assert!(sequence.todo.iter().all(|range| !range.is_empty()), "{sequence:?}");
            let last = sequence.todo.back().map(|range| range.end);
            assert_eq!(last, Some(sequence.len()), "the last token is never cached: {sequence:?}");
        }
        let tables: Vec<Vec<BlockId>> =
            self.sequences.values().map(|s| s.table.iter().copied().flatten().collect()).collect();
        self.blocks.check_invariants(tables.iter().map(Vec::as_slice));
    }
}

/// Takes every block of the sequence that is in the cache; at least one token is left to compute.
/// Returns how many tokens were found.
fn acquire_cached(blocks: &mut BlockManager, sequence: &mut Sequence) -> usize {
    if sequence.owes_prompt_logprobs() {
        return 0;
    }
    let mut todo: VecDeque<Range<usize>> = VecDeque::new();
    for block in 0..sequence.layout.num_blocks() {
        let tokens = sequence.layout.tokens(block);
        if tokens.end < sequence.len() && sequence.layout.is_complete(block) {
            let hash = sequence.hash(block);
            sequence.table[block] = blocks.acquire(hash, &sequence.tokens[tokens.clone()]);
        }
        if sequence.table[block].is_none() {
            match todo.back_mut() {
                Some(last) if last.end == tokens.start => last.end = tokens.end,
                _ => todo.push_back(tokens),
            }
        }
    }
    sequence.todo = todo;
    sequence.len() - sequence.num_todo()
}

/// Gives a sequence the blocks of its next `count` tokens, all or none.
fn grow(blocks: &mut BlockManager, sequence: &mut Sequence, count: usize) -> bool {
    let mut missing = Vec::new();
    for run in sequence.next_runs(count) {
        let touched = sequence.layout.block_of(run.start)..=sequence.layout.block_of(run.end - 1);
        missing.extend(touched.filter(|&block| sequence.table[block].is_none()));
    }
    missing.dedup();
    let Some(new) = blocks.try_allocate(missing.len()) else { return false };
    for (block, id) in missing.into_iter().zip(new) {
        sequence.table[block] = Some(id);
    }
    true
}

/// The next `count` tokens of a sequence, as runs in the order they are computed.
fn rows(sequence: &Sequence, count: usize, block_size: usize) -> Vec<BatchRow> {
    let runs = sequence.next_runs(count);
    let last = runs.len() - 1;
    let reaches_the_end = count == sequence.num_todo();
    let mut rows: Vec<BatchRow> =
        runs.into_iter().map(|run| row(sequence, run, block_size)).collect();
    rows[last].sample = reaches_the_end.then(|| sample_request(sequence));
    rows
}

fn row(sequence: &Sequence, run: Range<usize>, block_size: usize) -> BatchRow {
    let layout = &sequence.layout;
    let (first, last) = (layout.block_of(run.start), layout.block_of(run.end - 1));
    let segment = layout.segment(first);
    let mut slot_mapping = Vec::with_capacity(run.len());
    for block in first..=last {
        let BlockId(id) = sequence.table[block].expect("scheduled rows have a block");
        let tokens = layout.tokens(block);
        let start = id as usize * block_size;
        for token in tokens.start.max(run.start)..tokens.end.min(run.end) {
            slot_mapping.push((start + token - tokens.start) as u32);
        }
    }
    // Segments behind the first of the run are of the run, and see all before them.
    let view = (0..=last)
        .filter(|&block| block >= first || layout.is_visible(segment, layout.segment(block)))
        .map(|block| page_entry(sequence, block, run.end))
        .collect();
    BatchRow {
        id: sequence.id,
        tokens: sequence.tokens[run.clone()].to_vec(),
        start: layout.stored_position(run.start) as u32,
        slot_mapping,
        view,
        sample: None,
        prompt_logprobs: prompt_logprobs(sequence, &run),
    }
}

fn page_entry(sequence: &Sequence, block: usize, end: usize) -> PageEntry {
    let tokens = sequence.layout.tokens(block);
    let BlockId(id) = sequence.table[block].expect("visible rows have a block");
    PageEntry {
        block: id,
        first_row: 0,
        stored_position: sequence.layout.stored_position(tokens.start) as u32,
        num_valid: (tokens.end.min(end) - tokens.start) as u16,
        active: true,
        segment: sequence.layout.segment(block),
    }
}

fn sample_request(sequence: &Sequence) -> SampleRequest {
    let position = sequence.output().len();
    let needs_history = sequence.sampling.needs_history();
    let suppressed = position < sequence.rules.min_tokens;
    SampleRequest {
        params: sequence.sampling.clone(),
        choice: sequence.choice,
        position: position as u32,
        history: if needs_history { sequence.tokens.clone() } else { Vec::new() },
        prompt_len: if needs_history { sequence.prompt_len } else { 0 },
        suppressed: if suppressed { sequence.rules.stop_token_ids.clone() } else { Vec::new() },
        logprobs: sequence.rules.logprobs,
    }
}

/// Rows [run.start, run.end) that are followed by a prompt token, once: not when recomputed.
fn prompt_logprobs(sequence: &Sequence, run: &Range<usize>) -> Option<PromptLogprobs> {
    let top = sequence.rules.prompt_logprobs?;
    let start = run.start.max(sequence.reported);
    let end = run.end.min(sequence.prompt_len - 1);
    if start >= end || !sequence.owes_prompt_logprobs() {
        return None;
    }
    Some(PromptLogprobs {
        rows: start - run.start..end - run.start,
        next: sequence.tokens[start + 1..=end].to_vec(),
        top,
    })
}
