//! Names in paths: of chunks, by their hash, and of contexts.

use strand_engine::ChunkId;
use strand_engine::store::StoreError;
use uuid::Uuid;

use super::shelf::{Shelf, failed, no_chunk};
use crate::server::error::ApiError;

const DIGITS: usize = 64;
/// Fewest digits that name a chunk.
const SHORTEST: usize = 12;
/// What a context's id begins with; 128 random bits follow.
const CONTEXT: &str = "ctx_";

/// The chunk that a path or a field names: its hash, or digits that begin no other.
pub fn chunk(shelf: &Shelf, text: &str, param: &str) -> Result<ChunkId, ApiError> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if !(SHORTEST..=DIGITS).contains(&text.len()) || !text.bytes().all(is_digit) {
        let message = format!(
            "a chunk is named by the {DIGITS} lower-case hex digits of its hash, or by {SHORTEST} \
             or more that begin no other"
        );
        return Err(ApiError::invalid(param, message));
    }
    match shelf.rows().index().find_chunk(text) {
        Err(StoreError::UnknownChunk { .. }) => Err(no_chunk()),
        found => found.map_err(failed),
    }
}

/// An id that nobody can guess.
pub fn new_context() -> String {
    format!("{CONTEXT}{}", Uuid::new_v4().simple())
}

pub fn is_context(text: &str) -> bool {
    text.strip_prefix(CONTEXT).is_some_and(|digits| {
        digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}
