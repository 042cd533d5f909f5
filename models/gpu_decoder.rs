//! The network on a GPU: the same parts in its memory, workspaces made once, work that is queued.
//!
//! The residual stream is f32; what goes into products has the type of the weights. A step neither
//! waits nor allocates nor uploads anything, so that it can be captured as a graph.

use std::sync::Arc;

use strand_kernels::gpu::{
    AddRmsNorm, CheckFinite, Embedding, FilterView, Float, GatherRows, Gpu, RmsNorm, Rotary,
    SiluMul, Slice, Tables, Weight,
};
use strand_kernels::{Error as KernelError, RotaryTable, Threads, WeightDtype};
use strand_layers::gpu_attention::{GpuAttention, GpuAttentionLayer, GpuSizes, GpuStep};
use strand_layers::gpu_kv_cache::GpuKvCache;
use strand_layers::gpu_linear::GpuLinear;

use crate::config::ModelConfig;
use crate::error::Error;
use crate::gpu_workspace::Workspace;
use crate::network::{LayerParts, Network, Parts, attention_settings, rotary};
use crate::weights::Weights;

/// A loaded network.
pub struct GpuDecoder {
    gpu: Gpu,
    network: Network<Arc<Weight>, GpuLinear, Slice>,
    attention: GpuAttention,
    rotary: Arc<RotaryTable>,
    space: Workspace,
    sizes: GpuSizes,
    hidden: usize,
    inner: usize,
    eps: f32,
    float: Float,
}

/// How a network on a GPU computes.
#[derive(Debug, Clone, Copy)]
pub struct GpuArithmetic {
    pub dtype: WeightDtype,
    /// A row's bits depend on nothing but what it sees.
    pub deterministic: bool,
}

impl GpuArithmetic {
    fn float(self) -> Float {
        if self.dtype == WeightDtype::Bf16 { Float::Bf16 } else { Float::F16 }
    }
}

impl GpuDecoder {
    /// Uploads the weights, prepares rotations and makes workspaces; `slots` are the KV pool's.
    ///
    /// `progress` hears (bytes uploaded, bytes in all).
    ///
    /// # Errors
    /// As [`Decoder::load`](crate::Decoder::load); and what the device has no kernel or no memory
    /// for.
    pub fn load(
        (gpu, threads): (&Gpu, &Threads),
        (config, weights): (&ModelConfig, &Weights),
        arithmetic: GpuArithmetic,
        (sizes, slots): (GpuSizes, usize),
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let GpuArithmetic { dtype, deterministic } = arithmetic;
        let float = arithmetic.float();
        let maker = Uploader { gpu, dtype, float, deterministic, threads };
        let network = Network::load(config, weights, maker, dtype, progress)?;
        let table = Arc::new(rotary(config, sizes.positions));
        let settings: Vec<_> = network.layers.iter().map(|layer| layer.settings).collect();
        let of_device = Rotary::new(gpu, &table)?;
        let numbers = (slots, float, deterministic);
        Ok(Self {
            attention: GpuAttention::new(gpu, of_device, &settings, sizes, numbers)?,
            space: Workspace::new(gpu, config, sizes)?,
            gpu: gpu.clone(),
            network,
            rotary: table,
            sizes,
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            eps: config.rms_norm_eps,
            float,
        })
    }

    /// Bytes of the workspaces; not of weights, and not of KV.
    pub fn workspace_bytes(config: &ModelConfig, sizes: GpuSizes, deterministic: bool) -> u64 {
        let layer = attention_settings(config, 0);
        let rotations = 4 * sizes.positions * config.head_dim;
        let attention = GpuAttention::bytes(&layer, sizes, deterministic);
        (Workspace::bytes(config, sizes) + attention + rotations) as u64
    }

    /// The rotation of all layers.
    pub fn rotary(&self) -> &Arc<RotaryTable> {
        &self.rotary
    }

    pub fn vocab_size(&self) -> usize {
        self.network.lm_head.out_features()
    }

    pub fn hidden_size(&self) -> usize {
        self.hidden
    }

    /// The type of hidden states.
    pub fn float(&self) -> Float {
        self.float
    }

    /// Rows of logits or of hidden states that are computed at a time.
    pub fn max_outputs(&self) -> usize {
        self.sizes.sequences
    }

    /// True where a step of so many single rows may be captured, each of which sees so many keys
    /// at most.
    pub fn can_capture(&self, rows: usize, max_keys: usize) -> bool {
        rows <= self.sizes.sequences && self.attention.takes(rows, max_keys)
    }

    /// Room for the tables of so many pages; true where what was captured is of no use any more.
    pub fn make_room(&mut self, pages: usize) -> Result<bool, KernelError> {
        self.space.make_room(&self.gpu, pages)
    }

