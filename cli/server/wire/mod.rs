//! What travels: requests as read from JSON, answers as written to it. No handler is here.

pub mod chat;
pub mod common;
pub mod completions;
pub mod messages;
pub mod responses;
