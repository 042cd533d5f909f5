//! How a sequence's tokens fall into blocks.

use std::ops::Range;

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
    spans: Vec<Span>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Span {
    tokens: Range<usize>,
    segment: u16,
}

impl Layout {
    /// Lays out segments of the given lengths.
    pub fn new(block_size: usize, segments: impl IntoIterator<Item = usize>) -> Self {
        assert!(block_size > 0, "a block holds at least one row");
        let mut layout = Self { block_size, spans: Vec::new() };
        let mut at = 0;
        for (segment, len) in segments.into_iter().enumerate() {
            let segment = u16::try_from(segment).expect("checked when the request came in");
            let end = at + len;
            while at < end {
                let next = end.min(at + block_size);
                layout.spans.push(Span { tokens: at..next, segment });
                at = next;
            }
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

    /// True when nothing will be added to the block: it is full, or its segment has ended.
    pub fn is_complete(&self, block: usize) -> bool {
        self.spans[block].tokens.len() == self.block_size || block + 1 < self.spans.len()
    }

    /// How many blocks the first `tokens` tokens touch.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        self.spans.partition_point(|span| span.tokens.start < tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(layout: &Layout) -> Vec<Range<usize>> {
        (0..layout.num_blocks()).map(|block| layout.tokens(block)).collect()
    }

    #[test]
    fn every_segment_starts_a_fresh_block() {
        let layout = Layout::new(16, [21, 9, 16]);
        assert_eq!(spans(&layout), [0..16, 16..21, 21..30, 30..46]);
        assert_eq!((0..4).map(|b| layout.segment(b)).collect::<Vec<_>>(), [0, 0, 1, 2]);
        assert!((0..4).all(|block| layout.is_complete(block)));
    }

    #[test]
    fn only_the_last_segment_grows() {
        let mut layout = Layout::new(4, [3, 3]);
        layout.push();
        assert_eq!(spans(&layout), [0..3, 3..7]);
        layout.push();
        assert_eq!(spans(&layout), [0..3, 3..7, 7..8]);
        assert!(!layout.is_complete(2));
    }

    #[test]
    fn blocks_for_counts_what_is_touched() {
        let layout = Layout::new(4, [3, 3]);
        let counts: Vec<usize> = (0..=6).map(|tokens| layout.blocks_for(tokens)).collect();
        assert_eq!(counts, [0, 1, 1, 1, 2, 2, 2]);
    }
}
