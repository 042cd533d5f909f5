//! Carries a batch out on the CPU: inputs, forward, sampling.

use std::sync::Arc;

use candle_core::Tensor;
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
        let vocab_size = self.decoder.vocab_size();
        let mut logits = to_rows(&logits)?;
        let mut hidden = hidden.to_vec2::<f32>()?.into_iter();
        let mut outputs = Vec::with_capacity(batch.rows.len());
        let mut rows = logits.chunks_exact_mut(vocab_size);
        let mut failure = None;
        for row in &batch.rows {
            let output = row_output(row, &mut rows, &mut hidden).and_then(|output| {
                let error = || failure.get_or_insert_with(|| self.name_the_layer(&inputs)).clone();
                output.ok_or_else(error)
            });
            outputs.push(output);
        }
        Ok(outputs)
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

fn to_rows(logits: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(logits.flatten_all()?.to_vec1::<f32>()?)
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
