//! The conversation side of the engine: what was said, and the prompt it makes.
//!
//! Speaks of turns, templates and token budgets. Never reaches into the scheduler: what it
//! builds is handed to the engine as a [`Request`](crate::Request)'s segments.

mod conversation;

pub use conversation::{Conversation, Prompt, Role, Turn};
