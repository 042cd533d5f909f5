//! Parts of a request besides its body: the path's names, and what follows the question mark.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use axum::body::HttpBody;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;

use super::error::ApiError;
use super::lenient::Fields;
use super::state::App;

/// What follows the question mark; of a name that is given twice the last value counts.
#[derive(Debug, Default)]
pub struct Params(BTreeMap<String, String>);

/// Names in the path, decoded.
#[derive(Debug)]
pub struct Names<T>(pub T);

/// A JSON body that may be left out.
#[derive(Debug)]
pub struct MaybeFields(pub Fields);

impl Params {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn count(
        &self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let found = text.parse().ok().filter(|number| range.contains(number));
        found.map(Some).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            ApiError::invalid(name, format!("{name} is {text:?}, it must be from {low} to {high}"))
        })
    }

    /// One of these words.
    pub fn word<'a>(&self, name: &str, known: &[&'a str]) -> Result<Option<&'a str>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let found = known.iter().copied().find(|word| *word == text);
        found.map(Some).ok_or_else(|| {
            let words = known.join(", ");
            ApiError::invalid(name, format!("{name} is {text:?}, it must be one of {words}"))
        })
    }
}

impl FromRequestParts<App> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let query: Result<Query<BTreeMap<String, String>>, QueryRejection> =
            Query::from_request_parts(parts, app).await;
        let refused = |_| ApiError::bad_request("what follows the question mark can't be read");
        query.map(|Query(map)| Self(map)).map_err(refused)
    }
}

impl<T: serde::de::DeserializeOwned + Send> FromRequestParts<App> for Names<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let path: Result<Path<T>, PathRejection> = Path::from_request_parts(parts, app).await;
        let refused = |_| ApiError::bad_request("the path is not UTF-8");
        path.map(|Path(names)| Self(names)).map_err(refused)
    }
}

impl FromRequest<App> for MaybeFields {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        if request.body().is_end_stream() {
            return Fields::of_body(b"{}").map(Self);
        }
        Fields::from_request(request, app).await.map(Self)
    }
}
