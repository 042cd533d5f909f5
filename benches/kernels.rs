//! The hot kernels at Qwen3-0.6B's shapes, beside a plain read loop over memory in the same run.
//! Prints a table and ends with one line of JSON.
//!
//!     cargo bench --bench kernels -- [threads]

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde_json::json;
use strand_kernels::{
    BlockTables, Linear, PackedWeight, PagedAttention, RotaryTable, TableEntry, Threads,
    WeightDtype,
};
use strand_layers::kv_cache::{KvCache, KvCacheShape};

const HIDDEN: usize = 1024;
const INNER: usize = 3072;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const BLOCK: usize = 16;
const REPEATS: usize = 15;

fn main() {
    let threads = std::env::args().filter_map(|argument| argument.parse().ok()).next();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = Threads::new(threads.unwrap_or(cores));
    println!("{threads:?}, medians of {REPEATS}");
    let bandwidth = read_bandwidth(&threads);
    println!("{:<44} {bandwidth:>8.1} GB/s", "a plain read loop over memory");
    let mut rows = vec![json!({"name": "plain read loop", "gb_s": bandwidth})];
    for dtype in [WeightDtype::Bf16, WeightDtype::F32] {
        for count in [1, 8, 16, 64, 512] {
            rows.push(linear(&threads, dtype, count));
        }
    }
    for (queries, keys) in [(1, 512), (1, 2048), (1, 8192), (512, 512), (512, 2048)] {
        rows.push(attention(&threads, queries, keys));
    }
    for is_scattered in [false, true] {
        rows.extend(moves(&threads, is_scattered));
    }
    println!("{}", json!({"bench": "kernels", "threads": threads.count(), "rows": rows}));
}

/// Seconds of one call: the median.
fn median(mut call: impl FnMut()) -> f64 {
    call();
    let mut seconds: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}

/// GB/s of summing an array that fits no cache.
fn read_bandwidth(threads: &Threads) -> f64 {
    let data = vec![1u64; 64 << 20];
    let parts = 8 * threads.count();
    let sums: Vec<std::sync::atomic::AtomicU64> = (0..parts).map(|_| Default::default()).collect();
    let seconds = median(|| {
        threads.run(parts, |part| {
            let piece = &data[part * data.len() / parts..(part + 1) * data.len() / parts];
            let sum = piece.iter().fold(0u64, |sum, value| sum.wrapping_add(*value));
            sums[part].store(sum, std::sync::atomic::Ordering::Relaxed);
        });
    });
    (data.len() * 8) as f64 / seconds / 1e9
}

/// x (rows, 1024) times a weight of (3072, 1024). One of several weights, so that none is cached.
fn linear(threads: &Threads, dtype: WeightDtype, rows: usize) -> serde_json::Value {
    let weights: Vec<Linear> = (0..24)
        .map(|_| {
            let fill = |_: std::ops::Range<usize>, out: &mut [f32]| {
                out.fill(0.01);
                Ok::<(), ()>(())
            };
            let weight = PackedWeight::pack(INNER, HIDDEN, dtype, threads, fill);
            let weight = Arc::new(weight.expect("filling can't fail"));
            Linear { weight, bias: None, threads: threads.clone() }
        })
        .collect();
    let x = Tensor::ones((rows, HIDDEN), candle_core::DType::F32, &Device::Cpu).expect("it fits");
    let seconds = median(|| {
        for weight in &weights {
            x.apply_op1_no_bwd(weight).expect("the shapes agree");
        }
    }) / weights.len() as f64;
    let bytes = (HIDDEN * INNER * dtype.size()) as f64 / seconds / 1e9;
    let flops = (2 * rows * HIDDEN * INNER) as f64 / seconds / 1e9;
    let name = format!("linear {} {rows} x {HIDDEN} x {INNER}", dtype.name());
    println!("{name:<44} {bytes:>8.1} GB/s {flops:>8.1} GFLOP/s");
    json!({"name": name, "gb_s": bytes, "gflop_s": flops})
}

