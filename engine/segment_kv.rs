//! K and V of a segment's rows, off the device.

/// One frame for each (layer, K or V): layer 0's K, layer 0's V, layer 1's K, ... A frame holds the
/// rows of the segment one after another, each (kv_heads, head_dim) in the pool's type, little
/// endian. Knows no blocks: it can be put into a pool of any block size.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SegmentKv {
    pub frames: Vec<Vec<u8>>,
}

impl SegmentKv {
    pub fn num_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }
}
