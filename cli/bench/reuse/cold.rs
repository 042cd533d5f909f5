//! A question whose chunks are on the disk alone, against what the disk and the decoder can do.

use strand_engine::context::ReusePolicy;

use super::super::statistics::quantile;

/// How much longer than the disk needs by itself a cold hit may take.
const READ_ALLOWANCE: f64 = 1.3;
/// Rows that a core should decode in a second, in bytes.
const DECODE_BYTES_PER_SECOND: f64 = 1e9;

/// What was measured around the questions of one policy.
pub struct DiskHit {
    pub policy: ReusePolicy,
    /// Of all chunks.
    pub file_bytes: u64,
    /// Of their rows as the engine holds them.
    pub raw_bytes: u64,
    /// To the first token.
    pub seconds: Vec<f64>,
    /// For the files by themselves.
    pub read_seconds: Vec<f64>,
    /// From pages in memory to rows, every byte checked, on one thread.
    pub decode_seconds: Vec<f64>,
}

impl DiskHit {
    pub fn new(policy: ReusePolicy) -> Self {
        let (seconds, read_seconds, decode_seconds) = (Vec::new(), Vec::new(), Vec::new());
        Self { policy, file_bytes: 0, raw_bytes: 0, seconds, read_seconds, decode_seconds }
    }

    pub fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// In bytes a second.
    pub fn read_bandwidth(&self) -> f64 {
        self.file_bytes as f64 / median(&self.read_seconds)
    }

    /// Bytes of rows that one core decodes in a second.
    pub fn decode_rate(&self) -> f64 {
        self.raw_bytes as f64 / median(&self.decode_seconds)
    }

    /// The longest it should take in seconds: reading, decoding on `threads` cores, and what the
    /// question takes when its chunks are `resident`.
    pub fn bound(&self, threads: usize, resident: f64) -> f64 {
        let decode = self.raw_bytes as f64 / (DECODE_BYTES_PER_SECOND * threads as f64);
        READ_ALLOWANCE * median(&self.read_seconds) + decode + resident
    }
}

fn median(seconds: &[f64]) -> f64 {
    quantile(seconds, 0.5).expect("every hit was measured")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_adds_reading_decoding_and_the_question() {
        let hit = DiskHit {
            file_bytes: 600_000_000,
            raw_bytes: 1_000_000_000,
            seconds: vec![3.0],
            read_seconds: vec![1.0],
            decode_seconds: vec![0.5],
            ..DiskHit::new(ReusePolicy::Exact)
        };
        assert!((hit.bound(2, 0.25) - (1.3 + 0.5 + 0.25)).abs() < 1e-12);
        assert_eq!((hit.read_bandwidth(), hit.decode_rate()), (6e8, 2e9));
    }
}
