//! A doubly linked list of blocks inside one array: O(1) push, pop and removal from the middle.

use super::BlockId;

/// Links of all blocks for one list; a block is in it at most once.
#[derive(Debug)]
pub(super) struct BlockList {
    links: Vec<Link>,
    first: Option<BlockId>,
    last: Option<BlockId>,
    len: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Link {
    listed: bool,
    previous: Option<BlockId>,
    next: Option<BlockId>,
}

impl BlockList {
    pub fn new(num_blocks: usize) -> Self {
        Self { links: vec![Link::default(); num_blocks], first: None, last: None, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn push_back(&mut self, id: BlockId) {
        assert!(!self.link(id).listed, "block {} is listed already", id.0);
        *self.link(id) = Link { listed: true, previous: self.last, next: None };
        match self.last {
            Some(last) => self.link(last).next = Some(id),
            None => self.first = Some(id),
        }
        self.last = Some(id);
        self.len += 1;
    }

    pub fn pop_front(&mut self) -> Option<BlockId> {
        let id = self.first?;
        self.remove(id);
        Some(id)
    }

    pub fn remove(&mut self, id: BlockId) {
        let link = std::mem::take(self.link(id));
        assert!(link.listed, "block {} is not listed", id.0);
        match link.previous {
            Some(previous) => self.link(previous).next = link.next,
            None => self.first = link.next,
        }
        match link.next {
            Some(next) => self.link(next).previous = link.previous,
            None => self.last = link.previous,
        }
        self.len -= 1;
    }

    /// From the first to the last.
    pub fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(self.first, |id| self.links[id.0 as usize].next)
    }

    fn link(&mut self, id: BlockId) -> &mut Link {
        &mut self.links[id.0 as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(list: &BlockList) -> Vec<u32> {
        list.iter().map(|id| id.0).collect()
    }

    #[test]
    fn blocks_leave_from_the_front_the_middle_and_the_end() {
        let mut list = BlockList::new(5);
        (0..5).for_each(|id| list.push_back(BlockId(id)));
        list.remove(BlockId(2));
        assert_eq!(ids(&list), [0, 1, 3, 4]);
        list.remove(BlockId(4));
        assert_eq!(list.pop_front(), Some(BlockId(0)));
        list.push_back(BlockId(2));
        assert_eq!((ids(&list), list.len()), (vec![1, 3, 2], 3));
    }

    #[test]
    #[should_panic(expected = "listed already")]
    fn a_block_is_listed_once() {
        let mut list = BlockList::new(1);
        list.push_back(BlockId(0));
        list.push_back(BlockId(0));
    }
}
