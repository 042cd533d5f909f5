//! Tensors by name, wherever they are stored, handed out as packed products and plain vectors.
//!
//! Names are those of Hugging Face checkpoints; GGUF files translate inside. Files are mapped, and
//! rows become f32 strip by strip while they are packed, their pages dropped as soon as they are
//! read: loading needs little more anonymous memory than the packed weights themselves.
//! Which tensors the model needs is the decoder's business; this only remembers who asked.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ops::Range;
use std::path::Path;

use strand_kernels::gpu::block_bytes;
use strand_kernels::{BlockFormat, PackedWeight, Threads, WeightDtype};

use crate::config::ModelConfig;
use crate::error::Error;
use crate::fingerprint::WeightsSource;
use crate::gguf::GgufTensors;
use crate::random::{RandomMatrix, RandomTensors, Recipe};
use crate::safetensors::Checkpoint;
use crate::stored::{FileBytes, StoredMatrix};

/// Rows compared at a time.
const STRIP: usize = 64;

pub struct Weights {
    source: Source,
    /// Names somebody asked for, or that are known to be of no use.
    used: RefCell<BTreeSet<String>>,
}

enum Source {
    Safetensors(Checkpoint),
    Gguf(GgufTensors),
    Random(RandomTensors),
}

impl Weights {
    /// `model.safetensors` in `folder`, or the shards its `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::NotAModel`] when neither is there, [`Error::ShardMissing`],
    /// [`Error::TensorMissing`] when a shard lacks what the index promises, [`Error::Damaged`].
    pub fn open_safetensors(folder: &Path) -> Result<Self, Error> {
        Ok(Self::new(Source::Safetensors(Checkpoint::open(folder)?)))
    }

