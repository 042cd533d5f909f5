//! Hands out KV blocks and remembers what they hold.
//!
//! Allocation, release and lookup are O(1) per block. A block whose tokens are known stays
//! findable after its last user has left, until its rows are needed: least recently released
//! first. Knows nothing of devices.

use std::collections::HashMap;

use super::block_list::BlockList;
use super::{BlockHash, BlockId, ChunkId};

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
}

#[derive(Debug)]
struct Identity {
    hash: BlockHash,
    tokens: Box<[u32]>,
    chunk: Option<ChunkId>,
}

/// Owner of every block's state.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    free: BlockList,
    idle: BlockList,
    by_hash: HashMap<BlockHash, BlockId>,
}

impl BlockManager {
    pub fn new(num_blocks: usize) -> Self {
        let empty = || Block { state: BlockState::Free, ref_count: 0, identity: None };
        let mut free = BlockList::new(num_blocks);
        let ids = 0..u32::try_from(num_blocks).expect("block ids are 32 bits");
        ids.for_each(|id| free.push_back(BlockId(id)));
        Self {
            blocks: std::iter::repeat_with(empty).take(num_blocks).collect(),
            free,
            idle: BlockList::new(num_blocks),
            by_hash: HashMap::new(),
        }
    }

    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that could be allocated now: free and idle.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that nobody uses but can still be found.
    pub fn num_idle(&self) -> usize {
        self.idle.len()
    }

    pub fn state(&self, id: BlockId) -> BlockState {
        self.blocks[id.0 as usize].state
    }