    /// Pages that tables have room for; a step's pages must be readable that far.
    pub fn max_pages(&self) -> usize {
        self.space.max_pages()
    }

    /// All layers: from ids to the residual stream, which stays in the workspace for
    /// [`GpuDecoder::logits`] and [`GpuDecoder::hidden_rows`]. `before` is called before each
    /// layer's attention.
    pub fn forward(
        &self,
        step: &GpuStep,
        cache: &GpuKvCache,
        before: &mut dyn FnMut(usize) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        self.layers(step, cache, before, &mut |_| Ok(()))
    }

    /// The first part of the network after which the residual stream is not all finite, if any.
    /// The same rows are written to the same places, so nothing changes.
    pub fn first_non_finite(
        &self,
        step: &GpuStep,
        cache: &GpuKvCache,
    ) -> Result<Option<String>, KernelError> {
        let mut found = None;
        self.layers(step, cache, &mut |_| Ok(()), &mut |place| {
            if found.is_none() && self.is_broken(step.rows)? {
                found = Some(place.to_string());
            }
            Ok(())
        })?;
        if found.is_none() {
            self.add_norm(&self.network.norm, step.rows)?;
            let last = self.network.layers.len().saturating_sub(1);
            found = self.is_broken(step.rows)?.then(|| format!("model.layers.{last}.mlp"));
        }
        Ok(found)
    }

    /// Logits of `outputs[first..first + count]`, at most [`GpuDecoder::max_outputs`]: (count,
    /// vocab) f32.
    pub fn logits(
        &self,
        step: &GpuStep,
        (first, count): (usize, usize),
    ) -> Result<Slice, KernelError> {
        let rows = step.outputs.at(4 * first);
        self.normed(step, &rows, count)?;
        let (x, y) = (&self.space.picked_branch, &self.space.logits);
        self.network.lm_head.forward_wide(&self.gpu, x, y, count)?;
        Ok(y.clone())
    }

    /// Where the last [`GpuDecoder::logits`] lie, (count, vocab) f32; also where a graph puts them.
    pub fn logits_buffer(&self) -> &Slice {
        &self.space.logits
    }

    /// What the last norm makes of `hidden[first..first + count]`: (count, hidden) of
    /// [`GpuDecoder::float`].
    pub fn hidden_rows(
        &self,
        step: &GpuStep,
        (first, count): (usize, usize),
    ) -> Result<Slice, KernelError> {
        let rows = step.hidden.at(4 * first);
        self.normed(step, &rows, count)?;
        Ok(self.space.picked_branch.first(count * self.hidden * Float::SIZE))
    }

    fn layers(
        &self,
        step: &GpuStep,
        cache: &GpuKvCache,
        before: &mut dyn FnMut(usize) -> Result<(), KernelError>,
        after: &mut dyn FnMut(&dyn std::fmt::Display) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let (gpu, space) = (&self.gpu, &self.space);
        let tables = space.tables(&step.cu_pages);
        self.begin(step, cache, &tables)?;
        after(&"model.embed_tokens")?;
        for (index, layer) in self.network.layers.iter().enumerate() {
            match index {
                0 => self.norm(&layer.input_layernorm, step.rows)?,
                _ => {
                    self.add_norm(&layer.input_layernorm, step.rows)?;
                    after(&format_args!("model.layers.{}.mlp", index - 1))?;
                }
            }
            before(index)?;
            self.attend(index, layer, step, (cache, &tables))?;
            self.add_norm(&layer.post_attention_layernorm, step.rows)?;
            after(&format_args!("model.layers.{index}.self_attn"))?;
            layer.gate_up_proj.forward(gpu, &space.branch, &space.gate_up, step.rows)?;
            let (gate_up, out) = (&space.gate_up, &space.inner);
            let (float, rows, inner) = (self.float, step.rows, self.inner);
            SiluMul { gate_up, out, float, rows, inner }.launch(gpu)?;
            layer.down_proj.forward(gpu, &space.inner, &space.branch, step.rows)?;
        }
        Ok(())
    }

    /// Filters the views, lists the splits and looks the tokens up.
    fn begin(
        &self,
        step: &GpuStep,
        cache: &GpuKvCache,
        tables: &Tables,
    ) -> Result<(), KernelError> {
        FilterView {
            pages: &step.pages,
            starts: &step.cu_pages,
            ends: &step.cu_pages.at(4),
            num_sequences: step.sequences,
            max_pages: self.space.max_pages(),
            block_size: cache.block_size,
            tables,
        }
        .launch(&self.gpu)?;
        self.attention.begin(&self.gpu, step, tables)?;
        Embedding {
            ids: &step.ids,
            weight: &self.network.embed_tokens,
            out: &self.space.residual,
            count: step.rows,
        }
        .launch(&self.gpu)
    }

