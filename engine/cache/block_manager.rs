//! Hands out KV blocks and remembers what they hold.
//!
//! A block whose tokens are known stays findable after its last user has left, until its rows are
//! needed. Then the least valuable goes first: value is how often it was used, counted from the
//! value of the last one that went (GDSF; all full blocks cost the same bytes, and nearly the same
//! to compute again). Among equals the one that idles longest goes. Where tenants have shares, what
//! one leaves beyond its own goes before all else. Knows nothing of devices.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::{BlockHash, BlockId, ChunkId, KvId, KvOf, KvSegment};
use crate::tenant::tenant_of;

/// A block's life: `Free -> Filling -> Sealed -> Idle -> Free`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// Holds nothing.
    Free,
    /// In use, and not findable: still written to, a double, or erased.
    Filling,
    /// In use, complete and findable.
    Sealed,
    /// Findable, used by nobody.
    Idle,
}

#[derive(Debug)]
struct Block {
    state: BlockState,
    ref_count: u32,
    /// What it holds; present when sealed or idle.
    identity: Option<Identity>,
    /// Its place among the idle ones.
    rank: IdleRank,
}

/// Value, then order of arrival.
type IdleRank = (u64, u64);

#[derive(Debug)]
struct Identity {
    hash: BlockHash,
    tokens: Box<[u32]>,
    owner: Owner,
    uses: u64,
}

/// What a block holds, as its writer says.
#[derive(Debug, Clone, Default)]
pub struct Owner {
    pub chunk: Option<ChunkId>,
    pub salt: Arc<[u8]>,
    /// The whole of which it is a part, if other tiers may hold that too.
    pub segment: Option<Arc<KvSegment>>,
}

impl Owner {
    fn tenant(&self) -> String {
        tenant_of(&String::from_utf8_lossy(&self.salt)).to_owned()
    }
}

/// A segment that is about to lose a block, while all of it is still there.
#[derive(Debug)]
pub struct Departure {
    pub segment: Arc<KvSegment>,
    pub blocks: Vec<BlockId>,
}

/// Owner of every block's state.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    /// The one freed last is used first: the system has given its memory already, which it does
    /// page by page and slowly.
    free: Vec<BlockId>,
    idle: BTreeSet<(IdleRank, BlockId)>,
    by_hash: HashMap<BlockHash, BlockId>,
    /// Value of the last idle block that went: what comes later starts from there.
    clock: u64,
    arrivals: u64,
    departures: Vec<Departure>,
    /// Idle blocks that lost what they held to who needed them, so far.
    evictions: u64,
    /// Segments whose idle blocks go last.
    pinned: HashSet<KvId>,
    /// Blocks of one tenant that count as much as any other's.
    tenant_limit: Option<usize>,
    /// Findable blocks by tenant, where that is limited.
    of_tenants: HashMap<String, usize>,
}

/// Added to the value of what is pinned: it goes when all else has gone, and not before.
const PINNED: u64 = 1 << 62;

impl BlockManager {
    pub fn new(num_blocks: usize) -> Self {
        let empty =
            || Block { state: BlockState::Free, ref_count: 0, identity: None, rank: (0, 0) };
        let ids = 0..u32::try_from(num_blocks).expect("block ids are 32 bits");
        Self {
            blocks: std::iter::repeat_with(empty).take(num_blocks).collect(),
            free: ids.rev().map(BlockId).collect(),
            idle: BTreeSet::new(),
            by_hash: HashMap::new(),
            clock: 0,
            arrivals: 0,
            departures: Vec::new(),
            evictions: 0,
            pinned: HashSet::new(),
            tenant_limit: None,
            of_tenants: HashMap::new(),
        }
    }

    /// Lets what a tenant leaves beyond so many findable blocks go first.
    pub fn with_tenant_limit(self, tenant_limit: Option<usize>) -> Self {
        Self { tenant_limit, ..self }
    }

    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that could be allocated now: free and idle.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that hold nothing.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that nobody uses but can still be found.
    pub fn num_idle(&self) -> usize {
        self.idle.len()
    }

    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    pub fn state(&self, id: BlockId) -> BlockState {
        self.blocks[id.0 as usize].state
    }

