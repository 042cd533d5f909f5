//! The ops of a GPU at the shapes of an 8B model, beside what the same run measures of the device:
//! how fast it copies its memory, and multiplies matrices.
//!
//! A figure is the time of a row of calls, queued one behind the other, over their number.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use strand_engine::Device;
use strand_kernels::gpu::{
    AttentionOperands, AttentionShape, DecodeAttention, FilterView, Float, Gpu, PAGE_BYTES,
    Partials, PrefillAttention, Product, RmsNorm, Rotary, SampleRow, SampleRows, Slice, SplitPlan,
    Tables, Weight, page_bytes,
};
use strand_kernels::{BlockFormat, Error, PageEntry, RotaryTable, Threads};

use super::middle;
use crate::Outcome;
use crate::args::KernelsArgs;

const FLOAT: Float = Float::Bf16;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const HIDDEN: usize = 4096;
const INNER: usize = 12288;
const VOCAB: usize = 151_936;
const BLOCK_SIZE: usize = 16;
const SPLIT: u32 = 256;

/// A device and how it is measured.
struct Clock<'a> {
    gpu: &'a Gpu,
    /// Rows of calls, of which the median is told, and the calls of each.
    repeats: usize,
    calls: usize,
    /// By how much sizes are smaller than they should be: the emulator has no time for them.
    divisor: usize,
}

struct Figures {
    name: String,
    seconds: f64,
    /// That must be read and written.
    bytes: f64,
    /// Additions and multiplications.
    operations: f64,
}

/// What the device does at most, a second.
struct Ceilings {
    copied_bytes: f64,
    operations: f64,
}

pub fn run(gpu: &Gpu, args: &KernelsArgs, only_json: bool) -> Result<Outcome> {
    let divisor = if args.device == Device::Emulator { 64 } else { 1 };
    let calls = if divisor == 1 { 20 } else { 1 };
    let clock = Clock { gpu, repeats: args.repeats, calls, divisor };
    let ceilings = clock.ceilings()?;
    let mut out = io::stdout().lock();
    if !only_json {
        let (bytes, operations) = (ceilings.copied_bytes / 1e9, ceilings.operations / 1e12);
        writeln!(out, "{}: {} rows of {calls} calls", gpu.name(), args.repeats)?;
        writeln!(out, "copies {bytes:.0} GB/s (read and written), multiplies {operations:.1} T/s")?;
        writeln!(out, "{:<44} {:>10} {:>9} {:>9}", "", "us", "of copy", "of bf16")?;
    }
    let mut rows = Vec::new();
    let is_asked = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only));
    for (name, measure) in cases() {
        if !is_asked(name) {
            continue;
        }
        for figures in measure(&clock)? {
            if !only_json {
                figures.print(&ceilings, &mut out)?;
            }
            rows.push(figures.to_json(&ceilings));
        }
    }
    let line = json!({
        "bench": "kernels",
        "device": gpu.name(),
        "family": gpu.family(),
        "repeats": args.repeats,
        "copied_bytes_per_second": ceilings.copied_bytes,
        "bf16_operations_per_second": ceilings.operations,
        "rows": rows,
    });
    writeln!(out, "{line}")?;
    Ok(Outcome::Done)
}

type Measure = fn(&Clock) -> Result<Vec<Figures>>;

