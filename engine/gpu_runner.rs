//! Carries a batch out on a GPU: one upload, work that is queued, one wait.
//!
//! Steps in which every sequence decodes are captured as graphs, one for each of a few batch sizes:
//! the views are filtered inside, so that switching a chunk needs no new capture. Tokens are chosen
//! on the device where temperature, top-k, top-p and min-p are all that is asked for; other rows of
//! logits come to the host's sampler. Rows of KV move on a stream of their own.

mod assembly;
mod inputs;

use std::collections::BTreeMap;

use half::{bf16, f16};
use strand_kernels::gpu::{
    Buffer, CheckFinite, Float, Gpu, Graph, PAGE_BYTES, Pinned, SampleRow, SampleRows, Slice,
};
use strand_layers::gpu_attention::{GpuSizes, GpuStep};
use strand_layers::gpu_kv_cache::GpuKvCache;
use strand_models::GpuDecoder;

use self::assembly::Assembly;
use self::inputs::{Kind, StepPlan};
use crate::batch::{Batch, RowOutput, Runner};
use crate::error::Error;
use crate::segment_kv::SegmentKv;

/// Bytes of a step's inputs for each of its rows, pages aside: more than any takes.
const ROW_INPUTS: usize = 128;
/// Pages there is room for from the start at most; more make room when they come.
const MAX_FIRST_PAGES: usize = 1 << 20;
const WORD: usize = 4;

/// The model and its KV pool in a GPU's memory.
pub struct GpuRunner {
    gpu: Gpu,
    decoder: GpuDecoder,
    kv_cache: GpuKvCache,
    sizes: GpuSizes,
    /// A step's inputs, on both sides.
    staged: Pinned,
    inputs: Buffer,
    /// u32 each, `max_outputs` tokens and then as many flags of rows that are not finite; on both
    /// sides.
    results: Buffer,
    told: Pinned,
    /// Rows of logits for the host's sampler.
    logits: Pinned,
    graphs: BTreeMap<Bucket, Captured>,
}

/// What a step is padded to that is captured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Bucket {
    rows: usize,
    /// A bound on the keys that any of them sees.
    keys: usize,
}

/// A step as large as its bucket.
enum Captured {
    /// Done once as any other, so that nothing is left to be loaded or allocated.
    Tried,
    Graph(Graph),
}

impl GpuRunner {
    pub fn new(
        gpu: Gpu,
        mut decoder: GpuDecoder,
        kv_cache: GpuKvCache,
        sizes: GpuSizes,
    ) -> Result<Self, Error> {
        let blocks = sizes.positions.div_ceil(kv_cache.block_size);
        decoder.make_room((sizes.sequences * blocks).clamp(1, MAX_FIRST_PAGES))?;
        let results = 2 * WORD * decoder.max_outputs();
        let inputs = ROW_INPUTS * (sizes.rows() + 1) + PAGE_BYTES * decoder.max_pages();
        Ok(Self {
            staged: gpu.pinned(inputs)?,
            inputs: gpu.alloc(inputs)?,
            results: gpu.zeros(results)?,
            told: gpu.pinned(results)?,
            logits: gpu.pinned(WORD)?,
            graphs: BTreeMap::new(),
            gpu,
            decoder,
            kv_cache,
            sizes,
        })
    }

    /// Fills blocks with NaN.
    pub fn poison(&mut self, blocks: &[u32]) -> Result<(), Error> {
        Ok(self.kv_cache.poison(blocks)?)
    }

