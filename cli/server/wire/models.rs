//! `/v1/models`, `/health` and `/version`: what is answered.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`
    pub object: &'static str,
    pub data: Vec<ModelObject>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ModelObject {
    pub id: String,
    /// `model`
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// What its embeddings are.
    pub embeddings: &'static str,
    /// Always null: no model here is made of another.
    pub parent: Option<String>,
    /// The language model's own name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// Of the language model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Health {
    /// `ok`
    pub status: &'static str,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Version {
    pub version: &'static str,
}
