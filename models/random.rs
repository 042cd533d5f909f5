//! Weights that were never trained, for benches and tests: any row can be made at any time.
//!
//! Each row has a generator of its own, a counter hashed with SplitMix64 (Steele, Lea and Flood,
//! "Fast splittable pseudorandom number generators", 2014), so the values depend on seed, name and
//! row alone, not on who asks for them in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use strand_kernels::BlockFormat;

use crate::config::ModelConfig;
use crate::error::{Error, check_shape};

/// Standard deviation of a weight, as models are usually initialized.
const DEVIATION: f32 = 0.02;

/// Which matrices of a quantized file have which blocks: llama.cpp's recipes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    Q8_0,
    Q4_0,
    /// Q4_K, and Q6_K for the embedding and for half of the layers' values and down projections.
    Q4KM,
}

impl Recipe {
    pub const ALL: [Self; 3] = [Self::Q8_0, Self::Q4_0, Self::Q4KM];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4KM => "q4_k_m",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|recipe| recipe.as_str() == text)
    }

    fn format(self, name: &str, layers: usize) -> BlockFormat {
        let is_head = name.contains("embed_tokens") || name.contains("lm_head");
        let is_wide = name.contains("v_proj") || name.contains("down_proj");
        match self {
            Self::Q8_0 => BlockFormat::Q8_0,
            _ if is_head => BlockFormat::Q6K,
            Self::Q4_0 => BlockFormat::Q4_0,
            Self::Q4KM if is_wide && has_more_bits(name, layers) => BlockFormat::Q6K,
            Self::Q4KM => BlockFormat::Q4K,
        }
    }
}

/// The first and the last eighth of the layers, and every third between.
fn has_more_bits(name: &str, layers: usize) -> bool {
    let layer = name.split('.').find_map(|part| part.parse::<usize>().ok()).unwrap_or(0);
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

pub(crate) struct RandomTensors {
    seed: u64,
    recipe: Option<Recipe>,
    layers: usize,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl RandomTensors {
    pub(crate) fn new(config: &ModelConfig, seed: u64, recipe: Option<Recipe>) -> Self {
        let shapes = config.tensors().into_iter().collect();
        RandomTensors { seed, recipe, layers: config.num_hidden_layers, shapes }
    }

    /// What tells its numbers from those of other seeds and recipes.
    pub(crate) fn seed(&self) -> u64 {
        self.recipe.map_or(self.seed, |recipe| hash_name(self.seed, recipe.as_str()))
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
        let columns = shape.get(1).copied().unwrap_or(1);
        let format = self.recipe.map(|recipe| recipe.format(name, self.layers));
        // rows that are no whole blocks stay as they are
        let format = format.filter(|f| shape.len() == 2 && columns.is_multiple_of(f.block_len()));
        Ok(RandomMatrix {
            columns,
            format,
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
    /// Of its blocks, where it has some.
    format: Option<BlockFormat>,
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
            if let Some(format) = self.format {
                format.dequantize(&quantized(format, out), out);
            }
        }
    }

    pub(crate) fn block_format(&self) -> Option<BlockFormat> {
        self.format
    }

    /// A row in its blocks.
    pub(crate) fn read_bytes(&self, row: usize, out: &mut [u8]) {
        let (Values::Seeded(seed), Some(format)) = (&self.values, self.format) else {
            unreachable!("only matrices have blocks");
        };
        let mut values = vec![0.0; self.columns];
        fill(mix(seed.wrapping_add(row as u64)), &mut values);
        out.copy_from_slice(&quantized(format, &values));
    }
}

/// A row in blocks, as candle chooses scales.
fn quantized(format: BlockFormat, values: &[f32]) -> Vec<u8> {
    let dtype = match format {
        BlockFormat::Q8_0 => GgmlDType::Q8_0,
        BlockFormat::Q4_0 => GgmlDType::Q4_0,
        BlockFormat::Q4K => GgmlDType::Q4K,
        BlockFormat::Q6K => GgmlDType::Q6K,
        other => unreachable!("no recipe has {other:?}"),
    };
    let row = Tensor::from_slice(values, values.len(), &Device::Cpu);
    let blocks = row.and_then(|row| QTensor::quantize(&row, dtype));
    let bytes = blocks.and_then(|blocks| Ok(blocks.data()?.into_owned()));
    bytes.expect("a row of whole blocks can be quantized")
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