/// The last `queries` rows of a sequence of `keys`, bf16 KV. One of several layers.
fn attention(threads: &Threads, queries: usize, keys: usize) -> serde_json::Value {
    let blocks = keys / BLOCK;
    let shape = KvCacheShape {
        layers: 8,
        num_blocks: blocks,
        block_size: BLOCK,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let cache = KvCache::new(shape, strand_kernels::KvDtype::Bf16, threads).expect("it fits");
    let entries = (0..blocks as u32).map(|block| TableEntry {
        row: block * BLOCK as u32,
        first: block * BLOCK as u32,
        delta: 0,
        num_valid: BLOCK as u16,
    });
    let frequencies: Vec<f64> = (0..HEAD_DIM / 2).map(|i| 0.8f64.powi(i as i32)).collect();
    let op = PagedAttention {
        tables: Arc::new(BlockTables {
            entries: entries.collect(),
            cu_entries: vec![0, blocks as u32],
        }),
        cu_seqlens_q: Arc::new(vec![0, queries as u32]),
        positions: Arc::new(((keys - queries) as u32..keys as u32).collect()),
        rotary: Arc::new(RotaryTable::new(&frequencies, 1.0, keys)),
        num_heads: HEADS,
        scale: 0.1,
        sliding_window: None,
        soft_cap: None,
        threads: threads.clone(),
    };
    let width = HEADS * HEAD_DIM;
    let q = Tensor::ones((queries, width), candle_core::DType::F32, &Device::Cpu).expect("it fits");
    let seconds = median(|| {
        for layer in &cache.layers {
            q.apply_op3_no_bwd(&layer.k, &layer.v, &op).expect("the shapes agree");
        }
    }) / cache.layers.len() as f64;
    let bytes = (2 * keys * KV_HEADS * HEAD_DIM * 2) as f64 / seconds / 1e9;
    let visible = queries * (keys - queries) + queries * (queries + 1) / 2;
    let flops = (4 * visible * HEADS * HEAD_DIM) as f64 / seconds / 1e9;
    let name = format!("attention {queries} x {keys} keys, bf16");
    println!("{name:<44} {bytes:>8.1} GB/s {flops:>8.1} GFLOP/s");
    json!({"name": name, "gb_s": bytes, "gflop_s": flops})
}

/// 1024 tokens of 28 layers' KV, off the device and back: in one run of slots, or every block
/// elsewhere. Gathered rows get new memory each time, as a tier's do: its pages are in the time.
fn moves(threads: &Threads, is_scattered: bool) -> [serde_json::Value; 2] {
    const TOKENS: usize = 1024;
    let shape = KvCacheShape {
        layers: 28,
        num_blocks: 2 * TOKENS / BLOCK,
        block_size: BLOCK,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let mut cache = KvCache::new(shape, strand_kernels::KvDtype::Bf16, threads).expect("it fits");
    let place = |token: usize| match is_scattered {
        true => 2 * (token / BLOCK) * BLOCK + token % BLOCK,
        false => token,
    };
    let slots: Vec<u32> = (0..TOKENS).map(|token| place(token) as u32).collect();
    let frames = cache.gather(&slots).expect("they are in the cache");
    cache.scatter(&slots, &frames, 0).expect("it is the same cache");
    let bytes = frames.len() as f64;
    let gather = median(|| drop(cache.gather(&slots).expect("they are in the cache")));
    let scatter = median(|| cache.scatter(&slots, &frames, 0).expect("it is the same cache"));
    let runs = if is_scattered { "blocks apart" } else { "one run" };
    [("gather", gather), ("scatter", scatter)].map(|(verb, seconds)| {
        let name = format!("{verb} {TOKENS} rows x 56, bf16, {runs}");
        let gb_s = bytes / seconds / 1e9;
        println!("{name:<44} {gb_s:>8.1} GB/s {:>8.1} ms", seconds * 1e3);
        json!({"name": name, "gb_s": gb_s, "ms": seconds * 1e3})
    })
}
