//! What each route takes and answers.

use axum::http::Method;
use utoipa::ToSchema;
use utoipa::openapi::{ObjectBuilder, Ref, RefOr, Schema, Type};

use super::bodies;
use crate::server::wire::chat::{ChatChunk, ChatCompletion};
use crate::server::wire::chunks::{ChunkObject, ChunkOutcome, Deleted, Page};
use crate::server::wire::completions::TextCompletion;
use crate::server::wire::contexts::{ContextObject, ContextSummary};
use crate::server::wire::embeddings::Embeddings;
use crate::server::wire::models::{Health, ModelList, ModelObject, Version};
use crate::server::wire::responses::ResponseObject;
use crate::server::wire::tokens::{Detokenized, Tokenized, TokenizerInfo};

pub const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const FORM: &str = "multipart/form-data";
const METRICS: &str = "application/openmetrics-text";

/// A schema under its name, and those that it refers to.
#[derive(Clone)]
pub struct Named {
    name: String,
    schema: RefOr<Schema>,
    others: Vec<(String, RefOr<Schema>)>,
}

impl Named {
    pub fn of<T: ToSchema>() -> Self {
        Self::under::<T>(&T::name())
    }

    /// Of a type that has its name only with its parameters.
    fn under<T: ToSchema>(name: &str) -> Self {
        let mut others = Vec::new();
        T::schemas(&mut others);
        Self { name: name.to_owned(), schema: T::schema(), others }
    }

    /// Anything of a type.
    fn bare(name: &str, kind: Type) -> Self {
        let schema: Schema = ObjectBuilder::new().schema_type(kind).build().into();
        Self { name: name.to_owned(), schema: schema.into(), others: Vec::new() }
    }

    pub fn reference(&self) -> Ref {
        Ref::from_schema_name(&self.name)
    }

    pub fn all(&self) -> Vec<(String, RefOr<Schema>)> {
        let own = (self.name.clone(), self.schema.clone());
        self.others.iter().cloned().chain([own]).collect()
    }
}

pub fn text() -> Schema {
    ObjectBuilder::new().schema_type(Type::String).build().into()
}

/// What is sent and what comes back, by media type.
#[derive(Default)]
pub struct Exchange {
    pub query: &'static [&'static str],
    pub bodies: Vec<(&'static str, Named)>,
    pub body_required: bool,
    pub statuses: &'static [&'static str],
    pub answers: Vec<(&'static str, Named)>,
}

impl Exchange {
    /// All schemas, by name.
    pub fn named(&self) -> impl Iterator<Item = &Named> {
        self.bodies.iter().chain(&self.answers).map(|(_, named)| named)
    }

    fn answers<T: ToSchema>() -> Self {
        Self { statuses: &["200"], ..Self::default() }.or(JSON, Named::of::<T>())
    }

    fn or(mut self, media: &'static str, named: Named) -> Self {
        self.answers.push((media, named));
        self
    }

    fn takes<T: ToSchema>(mut self) -> Self {
        self.bodies.push((JSON, Named::of::<T>()));
        Self { body_required: true, ..self }
    }

    fn may_take<T: ToSchema>(self) -> Self {
        Self { body_required: false, ..self.takes::<T>() }
    }

    fn query(self, query: &'static [&'static str]) -> Self {
        Self { query, ..self }
    }

    fn statuses(self, statuses: &'static [&'static str]) -> Self {
        Self { statuses, ..self }
    }

    /// Or the answer comes in events.
    fn streams(self) -> Self {
        self.or(EVENTS, Named::bare("Events", Type::String))
    }
}

