//! Who computes what in the next step.
//!
//! Continuous batching: sequences that decode and (parts of) prompts share a step under a token
//! budget. Rank is priority, then arrival. When blocks run out the last in rank gives its own
//! back and is computed again later; where a tenant has its share, the last of its own does. Pure
//! bookkeeping: no tensors, no clock, no channels.

mod admission;
mod rows;
mod shares;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::batch::{Batch, BlockMove};
use crate::cache::{
    BlockId, BlockManager, KvId, KvOf, KvSegment, KvVariant, Owner, Tiers, TiersOf,
};
use crate::config::TenantLimits;
use crate::request::Reuse;
use crate::sequence::{Sequence, SequenceId};
use admission::Admission;
pub use admission::slots;
use rows::rows;

type Rank = (i32, SequenceId);

/// Limits of a step.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub block_size: usize,
    /// Bytes of a token's KV.
    pub token_bytes: u64,
    /// What one tenant may take.
    pub tenant: Option<TenantLimits>,
}

/// All live sequences, and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    tiers: Tiers,
    sequences: HashMap<SequenceId, Sequence>,
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    counters: Counters,
}

/// Monotonic counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub prompt_tokens: u64,
    /// Where the prompts' tokens came from, at first admission.
    pub reuse: Reuse,
    /// Segments that came back to the pool, at every admission.
    pub restored: Restored,
    /// Tokens computed, again after preemption included.
    pub encoded_tokens: u64,
    pub preemptions: u64,
}

/// How often KV came back to the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    pub from_host: u64,
    pub from_disk: u64,
}

