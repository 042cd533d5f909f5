//! Why an op refuses its arguments.

use candle_core::DType;

/// Nothing was computed or written when one of these is returned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{op}: {operand} must be {expected}, got {found:?}")]
    Dtype { op: &'static str, operand: &'static str, expected: &'static str, found: DType },
    #[error("{op}: {operand} must be {expected}, got shape {dims:?} with strides {strides:?}")]
    Layout {
        op: &'static str,
        operand: &'static str,
        expected: String,
        dims: Vec<usize>,
        strides: Vec<usize>,
    },
    #[error("{op}: {what} is {found}, must be {expected}")]
    Value { op: &'static str, what: String, found: i64, expected: String },
    #[error("{what}: {reason}")]
    Device { what: String, reason: String },
}

impl Error {
    /// A number outside its limits.
    pub(crate) fn value(
        op: &'static str,
        what: impl Into<String>,
        found: impl TryInto<i64>,
        expected: impl Into<String>,
    ) -> Self {
        let found = found.try_into().unwrap_or(i64::MAX);
        Self::Value { op, what: what.into(), found, expected: expected.into() }
    }

    /// What a device could not do, and why.
    pub(crate) fn device(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Device { what: what.into(), reason: reason.into() }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}
