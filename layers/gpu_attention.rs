//! Self-attention over paged K and V in a GPU's memory.
//!
//! Fast: rows that stand alone in their sequence are split over runs of keys, the others are tiles
//! on tensor cores. Deterministic: all rows are split over runs of 512 keys, so that a row's bits
//! are the same whether it was decoded or part of a prompt.

use strand_kernels::Error;
use strand_kernels::gpu::{
    AttentionOperands, AttentionShape, DecodeAttention, Float, Gpu, Partials, PrefillAttention,
    RopeStore, Rotary, Slice, SplitPlan, Tables,
};

use crate::attention::{AttentionSettings, AttentionWeights};
use crate::gpu_linear::GpuLinear;

/// Keys of a split: the contract of results that depend on nothing else.
const DETERMINISTIC_SPLIT: u32 = 512;
/// Enough splits for a whole device at a batch of one and a few thousand keys.
const FAST_SPLIT: u32 = 256;
/// Bytes that parts of results take at most.
const MAX_PARTIALS: usize = 1 << 30;

/// A step's inputs in the device's memory, and how many there are of each; vLLM's names.
pub struct GpuStep {
    /// u32 per row, as the next four.
    pub ids: Slice,
    /// How many keys of its view come before the row's own; its key is rotated at that position.
    pub positions: Slice,
    /// Where its K and V go; past the pool: nowhere.
    pub slot_mapping: Slice,
    /// Which sequence it belongs to.
    pub row_sequence: Slice,
    /// u32: sequence i has the rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`.
    pub cu_seqlens_q: Slice,
    /// u32: sequence i has the pages `cu_pages[i]..cu_pages[i + 1]`.
    pub cu_pages: Slice,
    /// To the end of what may be read as pages.
    pub pages: Slice,
    /// u32 each: rows whose logits are wanted, and rows whose hidden states are.
    pub outputs: Slice,
    pub hidden: Slice,
    pub rows: usize,
    pub sequences: usize,
    /// The first so many sequences have one row each.
    pub singles: usize,
    /// Rows of the longest sequence.
    pub longest: usize,
    /// Bounds on the keys that single rows see, and that any row sees.
    pub single_keys: usize,
    pub max_keys: usize,
}

/// The most there may be of everything at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuSizes {
    /// Tokens of a step.
    pub tokens: usize,
    /// Sequences that decode, and rows of logits at a time.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub positions: usize,
}

impl GpuSizes {
    /// Rows of a step, padding included.
    pub fn rows(self) -> usize {
        self.tokens.max(self.sequences).max(1)
    }
}

/// What attention of all layers shares.
pub struct GpuAttention {
    rotary: Rotary,
    /// One for each sliding window there is.
    plans: Vec<(Option<u32>, SplitPlan)>,
    partials: Partials,
    /// Rows of the caches.
    slots: usize,
    float: Float,
    deterministic: bool,
}

/// One layer, and what it works in.
pub struct GpuAttentionLayer<'a> {
    pub weights: &'a AttentionWeights<GpuLinear, Slice>,
    pub settings: AttentionSettings,
    pub eps: f32,
    /// (slots, kv_heads, head_dim) each.
    pub cache: (Slice, Slice),
    /// (rows, hidden), overwritten by the result.
    pub x: &'a Slice,
    /// (rows, q + 2 kv), overwritten.
    pub qkv: &'a Slice,
    /// (rows, q), overwritten.
    pub attended: &'a Slice,
}

impl GpuAttention {
    /// # Errors
    /// Layers there is no kernel for; no memory.
    pub fn new(
        gpu: &Gpu,
        rotary: Rotary,
        layers: &[AttentionSettings],
        sizes: GpuSizes,
        (slots, float, deterministic): (usize, Float, bool),
    ) -> Result<Self, Error> {
        let split = split(deterministic);
        let mut plans: Vec<(Option<u32>, SplitPlan)> = Vec::new();
        let items = layers.first().map_or(1, |layer| items(layer, sizes, deterministic));
        for layer in layers {
            let window = layer.sliding_window;
            if !plans.iter().any(|(other, _)| *other == window) {
                plans.push((window, SplitPlan::new(gpu, sizes.rows(), items, split)?));
            }
        }
        let (heads, width) = layers.first().map_or((1, 1), |l| (l.num_heads, l.head_dim));
        let partials = Partials::new(gpu, items, heads, width)?;
        let attention = Self { rotary, plans, partials, slots, float, deterministic };
        layers.iter().try_for_each(|layer| attention.shape(layer).check("attention"))?;
        Ok(attention)
    }

    /// Bytes that [`GpuAttention::new`] takes.
    pub fn bytes(layer: &AttentionSettings, sizes: GpuSizes, deterministic: bool) -> usize {
        let items = items(layer, sizes, deterministic);
        // two plans where layers with and without a window take turns
        Partials::bytes(items, layer.num_heads, layer.head_dim) + 2 * (8 * items + 4 * sizes.rows())
    }

    /// True where so many single rows, whatever they see, are done at once: a step that may be
    /// captured.
    pub fn takes(&self, rows: usize, max_keys: usize) -> bool {
        self.rows_at_once(max_keys) >= rows
    }

    /// Before the first layer: lists the splits of the step's rows.
    pub fn begin(&self, gpu: &Gpu, step: &GpuStep, tables: &Tables) -> Result<(), Error> {
        let (rows, max_keys) = self.split_rows(step);
        if rows == 0 || !self.takes(rows, max_keys) {
            return Ok(()); // listed part by part
        }
        for (window, plan) in &self.plans {
            let (sequence, positions) = (self.row_sequence(step), &step.positions);
            plan.fill(gpu, tables, (sequence, positions), (rows, max_keys), *window)?;
        }
        Ok(())
    }