    /// Takes `count` blocks, all or none; free ones first, then the longest idle.
    pub fn try_allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.available() {
            return None;
        }
        Some((0..count).map(|_| self.allocate_one()).collect())
    }

    fn allocate_one(&mut self) -> BlockId {
        let id = self.free.pop_front().unwrap_or_else(|| {
            let id = self.idle.pop_front().expect("the caller counted the available blocks");
            self.forget(id);
            id
        });
        let block = &mut self.blocks[id.0 as usize];
        assert!(block.ref_count == 0 && block.identity.is_none(), "block {} is in use", id.0);
        block.state = BlockState::Filling;
        block.ref_count = 1;
        id
    }

    fn forget(&mut self, id: BlockId) {
        let identity = self.blocks[id.0 as usize].identity.take();
        let identity = identity.expect("an idle block has an identity");
        let removed = self.by_hash.remove(&identity.hash);
        assert_eq!(removed, Some(id), "the index names another block");
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
        let identity = block.identity.as_ref().expect("an indexed block has an identity");
        if *identity.tokens != *tokens {
            return None;
        }
        if block.state == BlockState::Idle {
            self.idle.remove(id);
            block.state = BlockState::Sealed;
        }
        block.ref_count += 1;
        Some(id)
    }

    /// Makes a complete block findable. Where another block already holds the same, this one
    /// stays unfindable and is freed when released.
    pub fn seal(&mut self, id: BlockId, hash: BlockHash, tokens: &[u32], chunk: Option<ChunkId>) {
        let block = &mut self.blocks[id.0 as usize];
        assert_eq!(block.state, BlockState::Filling, "block {} is not being filled", id.0);
        if self.by_hash.contains_key(&hash) {
            return;
        }
        self.by_hash.insert(hash, id);
        block.identity = Some(Identity { hash, tokens: tokens.into(), chunk });
        block.state = BlockState::Sealed;
    }

    /// Makes every block of a chunk unfindable, whatever it saw. Idle ones are free at once,
    /// those in use when their last user has left. Returns how many there were.
    pub fn erase(&mut self, chunk: ChunkId) -> usize {
        let of_chunk = |block: &Block| {
            block.identity.as_ref().is_some_and(|identity| identity.chunk == Some(chunk))
        };
        let ids = (0..self.blocks.len()).filter(|&index| of_chunk(&self.blocks[index]));
        let ids: Vec<BlockId> = ids.map(|index| BlockId(index as u32)).collect();
        for &id in &ids {
            self.forget(id);
            if self.state(id) == BlockState::Idle {
                self.idle.remove(id);
                self.free.push_back(id);
                self.blocks[id.0 as usize].state = BlockState::Free;
            } else {
                self.blocks[id.0 as usize].state = BlockState::Filling;
            }
        }
        ids.len()
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
                self.idle.push_back(id);
            } else {
                block.state = BlockState::Free;
                self.free.push_back(id);
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
        let in_state = |id: BlockId, state| self.blocks[id.0 as usize].state == state;
        assert!(self.free.iter().all(|id| in_state(id, BlockState::Free)));
        assert!(self.idle.iter().all(|id| in_state(id, BlockState::Idle)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(tokens: &[u32]) -> BlockHash {
        BlockHash::root(0).child(tokens)
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
        manager.seal(id, name(&[1, 2]), &[1, 2], None);
        manager.release(table);
        assert_eq!((manager.state(id), manager.available()), (BlockState::Idle, 2));
        assert_eq!(manager.acquire(name(&[1, 2]), &[1, 2]), Some(id));
        assert_eq!((manager.state(id), manager.available()), (BlockState::Sealed, 1));
        manager.check_invariants([[id].as_slice()].into_iter());
    }

    #[test]
    fn equal_hashes_with_other_tokens_are_a_miss() {
        let mut manager = BlockManager::new(1);
        let table = manager.try_allocate(1).expect("one is free");
        manager.seal(table[0], name(&[1, 2]), &[1, 2], None);
        assert_eq!(manager.acquire(name(&[1, 2]), &[3, 4]), None);
    }

    #[test]
    fn the_longest_idle_block_is_reused_first_and_a_prefix_outlives_its_tail() {
        let mut manager = BlockManager::new(2);
        let table = manager.try_allocate(2).expect("two are free");
        let (prefix, tail) = (table[0], table[1]);
        manager.seal(prefix, name(&[1]), &[1], None);
        manager.seal(tail, name(&[2]), &[2], None);
        manager.release(table);
        assert_eq!(manager.try_allocate(1), Some(vec![tail]));
        assert_eq!(manager.acquire(name(&[2]), &[2]), None);
        assert_eq!(manager.acquire(name(&[1]), &[1]), Some(prefix));
    }

    #[test]
    fn of_two_equal_blocks_one_is_findable() {
        let mut manager = BlockManager::new(2);
        let table = manager.try_allocate(2).expect("two are free");
        manager.seal(table[0], name(&[1]), &[1], None);
        manager.seal(table[1], name(&[1]), &[1], None);
        manager.check_invariants([table.as_slice()].into_iter());
        manager.release(table);
        assert_eq!((manager.num_idle(), manager.available()), (1, 2));
    }

    #[test]
    fn an_erased_chunk_is_found_no_more_and_leaves_with_its_last_user() {
        let mut manager = BlockManager::new(3);
        let (chunk, other) = (ChunkId::of(b"a"), ChunkId::of(b"b"));
        let table = manager.try_allocate(3).expect("three are free");
        manager.seal(table[0], name(&[1]), &[1], Some(chunk));
        manager.seal(table[1], name(&[2]), &[2], Some(chunk));
        manager.seal(table[2], name(&[3]), &[3], Some(other));
        manager.release(vec![table[0], table[2]]);
        assert_eq!(manager.erase(chunk), 2);
        assert_eq!(manager.state(table[0]), BlockState::Free);
        assert_eq!(manager.acquire(name(&[2]), &[2]), None);
        manager.check_invariants([&table[1..2]].into_iter());
        manager.release(vec![table[1]]);
        assert_eq!((manager.available(), manager.num_idle()), (3, 1));
        assert_eq!(manager.acquire(name(&[3]), &[3]), Some(table[2]));
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
