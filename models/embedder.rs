//! Texts to vectors by a model of the BERT family, from a folder as sentence-transformers lays it
//! out (all-MiniLM-L6-v2's shape). The network is candle-transformers'.
//!
//! Knows neither the decoder nor its tokenizer: this is a model of its own, beside the other.

mod settings;

use std::path::Path;

use candle_core::{DType, Device, IndexOp, Result as TensorResult, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::BertModel;
use tokenizers::Encoding;

use crate::error::Error;
use settings::{Pooling, Settings};

/// Tokens of one forward, paddings included; a longer text is one of its own.
const BATCH_TOKENS: usize = 4096;

/// A loaded model.
pub struct Embedder {
    model: BertModel,
    encoder: tokenizers::Tokenizer,
    settings: Settings,
}

/// What became of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddedText {
    pub vector: Vec<f32>,
    /// Special ones included.
    pub tokens: usize,
}

impl Embedder {
    /// Reads config.json, model.safetensors and tokenizer.json of a folder, and where they are
    /// there modules.json, 1_Pooling/config.json and sentence_bert_config.json.
    ///
    /// # Errors
    /// A file missing or damaged, or a setting that would change the vectors and is unknown here.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let (config, settings) = settings::read(folder)?;
        let path = folder.join("model.safetensors");
        let damaged = |error: candle_core::Error| Error::Damaged {
            path: path.clone(),
            reason: error.to_string().lines().next().unwrap_or_default().to_string(),
        };
        let weights = settings::read_file(&path)?;
        let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu);
        let model = weights.and_then(|weights| BertModel::load(weights, &config));
        let mut encoder = settings::tokenizer(folder, config.vocab_size)?;
        // for training; here no text is cut, and each batch has its own length
        encoder.with_truncation(None).map_err(|error| Error::Tokenizer(error.to_string()))?;
        encoder.with_padding(None);
        Ok(Self { model: model.map_err(damaged)?, encoder, settings })
    }

    /// Numbers in a vector.
    pub fn dim(&self) -> usize {
        self.settings.dim
    }

    /// Most tokens of a text, special ones included.
    pub fn max_len(&self) -> usize {
        self.settings.max_len
    }

    /// One vector a text, in their order.
    ///
    /// # Errors
    /// [`Error::TextTooLong`]: nothing is cut off.
    pub fn embed(&self, texts: &[&str]) -> Result<Vec<EmbeddedText>, Error> {
        let encodings = self.encoder.encode_batch(texts.to_vec(), true);
        let encodings = encodings.map_err(|error| Error::Tokenizer(error.to_string()))?;
        let max = self.settings.max_len;
        for (index, encoding) in encodings.iter().enumerate() {
            let tokens = encoding.len();
            if tokens > max {
                return Err(Error::TextTooLong { index, tokens, max });
            }
        }
        let mut embedded = Vec::with_capacity(texts.len());
        for batch in batches(&encodings) {
            let vectors = self.forward(batch)?.to_vec2::<f32>()?;
            let tokens = batch.iter().map(Encoding::len);
            embedded.extend(
                vectors
                    .into_iter()
                    .zip(tokens)
                    .map(|(vector, tokens)| EmbeddedText { vector, tokens }),
            );
        }
        Ok(embedded)
    }

    /// (texts, dim)
    fn forward(&self, batch: &[Encoding]) -> TensorResult<Tensor> {
        let longest = batch.iter().map(Encoding::len).max().unwrap_or(0);
        let padded = |of: fn(&Encoding) -> &[u32], padding: u32| {
            let rows = batch.iter().flat_map(|encoding| {
                let values = of(encoding).iter().copied();
                values.chain(std::iter::repeat(padding)).take(longest)
            });
            let values: Vec<u32> = rows.collect();
            Tensor::from_vec(values, (batch.len(), longest), &Device::Cpu)
        };
        let ids = padded(Encoding::get_ids, self.settings.padding)?;
        let mask = padded(Encoding::get_attention_mask, 0)?;
        // (texts, longest, dim)
        let hidden = self.model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let pooled = match self.settings.pooling {
            Pooling::First => hidden.i((.., 0, ..))?,
            Pooling::Mean => {
                let mask = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
                hidden.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?
            }
        };
        match self.settings.normalizes {
            true => pooled.broadcast_div(&pooled.sqr()?.sum_keepdim(1)?.sqrt()?),
            false => Ok(pooled),
        }
    }
}

/// Texts in their order, as many at once as have [`BATCH_TOKENS`] when padded to the longest.
fn batches(encodings: &[Encoding]) -> impl Iterator<Item = &[Encoding]> {
    let mut left = encodings;
    std::iter::from_fn(move || {
        let mut longest = 0;
        let fits = left.iter().enumerate().take_while(|(index, encoding)| {
            longest = longest.max(encoding.len());
            *index == 0 || (index + 1) * longest <= BATCH_TOKENS
        });
        let count = fits.count();
        let (batch, rest) = left.split_at(count);
        left = rest;
        (count > 0).then_some(batch)
    })
}

#[cfg(test)]
mod tests;