    /// The rows' K and V are in the cache afterwards.
    pub fn forward(
        &self,
        gpu: &Gpu,
        layer: &GpuAttentionLayer,
        step: &GpuStep,
        tables: &Tables,
    ) -> Result<(), Error> {
        let shape = self.shape(&layer.settings);
        layer.weights.qkv_proj.forward(gpu, layer.x, layer.qkv, step.rows)?;
        let norms = layer.weights.qk_norm.as_ref();
        RopeStore {
            qkv: layer.qkv,
            qk_norm: norms.map(|(q, k)| (q, k, layer.eps)),
            rotary: &self.rotary,
            stored_positions: &step.positions,
            slot_mapping: &step.slot_mapping,
            k_cache: &layer.cache.0,
            v_cache: &layer.cache.1,
            shape,
            rows: step.rows,
        }
        .launch(gpu)?;
        self.split(gpu, layer, step, tables)?;
        if !self.deterministic && step.singles < step.sequences {
            self.tiles(gpu, layer, step, tables)?;
        }
        layer.weights.o_proj.forward(gpu, layer.attended, layer.x, step.rows)
    }

    /// Attention of rows one by one, so many at a time as there is room for their splits.
    fn split(
        &self,
        gpu: &Gpu,
        layer: &GpuAttentionLayer,
        step: &GpuStep,
        tables: &Tables,
    ) -> Result<(), Error> {
        let shape = self.shape(&layer.settings);
        let (all, max_keys) = self.split_rows(step);
        let window = layer.settings.sliding_window;
        let plan = self.plans.iter().find(|(other, _)| *other == window);
        let (_, plan) = plan.expect("every layer's window has a plan");
        let at_once = self.rows_at_once(max_keys);
        for first in (0..all).step_by(at_once) {
            let rows = at_once.min(all - first);
            let positions = step.positions.at(4 * first);
            let sequence = self.row_sequence(step).map(|slice| slice.at(4 * first));
            let tables = if sequence.is_some() { tables.clone() } else { tables.at(first) };
            if all > at_once {
                let sequence = sequence.as_ref();
                plan.fill(gpu, &tables, (sequence, &positions), (rows, max_keys), window)?;
            }
            let q = layer.qkv.at(first * shape.q_stride * Float::SIZE);
            let out = layer.attended.at(first * shape.num_heads * shape.head_dim * Float::SIZE);
            let operands = self.operands(layer, (&q, &positions, &out), &tables);
            let row_sequence = sequence.as_ref();
            DecodeAttention { operands, row_sequence, plan, rows, max_keys }.launch(gpu)?;
        }
        Ok(())
    }

    /// Attention of the sequences with several rows.
    fn tiles(
        &self,
        gpu: &Gpu,
        layer: &GpuAttentionLayer,
        step: &GpuStep,
        tables: &Tables,
    ) -> Result<(), Error> {
        let tables = tables.at(step.singles);
        let rows = (layer.qkv, &step.positions, layer.attended);
        PrefillAttention {
            operands: self.operands(layer, rows, &tables),
            cu_seqlens_q: &step.cu_seqlens_q.at(4 * step.singles),
            num_sequences: step.sequences - step.singles,
            rows: (step.singles, step.rows - step.singles),
            max_rows: step.longest,
            max_keys: step.max_keys,
        }
        .launch(gpu)
    }

    /// Of rows of q at positions, with their results.
    fn operands<'a>(
        &'a self,
        layer: &'a GpuAttentionLayer,
        (q, positions, out): (&'a Slice, &'a Slice, &'a Slice),
        tables: &'a Tables,
    ) -> AttentionOperands<'a> {
        AttentionOperands {
            q,
            k_cache: &layer.cache.0,
            v_cache: &layer.cache.1,
            tables,
            positions,
            rotary: &self.rotary,
            partials: &self.partials,
            out,
            shape: self.shape(&layer.settings),
        }
    }

    /// How many rows are split over keys, and a bound on the keys they see.
    fn split_rows(&self, step: &GpuStep) -> (usize, usize) {
        match self.deterministic {
            true => (step.rows, step.max_keys),
            false => (step.singles, step.single_keys),
        }
    }

    /// `None` where row i is all of sequence i.
    fn row_sequence<'a>(&self, step: &'a GpuStep) -> Option<&'a Slice> {
        self.deterministic.then_some(&step.row_sequence)
    }

    fn rows_at_once(&self, max_keys: usize) -> usize {
        let splits = max_keys.div_ceil(split(self.deterministic) as usize).max(1);
        (self.partials.items() / splits).max(1)
    }

    fn shape(&self, settings: &AttentionSettings) -> AttentionShape {
        let heads = settings.num_heads + 2 * settings.num_kv_heads;
        AttentionShape {
            num_heads: settings.num_heads,
            kv_heads: settings.num_kv_heads,
            head_dim: settings.head_dim,
            slots: self.slots,
            q_stride: heads * settings.head_dim,
            scale: 1.0 / (settings.head_dim as f32).sqrt(),
            sliding_window: settings.sliding_window,
            soft_cap: settings.soft_cap,
            float: self.float,
        }
    }
}

fn split(deterministic: bool) -> u32 {
    if deterministic { DETERMINISTIC_SPLIT } else { FAST_SPLIT }
}

/// (row, split) pairs there is room for: of all sequences at full length, or as many as fit, but
/// those of one row.
fn items(layer: &AttentionSettings, sizes: GpuSizes, deterministic: bool) -> usize {
    let splits = sizes.positions.div_ceil(split(deterministic) as usize).max(1);
    let most = MAX_PARTIALS / Partials::bytes(1, layer.num_heads, layer.head_dim);
    (sizes.sequences * splits).min(most).max(splits)
}
