//! Checkpoints: from files to a network's numbers and the text around them.
//!
//! [`ModelFiles::open`] takes what the user named (a folder, a GGUF file, a hub id, the bundled
//! model, or a config with random weights) and returns a [`ModelConfig`], [`Weights`] by name, the
//! [`Tokenizer`], the [`ChatTemplate`] and [`GenerationDefaults`].
//!
//! What this crate promises:
//!
//! - A config that parses is understood completely. Whatever changes the result and is unknown here
//!   is an error with its name and value.
//! - Files are checked before they are believed: sizes, offsets and shapes, each error with file
//!   and tensor.
//! - Weights are read strip by strip out of mapped files while they are packed, and never held
//!   twice.
//!
//! It knows nothing of batches, of the KV cache's blocks or of serving.

#![forbid(unsafe_code)]

mod chat_template;
mod config;
mod decoder;
mod embedder;
mod error;
mod files;
mod fingerprint;
mod gguf;
mod gguf_tokenizer;
mod gpu_decoder;
mod gpu_workspace;
mod hub;
mod keys;
mod network;
mod random;
mod rope;
mod safetensors;
mod stored;
mod template_functions;
mod template_marks;
mod template_segments;
mod tokenizer;
mod weights;

pub use chat_template::{ChatTemplate, Content, Conversation, Message};
pub use config::{Architecture, ModelConfig};
pub use decoder::Decoder;
pub use embedder::{EmbeddedText, Embedder};
pub use error::Error;
pub use files::{GenerationDefaults, ModelFiles, ModelSource, PRESETS, Training};
pub use fingerprint::{Fingerprint, WeightsSource, digest};
pub use gpu_decoder::{GpuArithmetic, GpuDecoder};
pub use hub::{CachedModel, Hub};
pub use random::Recipe;
pub use rope::{RopeConfig, RopeScaling, YarnScaling};
pub use template_marks::Marks;
pub use template_segments::{SegmentKind, TemplateSegment};
pub use tokenizer::{IncrementalDecoder, Tokenizer};
pub use weights::Weights;
