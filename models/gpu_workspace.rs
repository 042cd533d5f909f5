//! What a step on a GPU works in: buffers made once, each as large as the largest step needs.

use strand_kernels::Error;
use strand_kernels::gpu::{Buffer, Float, Gpu, Slice, Tables};
use strand_layers::gpu_attention::GpuSizes;

use crate::config::ModelConfig;

/// Bytes of a filtered table's entry.
const ENTRY: usize = 16;
const WIDE: usize = 4;

/// Shapes by rows; `rows` as many as a step has, `outputs` as many as logits are computed of at a
/// time.
pub(crate) struct Workspace {
    /// (rows, hidden) f32
    pub residual: Slice,
    /// (rows, hidden): a branch's input, and then what it adds.
    pub branch: Slice,
    /// (rows, q + 2 kv)
    pub qkv: Slice,
    /// (rows, q)
    pub attended: Slice,
    /// (rows, 2 inner)
    pub gate_up: Slice,
    /// (rows, inner)
    pub inner: Slice,
    /// (outputs, hidden): rows that were picked, f32 and narrow.
    pub picked_residual: Slice,
    pub picked_branch: Slice,
    /// (outputs, vocab) f32
    pub logits: Slice,
    /// u32 per row.
    pub flags: Slice,
    num_entries: Slice,
    num_keys: Slice,
    entries: Buffer,
}

impl Workspace {
    pub fn new(gpu: &Gpu, config: &ModelConfig, sizes: GpuSizes) -> Result<Self, Error> {
        let make = |bytes: usize| Ok::<_, Error>(gpu.alloc(bytes)?.all());
        let [residual, branch, qkv, attended, gate_up, inner] = Self::rows(config, sizes);
        let [picked_residual, picked_branch, logits] = Self::outputs(config, sizes);
        let words = WIDE * sizes.rows();
        Ok(Self {
            residual: make(residual)?,
            branch: make(branch)?,
            qkv: make(qkv)?,
            attended: make(attended)?,
            gate_up: make(gate_up)?,
            inner: make(inner)?,
            picked_residual: make(picked_residual)?,
            picked_branch: make(picked_branch)?,
            logits: make(logits)?,
            flags: make(words)?,
            num_entries: make(words)?,
            num_keys: make(words)?,
            entries: gpu.alloc(ENTRY)?,
        })
    }

    /// Bytes that [`Workspace::new`] takes.
    pub fn bytes(config: &ModelConfig, sizes: GpuSizes) -> usize {
        let rows: usize = Self::rows(config, sizes).iter().sum();
        let outputs: usize = Self::outputs(config, sizes).iter().sum();
        rows + outputs + 3 * WIDE * sizes.rows()
    }

    /// Room for so many entries of tables; true where they lie elsewhere now.
    pub fn make_room(&mut self, gpu: &Gpu, pages: usize) -> Result<bool, Error> {
        if self.entries.len() >= pages * ENTRY {
            return Ok(false);
        }
        self.entries = gpu.alloc(pages.next_power_of_two() * ENTRY)?;
        Ok(true)
    }

    /// How many entries there is room for.
    pub fn max_pages(&self) -> usize {
        self.entries.len() / ENTRY
    }

    /// The tables of sequences whose pages start at `starts`.
    pub fn tables(&self, starts: &Slice) -> Tables {
        Tables {
            entries: self.entries.all(),
            starts: starts.clone(),
            num_entries: self.num_entries.clone(),
            num_keys: self.num_keys.clone(),
        }
    }

    fn rows(config: &ModelConfig, sizes: GpuSizes) -> [usize; 6] {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let narrow = |width: usize| sizes.rows() * width * Float::SIZE;
        let wide = sizes.rows() * hidden * WIDE;
        [wide, narrow(hidden), narrow(q + 2 * kv), narrow(q), narrow(2 * inner), narrow(inner)]
    }

    fn outputs(config: &ModelConfig, sizes: GpuSizes) -> [usize; 3] {
        let (count, hidden) = (sizes.sequences, config.hidden_size);
        [count * hidden * WIDE, count * hidden * Float::SIZE, count * config.vocab_size * WIDE]
    }
}