fn cases() -> [(&'static str, Measure); 7] {
    [
        ("decode attention", decode_attention),
        ("prefill attention", prefill_attention),
        ("product of one row", product_of_one_row),
        ("deterministic product", deterministic_product),
        ("quantized product", quantized_product),
        ("rms_norm", rms_norm),
        ("sample", sample),
    ]
}

impl Clock<'_> {
    /// Seconds of one call.
    fn median(&self, mut call: impl FnMut() -> Result<(), Error>) -> Result<f64> {
        call()?;
        self.gpu.synchronize()?;
        let mut seconds = Vec::with_capacity(self.repeats);
        for _ in 0..self.repeats {
            let start = Instant::now();
            (0..self.calls).try_for_each(|_| call())?;
            self.gpu.synchronize()?;
            seconds.push(start.elapsed().as_secs_f64() / self.calls as f64);
        }
        Ok(middle(seconds))
    }

    fn ceilings(&self) -> Result<Ceilings> {
        let bytes = (4usize << 30) / self.divisor.pow(2);
        let (from, to) = (self.gpu.zeros(bytes)?.all(), self.gpu.zeros(bytes)?.all());
        let copied = self.median(|| self.gpu.copy(&from, &to))?;
        let size = 8192 / self.divisor;
        let weight = self.weight(size, size)?;
        let (x, y) = (self.narrow(size * size)?, self.narrow(size * size)?);
        let product = self.median(|| self.product(&x, &weight, &y, size).fast(self.gpu))?;
        Ok(Ceilings {
            copied_bytes: 2.0 * bytes as f64 / copied,
            operations: 2.0 * (size as f64).powi(3) / product,
        })
    }

    /// So many zeros.
    fn narrow(&self, count: usize) -> Result<Slice> {
        Ok(self.gpu.zeros(count.max(1) * Float::SIZE)?.all())
    }

    fn weight(&self, outputs: usize, inputs: usize) -> Result<Weight> {
        let fill = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            let number = |index: usize| ((rows.start + index) % 251) as f32 / 251.0 - 0.5;
            out.iter_mut().enumerate().for_each(|(index, value)| *value = number(index));
            Ok::<_, Error>(())
        };
        Ok(Weight::dense(self.gpu, FLOAT, outputs, inputs, fill)?)
    }

    fn product<'a>(
        &self,
        x: &'a Slice,
        weight: &'a Weight,
        y: &'a Slice,
        rows: usize,
    ) -> Product<'a> {
        Product { x, weight, bias: None, y, y_float: Some(weight.float()), rows }
    }

    fn words(&self, words: impl Iterator<Item = u32>) -> Result<Slice> {
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        Ok(self.gpu.uploaded(&bytes)?.all())
    }
}

/// Sequences over a pool, each with blocks of its own, its keys in chunks of `chunk` keys that
/// were encoded at position 0.
struct Scene {
    shape: AttentionShape,
    tables: Tables,
    rotary: Rotary,
    k_cache: Slice,
    v_cache: Slice,
    partials: Partials,
}

impl Scene {
    fn new(clock: &Clock, sequences: usize, keys: usize, chunk: usize) -> Result<Self> {
        let gpu = clock.gpu;
        let blocks = keys.div_ceil(BLOCK_SIZE);
        let slots = sequences * blocks * BLOCK_SIZE;
        let page = |index: usize| PageEntry {
            block: index as u32,
            first_row: 0,
            stored_position: (index % blocks * BLOCK_SIZE % chunk) as u32,
            num_valid: BLOCK_SIZE as u16,
            active: true,
            segment: 0,
        };
        let pages: Vec<u8> = (0..sequences * blocks).flat_map(|i| page_bytes(&page(i))).collect();
        let starts = clock.words((0..=sequences).map(|sequence| (sequence * blocks) as u32))?;
        let words = || gpu.zeros(4 * sequences).map(|buffer| buffer.all());
        let tables = Tables {
            entries: gpu.zeros(PAGE_BYTES * sequences * blocks)?.all(),
            starts: starts.clone(),
            num_entries: words()?,
            num_keys: words()?,
        };
        FilterView {
            pages: &gpu.uploaded(&pages)?.all(),
            starts: &starts,
            ends: &starts.at(4),
            num_sequences: sequences,
            max_pages: sequences * blocks,
            block_size: BLOCK_SIZE,
            tables: &tables,
        }
        .launch(gpu)?;
        gpu.synchronize()?;
        let frequencies: Vec<f64> =
            (0..HEAD_DIM / 2).map(|pair| 1e6f64.powf(-2.0 * pair as f64 / 128.0)).collect();
        let shape = AttentionShape {
            num_heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            slots,
            q_stride: HEADS * HEAD_DIM,
            scale: 1.0 / (HEAD_DIM as f32).sqrt(),
            sliding_window: None,
            soft_cap: None,
            float: FLOAT,
        };
        let splits = sequences * keys.div_ceil(SPLIT as usize);
        Ok(Self {
            shape,
            tables,
            rotary: Rotary::new(gpu, &RotaryTable::new(&frequencies, 1.0, keys))?,
            k_cache: clock.narrow(slots * shape.kv_width())?,
            v_cache: clock.narrow(slots * shape.kv_width())?,
            partials: Partials::new(gpu, splits, HEADS, HEAD_DIM)?,
        })
    }