/// Where KV goes that comes from the disk.
#[derive(Debug)]
pub enum Placement {
    /// By these moves, once the host has it.
    Pool(Vec<BlockMove>),
    Host,
    /// There is no room: what waits for it computes it.
    Nowhere,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits, num_blocks: usize, tiers: Tiers) -> Self {
        Self {
            limits,
            blocks: BlockManager::new(num_blocks)
                .with_tenant_limit(limits.tenant.map(|tenant| tenant.blocks)),
            tiers,
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

    pub fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    pub fn tiers_mut(&mut self) -> &mut Tiers {
        &mut self.tiers
    }

    /// True when a step would find somebody to serve: all others wait for KV.
    pub fn has_work(&self) -> bool {
        let waits = |rank: &Rank| {
            let sequence = &self.sequences[&rank.1];
            !sequence.loading.is_empty() || self.waits_for_first_choice(sequence)
        };
        !self.running.is_empty() || !self.waiting.iter().all(waits)
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
        sequence.leased.iter().for_each(|&kv| self.tiers.release(kv));
    }

    /// Where each segment of a sequence has its KV.
    pub fn residency(&self, sequence: &mut Sequence) -> Vec<TiersOf> {
        let segments = 0..sequence.layout.num_segments();
        segments.map(|segment| self.tiers_of(sequence, segment)).collect()
    }

    fn tiers_of(&self, sequence: &mut Sequence, segment: u16) -> TiersOf {
        let device = sequence.layout.blocks_of(segment).all(|block| {
            let tokens = sequence.layout.tokens(block);
            sequence.layout.is_complete(block)
                && self.blocks.holds(sequence.hash(block), &sequence.tokens[tokens])
        });
        let kv = sequence.kv(segment).map(|segment| segment.kv);
        TiersOf {
            device,
            host: kv.is_some_and(|kv| self.tiers.in_host(kv)),
            disk: kv.is_some_and(|kv| self.tiers.on_disk(kv)),
        }
    }

    /// Makes a chunk's blocks unfindable, those that live sequences have yet to compute too.
    /// Returns how many there were, and what leaves the host; what the disk holds stays known.
    pub fn forget(&mut self, kv: &KvOf) -> (usize, Vec<KvId>) {
        for sequence in self.sequences.values_mut().filter(|one| kv.has_salt(&one.salt)) {
            sequence.erased.push(kv.chunk);
        }
        (self.blocks.erase(kv), self.tiers.forget(kv))
    }

    /// Lets a segment's blocks go last when blocks run out, or as any other's again.
    pub fn set_pinned(&mut self, segment: &KvSegment, pinned: bool) {
        self.blocks.set_pinned(segment, pinned);
    }

    /// Takes a segment's blocks out of the pool. Returns how many there were.
    pub fn unload(&mut self, segment: &KvSegment) -> usize {
        self.blocks.unload(segment)
    }

    /// Where KV goes that was fetched for somebody: to the pool at once where blocks are free, for
    /// the disk has it anyway, and what waits in the host takes memory. Rows that can't be computed
    /// again go to the host, where they are leased.
    pub fn place(&mut self, segment: &Arc<KvSegment>) -> Placement {
        let tokens = segment.tokens.chunks(self.limits.block_size);
        let mut there: Vec<Option<BlockId>> = tokens
            .zip(&segment.hashes)
            .map(|(rows, &hash)| self.blocks.acquire(hash, rows))
            .collect();
        let missing: Vec<usize> = (0..there.len()).filter(|&at| there[at].is_none()).collect();
        let is_lossy = segment.variant == KvVariant::Int8;
        let has_room = self.tiers.has_room(segment.tokens.len() as u64 * self.limits.token_bytes);
        let placement = if is_lossy || has_room && missing.len() > self.blocks.num_free() {
            Placement::Host
        } else {
            let mut admission = Admission::new(&mut self.blocks, &mut self.tiers, self.limits);
            let new = admission.bring(segment, &missing);
            let moves = admission.moves;
            there.extend(new.iter().flatten().copied().map(Some));
            self.counters.restored.from_disk += u64::from(!moves.is_empty());
            new.map_or(Placement::Nowhere, |_| Placement::Pool(moves))
        };
        self.blocks.release(there.into_iter().flatten().collect());
        placement
    }

    /// KV that a sequence waited for is in the pool or the host, or will not come.
    pub fn loaded(&mut self, id: SequenceId, kv: KvId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if !sequence.loading.remove(&kv) {
            return;
        }
        sequence.fetched.insert(kv);
        if self.tiers.in_host(kv) {
            self.tiers.lease(kv);
            sequence.leased.insert(kv);
        }
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
            while let Some(sequence) = self.sequences.get(&rank.1) {
                let count = sequence.num_todo().min(*budget);
                let last_of_tenant = self.last_where_full(rank, count);
                let sequence = self.sequences.get_mut(&rank.1).expect("it was just there");
                let mut admission = Admission::new(&mut self.blocks, &mut self.tiers, self.limits);
                if last_of_tenant.is_none() && admission.grow(sequence, count) {
                    batch.moves.extend(admission.moves);
                    *budget -= count;
                    batch.rows.extend(rows(sequence, count, self.limits.block_size));
                    break;
                }
                let victim = last_of_tenant.or(left.back().copied()).unwrap_or(rank);
                left.retain(|&other| other != victim);
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
            let sequence = &self.sequences[&rank.1];
            let waits = !sequence.loading.is_empty() || self.waits_for_first_choice(sequence);
            if waits || self.waits_for_its_tenants(sequence) {
                continue;
            }
            let sequence = self.sequences.get_mut(&rank.1).expect("a waiting sequence exists");
            let mut admission = Admission::new(&mut self.blocks, &mut self.tiers, self.limits);
            let Some(count) = admission.admit(sequence, *budget) else { break };
            batch.moves.extend(admission.moves);
            if sequence.reuse.is_none() {
                self.counters.prompt_tokens += sequence.layout.shown_tokens() as u64;
                self.counters.reuse += admission.reuse;
                sequence.reuse = Some(admission.reuse);
            }
            self.counters.restored.from_host += admission.restored.from_host;
            self.counters.restored.from_disk += admission.restored.from_disk;
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
            sequence.reported = sequence.reported.max(run.end.min(sequence.num_reported()));
            let blocks = sequence.layout.block_of(run.start)..sequence.layout.block_of(run.end - 1);
            for block in blocks.start..=blocks.end {
                let tokens = sequence.layout.tokens(block);
                let segment = sequence.layout.segment(block);
                let chunk = sequence.layout.facts(segment).chunk;
                let is_erased = chunk.is_some_and(|chunk| sequence.erased.contains(&chunk));
                if tokens.end <= run.end && sequence.layout.is_complete(block) && !is_erased {
                    let hash = sequence.hash(block);
                    let id = sequence.table[block].expect("computed rows have a block");
                    let (salt, segment) = (sequence.salt.clone(), sequence.kv(segment).cloned());
                    let owner = Owner { chunk, salt, segment };
                    self.blocks.seal(id, hash, &sequence.tokens[tokens], owner);
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
        let leased: usize = self.sequences.values().map(|sequence| sequence.leased.len()).sum();
        assert_eq!(self.tiers.num_leases(), leased, "a lease is a live sequence's");
        self.tiers.check_invariants();
        self.check_shares();
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
