//! Bodies of requests as their routes read them, without a server: for tests and for fuzzing.

use std::time::Duration;

use super::body::FromFields;
use super::error::ApiError;
use super::lenient::Fields;
use super::state::ServerLimits;
use super::wire::chat::ChatRequest;
use super::wire::chunks::NewChunk;
use super::wire::completions::TextRequest;
use super::wire::contexts::ContextChange;
use super::wire::embeddings::EmbeddingRequest;
use super::wire::responses::ResponseRequest;
use super::wire::tokens::{DetokenizeRequest, TokenizeRequest};

/// Routes whose bodies have many fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    Chat,
    Text,
    Response,
    Embedding,
    Tokenize,
    Detokenize,
    Chunk,
    Context,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Reading {
    /// Understood, but for so many fields.
    Taken {
        unknown: usize,
    },
    Refused {
        status: u16,
        param: Option<String>,
        message: String,
    },
}

/// Wide enough for any test.
const LIMITS: ServerLimits = ServerLimits { body: usize::MAX, read_timeout: Duration::MAX, n: 64 };

impl Body {
    pub const ALL: [Self; 8] = [
        Self::Chat,
        Self::Text,
        Self::Response,
        Self::Embedding,
        Self::Tokenize,
        Self::Detokenize,
        Self::Chunk,
        Self::Context,
    ];

    /// Reads bytes that a client has sent.
    pub fn read(self, bytes: &[u8]) -> Reading {
        match self.fields(bytes) {
            Ok(fields) => Reading::Taken { unknown: fields.unknown() },
            Err(ApiError { status, param, message, .. }) => {
                Reading::Refused { status: status.as_u16(), param, message }
            }
        }
    }

    /// What is left of the body when all is read.
    fn fields(self, bytes: &[u8]) -> Result<Fields, ApiError> {
        let mut fields = Fields::of_body(bytes)?;
        let limits = &LIMITS;
        match self {
            Self::Chat => drop(ChatRequest::read(&mut fields, limits)?),
            Self::Text => drop(TextRequest::read(&mut fields, limits)?),
            Self::Response => {
                let asked = ResponseRequest::read(&mut fields, limits)?;
                drop(asked.messages(&[])?);
            }
            Self::Embedding => drop(EmbeddingRequest::read(&mut fields, limits)?),
            Self::Tokenize => drop(TokenizeRequest::read(&mut fields, limits)?),
            Self::Detokenize => drop(DetokenizeRequest::read(&mut fields, limits)?),
            Self::Chunk => drop(NewChunk::read(&mut fields, limits)?),
            Self::Context => drop(ContextChange::read(&mut fields, limits)?),
        }
        Ok(fields)
    }
}
