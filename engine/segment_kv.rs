//! K and V of a segment's rows, off the device.

use std::fmt;

use strand_kernels::gpu::HostBytes;

/// One frame for each (layer, K or V): layer 0's K, layer 0's V, layer 1's K, ... A frame holds the
/// rows of the segment one after another, each (kv_heads, head_dim) in the pool's type, little
/// endian. Knows no blocks: it can be put into a pool of any block size.
pub struct SegmentKv {
    /// The frames one after another, all of one length.
    bytes: HostBytes,
    num_frames: usize,
}

impl SegmentKv {
    /// # Panics
    /// If the bytes are not so many frames.
    pub fn new(bytes: HostBytes, num_frames: usize) -> Self {
        assert!(bytes.len().is_multiple_of(num_frames), "frames have one length");
        Self { bytes, num_frames }
    }

    /// As a device reads them.
    pub(crate) fn host_bytes(&self) -> &HostBytes {
        &self.bytes
    }

    /// Copies frames together.
    ///
    /// # Panics
    /// If they are not of one length.
    pub fn of_frames(frames: &[Vec<u8>]) -> Self {
        let frame_bytes = frames.first().map_or(0, Vec::len);
        assert!(frames.iter().all(|frame| frame.len() == frame_bytes), "frames have one length");
        Self::new(HostBytes::Plain(frames.concat()), frames.len())
    }

    pub fn num_frames(&self) -> usize {
        self.num_frames
    }

    pub fn frame_bytes(&self) -> usize {
        self.bytes.len().checked_div(self.num_frames).unwrap_or(0)
    }

    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes().chunks_exact(self.frame_bytes().max(1))
    }

    pub fn frames_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let frame_bytes = self.frame_bytes().max(1);
        self.bytes.chunks_exact_mut(frame_bytes)
    }

    /// All frames one after another.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn num_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl Clone for SegmentKv {
    fn clone(&self) -> Self {
        Self::new(HostBytes::Plain(self.bytes().to_vec()), self.num_frames)
    }
}

impl PartialEq for SegmentKv {
    fn eq(&self, other: &Self) -> bool {
        self.num_frames == other.num_frames && self.bytes() == other.bytes()
    }
}

impl Eq for SegmentKv {}

impl fmt::Debug for SegmentKv {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "SegmentKv({} frames of {} bytes)", self.num_frames, self.frame_bytes())
    }
}
