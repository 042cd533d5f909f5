//! The conversation side of the engine: what was said, and the prompt it makes.
//!
//! Speaks of turns, templates and token budgets. Never reaches into the scheduler: what it
//! builds is handed to the engine as a [`Request`](crate::Request)'s segments.

mod chunk;
#[expect(clippy::module_inception, reason = "a context is what this folder is named after")]
mod context;
mod conversation;
mod kept;
mod placement;
mod policy;

pub use crate::ChunkId;
pub use chunk::{Chunk, ChunkKind};
pub use context::{Context, Entry, Loaded};
pub use conversation::{Conversation, Dropped, Prompt, Role, Turn};
pub use policy::ReusePolicy;
