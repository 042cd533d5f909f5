//! How a sequence gets its blocks: those it finds, those that come back from the host, new ones.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::batch::BlockMove;
use crate::cache::{BlockId, BlockManager, KvId, KvSegment, Owner, Tiers};
use crate::request::Reuse;
use crate::scheduler::{Restored, SchedulerLimits};
use crate::sequence::Sequence;

/// One sequence's way to its blocks, and what must move for it.
pub struct Admission<'a> {
    blocks: &'a mut BlockManager,
    tiers: &'a mut Tiers,
    limits: SchedulerLimits,
    /// To be carried out in this order before the next forward.
    pub moves: Vec<BlockMove>,
    pub reuse: Reuse,
    pub restored: Restored,
}

/// A segment, some of whose blocks come back from the host.
struct Onboarding {
    segment: Arc<KvSegment>,
    blocks: Vec<usize>,
}

impl<'a> Admission<'a> {
    pub fn new(
        blocks: &'a mut BlockManager,
        tiers: &'a mut Tiers,
        limits: SchedulerLimits,
    ) -> Self {
        let (reuse, restored) = (Reuse::default(), Restored::default());
        Self { blocks, tiers, limits, moves: Vec::new(), reuse, restored }
    }

    /// Gives a waiting sequence all blocks that are there and those of its next tokens, at most
    /// `budget`; all or none. Returns how many tokens it computes.
    pub fn admit(&mut self, sequence: &mut Sequence, budget: usize) -> Option<usize> {
        let onboardings = self.acquire(sequence);
        let count = sequence.num_todo().min(budget);
        let coming: usize = onboardings.iter().map(|onboarding| onboarding.blocks.len()).sum();
        if coming + missing_blocks(sequence, count).len() > self.blocks.available() {
            self.blocks.release(sequence.take_table());
            return None;
        }
        // What is to come back must not leave for what goes.
        onboardings.iter().for_each(|onboarding| self.tiers.lease(onboarding.segment.kv));
        for onboarding in &onboardings {
            self.onboard(sequence, onboarding);
        }
        let has_grown = self.grow(sequence, count);
        assert!(has_grown, "the blocks were counted");
        onboardings.iter().for_each(|onboarding| self.tiers.release(onboarding.segment.kv));
        self.trim();
        Some(count)
    }

    /// Gives a sequence the blocks of its next `count` tokens, all or none.
    pub fn grow(&mut self, sequence: &mut Sequence, count: usize) -> bool {
        let missing = missing_blocks(sequence, count);
        let Some(new) = self.allocate(missing.len()) else { return false };
        for (block, id) in missing.into_iter().zip(new) {
            sequence.table[block] = Some(id);
        }
        true
    }