    fn attend(
        &self,
        index: usize,
        layer: &LayerParts<GpuLinear, Slice>,
        step: &GpuStep,
        (cache, tables): (&GpuKvCache, &Tables),
    ) -> Result<(), KernelError> {
        let layer = GpuAttentionLayer {
            weights: &layer.attention,
            settings: layer.settings,
            eps: self.eps,
            cache: cache.layer(index),
            x: &self.space.branch,
            qkv: &self.space.qkv,
            attended: &self.space.attended,
        };
        self.attention.forward(&self.gpu, &layer, step, tables)
    }

    /// The norm of the residual stream, a branch's input.
    fn norm(&self, weight: &Slice, rows: usize) -> Result<(), KernelError> {
        RmsNorm {
            x: &self.space.residual,
            weight,
            eps: self.eps,
            out: &self.space.branch,
            float: self.float,
            rows,
            width: self.hidden,
        }
        .launch(&self.gpu)
    }

    /// What the last branch came to enters the residual stream, whose norm the next one gets.
    fn add_norm(&self, weight: &Slice, rows: usize) -> Result<(), KernelError> {
        let space = &self.space;
        self.add_norm_of((&space.branch, &space.residual), weight, rows)
    }

    fn add_norm_of(
        &self,
        (branch, residual): (&Slice, &Slice),
        weight: &Slice,
        rows: usize,
    ) -> Result<(), KernelError> {
        AddRmsNorm {
            x: branch,
            residual,
            weight,
            eps: self.eps,
            out: branch,
            float: self.float,
            rows,
            width: self.hidden,
        }
        .launch(&self.gpu)
    }

    /// The last norm of some rows, in `picked_branch`.
    fn normed(&self, step: &GpuStep, rows: &Slice, count: usize) -> Result<(), KernelError> {
        let space = &self.space;
        let pick = |x, out, width_bytes| {
            GatherRows { x, rows, out, count, limit: step.rows, width_bytes }.launch(&self.gpu)
        };
        pick(&space.residual, &space.picked_residual, self.hidden * 4)?;
        pick(&space.branch, &space.picked_branch, self.hidden * Float::SIZE)?;
        let both = (&space.picked_branch, &space.picked_residual);
        self.add_norm_of(both, &self.network.norm, count)
    }

    /// Waits, and looks at the residual stream.
    fn is_broken(&self, rows: usize) -> Result<bool, KernelError> {
        let (x, flags) = (&self.space.residual, &self.space.flags);
        CheckFinite { x, flags, rows, width: self.hidden }.launch(&self.gpu)?;
        let mut found = vec![0; 4 * rows];
        self.gpu.download(flags, &mut found)?;
        Ok(found.iter().any(|&byte| byte != 0))
    }
}

/// The parts in a GPU's memory.
struct Uploader<'a> {
    gpu: &'a Gpu,
    dtype: WeightDtype,
    float: Float,
    deterministic: bool,
    threads: &'a Threads,
}

impl Uploader<'_> {
    fn upload(&self, values: &[f32]) -> Result<Slice, Error> {
        Ok(self.gpu.uploaded_floats(values)?.all())
    }
}

impl Parts for Uploader<'_> {
    type Matrix = Arc<Weight>;
    type Linear = GpuLinear;
    /// f32
    type Norm = Slice;

    fn matrix(
        &mut self,
        weights: &Weights,
        parts: &[(&str, usize)],
        in_features: usize,
    ) -> Result<Arc<Weight>, Error> {
        let stack = weights.stack(parts, in_features)?;
        let blocks = stack.block_formats().filter(|_| self.dtype == WeightDtype::Quantized);
        if let Some(parts) = blocks {
            let read = |row, bytes: &mut [u8]| stack.read_bytes(row, bytes);
            let to = (self.gpu, self.threads);
            return Ok(Arc::new(Weight::blocks(to, &parts, in_features, read)?));
        }
        let rows = stack.rows();
        let weight = Weight::dense(self.gpu, self.float, rows, in_features, |rows, out| {
            self.threads.for_each_chunk(out, in_features, |row, out| {
                stack.read(rows.start + row..rows.start + row + 1, out);
            });
            Ok::<_, Error>(())
        })?;
        Ok(Arc::new(weight))
    }

    fn linear(&mut self, weight: Arc<Weight>, bias: Option<Vec<f32>>) -> Result<GpuLinear, Error> {
        let bias = bias.map(|bias| self.upload(&bias)).transpose()?;
        Ok(GpuLinear::new(weight, bias, self.deterministic))
    }

    fn norm(&mut self, weight: Vec<f32>) -> Result<Slice, Error> {
        self.upload(&weight)
    }
}