/// Of a route in the table.
pub fn of(method: &Method, path: &str) -> Exchange {
    match (method.as_str(), path) {
        ("GET", "/health" | "/ready") => Exchange::answers::<Health>(),
        ("GET", "/metrics") => Exchange { statuses: &["200"], ..Exchange::default() }
            .or(METRICS, Named::bare("Metrics", Type::String)),
        ("GET", "/openapi.json") => Exchange { statuses: &["200"], ..Exchange::default() }
            .or(JSON, Named::bare("OpenApi", Type::Object)),
        ("GET", "/version") => Exchange::answers::<Version>(),
        ("GET", "/v1/models") => Exchange::answers::<ModelList>(),
        ("GET", "/v1/models/{*id}") => Exchange::answers::<ModelObject>(),
        ("POST", "/v1/embeddings") => {
            Exchange::answers::<Embeddings>().takes::<bodies::EmbeddingRequest>()
        }
        ("POST", "/tokenize") => {
            Exchange::answers::<Tokenized>().takes::<bodies::TokenizeRequest>()
        }
        ("POST", "/detokenize") => {
            Exchange::answers::<Detokenized>().takes::<bodies::DetokenizeRequest>()
        }
        ("GET", "/tokenizer_info") => Exchange::answers::<TokenizerInfo>(),
        (method, path) if path.starts_with("/v1/chunks") => chunks(method, path),
        (method, path) if path.starts_with("/v1/contexts") => contexts(method, path),
        (method, path) => generation(method, path),
    }
}

fn generation(method: &str, path: &str) -> Exchange {
    match (method, path) {
        ("POST", "/v1/chat/completions") => {
            let mut exchange =
                Exchange::answers::<ChatCompletion>().takes::<bodies::ChatRequest>().streams();
            // what each event of a stream has
            let chunk = Named::of::<ChatChunk>();
            exchange.answers[1].1.others = chunk.all();
            exchange
        }
        ("POST", "/v1/completions") => {
            Exchange::answers::<TextCompletion>().takes::<bodies::TextRequest>().streams()
        }
        ("POST", "/v1/responses") => {
            Exchange::answers::<ResponseObject>().takes::<bodies::ResponseRequest>().streams()
        }
        // a socket
        ("GET", "/v1/responses") => Exchange::default().statuses(&["101"]),
        other => unreachable!("nothing is said of {other:?}"),
    }
}

fn chunks(method: &str, path: &str) -> Exchange {
    match (method, path) {
        ("POST", "/v1/chunks") => {
            let mut exchange = Exchange::answers::<ChunkOutcome>()
                .takes::<bodies::ChunkRequest>()
                .statuses(&["200", "201"]);
            exchange.bodies.push((FORM, Named::of::<bodies::ChunkForm>()));
            exchange
        }
        ("GET", "/v1/chunks") => Exchange { statuses: &["200"], ..Exchange::default() }
            .or(JSON, Named::under::<Page<ChunkObject>>("ChunkPage"))
            .query(&["state", "tier", "tag", "limit", "after"]),
        ("GET", _) => Exchange::answers::<ChunkObject>(),
        ("DELETE", _) => Exchange::answers::<Deleted>(),
        ("POST", "/v1/chunks/{id}/pin") => {
            Exchange::answers::<ChunkOutcome>().may_take::<bodies::PinRequest>()
        }
        _ => Exchange::answers::<ChunkOutcome>(),
    }
}

fn contexts(method: &str, path: &str) -> Exchange {
    let exchange = match (method, path) {
        ("POST", "/v1/contexts") => Exchange::answers::<ContextObject>()
            .takes::<bodies::ContextRequest>()
            .statuses(&["201"]),
        ("GET", "/v1/contexts") => {
            return Exchange { statuses: &["200"], ..Exchange::default() }
                .or(JSON, Named::under::<Page<ContextSummary>>("ContextPage"))
                .query(&["limit", "after", "tenant"]);
        }
        ("PATCH", _) => Exchange::answers::<ContextObject>().takes::<bodies::ContextRequest>(),
        ("DELETE", "/v1/contexts/{id}") => Exchange::answers::<Deleted>(),
        ("POST", "/v1/contexts/{id}/fork") => Exchange::answers::<ContextObject>()
            .may_take::<bodies::ForkRequest>()
            .statuses(&["201"]),
        ("PUT", _) => Exchange::answers::<ContextObject>().may_take::<bodies::PutRequest>(),
        _ => Exchange::answers::<ContextObject>(),
    };
    exchange.query(&["tenant"])
}
