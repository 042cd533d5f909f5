//! The ops, at the shapes of Qwen3-0.6B.

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use strand_kernels::{
    AddRmsNorm, BlockFormat, BlockTables, KvDtype, Linear, PackedWeight, PagedAttention, Rope,
    RotaryTable, SiluMul, StoreKv, TableEntry, WeightDtype,
};
use strand_layers::kv_cache::{KvCache, KvCacheShape};

use super::{Clock, Figures, Peak};

const HIDDEN: usize = 1024;
const INNER: usize = 3072;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const LAYERS: usize = 28;
const BLOCK: usize = 16;
/// What is read once a step and together fits no cache, not even one of hundreds of megabytes.
const LARGE: usize = 768 << 20;
/// Where products count more than memory, so many are enough.
const MANY_ROWS: usize = 64;

/// An op at one size.
pub struct Case {
    pub name: String,
    pub measure: Box<Measure>,
}

type Measure = dyn Fn(&Clock) -> Result<Figures>;
/// As [`Measure`], for so many rows.
type MeasureRows = fn(&Clock, usize) -> Result<Figures>;

/// In the order they are printed.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [WeightDtype::Bf16, WeightDtype::F32] {
        for rows in [1, 8, 16, 64, 512] {
            let name = format!("linear {} {rows} x {HIDDEN} x {INNER}", dtype.name());
            cases.push(Case::new(name, move |clock| plain_linear(clock, dtype, rows)));
        }
    }
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0, BlockFormat::Q4K, BlockFormat::Q6K] {
        for rows in [1, 8, 16, 512] {
            let name = format!("linear {format:?} {rows} x {HIDDEN} x {INNER}");
            cases.push(Case::new(name, move |clock| quantized_linear(clock, format, rows)));
        }
    }
    let dtypes = [KvDtype::Bf16, KvDtype::Int8];
    for (batch, queries, keys) in [
        (1, 1, 512),
        (1, 1, 8192),
        (1, 1, 32_768),
        (16, 1, 144),
        (1, 512, 512),
        (1, 512, 2048),
        (1, 512, 8192),
    ] {
        for dtype in dtypes {
            let scene = Attention { dtype, batch, queries, keys };
            let name = format!("attention {batch} x {queries} x {keys} keys, {}", dtype.name());
            cases.push(Case::new(name, move |clock| scene.measure(clock)));
        }
    }
    for rows in [1, 512] {
        let ops: [(&str, MeasureRows); 4] = [
            ("add_rms_norm", add_rms_norm),
            ("rope", rope),
            ("store_kv, bf16,", store_kv),
            ("silu_mul", silu_mul),
        ];
        for (op, measure) in ops {
            cases.push(Case::new(format!("{op} {rows}"), move |clock| measure(clock, rows)));
        }
    }
    for (runs, is_scattered) in [("one run", false), ("blocks apart", true)] {
        let name = |verb| format!("{verb} {TOKENS} rows x {}, bf16, {runs}", 2 * LAYERS);
        cases.push(Case::new(name("gather"), move |clock| gather(clock, is_scattered)));
        cases.push(Case::new(name("scatter"), move |clock| scatter(clock, is_scattered)));
    }
    cases
}

impl Case {
    fn new(name: String, measure: impl Fn(&Clock) -> Result<Figures> + 'static) -> Self {
        Self { name, measure: Box::new(measure) }
    }
}

fn plain_linear(clock: &Clock, dtype: WeightDtype, rows: usize) -> Result<Figures> {
    let fill = |_: std::ops::Range<usize>, out: &mut [f32]| {
        out.fill(0.01);
        Ok::<_, Infallible>(())
    };
    let weight = || {
        let Ok(weight) = PackedWeight::pack(INNER, HIDDEN, dtype, &clock.threads, fill);
        weight
    };
    let peak = if dtype == WeightDtype::Bf16 { Peak::Bf16 } else { Peak::F32 };
    linear(clock, peak, rows, weight)
}

fn quantized_linear(clock: &Clock, format: BlockFormat, rows: usize) -> Result<Figures> {
    let fill = |_: usize, out: &mut [u8]| {
        out.fill(0x2C); // a scale of 1/15 in f16, and codes of 2 and 12
        Ok::<_, Infallible>(())
    };
    let weight = || {
        let parts = [(format, INNER)];
        let Ok(weight) = PackedWeight::pack_blocks(&parts, HIDDEN, &clock.threads, fill);
        weight
    };
    linear(clock, Peak::Int8, rows, weight)
}