    fn operands<'a>(
        &'a self,
        q: &'a Slice,
        positions: &'a Slice,
        out: &'a Slice,
    ) -> AttentionOperands<'a> {
        AttentionOperands {
            q,
            k_cache: &self.k_cache,
            v_cache: &self.v_cache,
            tables: &self.tables,
            positions,
            rotary: &self.rotary,
            partials: &self.partials,
            out,
            shape: self.shape,
        }
    }
}

fn decode_attention(clock: &Clock) -> Result<Vec<Figures>> {
    let sizes = [(1, 1024), (1, 32_768), (8, 8192), (64, 4096), (256, 1024)];
    sizes.into_iter().map(|(batch, keys)| decode(clock, batch, keys)).collect()
}

fn decode(clock: &Clock, batch: usize, keys: usize) -> Result<Figures> {
    let (gpu, keys) = (clock.gpu, keys / clock.divisor);
    let scene = Scene::new(clock, batch, keys, 1024)?;
    let plan = SplitPlan::new(gpu, batch, batch * keys.div_ceil(SPLIT as usize), SPLIT)?;
    let positions = clock.words((0..batch).map(|_| keys as u32 - 1))?;
    plan.fill(gpu, &scene.tables, (None, &positions), (batch, keys), None)?;
    let width = HEADS * HEAD_DIM;
    let (q, out) = (clock.narrow(batch * width)?, clock.narrow(batch * width)?);
    let attention = DecodeAttention {
        operands: scene.operands(&q, &positions, &out),
        row_sequence: None,
        plan: &plan,
        rows: batch,
        max_keys: keys,
    };
    Ok(Figures {
        name: format!("decode attention, {batch} rows over {keys} keys"),
        seconds: clock.median(|| attention.launch(gpu))?,
        bytes: (2 * batch * keys * KV_HEADS * HEAD_DIM * Float::SIZE) as f64,
        operations: 4.0 * (batch * keys * width) as f64,
    })
}

fn prefill_attention(clock: &Clock) -> Result<Vec<Figures>> {
    // a prompt alone; and a question's rows behind chunks
    let sizes = [(8192, 8192), (16_384, 16_384), (512, 32_768)];
    sizes.into_iter().map(|(rows, keys)| prefill(clock, rows, keys)).collect()
}

fn prefill(clock: &Clock, rows: usize, keys: usize) -> Result<Figures> {
    let (gpu, rows, keys) = (clock.gpu, rows / clock.divisor, keys / clock.divisor);
    let scene = Scene::new(clock, 1, keys, if rows == keys { usize::MAX } else { 1024 })?;
    let positions = clock.words((keys - rows..keys).map(|position| position as u32))?;
    let width = HEADS * HEAD_DIM;
    let (q, out) = (clock.narrow(rows * width)?, clock.narrow(rows * width)?);
    let attention = PrefillAttention {
        operands: scene.operands(&q, &positions, &out),
        cu_seqlens_q: &clock.words([0, rows as u32].into_iter())?,
        num_sequences: 1,
        rows: (0, rows),
        max_rows: rows,
        max_keys: keys,
    };
    let seen: usize = (keys - rows + 1..=keys).sum();
    Ok(Figures {
        name: format!("prefill attention, {rows} rows over {keys} keys"),
        seconds: clock.median(|| attention.launch(gpu))?,
        bytes: (2 * keys * KV_HEADS * HEAD_DIM * Float::SIZE) as f64,
        operations: 4.0 * (seen * width) as f64,
    })
}

fn product_of_one_row(clock: &Clock) -> Result<Vec<Figures>> {
    let (outputs, inputs) = (2 * INNER / clock.divisor, HIDDEN / clock.divisor);
    let weight = clock.weight(outputs, inputs)?;
    let name = |rows| format!("product of {rows} rows, {inputs} to {outputs}");
    let launch = |product: &Product| product.fast(clock.gpu);
    [1, 16].map(|rows| product(clock, &weight, (rows, name(rows)), launch)).into_iter().collect()
}

fn deterministic_product(clock: &Clock) -> Result<Vec<Figures>> {
    let (outputs, inputs) = (2 * INNER / clock.divisor, HIDDEN / clock.divisor);
    let weight = clock.weight(outputs, inputs)?;
    let name = |rows| format!("deterministic product of {rows} rows");
    let launch = |product: &Product| product.deterministic(clock.gpu);
    let rows = [1, 16, 4096 / clock.divisor];
    rows.map(|rows| product(clock, &weight, (rows, name(rows)), launch)).into_iter().collect()
}

