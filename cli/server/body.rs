//! Reads a JSON body, as what its route asks for: its type, its size and the time it takes are
//! limited.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;

use super::error::ApiError;
use super::lenient::Fields;
use super::state::{App, Server, ServerLimits};

/// So much more is read and thrown away, so that the client comes to read why.
const DISCARDED: usize = 64 << 20;

/// What a body can be read as.
pub trait FromFields: Sized {
    /// Takes out what it knows.
    fn read(fields: &mut Fields, limits: &ServerLimits) -> Result<Self, ApiError>;
}

/// A body as it was read.
pub struct Asked<T>(pub T);

impl Server {
    /// Reads a body; what nobody took out of it is counted.
    pub fn read<T: FromFields>(&self, mut fields: Fields) -> Result<T, ApiError> {
        let read = T::read(&mut fields, &self.limits)?;
        self.metrics.was_read(&fields);
        Ok(read)
    }
}

impl<T: FromFields> FromRequest<App> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        app.read(Fields::from_request(request, app).await?).map(Self)
    }
}

impl FromRequest<App> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        check_headers(request.headers())?;
        let body = read(request.into_body(), app.limits.body, app.limits.read_timeout).await?;
        Fields::of_body(&body)
    }
}

/// JSON and nothing else: what a form of a foreign page can send is not taken for it.
fn check_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = |message| Err(ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    let value = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let media = value(header::CONTENT_TYPE).map(|value| value.split(';').next().unwrap_or(value));
    if !media.is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json")) {
        return refused("the body must be sent as Content-Type: application/json");
    }
    match value(header::CONTENT_ENCODING) {
        None | Some("identity") => Ok(()),
        Some(_) => refused("the body must be sent as it is, without Content-Encoding"),
    }
}

/// The whole body, of at most `limit` bytes.
pub async fn read(body: Body, limit: usize, time: Duration) -> Result<Vec<u8>, ApiError> {
    let reading = tokio::time::timeout(time, read_all(body, limit));
    reading.await.unwrap_or_else(|_| {
        let message = format!("the body took more than {} seconds to arrive", time.as_secs());
        Err(ApiError::refused(StatusCode::REQUEST_TIMEOUT, message))
    })
}

async fn read_all(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("the body broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length <= limit {
            bytes.extend_from_slice(&data);
        } else if length > limit + DISCARDED {
            break;
        }
    }
    if length > limit {
        let message = format!("the body is larger than {limit} bytes");
        return Err(ApiError::refused(StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    Ok(bytes)
}
