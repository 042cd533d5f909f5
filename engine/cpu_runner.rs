//! Carries a batch out on the CPU: inputs, forward, sampling.

use std::sync::Arc;

use candle_core::{Storage, Tensor};
use strand_kernels::gpu::HostBytes;
use strand_kernels::{BlockTables, filter_view};
use strand_layers::attention::AttentionMetadata;
use strand_layers::kv_cache::KvCache;
use strand_models::Decoder;

use crate::batch::{Batch, RowOutput, Runner};
use crate::error::Error;
use crate::row_output::row_output;
use crate::segment_kv::SegmentKv;

/// The model and its KV pool in the computer's memory.
pub struct CpuRunner {
    decoder: Decoder,
    kv_cache: KvCache,
}

impl CpuRunner {
    pub fn new(decoder: Decoder, kv_cache: KvCache) -> Self {
        Self { decoder, kv_cache }
    }

    /// Fills blocks with NaN.
    pub fn poison(&mut self, blocks: &[u32]) -> Result<(), Error> {
        Ok(self.kv_cache.poison(blocks)?)
    }
}

impl Runner for CpuRunner {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error> {
        let inputs = Inputs::of(batch, self.kv_cache.block_size);
        let (logits, hidden) = self.decoder.forward_with_hidden(
            &inputs.ids,
            &inputs.metadata,
            &mut self.kv_cache,
            &inputs.logits_rows,
            &inputs.hidden_rows,
        )?;
        let outputs = self.read(batch, &logits, &hidden.to_vec2()?)?;
        let mut failure = None;
        let mut sound = |output: Result<Option<RowOutput>, Error>| {
            let error = || failure.get_or_insert_with(|| self.name_the_layer(&inputs)).clone();
            output.and_then(|output| output.ok_or_else(error))
        };
        Ok(outputs.into_iter().map(&mut sound).collect())
    }

    fn gather(&mut self, slots: &[u32]) -> Result<SegmentKv, Error> {
        let bytes = HostBytes::Plain(self.kv_cache.gather(slots)?);
        Ok(SegmentKv::new(bytes, self.kv_cache.num_frames()))
    }

    fn scatter(&mut self, kv: &SegmentKv, first_row: usize, slots: &[u32]) -> Result<(), Error> {
        Ok(self.kv_cache.scatter(slots, kv.bytes(), first_row)?)
    }
}

impl CpuRunner {
    /// What the rows of a batch come to, each read by one thread.
    fn read(
        &self,
        batch: &Batch,
        logits: &Tensor,
        hidden: &[Vec<f32>],
    ) -> Result<Vec<Result<Option<RowOutput>, Error>>, Error> {
        let (storage, layout) = logits.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            unreachable!("the CPU's decoder makes tensors of the CPU");
        };
        let logits = &storage.as_slice::<f32>()?[layout.start_offset()..];
        let vocab_size = self.decoder.vocab_size();
        let mut outputs = Vec::with_capacity(batch.rows.len());
        let (mut logits_row, mut hidden_row) = (0, 0);
        for row in &batch.rows {
            let prompt = row.prompt_logprobs.as_ref().map_or(0, |wanted| wanted.rows.len());
            let wanted = prompt + usize::from(row.sample.is_some());
            let logits = &logits[logits_row * vocab_size..(logits_row + wanted) * vocab_size];
            outputs.push((row, logits, &hidden[hidden_row..hidden_row + row.hidden.len()], None));
            (logits_row, hidden_row) = (logits_row + wanted, hidden_row + row.hidden.len());
        }
        self.decoder.threads().for_each_chunk(&mut outputs, 1, |_, output| {
            let (row, logits, hidden, output) = &mut output[0];
            let mut logits = logits.chunks_exact(vocab_size);
            *output = Some(row_output(row, &mut logits, &mut hidden.iter().cloned()));
        });
        Ok(outputs.into_iter().map(|(.., output)| output.expect("every row is read")).collect())
    }

    /// Computes the step again, looking at every layer's output. The same rows are written to
    /// the same places, so nothing changes.
    fn name_the_layer(&mut self, inputs: &Inputs) -> Error {
        let found =
            self.decoder.first_non_finite(&inputs.ids, &inputs.metadata, &mut self.kv_cache);
        match found {
            Ok(layer) => Error::NotANumber { layer: layer.unwrap_or_else(|| "lm_head".into()) },
            Err(error) => error.into(),
        }
    }
}

/// The forward's arguments.
struct Inputs {
    ids: Vec<u32>,
    metadata: AttentionMetadata,
    logits_rows: Vec<u32>,
    hidden_rows: Vec<u32>,
}

impl Inputs {
    fn of(batch: &Batch, block_size: usize) -> Self {
        let mut ids = Vec::with_capacity(batch.num_tokens());
        let mut positions = Vec::with_capacity(batch.num_tokens());
        let mut slot_mapping = Vec::with_capacity(batch.num_tokens());
        let mut cu_seqlens_q = vec![0];
        let mut tables = BlockTables { entries: Vec::new(), cu_entries: vec![0] };
        let (mut logits_rows, mut hidden_rows) = (Vec::new(), Vec::new());
        for row in &batch.rows {
            let first = ids.len() as u32;
            ids.extend_from_slice(&row.tokens);
            positions.extend(row.start..row.start + row.tokens.len() as u32);
            slot_mapping.extend_from_slice(&row.slot_mapping);
            cu_seqlens_q.push(ids.len() as u32);
            filter_view(&row.view, block_size, &mut tables.entries);
            tables.cu_entries.push(tables.entries.len() as u32);
            if let Some(wanted) = &row.prompt_logprobs {
                logits_rows.extend(wanted.rows.clone().map(|row| first + row as u32));
            }
            hidden_rows.extend(row.hidden.clone().map(|row| first + row as u32));
            if row.sample.is_some() {
                logits_rows.push(ids.len() as u32 - 1);
            }
        }
        let positions = Arc::new(positions);
        let metadata = AttentionMetadata {
            slot_mapping: Arc::new(slot_mapping),
            stored_positions: positions.clone(),
            positions,
            cu_seqlens_q: Arc::new(cu_seqlens_q),
            tables: Arc::new(tables),
        };
        Self { ids, metadata, logits_rows, hidden_rows }
    }
}