fn quantized_product(clock: &Clock) -> Result<Vec<Figures>> {
    // whole blocks, however small
    let (outputs, inputs) = (2 * INNER / clock.divisor, (HIDDEN / clock.divisor).max(256));
    let mut figures = Vec::new();
    for (format, format_name) in [(BlockFormat::Q8_0, "Q8_0"), (BlockFormat::Q4K, "Q4_K")] {
        let fill = |_, bytes: &mut [u8]| bytes.fill(0x11);
        let by = (clock.gpu, &Threads::new(2));
        let weight = Weight::blocks(by, &[(format, outputs)], inputs, fill)?;
        for rows in [1, 16, 4096 / clock.divisor] {
            let name = format!("{format_name} product of {rows} rows");
            let launch = |product: &Product| product.fast(clock.gpu);
            figures.push(product(clock, &weight, (rows, name), launch)?);
        }
    }
    Ok(figures)
}

fn product(
    clock: &Clock,
    weight: &Weight,
    (rows, name): (usize, String),
    launch: impl Fn(&Product) -> Result<(), Error>,
) -> Result<Figures> {
    let (outputs, inputs) = (weight.out_features(), weight.in_features());
    let (x, y) = (clock.narrow(rows * inputs)?, clock.narrow(rows * outputs)?);
    let product = clock.product(&x, weight, &y, rows);
    Ok(Figures {
        name,
        seconds: clock.median(|| launch(&product))?,
        bytes: (weight.bytes() + rows * (inputs + outputs) * Float::SIZE) as f64,
        operations: 2.0 * (rows * inputs * outputs) as f64,
    })
}

fn rms_norm(clock: &Clock) -> Result<Vec<Figures>> {
    let (gpu, rows) = (clock.gpu, 8192 / clock.divisor);
    let x = gpu.zeros(rows * HIDDEN * 4)?.all();
    let (weight, out) = (gpu.zeros(HIDDEN * 4)?.all(), clock.narrow(rows * HIDDEN)?);
    let (eps, float, width) = (1e-6, FLOAT, HIDDEN);
    let norm = RmsNorm { x: &x, weight: &weight, eps, out: &out, float, rows, width };
    Ok(vec![Figures {
        name: format!("rms_norm of {rows} rows"),
        seconds: clock.median(|| norm.launch(gpu))?,
        bytes: (rows * HIDDEN * (4 + Float::SIZE)) as f64,
        operations: 4.0 * (rows * HIDDEN) as f64,
    }])
}

fn sample(clock: &Clock) -> Result<Vec<Figures>> {
    let (gpu, rows, vocab) = (clock.gpu, 256 / clock.divisor, VOCAB / clock.divisor);
    let draw = SampleRow {
        temperature: 0.6,
        top_p: 0.95,
        min_p: 0.0,
        top_k: 20,
        seed: 1,
        choice: 0,
        position: 0,
    };
    let logits = clock.words((0..rows * vocab).map(|i| ((i % 1013) as f32 / 99.0).to_bits()))?;
    let params = gpu.uploaded(&draw.to_bytes().repeat(rows))?.all();
    let tokens = gpu.zeros(4 * rows)?.all();
    let draw = SampleRows { logits: &logits, params: &params, tokens: &tokens, rows, vocab };
    Ok(vec![Figures {
        name: format!("sample {rows} rows of {vocab}, top-k and top-p"),
        seconds: clock.median(|| draw.launch(gpu))?,
        bytes: (rows * vocab * 4) as f64,
        operations: (rows * vocab) as f64,
    }])
}

impl Figures {
    fn shares(&self, ceilings: &Ceilings) -> (f64, f64) {
        let bytes = self.bytes / self.seconds / ceilings.copied_bytes;
        (bytes, self.operations / self.seconds / ceilings.operations)
    }

    fn print(&self, ceilings: &Ceilings, out: &mut impl Write) -> io::Result<()> {
        let ((bytes, operations), us) = (self.shares(ceilings), self.seconds * 1e6);
        let (name, bytes, operations) = (&self.name, bytes * 100.0, operations * 100.0);
        writeln!(out, "{name:<44} {us:>10.1} {bytes:>8.0}% {operations:>8.0}%")
    }

    fn to_json(&self, ceilings: &Ceilings) -> Value {
        let (bytes, operations) = self.shares(ceilings);
        json!({
            "op": self.name,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "operations": self.operations,
            "share_of_copy": bytes,
            "share_of_bf16": operations,
        })
    }
}