/// x (rows, 1024) times a weight of (3072, 1024). One of several weights, so that none is cached.
fn linear(
    clock: &Clock,
    peak: Peak,
    rows: usize,
    weight: impl Fn() -> PackedWeight,
) -> Result<Figures> {
    let op =
        |weight| Linear { weight: Arc::new(weight), bias: None, threads: clock.threads.clone() };
    let first = op(weight());
    let bytes = first.weight.bytes();
    let count = if rows < MANY_ROWS { LARGE.div_ceil(bytes) } else { 4 };
    let mut weights = vec![first];
    weights.extend((1..count).map(|_| op(weight())));
    let x = Tensor::ones((rows, HIDDEN), DType::F32, &Device::Cpu)?;
    let seconds = clock.median(|| {
        for weight in &weights {
            x.apply_op1_no_bwd(weight)?;
        }
        Ok(())
    })?;
    Ok(Figures {
        seconds: seconds / count as f64,
        bytes: bytes as f64,
        operations: (2 * rows * HIDDEN * INNER) as f64,
        peak,
    })
}

/// A cache that is full: untouched memory would be one page of zeros, again and again.
fn kv_cache(clock: &Clock, dtype: KvDtype, layers: usize, num_blocks: usize) -> Result<KvCache> {
    let shape = KvCacheShape {
        layers,
        num_blocks,
        block_size: BLOCK,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let cache = KvCache::new(shape, dtype, &clock.threads)?;
    let rows = num_blocks * BLOCK;
    let ones = Tensor::ones((rows, KV_HEADS * HEAD_DIM), DType::F32, &Device::Cpu)?;
    let op = StoreKv { slot_mapping: Arc::new((0..rows as u32).collect()) };
    for layer in &cache.layers {
        layer.k.inplace_op2(&ones, &op)?;
        layer.v.inplace_op2(&ones, &op)?;
    }
    Ok(cache)
}

fn rotary(positions: usize) -> Arc<RotaryTable> {
    let frequencies: Vec<f64> = (0..HEAD_DIM / 2).map(|i| 0.8f64.powi(i as i32)).collect();
    Arc::new(RotaryTable::new(&frequencies, 1.0, positions))
}

/// The last `queries` rows of `batch` sequences of `keys` each.
#[derive(Clone, Copy)]
struct Attention {
    dtype: KvDtype,
    batch: usize,
    queries: usize,
    keys: usize,
}

impl Attention {
    /// One of as many layers as no cache holds, where keys are read for one row.
    fn measure(self, clock: &Clock) -> Result<Figures> {
        let Self { dtype, batch, queries, keys } = self;
        let blocks = batch * keys / BLOCK;
        let bytes = 2 * batch * keys * KV_HEADS * dtype.vector_bytes(HEAD_DIM);
        let layers = if queries == 1 { LARGE.div_ceil(bytes) } else { 4 };
        let cache = kv_cache(clock, dtype, layers, blocks)?;
        let entry = |index: usize| TableEntry {
            row: (index * BLOCK) as u32,
            first: (index % (keys / BLOCK) * BLOCK) as u32,
            delta: 0,
            num_valid: BLOCK as u16,
        };
        let offsets = |each: usize| (0..=batch).map(|i| (i * each) as u32).collect();
        let positions = || (keys - queries) as u32..keys as u32;
        let op = PagedAttention {
            tables: Arc::new(BlockTables {
                entries: (0..blocks).map(entry).collect(),
                cu_entries: offsets(keys / BLOCK),
            }),
            cu_seqlens_q: Arc::new(offsets(queries)),
            positions: Arc::new((0..batch).flat_map(|_| positions()).collect()),
            rotary: rotary(keys),
            num_heads: HEADS,
            scale: 0.1,
            sliding_window: None,
            soft_cap: None,
            threads: clock.threads.clone(),
        };
        let q = Tensor::ones((batch * queries, HEADS * HEAD_DIM), DType::F32, &Device::Cpu)?;
        let seconds = clock.median(|| {
            for layer in &cache.layers {
                q.apply_op3_no_bwd(&layer.k, &layer.v, &op)?;
            }
            Ok(())
        })?;
        let visible = queries * (keys - queries) + queries * (queries + 1) / 2;
        Ok(Figures {
            seconds: seconds / cache.layers.len() as f64,
            bytes: bytes as f64,
            operations: (4 * batch * visible * HEADS * HEAD_DIM) as f64,
            peak: Peak::F32,
        })
    }
}

fn add_rms_norm(clock: &Clock, rows: usize) -> Result<Figures> {
    let weight = Arc::new(vec![1.0; HIDDEN]);
    let op = AddRmsNorm { weight, eps: 1e-6, threads: clock.threads.clone() };
    let x = Tensor::ones((rows, HIDDEN), DType::F32, &Device::Cpu)?;
    let seconds = clock.median(|| repeat(|| Ok(x.apply_op2_no_bwd(&x, &op)?)))?;
    Ok(small(rows, seconds, 4 * 4 * HIDDEN, 6 * HIDDEN))
}

fn rope(clock: &Clock, rows: usize) -> Result<Figures> {
    let positions = Arc::new((0..rows as u32).collect());
    let op = Rope { table: rotary(rows), positions, threads: clock.threads.clone() };
    let width = KV_HEADS * HEAD_DIM;
    let x = Tensor::ones((rows, width), DType::F32, &Device::Cpu)?;
    let seconds = clock.median(|| repeat(|| Ok(x.apply_op1_no_bwd(&op)?)))?;
    Ok(small(rows, seconds, 2 * 4 * width, 3 * width))
}

fn store_kv(clock: &Clock, rows: usize) -> Result<Figures> {
    let cache = kv_cache(clock, KvDtype::Bf16, 1, rows.div_ceil(BLOCK))?;
    let op = StoreKv { slot_mapping: Arc::new((0..rows as u32).collect()) };
    let width = KV_HEADS * HEAD_DIM;
    let x = Tensor::ones((rows, width), DType::F32, &Device::Cpu)?;
    let layer = &cache.layers[0];
    let seconds = clock.median(|| repeat(|| Ok(layer.k.inplace_op2(&x, &op)?)))?;
    Ok(small(rows, seconds, (4 + 2) * width, 0))
}

fn silu_mul(clock: &Clock, rows: usize) -> Result<Figures> {
    let op = SiluMul { threads: clock.threads.clone() };
    let x = Tensor::ones((rows, 2 * INNER), DType::F32, &Device::Cpu)?;
    let seconds = clock.median(|| repeat(|| Ok(x.apply_op1_no_bwd(&op)?)))?;
    Ok(small(rows, seconds, 3 * 4 * INNER, 25 * INNER))
}

/// Calls of a small op between two looks at the clock.
const REPEATS: usize = 50;

fn repeat<T>(mut call: impl FnMut() -> Result<T>) -> Result<()> {
    (0..REPEATS).try_for_each(|_| call().map(drop))
}

/// An op that was repeated; bytes and operations are those of a row.
fn small(rows: usize, seconds: f64, bytes: usize, operations: usize) -> Figures {
    Figures {
        seconds: seconds / REPEATS as f64,
        bytes: (rows * bytes) as f64,
        operations: (rows * operations) as f64,
        peak: Peak::F32,
    }
}

/// Tokens that are moved off the device and back.
const TOKENS: usize = 1024;

/// Their places: in one run of slots, or every block elsewhere.
fn slots(is_scattered: bool) -> Vec<u32> {
    let place = |token: usize| match is_scattered {
        true => 2 * (token / BLOCK) * BLOCK + token % BLOCK,
        false => token,
    };
    (0..TOKENS).map(|token| place(token) as u32).collect()
}

/// Gathered rows get new memory each time, as a tier's do: its pages are in the time.
fn gather(clock: &Clock, is_scattered: bool) -> Result<Figures> {
    let cache = kv_cache(clock, KvDtype::Bf16, LAYERS, 2 * TOKENS / BLOCK)?;
    let slots = slots(is_scattered);
    let seconds = clock.median(|| Ok(cache.gather(&slots)?))?;
    Ok(moved(seconds))
}

fn scatter(clock: &Clock, is_scattered: bool) -> Result<Figures> {
    let mut cache = kv_cache(clock, KvDtype::Bf16, LAYERS, 2 * TOKENS / BLOCK)?;
    let slots = slots(is_scattered);
    let frames = cache.gather(&slots)?;
    let seconds = clock.median(|| Ok(cache.scatter(&slots, &frames, 0)?))?;
    Ok(moved(seconds))
}

fn moved(seconds: f64) -> Figures {
    let bytes = (2 * LAYERS * TOKENS * KV_HEADS * HEAD_DIM * 2) as f64;
    Figures { seconds, bytes, operations: 0.0, peak: Peak::F32 }
}