    /// A whole safetensors file that is part of the program.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, Error> {
        let checkpoint = Checkpoint::from_static(name, bytes)?;
        Ok(Self::new(Source::Safetensors(checkpoint)))
    }

    pub(crate) fn from_gguf(tensors: GgufTensors) -> Self {
        Self::new(Source::Gguf(tensors))
    }

    /// Weights nobody trained, of the config's shapes: small random matrices, norms of one. The
    /// same seed gives the same model; nothing is stored.
    /// With a `recipe` its matrices come in blocks, as in a file that was quantized so.
    pub fn random(config: &ModelConfig, seed: u64, recipe: Option<Recipe>) -> Self {
        Self::new(Source::Random(RandomTensors::new(config, seed, recipe)))
    }

    fn new(source: Source) -> Self {
        Weights { source, used: RefCell::new(BTreeSet::new()) }
    }

    /// Everything the numbers come from.
    pub fn sources(&self) -> Vec<WeightsSource<'_>> {
        match &self.source {
            Source::Safetensors(checkpoint) => {
                checkpoint.files().iter().map(FileBytes::as_source).collect()
            }
            Source::Gguf(tensors) => vec![tensors.file().as_source()],
            Source::Random(tensors) => vec![WeightsSource::Seed(tensors.seed())],
        }
    }

    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Safetensors(checkpoint) => checkpoint.contains(name),
            Source::Gguf(tensors) => tensors.contains(name),
            Source::Random(tensors) => tensors.contains(name),
        }
    }

    /// One product from tensors stacked on the output side (q, k and v; gate and up): `parts` are
    /// (name, output features), each tensor (output features, in_features).
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::TensorShape`], [`Error::TensorType`].
    pub fn packed(
        &self,
        parts: &[(&str, usize)],
        in_features: usize,
        dtype: WeightDtype,
        threads: &Threads,
    ) -> Result<PackedWeight, Error> {
        let stack = self.stack(parts, in_features)?;
        let blocks = stack.block_formats().filter(|_| dtype == WeightDtype::Quantized);
        let packed = match blocks {
            Some(parts) => PackedWeight::pack_blocks(&parts, in_features, threads, |row, bytes| {
                stack.read_bytes(row, bytes);
                Ok::<_, Infallible>(())
            }),
            None => {
                let rows = stack.rows();
                PackedWeight::pack(rows, in_features, dtype, threads, |rows, out| {
                    stack.read(rows, out);
                    Ok(())
                })
            }
        };
        let Ok(packed) = packed;
        Ok(packed)
    }

    /// A bias or a norm's weight.
    ///
    /// # Errors
    /// As [`Weights::packed`].
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let matrix = self.find(name, &[len])?;
        let mut values = vec![0.0; len];
        matrix.read(0..len, &mut values);
        Ok(values)
    }

    /// Bytes that a network's tensors take where they are computed with in `dtype`.
    pub fn bytes(&self, config: &ModelConfig, dtype: WeightDtype) -> u64 {
        let bytes = |(name, shape): (String, Vec<usize>)| -> u64 {
            let is_quantized = dtype == WeightDtype::Quantized;
            // who is missing is told when it is loaded
            let format = self.look_up(&name, &shape).ok().and_then(|found| found.block_format());
            match (format.filter(|_| is_quantized), &shape[..]) {
                (Some(format), &[rows, inputs]) => block_bytes(format, rows, inputs) as u64,
                _ => {
                    let numbers = shape.iter().map(|&size| size as u64).product::<u64>();
                    numbers.saturating_mul(if is_quantized { 2 } else { dtype.size() as u64 })
                }
            }
        };
        config.tensors().into_iter().map(bytes).fold(0, u64::saturating_add)
    }

    /// The type a tensor is stored in. `None` when there is no such tensor, or it has no type of
    /// its own.
    pub fn stored_dtype(&self, name: &str) -> Option<WeightDtype> {
        match &self.source {
            Source::Safetensors(checkpoint) => checkpoint.dtype(name),
            Source::Gguf(tensors) => tensors.dtype(name),
            Source::Random(_) => None,
        }
    }

    /// Tensors of the checkpoint nobody asked for, by the names they have in their file. A loaded
    /// model with any left is not the model its author saved.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        match &self.source {
            Source::Safetensors(checkpoint) => checkpoint.unused(&used),
            Source::Gguf(tensors) => tensors.unused(&used),
            Source::Random(tensors) => tensors.unused(&used),
        }
    }

    /// Sets aside the output matrix some checkpoints save beside the embedding it is tied to.
    ///
    /// # Errors
    /// [`Error::TiedTensorsDiffer`]: such a checkpoint is not tied, whatever its config says.
    pub(crate) fn set_tied_copy_aside(&self, config: &ModelConfig) -> Result<(), Error> {
        const EMBEDDING: &str = "model.embed_tokens.weight";
        const HEAD: &str = "lm_head.weight";
        if !config.tie_word_embeddings || !self.contains(HEAD) || !self.contains(EMBEDDING) {
            return Ok(());
        }
        let shape = [config.vocab_size, config.hidden_size];
        let (embedding, head) = (self.find(EMBEDDING, &shape)?, self.find(HEAD, &shape)?);
        self.used.borrow_mut().remove(EMBEDDING);
        for start in (0..config.vocab_size).step_by(STRIP) {
            let rows = start..config.vocab_size.min(start + STRIP);
            let mut strips = [vec![0.0; rows.len() * config.hidden_size], Vec::new()];
            strips[1] = strips[0].clone();
            embedding.read(rows.clone(), &mut strips[0]);
            head.read(rows, &mut strips[1]);
            if strips[0] != strips[1] {
                return Err(Error::TiedTensorsDiffer {
                    first: EMBEDDING.to_string(),
                    second: HEAD.to_string(),
                });
            }
        }
        Ok(())
    }

    /// The same tensors to be read row by row.
    ///
    /// # Errors
    /// As [`Weights::packed`].
    pub(crate) fn stack(
        &self,
        parts: &[(&str, usize)],
        in_features: usize,
    ) -> Result<Stack<'_>, Error> {
        let mut stack = Stack { parts: Vec::new() };
        for &(name, out_features) in parts {
            let matrix = self.find(name, &[out_features, in_features])?;
            let start = stack.rows();
            stack.parts.push((start..start + out_features, matrix));
        }
        Ok(stack)
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<Matrix<'_>, Error> {
        let matrix = self.look_up(name, shape)?;
        self.used.borrow_mut().insert(name.to_string());
        Ok(matrix)
    }

    fn look_up(&self, name: &str, shape: &[usize]) -> Result<Matrix<'_>, Error> {
        Ok(match &self.source {
            Source::Safetensors(checkpoint) => Matrix::Stored(checkpoint.find(name, shape)?),
            Source::Gguf(tensors) => Matrix::Stored(tensors.find(name, shape)?),
            Source::Random(tensors) => Matrix::Random(tensors.find(name, shape)?),
        })
    }
}

enum Matrix<'a> {
    Stored(StoredMatrix<'a>),
    Random(RandomMatrix),
}

impl Matrix<'_> {
    fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Matrix::Stored(stored) => stored.read(rows, out),
            Matrix::Random(random) => random.read(rows, out),
        }
    }

    /// The format of its blocks, if it has some.
    fn block_format(&self) -> Option<BlockFormat> {
        match self {
            Matrix::Stored(stored) => stored.block_format(),
            Matrix::Random(random) => random.block_format(),
        }
    }

    fn read_bytes(&self, row: usize, out: &mut [u8]) {
        match self {
            Matrix::Stored(stored) => stored.read_bytes(row, out),
            Matrix::Random(random) => random.read_bytes(row, out),
        }
    }
}

/// Matrices of equal width, one below the other.
pub(crate) struct Stack<'a> {
    parts: Vec<(Range<usize>, Matrix<'a>)>,
}

impl Stack<'_> {
    pub(crate) fn rows(&self) -> usize {
        self.parts.last().map_or(0, |(rows, _)| rows.end)
    }

    /// Format and number of rows of each part, where all have blocks.
    pub(crate) fn block_formats(&self) -> Option<Vec<(BlockFormat, usize)>> {
        let part = |(rows, matrix): &(Range<usize>, Matrix)| {
            matrix.block_format().map(|format| (format, rows.len()))
        };
        self.parts.iter().map(part).collect()
    }

    pub(crate) fn read_bytes(&self, row: usize, out: &mut [u8]) {
        let holds = |(rows, _): &&(Range<usize>, Matrix)| rows.contains(&row);
        let (rows, matrix) = self.parts.iter().find(holds).expect("a row of the stack");
        matrix.read_bytes(row - rows.start, out);
    }

    /// `rows` may begin in one part and end in another; `out` is `(rows.len(), in_features)`.
    pub(crate) fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        let width = out.len() / rows.len().max(1);
        for (part, matrix) in &self.parts {
            let start = rows.start.max(part.start);
            let end = rows.end.min(part.end);
            if start < end {
                let values = (start - rows.start) * width..(end - rows.start) * width;
                matrix.read(start - part.start..end - part.start, &mut out[values]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