    /// Takes blocks from the pool; what leaves it for them goes to the host where there is room.
    fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        let new = self.blocks.try_allocate(count)?;
        for departure in self.blocks.take_departures() {
            let segment = departure.segment;
            let bytes = segment.tokens.len() as u64 * self.limits.token_bytes;
            if self.tiers.in_host(segment.kv) || !self.tiers.has_room(bytes) {
                continue;
            }
            let slots = slots(&departure.blocks, segment.tokens.len(), self.limits.block_size);
            self.moves.push(BlockMove::Offload { segment: segment.clone(), slots });
            self.tiers.put_host(segment, bytes);
            self.trim();
        }
        Some(new)
    }

    /// Has the host give up what is over its budget.
    fn trim(&mut self) {
        for segment in self.tiers.trim() {
            let on_disk = self.tiers.on_disk(segment.kv);
            self.moves.push(BlockMove::Discard { segment, on_disk });
        }
    }

    /// Takes every block of the sequence that is in the pool; at least one token is left to
    /// compute. Names what the host has of the rest, and leaves what it hasn't as `todo`.
    fn acquire(&mut self, sequence: &mut Sequence) -> Vec<Onboarding> {
        let computes_all = sequence.owes_rows();
        sequence.name_blocks();
        let len = sequence.len();
        let Sequence { layout, table, tokens, hashes, kv, .. } = &mut *sequence;
        let mut is_missing = vec![false; usize::from(layout.num_segments())];
        let needed = layout.needed(|segment| {
            for block in layout.blocks_of(segment) {
                let range = layout.tokens(block);
                if range.end < len && layout.is_complete(block) && !computes_all {
                    table[block] = self.blocks.acquire(hashes[block], &tokens[range]);
                }
            }
            let has_gaps = layout.blocks_of(segment).any(|block| table[block].is_none());
            let kv = kv.get(usize::from(segment)).and_then(Option::as_ref);
            let in_host = kv.is_some_and(|kv| self.tiers.in_host(kv.kv));
            is_missing[usize::from(segment)] = has_gaps && (computes_all || !in_host);
            is_missing[usize::from(segment)]
        });
        let mut onboardings = Vec::new();
        let mut todo: VecDeque<Range<usize>> = VecDeque::new();
        for segment in (0..sequence.layout.num_segments()).filter(|&s| needed[usize::from(s)]) {
            let gaps: Vec<usize> = sequence
                .layout
                .blocks_of(segment)
                .filter(|&block| sequence.table[block].is_none())
                .collect();
            self.account(sequence, segment, &gaps, is_missing[usize::from(segment)]);
            if is_missing[usize::from(segment)] {
                gaps.iter().for_each(|&block| extend(&mut todo, sequence.layout.tokens(block)));
            } else if !gaps.is_empty() {
                let segment = sequence.kv(segment).expect("the host has it").clone();
                onboardings.push(Onboarding { segment, blocks: gaps });
            }
        }
        sequence.todo = todo;
        onboardings
    }

    /// Counts where the rows of a segment come from.
    fn account(&mut self, sequence: &Sequence, segment: u16, gaps: &[usize], computes: bool) {
        let layout = &sequence.layout;
        let shown = layout.shown(segment);
        for block in layout.blocks_of(segment) {
            let tokens = layout.tokens(block);
            let seen = tokens.end.saturating_sub(tokens.start.max(shown.start));
            let fetched = sequence.kv(segment).is_some_and(|kv| sequence.fetched.contains(&kv.kv));
            let (count, rows) = match (gaps.contains(&block), computes) {
                (false, _) if fetched => (&mut self.reuse.disk, seen),
                (false, _) => (&mut self.reuse.device, seen),
                (true, true) if layout.facts(segment).recomputed => {
                    (&mut self.reuse.recomputed, tokens.len())
                }
                (true, true) => (&mut self.reuse.encoded, tokens.len()),
                (true, false) if fetched => (&mut self.reuse.disk, seen),
                (true, false) => (&mut self.reuse.host, seen),
            };
            *count += rows;
        }
    }

    /// Gives a sequence blocks for what comes back from the host.
    fn onboard(&mut self, sequence: &mut Sequence, onboarding: &Onboarding) {
        let segment = &onboarding.segment;
        self.tiers.used(segment.kv);
        let fetched = sequence.fetched.contains(&segment.kv);
        let restored = &mut self.restored;
        *(if fetched { &mut restored.from_disk } else { &mut restored.from_host }) += 1;
        let first = onboarding.blocks.first().map(|&block| sequence.layout.segment(block));
        let first = first.map_or(0, |segment| sequence.layout.blocks_of(segment).start);
        let of_segment: Vec<usize> = onboarding.blocks.iter().map(|block| block - first).collect();
        let new = self.bring(segment, &of_segment).expect("the blocks were counted");
        for (&block, id) in onboarding.blocks.iter().zip(new) {
            sequence.table[block] = Some(id);
        }
    }

    /// Takes blocks for some of a segment's, whose rows come from the host. They are as good as
    /// computed: the rows are there before the next forward reads them.
    pub fn bring(&mut self, segment: &Arc<KvSegment>, blocks: &[usize]) -> Option<Vec<BlockId>> {
        let new = self.allocate(blocks.len())?;
        let block_size = self.limits.block_size;
        for (&block, &id) in blocks.iter().zip(&new) {
            let first_row = block * block_size;
            let tokens = &segment.tokens[first_row..];
            let tokens = &tokens[..tokens.len().min(block_size)];
            self.onboard_rows(segment.kv, first_row, slots(&[id], tokens.len(), block_size));
            let (chunk, salt) = (Some(segment.chunk), segment.identity.salt.as_slice().into());
            let owner = Owner { chunk, salt, segment: Some(segment.clone()) };
            self.blocks.seal(id, segment.hashes[block], tokens, owner);
        }
        Some(new)
    }

    /// Rows that follow those before them are one move with them: long copies are fast ones.
    fn onboard_rows(&mut self, kv: KvId, first_row: usize, mut slots: Vec<u32>) {
        match self.moves.last_mut() {
            Some(BlockMove::Onboard { kv: of, first_row: first, slots: before })
                if *of == kv && *first + before.len() == first_row =>
            {
                before.append(&mut slots);
            }
            _ => self.moves.push(BlockMove::Onboard { kv, first_row, slots }),
        }
    }
}

/// The blocks of a sequence's next `count` tokens that it doesn't have yet.
pub(super) fn missing_blocks(sequence: &Sequence, count: usize) -> Vec<usize> {
    let mut missing = Vec::new();
    for run in sequence.next_runs(count) {
        let touched = sequence.layout.block_of(run.start)..=sequence.layout.block_of(run.end - 1);
        missing.extend(touched.filter(|&block| sequence.table[block].is_none()));
    }
    missing.dedup();
    missing
}

/// Physical rows of the first `rows` rows of blocks.
pub fn slots(blocks: &[BlockId], rows: usize, block_size: usize) -> Vec<u32> {
    let of_block = |id: &BlockId| {
        let first = id.0 as usize * block_size;
        (first..first + block_size).map(|row| row as u32)
    };
    blocks.iter().flat_map(of_block).take(rows).collect()
}

fn extend(todo: &mut VecDeque<Range<usize>>, tokens: Range<usize>) {
    match todo.back_mut() {
        Some(last) if last.end == tokens.start => last.end = tokens.end,
        _ => todo.push_back(tokens),
    }
}
