//! How a sequence's tokens fall into blocks, and what each segment sees.

use std::ops::Range;

use super::ChunkId;

/// What the rows of a segment see besides the rows before them in the segment itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sees {
    /// All segments before it.
    Everything,
    /// The first segment, where that is an anchor; else nothing. Its KV is the same wherever the
    /// segment stands (block attention).
    Anchor,
}

/// A segment as the layout knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentLayout {
    pub len: usize,
    pub sees: Sees,
    /// True for a first segment that every other one sees.
    pub is_anchor: bool,
    pub chunk: Option<ChunkId>,
}

/// Token ranges of a sequence's blocks, in order.
///
/// ```text
/// segments    [0 ........ 21) [21 ... 30)
/// blocks      [0, 16) [16, 21) [21, 30)        block size 16
/// ```
/// Every segment starts a fresh block; only the last segment grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    block_size: usize,
    segments: Vec<Placed>,
    spans: Vec<Span>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Placed {
    tokens: Range<usize>,
    sees: Sees,
    chunk: Option<ChunkId>,
    /// Position at which its first key is rotated: how many keys it sees before its own.
    stored_start: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Span {
    tokens: Range<usize>,
    segment: u16,
}

impl Layout {
    /// Lays out segments, which are not empty.
    pub fn new(block_size: usize, segments: impl IntoIterator<Item = SegmentLayout>) -> Self {
        assert!(block_size > 0, "a block holds at least one row");
        let mut layout = Self { block_size, segments: Vec::new(), spans: Vec::new() };
        let (mut at, mut anchor) = (0, 0);
        for (index, segment) in segments.into_iter().enumerate() {
            assert!(segment.len > 0, "a segment holds at least one token");
            let number = u16::try_from(index).expect("checked when the request came in");
            let stored_start = match segment.sees {
                Sees::Everything => at,
                Sees::Anchor => anchor,
            };
            let tokens = at..at + segment.len;
            for start in tokens.clone().step_by(block_size) {
                let end = tokens.end.min(start + block_size);
                layout.spans.push(Span { tokens: start..end, segment: number });
            }
            at = tokens.end;
            if index == 0 && segment.is_anchor {
                anchor = segment.len;
            }
            let SegmentLayout { sees, chunk, .. } = segment;
            layout.segments.push(Placed { tokens, sees, chunk, stored_start });
        }
        layout
    }

    /// Adds one token to the last segment.
    pub fn push(&mut self) {
        let last = self.spans.last_mut().expect("a sequence has at least one token");
        if last.tokens.len() < self.block_size {
            last.tokens.end += 1;
        } else {
            let (at, segment) = (last.tokens.end, last.segment);
            self.spans.push(Span { tokens: at..at + 1, segment });
        }
        self.segments.last_mut().expect("as above").tokens.end += 1;
    }

    /// Blocks of the whole sequence.
    pub fn num_blocks(&self) -> usize {
        self.spans.len()
    }

    /// Tokens in all blocks.
    pub fn num_tokens(&self) -> usize {
        self.spans.last().map_or(0, |span| span.tokens.end)
    }

    /// The tokens of a block.
    pub fn tokens(&self, block: usize) -> Range<usize> {
        self.spans[block].tokens.clone()
    }

    /// The segment of a block.
    pub fn segment(&self, block: usize) -> u16 {
        self.spans[block].segment
    }

    /// The chunk a block belongs to.
    pub fn chunk(&self, block: usize) -> Option<ChunkId> {
        self.segments[usize::from(self.segment(block))].chunk
    }

    /// True when nothing will be added to the block: it is full, or its segment has ended.
    pub fn is_complete(&self, block: usize) -> bool {
        self.spans[block].tokens.len() == self.block_size || block + 1 < self.spans.len()
    }

    /// The block that holds a token.
    pub fn block_of(&self, token: usize) -> usize {
        self.spans.partition_point(|span| span.tokens.end <= token)
    }

    /// The blocks of a segment.
    pub fn blocks_of(&self, segment: u16) -> Range<usize> {
        let start = self.spans.partition_point(|span| span.segment < segment);
        start..self.spans.partition_point(|span| span.segment <= segment)
    }

    /// Position a token's key is rotated at, whatever the place of its segment.
    pub fn stored_position(&self, token: usize) -> usize {
        let segment = &self.segments[usize::from(self.segment(self.block_of(token)))];
        segment.stored_start + token - segment.tokens.start
    }

    /// True when rows of one segment see rows of another.
    pub fn is_visible(&self, row: u16, key: u16) -> bool {
        let (row_segment, key_segment) = (&self.segments[usize::from(row)], usize::from(key));
        let precedes = match row_segment.sees {
            Sees::Everything => key < row,
            // the anchor, if there is one, is all that lies before its own start
            Sees::Anchor => self.segments[key_segment].tokens.end <= row_segment.stored_start,
        };
        precedes || key == row
    }

    /// Where a run of tokens that starts at `run.start` must end: all its rows see the same
    /// segments but for those of the run itself.
    pub fn cut(&self, run: Range<usize>) -> Range<usize> {
        let first = usize::from(self.segment(self.block_of(run.start)));
        let end = match self.segments[first].sees {
            Sees::Anchor => self.segments[first].tokens.end,
            Sees::Everything => self.segments[first..]
                .iter()
                .take_while(|segment| segment.sees == Sees::Everything)
                .last()
                .map_or(run.end, |segment| segment.tokens.end),
        };
        run.start..run.end.min(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(len: usize) -> SegmentLayout {
        SegmentLayout { len, sees: Sees::Everything, is_anchor: false, chunk: None }
    }

    fn chunk(len: usize) -> SegmentLayout {
        SegmentLayout { sees: Sees::Anchor, ..whole(len) }
    }

    fn anchor(len: usize) -> SegmentLayout {
        SegmentLayout { is_anchor: true, ..whole(len) }
    }

    fn spans(layout: &Layout) -> Vec<Range<usize>> {
        (0..layout.num_blocks()).map(|block| layout.tokens(block)).collect()
    }

    #[test]
    fn every_segment_starts_a_fresh_block() {
        let layout = Layout::new(16, [whole(21), whole(9), whole(16)]);
        assert_eq!(spans(&layout), [0..16, 16..21, 21..30, 30..46]);
        assert_eq!((0..4).map(|b| layout.segment(b)).collect::<Vec<_>>(), [0, 0, 1, 2]);
        assert!((0..4).all(|block| layout.is_complete(block)));
        assert_eq!((layout.blocks_of(0), layout.blocks_of(2)), (0..2, 3..4));
    }

    #[test]
    fn only_the_last_segment_grows() {
        let mut layout = Layout::new(4, [whole(3), whole(3)]);
        layout.push();
        assert_eq!(spans(&layout), [0..3, 3..7]);
        layout.push();
        assert_eq!(spans(&layout), [0..3, 3..7, 7..8]);
        assert!(!layout.is_complete(2));
    }

    #[test]
    fn a_chunk_is_stored_behind_the_anchor_wherever_it_stands() {
        let layout = Layout::new(4, [anchor(1), chunk(5), chunk(2), whole(3)]);
        let stored: Vec<usize> = (0..11).map(|token| layout.stored_position(token)).collect();
        assert_eq!(stored, [0, 1, 2, 3, 4, 5, 1, 2, 8, 9, 10]);
        let without = Layout::new(4, [chunk(5), chunk(2)]);
        assert_eq!([4, 5, 6].map(|token| without.stored_position(token)), [4, 0, 1]);
    }

    #[test]
    fn chunks_see_the_anchor_and_themselves_turns_see_all() {
        let layout = Layout::new(4, [anchor(1), chunk(5), chunk(2), whole(3)]);
        let sees =
            |row: u16| -> Vec<u16> { (0..4).filter(|&key| layout.is_visible(row, key)).collect() };
        assert_eq!([sees(0), sees(1), sees(2)], [vec![0], vec![0, 1], vec![0, 2]]);
        assert_eq!(sees(3), [0, 1, 2, 3]);
        let without = Layout::new(4, [chunk(5), chunk(2)]);
        assert!(!without.is_visible(1, 0) && !without.is_visible(0, 1));
    }

    #[test]
    fn runs_are_cut_where_sight_changes() {
        let layout = Layout::new(4, [anchor(1), chunk(5), chunk(2), whole(3), whole(4)]);
        assert_eq!(layout.cut(0..15), 0..1);
        assert_eq!(layout.cut(2..15), 2..6);
        assert_eq!(layout.cut(6..7), 6..7);
        assert_eq!(layout.cut(9..15), 9..15);
    }
}