    /// How many steps were captured so far, replayed, and the like.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Runner for GpuRunner {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error> {
        let mut plan = StepPlan::of(batch);
        let bucket = self.bucket(&plan);
        if let Some(Bucket { rows, keys }) = bucket {
            plan.pad(rows, keys);
        }
        self.upload(&plan)?;
        let inputs = self.inputs.all();
        let (step, sampling) = (plan.step(&inputs), plan.sampling(&inputs));
        let mut assembly = Assembly::new(batch);
        let mut moving = self.kv_cache.take_moving();
        match bucket {
            Some(bucket) => {
                moving.settle(&self.gpu)?;
                self.decode(bucket, &step, &sampling)?;
                self.read(&plan, (0, bucket.rows), &mut assembly)?;
            }
            None => {
                let gpu = &self.gpu;
                let mut before = |layer: usize| moving.settle_layer(gpu, layer);
                let done = self.decoder.forward(&step, &self.kv_cache, &mut before);
                if let Err(error) = done {
                    self.kv_cache.put_back(moving);
                    return Err(error.into());
                }
                self.read_hidden(&plan, &step, &mut assembly)?;
                self.read_outputs(&plan, (&step, &sampling), &mut assembly)?;
            }
        }
        if !assembly.is_sound() {
            let layer = self.decoder.first_non_finite(&step, &self.kv_cache)?;
            assembly.fail(&layer.unwrap_or_else(|| "lm_head".into()));
        }
        Ok(assembly.finish())
    }

    fn gather(&mut self, slots: &[u32]) -> Result<SegmentKv, Error> {
        Ok(SegmentKv::new(self.kv_cache.gather(slots)?, self.kv_cache.num_frames()))
    }

    fn scatter(&mut self, kv: &SegmentKv, first_row: usize, slots: &[u32]) -> Result<(), Error> {
        Ok(self.kv_cache.scatter(slots, kv.host_bytes(), (first_row, kv.frame_bytes()))?)
    }
}

impl GpuRunner {
    /// A step is padded to the next power of two of its rows, or to as many as there may be. It
    /// fits any number of keys, or, where so many rows leave no room for that, the next power of
    /// two of its own.
    fn bucket(&self, plan: &StepPlan) -> Option<Bucket> {
        let rows = plan.num_rows().next_power_of_two().min(self.sizes.sequences);
        if !plan.is_decode() || plan.num_rows() > rows {
            return None;
        }
        let most = self.sizes.positions;
        let keys = [most, plan.max_keys().next_power_of_two().min(most)];
        let keys = keys.into_iter().find(|&keys| self.decoder.can_capture(rows, keys))?;
        Some(Bucket { rows, keys })
    }

    /// The step's inputs, and room for its tables.
    fn upload(&mut self, plan: &StepPlan) -> Result<(), Error> {
        let mut moved = self.decoder.make_room(plan.num_pages())?;
        let bytes = plan.bytes();
        let readable = bytes + PAGE_BYTES * (self.decoder.max_pages() - plan.num_pages());
        if self.inputs.len() < readable {
            self.staged = self.gpu.pinned(readable)?;
            self.inputs = self.gpu.alloc(readable)?;
            moved = true;
        }
        if moved {
            self.graphs.clear();
        }
        plan.write(&mut self.staged[..bytes]);
        Ok(self.gpu.upload_pinned(&self.staged, (0, bytes), &self.inputs.all())?)
    }

    /// A step of single rows: replayed, or carried out and captured for the next time.
    fn decode(&mut self, bucket: Bucket, step: &GpuStep, sampling: &Slice) -> Result<(), Error> {
        let work = || {
            self.decoder.forward(step, &self.kv_cache, &mut |_| Ok(()))?;
            self.choose(step, sampling, (0, bucket.rows))
        };
        match self.graphs.get(&bucket) {
            Some(Captured::Graph(graph)) => self.gpu.replay(graph)?,
            Some(Captured::Tried) => {
                let graph = self.gpu.capture(work)?;
                self.gpu.replay(&graph)?;
                self.graphs.insert(bucket, Captured::Graph(graph));
            }
            None => {
                work()?;
                self.graphs.insert(bucket, Captured::Tried);
            }
        }
        Ok(())
    }

    /// Logits of a part of the outputs, whether they are finite, and tokens drawn from them.
    fn choose(
        &self,
        step: &GpuStep,
        sampling: &Slice,
        (first, count): (usize, usize),
    ) -> Result<(), strand_kernels::Error> {
        let logits = self.decoder.logits(step, (first, count))?;
        let (rows, vocab) = (count, self.decoder.vocab_size());
        let flags = self.results.at(self.results.len() / 2);
        CheckFinite { x: &logits, flags: &flags, rows, width: vocab }.launch(&self.gpu)?;
        let params = sampling.at(first * SampleRow::BYTES);
        let tokens = self.results.all();
        SampleRows { logits: &logits, params: &params, tokens: &tokens, rows, vocab }
            .launch(&self.gpu)
    }

