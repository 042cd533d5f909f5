//! Random prompts, a function of the seed alone.
//!
//! The same distribution as nano-vLLM's bench.py (ids uniform in 0..=10000, fewer where the
//! vocabulary ends earlier; lengths uniform in their range), but not Python's generator.

/// Largest token id that the workload uses.
const LARGEST_ID: u64 = 10_000;

/// A stream of numbers: SplitMix64.
///
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in `low..=high`, by the high half of a 64 x 64 bit product.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        let range = u128::from(high - low) + 1;
        low + ((u128::from(self.next()) * range) >> 64) as u64
    }

    pub fn prompt(&mut self, len: usize, vocab_size: usize) -> Vec<u32> {
        let largest = LARGEST_ID.min(vocab_size as u64 - 1);
        (0..len).map(|_| self.within(0, largest) as u32).collect()
    }

    /// Uniform above 0 up to 1.
    pub fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_in_their_range_and_reach_both_ends() {
        let mut random = Random::new(0);
        let mut seen = [0u32; 5];
        for _ in 0..5_000 {
            seen[random.within(10, 14) as usize - 10] += 1;
        }
        assert!(seen.iter().all(|&count| (800..1_200).contains(&count)), "{seen:?}");
        assert_eq!(random.within(3, 3), 3);
        let units: Vec<f64> = (0..1_000).map(|_| random.unit()).collect();
        assert!(units.iter().all(|unit| (0.0..=1.0).contains(unit) && *unit > 0.0));
        let mean = units.iter().sum::<f64>() / 1e3;
        assert!((0.45..0.55).contains(&mean), "{mean}");
    }

    #[test]
    fn a_prompt_is_a_function_of_the_seed() {
        let prompt = |seed| Random::new(seed).prompt(64, 2048);
        assert_eq!(prompt(1), prompt(1));
        assert_ne!(prompt(1), prompt(2));
        assert!(prompt(1).iter().all(|&id| id < 2048));
    }
}
