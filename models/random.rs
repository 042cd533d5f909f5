//! Weights that were never trained, for benches and tests: any row can be made at any time.
//!
//! Each row has a generator of its own, a counter hashed with SplitMix64 (Steele, Lea and Flood,
//! "Fast splittable pseudorandom number generators", 2014), so the values depend on seed, name and
//! row alone, not on who asks for them in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::config::ModelConfig;
use crate::error::{Error, check_shape};

/// Standard deviation of a weight, as models are usually initialized.
const DEVIATION: f32 = 0.02;

pub(crate) struct RandomTensors {
    seed: u64,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl RandomTensors {
    pub(crate) fn new(config: &ModelConfig, seed: u64) -> Self {
        RandomTensors { seed, shapes: config.tensors().into_iter().collect() }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    pub(crate) fn unused(&self, used: &BTreeSet<String>) -> Vec<String> {
        self.shapes.keys().filter(|name| !used.contains(*name)).cloned().collect()
    }

    pub(crate) fn find(&self, name: &str, shape: &[usize]) -> Result<RandomMatrix, Error> {
        let place = || "the random weights".to_string();
        let found = self
            .shapes
            .get(name)
            .ok_or_else(|| Error::TensorMissing { name: name.to_string(), place: place() })?;
        check_shape(name, place, found, shape)?;
        Ok(RandomMatrix {
            columns: shape.get(1).copied().unwrap_or(1),
            values: if name.ends_with("norm.weight") {
                Values::Ones
            } else {
                Values::Seeded(hash_name(self.seed, name))
            },
        })
    }
}

pub(crate) struct RandomMatrix {
    columns: usize,
    values: Values,
}

enum Values {
    Ones,
    Seeded(u64),
}

impl RandomMatrix {
    /// `out` is `(rows.len(), columns)`.
    pub(crate) fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        let Values::Seeded(seed) = self.values else {
            return out.fill(1.0);
        };
        for (row, out) in rows.zip(out.chunks_exact_mut(self.columns)) {
            fill(mix(seed.wrapping_add(row as u64)), out);
        }
    }
}

/// Uniform values, four from each hash.
fn fill(seed: u64, out: &mut [f32]) {
    // A uniform variable on (-a, a) deviates by a / sqrt(3).
    let scale = DEVIATION * 3f32.sqrt() / 32768.0;
    for (counter, values) in out.chunks_mut(4).enumerate() {
        let bits = mix(seed.wrapping_add((counter as u64).wrapping_mul(GOLDEN)));
        for (place, value) in values.iter_mut().enumerate() {
            *value = f32::from((bits >> (16 * place)) as u16 as i16) * scale;
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finalizer.
fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(GOLDEN);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

fn hash_name(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte)))
}