    /// Takes `count` blocks, all or none; free ones first, then the least valuable idle ones. In
    /// ascending order: neighbours are copied in one piece.
    pub fn try_allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.available() {
            return None;
        }
        let mut table: Vec<BlockId> = (0..count).map(|_| self.allocate_one()).collect();
        table.sort_unstable();
        Some(table)
    }

    fn allocate_one(&mut self) -> BlockId {
        let id = self.free.pop().unwrap_or_else(|| self.evict());
        let block = &mut self.blocks[id.0 as usize];
        assert!(block.ref_count == 0 && block.identity.is_none(), "block {} is in use", id.0);
        block.state = BlockState::Filling;
        block.ref_count = 1;
        id
    }

    fn evict(&mut self) -> BlockId {
        let (rank, id) = self.idle.pop_first().expect("the caller counted the available blocks");
        // what was beyond a share had none
        self.clock = self.clock.max(rank.0 % PINNED);
        self.evictions += 1;
        let identity = self.blocks[id.0 as usize].identity.as_ref();
        if let Some(segment) = identity.and_then(|identity| identity.owner.segment.clone())
            && let Some(blocks) = self.blocks_of(&segment)
        {
            self.departures.push(Departure { segment, blocks });
        }
        self.forget(id);
        id
    }

    /// Segments that lost their first block since the last call. Their rows are still where
    /// they were until the next forward.
    pub fn take_departures(&mut self) -> Vec<Departure> {
        std::mem::take(&mut self.departures)
    }

    /// The blocks of a segment, if all are there.
    pub fn blocks_of(&self, segment: &KvSegment) -> Option<Vec<BlockId>> {
        segment.hashes.iter().map(|hash| self.by_hash.get(hash).copied()).collect()
    }

    fn forget(&mut self, id: BlockId) {
        let identity = self.blocks[id.0 as usize].identity.take();
        let identity = identity.expect("an idle block has an identity");
        let removed = self.by_hash.remove(&identity.hash);
        assert_eq!(removed, Some(id), "the index names another block");
        if self.tenant_limit.is_some() {
            let tenant = identity.owner.tenant();
            let count = self.of_tenants.get_mut(&tenant).expect("counted when it was sealed");
            *count -= 1;
            if *count == 0 {
                self.of_tenants.remove(&tenant);
            }
        }
    }

    /// True when a complete block of that name is there.
    pub fn holds(&self, hash: BlockHash, tokens: &[u32]) -> bool {
        let identity = |id: &BlockId| self.blocks[id.0 as usize].identity.as_ref();
        let found = self.by_hash.get(&hash).and_then(identity);
        found.is_some_and(|identity| *identity.tokens == *tokens)
    }

    /// Finds a complete block by name and takes a reference; the tokens must agree too.
    pub fn acquire(&mut self, hash: BlockHash, tokens: &[u32]) -> Option<BlockId> {
        let id = *self.by_hash.get(&hash)?;
        let block = &mut self.blocks[id.0 as usize];
        let identity = block.identity.as_mut().expect("an indexed block has an identity");
        if *identity.tokens != *tokens {
            return None;
        }
        identity.uses += 1;
        if block.state == BlockState::Idle {
            self.idle.remove(&(block.rank, id));
            block.state = BlockState::Sealed;
        }
        block.ref_count += 1;
        Some(id)
    }

    /// Makes a complete block findable. Where another block already holds the same, this one
    /// stays unfindable and is freed when released.
    pub fn seal(&mut self, id: BlockId, hash: BlockHash, tokens: &[u32], owner: Owner) {
        let block = &mut self.blocks[id.0 as usize];
        assert_eq!(block.state, BlockState::Filling, "block {} is not being filled", id.0);
        if self.by_hash.contains_key(&hash) {
            return;
        }
        self.by_hash.insert(hash, id);
        if self.tenant_limit.is_some() {
            *self.of_tenants.entry(owner.tenant()).or_default() += 1;
        }
        block.identity = Some(Identity { hash, tokens: tokens.into(), owner, uses: 1 });
        block.state = BlockState::Sealed;
    }

    /// Makes every block of a chunk unfindable, whatever it saw. Idle ones are free at once,
    /// those in use when their last user has left. Returns how many there were.
    pub fn erase(&mut self, kv: &KvOf) -> usize {
        let is_of = |block: &Block| {
            let owner = block.identity.as_ref().map(|identity| &identity.owner);
            owner.is_some_and(|owner| owner.chunk.is_some_and(|id| kv.includes(id, &owner.salt)))
        };
        let ids = (0..self.blocks.len()).filter(|&index| is_of(&self.blocks[index]));
        let ids: Vec<BlockId> = ids.map(|index| BlockId(index as u32)).collect();
        ids.iter().for_each(|&id| self.drop_identity(id));
        ids.len()
    }

    /// The same for the blocks of one segment, which other tiers may hold.
    pub fn unload(&mut self, segment: &KvSegment) -> usize {
        let there = |hash: &BlockHash| self.by_hash.get(hash).copied();
        let ids: Vec<BlockId> = segment.hashes.iter().filter_map(there).collect();
        ids.iter().for_each(|&id| self.drop_identity(id));
        ids.len()
    }

    fn drop_identity(&mut self, id: BlockId) {
        self.forget(id);
        let block = &mut self.blocks[id.0 as usize];
        if block.state == BlockState::Idle {
            self.idle.remove(&(block.rank, id));
            self.free.push(id);
            block.state = BlockState::Free;
        } else {
            block.state = BlockState::Filling;
        }
    }

    /// Gives references back. The last block goes first, so that a prefix outlives its tail.
    pub fn release(&mut self, table: Vec<BlockId>) {
        for id in table.into_iter().rev() {
            let block = &mut self.blocks[id.0 as usize];
            assert!(block.ref_count > 0, "block {} has no user", id.0);
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.state == BlockState::Sealed {
                block.state = BlockState::Idle;
                self.rank(id);
            } else {
                block.state = BlockState::Free;
                self.free.push(id);
            }
        }
    }

    /// Gives an idle block its place among the others.
    fn rank(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        let identity = block.identity.as_ref().expect("an idle block has an identity");
        let segment = identity.owner.segment.as_ref();
        let is_pinned = segment.is_some_and(|segment| self.pinned.contains(&segment.kv));
        let is_beyond = self.tenant_limit.is_some_and(|limit| {
            let count = self.of_tenants.get(&identity.owner.tenant());
            count.is_some_and(|&count| count > limit)
        });
        let value = match (is_pinned, is_beyond) {
            (true, _) => PINNED + self.clock + identity.uses,
            (false, true) => 0,
            (false, false) => self.clock + identity.uses,
        };
        block.rank = (value, self.arrivals);
        self.arrivals += 1;
        self.idle.insert((block.rank, id));
    }

    /// Lets the blocks of a segment go last, or as any other's again. Never keeps one from who
    /// needs it.
    pub fn set_pinned(&mut self, segment: &KvSegment, pinned: bool) {
        match pinned {
            true => self.pinned.insert(segment.kv),
            false => self.pinned.remove(&segment.kv),
        };
        for hash in &segment.hashes {
            let Some(&id) = self.by_hash.get(hash) else { continue };
            let block = &self.blocks[id.0 as usize];
            if block.state == BlockState::Idle {
                self.idle.remove(&(block.rank, id));
                self.rank(id);
            }
        }
    }

    /// Panics where the books don't balance. `tables` are the tables of all live sequences.
    pub fn check_invariants<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut users = vec![0u32; self.blocks.len()];
        for id in tables.flatten() {
            users[id.0 as usize] += 1;
        }
        let used = users.iter().filter(|&&count| count > 0).count();
        assert_eq!(used + self.free.len() + self.idle.len(), self.blocks.len());
        for (index, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.ref_count, users[index], "references of block {index}");
            let in_use = matches!(block.state, BlockState::Filling | BlockState::Sealed);
            assert_eq!(in_use, users[index] > 0, "state of block {index}");
            let known = matches!(block.state, BlockState::Sealed | BlockState::Idle);
            assert_eq!(known, block.identity.is_some(), "identity of block {index}");
            if let Some(identity) = &block.identity {
                assert_eq!(self.by_hash.get(&identity.hash).map(|id| id.0 as usize), Some(index));
            }
        }
        let known = self.blocks.iter().filter(|block| block.identity.is_some()).count();
        assert_eq!(known, self.by_hash.len(), "the index names only known blocks");
        let counted: usize = self.of_tenants.values().sum();
        assert_eq!(counted, if self.tenant_limit.is_some() { known } else { 0 });
        let in_state = |id: BlockId, state| self.blocks[id.0 as usize].state == state;
        assert!(self.free.iter().all(|&id| in_state(id, BlockState::Free)));
        assert!(self.idle.iter().all(|&(_, id)| in_state(id, BlockState::Idle)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{KvIdentity, KvVariant};
    use super::*;

    fn name(tokens: &[u32]) -> BlockHash {
        BlockHash::root(b"").child(tokens)
    }

    #[test]
    fn allocation_is_all_or_nothing() {
        let mut manager = BlockManager::new(3);
        assert!(manager.try_allocate(4).is_none());
        assert_eq!(manager.available(), 3);
        assert_eq!(manager.try_allocate(3).map(|ids| ids.len()), Some(3));
    }

    #[test]
    fn a_sealed_block_is_found_again_after_its_user_left() {
        let mut manager = BlockManager::new(2);
        let table = manager.try_allocate(1).expect("two are free");
        let id = table[0];
        manager.seal(id, name(&[1, 2]), &[1, 2], Owner::default());
        manager.release(table);
        assert_eq!((manager.state(id), manager.available()), (BlockState::Idle, 2));
        assert_eq!(manager.acquire(name(&[1, 2]), &[1, 2]), Some(id));
        assert_eq!((manager.state(id), manager.available()), (BlockState::Sealed, 1));
        manager.check_invariants([[id].as_slice()].into_iter());
    }

    #[test]
    fn what_a_tenant_leaves_beyond_its_share_goes_first() {
        let mut manager = BlockManager::new(6).with_tenant_limit(Some(2));
        let mut leave = |token: u32, salt: &[u8]| {
            let table = manager.try_allocate(1).expect("all are free or idle");
            let owner = Owner { salt: salt.into(), ..Owner::default() };
            manager.seal(table[0], name(&[token]), &[token], owner);
            manager.release(table);
            manager.check_invariants([].into_iter());
        };
        leave(1, b"ben\0");
        (10..14).for_each(|token| leave(token, b"anna\0x"));
        leave(2, b"ben\0");
        // full: anna's own go for what she brings, however much that is
        (14..40).for_each(|token| leave(token, b"anna\0"));
        let there = |token: u32| manager.holds(name(&[token]), &[token]);
        assert!([1, 2, 10, 11, 39].into_iter().all(there), "ben's, and of anna's two and the last");
        assert_eq!((10..40).filter(|&token| there(token)).count(), 4);
    }

    #[test]
    fn equal_hashes_with_other_tokens_are_a_miss() {
        let mut manager = BlockManager::new(1);
        let table = manager.try_allocate(1).expect("one is free");
        manager.seal(table[0], name(&[1, 2]), &[1, 2], Owner::default());
        assert_eq!(manager.acquire(name(&[1, 2]), &[3, 4]), None);
    }

    #[test]
    fn the_longest_idle_block_is_reused_first_and_a_prefix_outlives_its_tail() {
        let mut manager = BlockManager::new(2);
        let table = manager.try_allocate(2).expect("two are free");
        let (prefix, tail) = (table[0], table[1]);
        manager.seal(prefix, name(&[1]), &[1], Owner::default());
        manager.seal(tail, name(&[2]), &[2], Owner::default());
        manager.release(table);
        assert_eq!(manager.try_allocate(1), Some(vec![tail]));
        assert_eq!(manager.acquire(name(&[2]), &[2]), None);
        assert_eq!(manager.acquire(name(&[1]), &[1]), Some(prefix));
    }

    #[test]
    fn of_two_equal_blocks_one_is_findable() {
        let mut manager = BlockManager::new(2);
        let table = manager.try_allocate(2).expect("two are free");
        manager.seal(table[0], name(&[1]), &[1], Owner::default());
        manager.seal(table[1], name(&[1]), &[1], Owner::default());
        manager.check_invariants([table.as_slice()].into_iter());
        manager.release(table);
        assert_eq!((manager.num_idle(), manager.available()), (1, 2));
    }

    #[test]
    fn an_erased_chunk_is_found_no_more_and_leaves_with_its_last_user() {
        let mut manager = BlockManager::new(3);
        let (chunk, other) = (ChunkId::of(b"a"), ChunkId::of(b"b"));
        let of = |chunk, salt: &[u8]| Owner {
            chunk: Some(chunk),
            salt: salt.into(),
            ..Owner::default()
        };
        let table = manager.try_allocate(3).expect("three are free");
        manager.seal(table[0], name(&[1]), &[1], of(chunk, b"x\0narrower"));
        manager.seal(table[1], name(&[2]), &[2], of(chunk, b"y\0"));
        manager.seal(table[2], name(&[3]), &[3], of(other, b"x\0"));
        manager.release(vec![table[0], table[2]]);
        assert_eq!(manager.erase(&KvOf::new(chunk, Some(""))), 0, "it has none");
        assert_eq!(manager.erase(&KvOf::new(chunk, Some("x\0"))), 1, "its other salts too");
        assert_eq!(manager.erase(&KvOf::new(chunk, None)), 1, "the rest of it");
        assert_eq!(manager.state(table[0]), BlockState::Free);
        assert_eq!(manager.acquire(name(&[2]), &[2]), None);
        manager.check_invariants([&table[1..2]].into_iter());
        manager.release(vec![table[1]]);
        assert_eq!((manager.available(), manager.num_idle()), (3, 1));
        assert_eq!(manager.acquire(name(&[3]), &[3]), Some(table[2]));
    }

    #[test]
    fn what_was_used_more_often_stays_longer() {
        let mut manager = BlockManager::new(2);
        let table = manager.try_allocate(2).expect("two are free");
        let (often, once) = (table[0], table[1]);
        manager.seal(often, name(&[1]), &[1], Owner::default());
        manager.seal(once, name(&[2]), &[2], Owner::default());
        manager.release(table);
        let again = manager.acquire(name(&[1]), &[1]).expect("it is there");
        manager.release(vec![again]);
        let new = manager.try_allocate(1).expect("one can go");
        assert_eq!(new, [once]);
        manager.seal(once, name(&[3]), &[3], Owner::default());
        manager.release(new);
        // what comes new starts where the last one went: old fame fades
        assert_eq!(manager.try_allocate(1), Some(vec![often]));
        manager.check_invariants([[often].as_slice()].into_iter());
    }

    /// A segment of two blocks of one token each.
    fn segment(tokens: [u32; 2]) -> Arc<KvSegment> {
        Arc::new(KvSegment {
            kv: KvIdentity::default().root(KvVariant::Lossless).kv_id(&tokens, &[]),
            chunk: ChunkId::of(b"a"),
            variant: KvVariant::Lossless,
            identity: Arc::default(),
            tokens: tokens.into(),
            seen: [].into(),
            first_position: 0,
            hashes: tokens.map(|token| name(&[token])).into(),
        })
    }

    #[test]
    fn the_pinned_goes_last_and_goes_where_it_must() {
        let mut manager = BlockManager::new(4);
        let pinned = segment([1, 2]);
        let table = manager.try_allocate(4).expect("four are free");
        for (token, &id) in (1..).zip(&table) {
            let segment = (token < 3).then(|| pinned.clone());
            manager.seal(id, name(&[token]), &[token], Owner { segment, ..Owner::default() });
        }
        manager.release(table.clone());
        manager.set_pinned(&pinned, true);
        let mut others = manager.try_allocate(2).expect("all are idle");
        others.sort();
        assert_eq!(others, table[2..], "the others first");
        assert_eq!(manager.try_allocate(2).map(|ids| ids.len()), Some(2), "then the pinned");
        assert!(manager.clock < PINNED);
    }

    #[test]
    fn a_pin_ends() {
        let mut manager = BlockManager::new(3);
        let pinned = segment([1, 2]);
        let table = manager.try_allocate(3).expect("three are free");
        for (token, &id) in (1..).zip(&table) {
            let segment = (token < 3).then(|| pinned.clone());
            manager.seal(id, name(&[token]), &[token], Owner { segment, ..Owner::default() });
        }
        let other = manager.acquire(name(&[3]), &[3]).expect("it is there");
        manager.set_pinned(&pinned, true);
        manager.release([&table[..], &[other]].concat());
        manager.set_pinned(&pinned, false);
        let mut first = manager.try_allocate(2).expect("all are idle");
        first.sort();
        assert_eq!(first, table[..2], "the other was used more often");
        manager.check_invariants([first.as_slice()].into_iter());
    }

    #[test]
    fn a_segment_departs_whole_before_it_loses_a_block() {
        let mut manager = BlockManager::new(3);
        let table = manager.try_allocate(2).expect("three are free");
        let hashes = [name(&[1]), name(&[2])];
        let segment = segment([1, 2]);
        let owner = || Owner { segment: Some(segment.clone()), ..Owner::default() };
        manager.seal(table[0], hashes[0], &[1], owner());
        assert_eq!(manager.blocks_of(&segment), None);
        manager.seal(table[1], hashes[1], &[2], owner());
        assert_eq!(manager.blocks_of(&segment), Some(table.clone()));
        manager.release(table.clone());
        manager.try_allocate(3).expect("one is free, two can go");
        let departures = manager.take_departures();
        assert_eq!(departures.len(), 1, "once, not for every block");
        assert_eq!((&departures[0].segment, &departures[0].blocks), (&segment, &table));
    }

    #[test]
    #[should_panic(expected = "has no user")]
    fn a_block_is_released_once() {
        let mut manager = BlockManager::new(1);
        let table = manager.try_allocate(1).expect("one is free");
        manager.release(table.clone());
        manager.release(table);
    }
}
