//! How long requests waited before they first ran, as a histogram.

use std::time::Duration;

/// Upper ends of the buckets in seconds: one millisecond, doubled. What took longer has one more.
const BOUNDS: usize = 16;

/// Counts by bucket, and all waiting together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct QueueTimes {
    counts: [u64; BOUNDS + 1],
    /// Of all requests together.
    pub seconds: f64,
}

impl QueueTimes {
    pub fn observe(&mut self, waited: Duration) {
        let seconds = waited.as_secs_f64();
        let bucket = (0..BOUNDS).find(|&bucket| seconds <= bound(bucket));
        self.counts[bucket.unwrap_or(BOUNDS)] += 1;
        self.seconds += seconds;
    }

    /// Requests that have waited to the end.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper end of each bucket in seconds, none for the last, and how many fell into it.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<f64>, u64)> {
        let end = |bucket| (bucket < BOUNDS).then(|| bound(bucket));
        self.counts.into_iter().enumerate().map(move |(bucket, count)| (end(bucket), count))
    }
}

fn bound(bucket: usize) -> f64 {
    0.001 * f64::from(1_u32 << bucket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_falls_into_the_first_bucket_that_holds_it() {
        let mut times = QueueTimes::default();
        for millis in [0, 1, 2, 3, 1_000_000] {
            times.observe(Duration::from_millis(millis));
        }
        let buckets: Vec<(Option<f64>, u64)> = times.buckets().collect();
        assert_eq!(buckets[..3], [(Some(0.001), 2), (Some(0.002), 1), (Some(0.004), 1)]);
        assert_eq!(buckets.last(), Some(&(None, 1)));
        assert_eq!((times.count(), times.seconds), (5, 1000.006));
    }
}
