//! How a sequence's tokens fall into blocks, and what each segment sees.

use std::ops::Range;
use std::sync::Arc;

use super::{ChunkId, KvVariant};

/// What the rows of a segment see besides the rows before them in the segment itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Sees {
    /// All segments before it, but for their hidden rows.
    Everything,
    /// The first segment, where that is an anchor; else nothing. Its KV is the same wherever the
    /// segment stands (block attention).
    Anchor,
    /// These earlier segments, hidden rows included, in ascending order.
    Listed(Arc<[u16]>),
}

/// A segment as the layout knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentLayout {
    pub len: usize,
    pub sees: Sees,
    /// So many of its first rows are seen by the segment itself and by those that list it alone.
    pub hidden: usize,
    /// True for a first segment that every other one sees.
    pub is_anchor: bool,
    pub chunk: Option<ChunkId>,
    /// Its rows stand in for rows of the chunk that were encoded without what is before it.
    pub recomputed: bool,
    pub variant: KvVariant,
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
    /// Position at which its first key is rotated: how many keys it sees before its own.
    stored_start: usize,
    segment: SegmentLayout,
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
        let (mut at, mut shown, mut anchor) = (0, 0, 0);
        for (index, segment) in segments.into_iter().enumerate() {
            assert!(segment.len > 0, "a segment holds at least one token");
            assert!(segment.hidden <= segment.len, "only its own rows can be hidden");
            let number = u16::try_from(index).expect("checked when the request came in");
            let tokens = at..at + segment.len;
            for start in tokens.clone().step_by(block_size) {
                let end = tokens.end.min(start + block_size);
                layout.spans.push(Span { tokens: start..end, segment: number });
            }
            let stored_start = match &segment.sees {
                Sees::Everything => shown,
                Sees::Anchor => anchor,
                Sees::Listed(list) => list.iter().map(|&other| layout.facts(other).len).sum(),
            };
            at = tokens.end;
            shown += segment.len - segment.hidden;
            if index == 0 && segment.is_anchor {
                anchor = segment.len;
            }
            layout.segments.push(Placed { tokens, stored_start, segment });
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

    pub fn num_segments(&self) -> u16 {
        self.segments.len() as u16
    }

    /// What was said of a segment.
    pub fn facts(&self, segment: u16) -> &SegmentLayout {
        &self.segments[usize::from(segment)].segment
    }

    /// The tokens of a segment.
    pub fn tokens_of(&self, segment: u16) -> Range<usize> {
        self.segments[usize::from(segment)].tokens.clone()
    }

    /// The tokens of a segment that later ones see.
    pub fn shown(&self, segment: u16) -> Range<usize> {
        let Placed { tokens, segment, .. } = &self.segments[usize::from(segment)];
        tokens.start + segment.hidden..tokens.end
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

    /// How many tokens the end of the sequence sees.
    pub fn shown_tokens(&self) -> usize {
        self.segments.iter().map(|placed| placed.segment.len - placed.segment.hidden).sum()
    }

    /// Position of a segment's first key.
    pub fn stored_start(&self, segment: u16) -> usize {
        self.segments[usize::from(segment)].stored_start
    }

    /// The other segments that the rows of one see, in order.
    pub fn seen_segments(&self, row: u16) -> Vec<u16> {
        match &self.facts(row).sees {
            Sees::Everything => (0..row).filter(|&other| !self.shown(other).is_empty()).collect(),
            Sees::Anchor => (0..row.min(1)).filter(|_| self.facts(0).is_anchor).collect(),
            Sees::Listed(list) => list.to_vec(),
        }
    }

    /// The rows of another segment that the rows of one see; of its own, those there are.
    pub fn seen_rows(&self, row: u16, key: u16) -> Range<usize> {
        let nothing = self.tokens_of(key).start..self.tokens_of(key).start;
        if key == row {
            return self.tokens_of(key);
        }
        match &self.facts(row).sees {
            Sees::Everything if key < row => self.shown(key),
            Sees::Anchor if key == 0 && self.facts(0).is_anchor => self.tokens_of(0),
            Sees::Listed(list) if list.binary_search(&key).is_ok() => self.tokens_of(key),
            Sees::Everything | Sees::Anchor | Sees::Listed(_) => nothing,
        }
    }

    /// The segments whose KV is needed: those that are seen in the end, and for each that is
    /// missing those that it sees. `is_missing` is asked once for each, the last first.
    pub fn needed(&self, mut is_missing: impl FnMut(u16) -> bool) -> Vec<bool> {
        let last = self.num_segments() - 1;
        let mut needed: Vec<bool> =
            (0..=last).map(|segment| segment == last || !self.shown(segment).is_empty()).collect();
        for segment in (0..=last).rev() {
            if needed[usize::from(segment)] && is_missing(segment) {
                for seen in self.seen_segments(segment) {
                    needed[usize::from(seen)] = true;
                }
            }
        }
        needed
    }

    /// Where a run of tokens that starts at `run.start` must end: all its rows see the same
    /// segments but for those of the run itself.
    pub fn cut(&self, run: Range<usize>) -> Range<usize> {
        let first = usize::from(self.segment(self.block_of(run.start)));
        let mut end = self.segments[first].tokens.end;
        for pair in self.segments[first..].windows(2) {
            let (before, after) = (&pair[0].segment, &pair[1].segment);
            let goes_on = before.sees == Sees::Everything && before.hidden == 0;
            if !goes_on || after.sees != Sees::Everything {
                break;
            }
            end = pair[1].tokens.end;
        }
        run.start..run.end.min(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(len: usize) -> SegmentLayout {
        SegmentLayout {
            len,
            sees: Sees::Everything,
            hidden: 0,
            is_anchor: false,
            chunk: None,
            recomputed: false,
            variant: KvVariant::Lossless,
        }
    }

    fn chunk(len: usize) -> SegmentLayout {
        SegmentLayout { sees: Sees::Anchor, ..whole(len) }
    }

    fn anchor(len: usize) -> SegmentLayout {
        SegmentLayout { is_anchor: true, ..whole(len) }
    }

    fn listing(len: usize, list: &[u16]) -> SegmentLayout {
        SegmentLayout { sees: Sees::Listed(list.into()), ..whole(len) }
    }

    fn spans(layout: &Layout) -> Vec<Range<usize>> {
        (0..layout.num_blocks()).map(|block| layout.tokens(block)).collect()
    }

    /// How many rows of each segment a segment sees.
    fn sees(layout: &Layout, row: u16) -> Vec<usize> {
        (0..layout.num_segments()).map(|key| layout.seen_rows(row, key).len()).collect()
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
        assert_eq!(sees(&layout, 1), [1, 5, 0, 0]);
        assert_eq!(sees(&layout, 2), [1, 0, 2, 0]);
        assert_eq!(sees(&layout, 3), [1, 5, 2, 3]);
        let without = Layout::new(4, [chunk(5), chunk(2)]);
        assert_eq!(sees(&without, 1), [0, 2]);
    }

    #[test]
    fn hidden_rows_take_no_place_but_in_their_own_segment() {
        // a chunk whose first two rows are recomputed behind the one before it
        let head = SegmentLayout { recomputed: true, ..whole(2) };
        let rest = SegmentLayout { hidden: 2, ..chunk(6) };
        let layout = Layout::new(4, [anchor(1), chunk(5), head, rest, whole(3)]);
        assert_eq!(sees(&layout, 2), [1, 5, 2, 0, 0]);
        assert_eq!(sees(&layout, 3), [1, 0, 0, 6, 0]);
        assert_eq!(sees(&layout, 4), [1, 5, 2, 4, 3]);
        assert_eq!([2, 3, 4].map(|segment| layout.stored_start(segment)), [6, 1, 12]);
    }

    #[test]
    fn a_list_names_all_that_is_seen() {
        // the second chunk was switched off after the turn had seen it
        let off = SegmentLayout { hidden: 4, ..listing(4, &[0]) };
        let layout =
            Layout::new(4, [listing(5, &[]), off, listing(3, &[0, 1]), listing(2, &[0, 2])]);
        assert_eq!(sees(&layout, 2), [5, 4, 3, 0]);
        assert_eq!(sees(&layout, 3), [5, 0, 3, 2]);
        assert_eq!([2, 3].map(|segment| layout.stored_start(segment)), [9, 8]);
    }

    #[test]
    fn what_was_switched_off_is_needed_only_to_encode_what_saw_it() {
        let off = |list: &[u16]| SegmentLayout { hidden: 4, ..listing(4, list) };
        let layout = Layout::new(4, [off(&[]), off(&[0]), listing(3, &[1]), listing(2, &[2])]);
        assert_eq!(layout.needed(|_| false), [false, false, true, true]);
        assert_eq!(layout.needed(|segment| segment == 2), [false, true, true, true]);
        assert_eq!(layout.needed(|_| true), [true; 4]);
    }

    #[test]
    fn runs_are_cut_where_sight_changes() {
        let layout = Layout::new(4, [anchor(1), chunk(5), chunk(2), whole(3), whole(4)]);
        assert_eq!(layout.cut(0..15), 0..1);
        assert_eq!(layout.cut(2..15), 2..6);
        assert_eq!(layout.cut(6..7), 6..7);
        assert_eq!(layout.cut(9..15), 9..15);
        let hidden = SegmentLayout { hidden: 1, ..whole(3) };
        assert_eq!(Layout::new(4, [hidden, whole(3)]).cut(0..6), 0..3);
        assert_eq!(Layout::new(4, [whole(3), listing(3, &[0])]).cut(0..6), 0..3);
    }
}
