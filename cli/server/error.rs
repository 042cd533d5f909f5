//! What a client is told when a request can't be served, in OpenAI's shape.
//!
//! `{"error": {"message", "type", "param", "code"}}`. Our own mistakes are told without their
//! cause, which goes to the log.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use strand_engine::Error as EngineError;
use utoipa::ToSchema;

/// A refusal. Build it with one of the constructors, which know OpenAI's words.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// The field that is wrong.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// Seconds after which it may be tried again.
    pub retry_after: Option<u32>,
}

/// A refusal as it travels.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorFields,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorFields {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message, kind, param: None, code: None, retry_after: None }
    }

    /// A field with a value that can't be.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID, message);
        Self { param: Some(param.into()), code: Some("invalid_value"), ..error }
    }

    /// A request that is wrong as a whole.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, message)
    }

    /// Another status for what the client did wrong.
    pub fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, INVALID, message)
    }

    pub fn unauthorized(message: &str) -> Self {
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    pub fn forbidden(message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, message);
        Self { code: Some("not_found"), ..error }
    }

    pub fn unknown_model(name: &str) -> Self {
        let message = format!("the model {name:?} does not exist; GET /v1/models names what does");
        let error = Self::not_found(message);
        Self { param: Some("model".into()), code: Some("model_not_found"), ..error }
    }

    /// Something else must happen first, or has happened already.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, INVALID, message)
    }

    /// Too many requests of this key.
    pub fn rate_limited(message: &str, retry_after: u32) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(retry_after), ..error }
    }

    /// Too many requests of everybody.
    pub fn busy(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("server_busy"), retry_after: Some(1), ..error }
    }

    /// Our mistake. The cause is for the log.
    pub fn internal() -> Self {
        let message = "the server failed to answer; its log says why";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// More than the model takes.
    pub fn too_long(message: String, param: &str) -> Self {
        let error = Self::bad_request(message);
        Self { param: Some(param.into()), code: Some("context_length_exceeded"), ..error }
    }

    /// As it travels in a body or an event.
    pub fn to_json(&self) -> Value {
        let (message, param) = (self.message.clone(), self.param.clone());
        let error = ErrorFields { message, kind: self.kind, param, code: self.code };
        json!(ErrorBody { error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self.status, StatusCode::CONFLICT | StatusCode::INTERNAL_SERVER_ERROR) {
            // OpenAI's SDKs would try these again
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        use EngineError as E;
        let text = error.to_string();
        match error {
            E::PromptTooLong { prompt_tokens, max_model_len } => {
                let message = format!(
                    "this model's maximum context length is {max_model_len} tokens, but the \
                     prompt has {prompt_tokens}, which leaves no room for an answer; shorten it"
                );
                Self::too_long(message, "messages")
            }
            E::TooManyTokens { prompt_tokens, max_tokens, max_model_len } => {
                let message = format!(
                    "this model's maximum context length is {max_model_len} tokens, but \
                     {} were asked for ({prompt_tokens} in the prompt, {max_tokens} for the \
                     answer); shorten the prompt or lower max_tokens",
                    prompt_tokens + max_tokens
                );
                Self::too_long(message, "max_tokens")
            }
            E::ContextTooLong { .. } | E::PoolTooSmall { .. } => Self::too_long(text, "messages"),
            E::EmptyPrompt => Self::invalid("prompt", text),
            E::UnknownToken { .. } => Self::invalid("prompt", text),
            E::EmptyStop { .. } | E::NoTokenizer => Self::invalid("stop", text),
            E::LimitTooSmall { name, .. } | E::LimitTooLarge { name, .. } => {
                Self::invalid(name, text)
            }
            // "temperature is 3, it must be ..."
            E::Sampling(ref reason) => {
                let name = reason.split(' ').next().unwrap_or_default().to_owned();
                Self::invalid(name, text)
            }
            E::Grammar { .. } => Self::invalid("response_format", text),
            E::UnknownChunk { .. } => Self::not_found(text),
            E::AmbiguousChunk { .. } | E::NoKv { .. } => Self::conflict(text),
            E::HiddenPromptLogprobs | E::NotAChunk { .. } | E::HostTooSmall { .. } => {
                Self::bad_request(text)
            }
            E::Model(ref cause) if matches!(**cause, strand_models::Error::ChatTemplate(_)) => {
                Self::invalid("messages", text)
            }
            E::QueueFull { .. } => Self::busy(text),
            E::Stopped => Self::busy("the engine has stopped"),
            _ => {
                tracing::error!(cause = text, "the engine failed");
                Self::internal()
            }
        }
    }
}

impl From<strand_models::Error> for ApiError {
    fn from(error: strand_models::Error) -> Self {
        Self::from(EngineError::from(error))
    }
}