    /// All rows of logits that a step was asked for, part by part.
    fn read_outputs(
        &mut self,
        plan: &StepPlan,
        (step, sampling): (&GpuStep, &Slice),
        assembly: &mut Assembly,
    ) -> Result<(), Error> {
        if plan.num_outputs() == 0 {
            return Ok(self.gpu.synchronize()?);
        }
        let at_once = self.decoder.max_outputs();
        for first in (0..plan.num_outputs()).step_by(at_once) {
            let part = (first, at_once.min(plan.num_outputs() - first));
            self.choose(step, sampling, part)?;
            self.read(plan, part, assembly)?;
        }
        Ok(())
    }

    /// What was chosen, and the rows of logits that the host wants, of a part of the outputs.
    fn read(
        &mut self,
        plan: &StepPlan,
        (first, count): (usize, usize),
        assembly: &mut Assembly,
    ) -> Result<(), Error> {
        let row_bytes = WORD * self.decoder.vocab_size();
        let here: Vec<(usize, usize)> = (0..plan.outputs.len())
            .map(|index| (index, plan.output_row(index)))
            .filter(|(_, row)| (first..first + count).contains(row))
            .map(|(index, row)| (index, row - first))
            .collect();
        let is_read = |index: usize| plan.outputs[index].kind != Kind::Draw;
        let wanted = here.iter().filter(|(index, _)| is_read(*index)).count();
        if self.logits.len() < wanted * row_bytes {
            self.logits = self.gpu.pinned(wanted * row_bytes)?;
        }
        let logits = self.decoder.logits_buffer();
        let rows = here.iter().filter(|(index, _)| is_read(*index)).map(|(_, row)| row);
        for (place, row) in rows.enumerate() {
            let from = logits.at(row * row_bytes).first(row_bytes);
            self.gpu.download_pinned(&from, &mut self.logits, place * row_bytes)?;
        }
        self.gpu.download_pinned(&self.results.all(), &mut self.told, 0)?;
        self.gpu.synchronize()?;
        let (tokens, flags) = self.told.split_at(self.told.len() / 2);
        let word = |bytes: &[u8], row: usize| u32::from_le_bytes(bytes.as_chunks().0[row]);
        let mut rows = self.logits.chunks_exact(row_bytes);
        for (index, row) in here {
            let output = &plan.outputs[index];
            let is_finite = word(flags, row) == 0;
            match output.kind {
                Kind::Draw => assembly.drawn(output.row, word(tokens, row), is_finite),
                kind => {
                    let bytes = rows.next().expect("every row asked for was copied");
                    let values = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                    assembly.logits(output.row, kind, values.collect(), is_finite);
                }
            }
        }
        Ok(())
    }

    /// The hidden states that a step was asked for, part by part.
    fn read_hidden(
        &mut self,
        plan: &StepPlan,
        step: &GpuStep,
        assembly: &mut Assembly,
    ) -> Result<(), Error> {
        let width = self.decoder.hidden_size();
        for (number, part) in plan.hidden.chunks(self.decoder.max_outputs()).enumerate() {
            let first = number * self.decoder.max_outputs();
            let rows = self.decoder.hidden_rows(step, (first, part.len()))?;
            let mut bytes = vec![0; part.len() * width * Float::SIZE];
            self.gpu.download(&rows, &mut bytes)?;
            for (&(row, _), bytes) in part.iter().zip(bytes.chunks_exact(width * Float::SIZE)) {
                assembly.hidden(row, widened(bytes, self.decoder.float()));
            }
        }
        Ok(())
    }
}

fn widened(bytes: &[u8], float: Float) -> Vec<f32> {
    let words = bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
    match float {
        Float::Bf16 => words.map(|word| bf16::from_bits(word).to_f32()).collect(),
        Float::F16 => words.map(|word| f16::from_bits(word).to_f32()).collect(),
    }
}
