//! What travels: requests as read from JSON, answers as written to it. No handler is here.

pub mod chat;
pub mod chunks;
pub mod common;
pub mod completions;
pub mod contexts;
pub mod embeddings;
pub mod messages;
pub mod models;
pub mod responses;
pub mod tokens;
