//! `/v1/chunks`: content that is encoded once, by name.

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use super::asking::blocking;
use super::auth::Principal;
use super::body::Asked;
use super::error::ApiError;
use super::lenient::Fields;
use super::library::chunks::{self, Filter};
use super::library::names;
use super::library::verbs::{self, Verb};
use super::query::{MaybeFields, Names, Params};
use super::state::App;
use super::wire::chunks::{ChunkObject, ChunkOutcome, Deleted, NewChunk, Page};

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    Upload(new): Upload,
) -> Result<Response, ApiError> {
    let meter = app.quotas.meter(&principal.payer)?;
    let (is_new, outcome) = blocking(&app, move |server| {
        let shelf = server.library.shelf(&principal.tenant)?;
        let started = Instant::now();
        let made = chunks::make(server, &shelf, new)?;
        meter.count(made.encoded);
        let millis = started.elapsed().as_secs_f64() * 1e3;
        let chunk = chunks::show(server, &shelf, made.id)?;
        Ok((made.is_new, ChunkOutcome::made(chunk, millis, made.encoded)))
    })
    .await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(outcome)).into_response())
}

pub async fn list(
    State(app): State<App>,
    principal: Principal,
    params: Params,
) -> Result<Json<Page<ChunkObject>>, ApiError> {
    let filter = Filter::read(params)?;
    blocking(&app, move |server| {
        let shelf = server.library.shelf(&principal.tenant)?;
        chunks::list(server, &shelf, &filter).map(Json)
    })
    .await
}

pub async fn get(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
) -> Result<Json<ChunkObject>, ApiError> {
    blocking(&app, move |server| {
        let shelf = server.library.shelf(&principal.tenant)?;
        let id = names::chunk(&shelf, &id, "id")?;
        chunks::show_all(server, &shelf, id).map(Json)
    })
    .await
}

pub async fn erase(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
) -> Result<Json<Deleted>, ApiError> {
    blocking(&app, move |server| {
        let shelf = server.library.shelf(&principal.tenant)?;
        let id = names::chunk(&shelf, &id, "id")?;
        chunks::erase(server, &shelf, id)?;
        Ok(Json(Deleted { id: id.to_string(), object: "chunk.deleted", deleted: true }))
    })
    .await
}

pub async fn populate(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
) -> Result<Json<ChunkOutcome>, ApiError> {
    act(app, principal, id, Verb::Populate).await
}

pub async fn save(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
) -> Result<Json<ChunkOutcome>, ApiError> {
    act(app, principal, id, Verb::Save).await
}

pub async fn unload(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
) -> Result<Json<ChunkOutcome>, ApiError> {
    act(app, principal, id, Verb::Unload).await
}

pub async fn restore(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
) -> Result<Json<ChunkOutcome>, ApiError> {
    act(app, principal, id, Verb::Restore).await
}

/// Seconds that a pin lasts where nobody says so.
const PINNED: usize = 300;

pub async fn pin(
    State(app): State<App>,
    principal: Principal,
    Names(id): Names<String>,
    MaybeFields(mut fields): MaybeFields,
) -> Result<Json<ChunkOutcome>, ApiError> {
    let seconds = fields.count("seconds", 1..=usize::MAX)?.unwrap_or(PINNED);
    act(app, principal, id, Verb::Pin(Duration::from_secs(seconds as u64))).await
}

async fn act(
    app: App,
    principal: Principal,
    id: String,
    verb: Verb,
) -> Result<Json<ChunkOutcome>, ApiError> {
    let meter = app.quotas.meter(&principal.payer)?;
    blocking(&app, move |server| {
        let shelf = server.library.shelf(&principal.tenant)?;
        let id = names::chunk(&shelf, &id, "id")?;
        let outcome = verbs::carry_out(server, &shelf, id, verb)?;
        meter.count(outcome.encoded);
        Ok(Json(outcome))
    })
    .await
}

/// A chunk to be made, as JSON or as a file of a form.
pub struct Upload(NewChunk);

impl FromRequest<App> for Upload {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let media = request.headers().get(header::CONTENT_TYPE);
        let media = media.and_then(|media| media.to_str().ok()).unwrap_or_default();
        if !media.to_ascii_lowercase().starts_with("multipart/form-data") {
            let Asked(new) = Asked::from_request(request, app).await?;
            return Ok(Self(new));
        }
        check_origin(request.headers())?;
        let time = app.limits.read_timeout;
        let reading = tokio::time::timeout(time, read_form(request, app)).await;
        reading.unwrap_or_else(|_| {
            let message = format!("the body took more than {} seconds to arrive", time.as_secs());
            Err(ApiError::refused(StatusCode::REQUEST_TIMEOUT, message))
        })
    }
}

/// A form is what a foreign page can send without asking; it says where it comes from.
fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(origin) = value(header::ORIGIN) else { return Ok(()) };
    let own = value(header::HOST).is_some_and(|host| {
        origin.strip_prefix("http://").or(origin.strip_prefix("https://")) == Some(host)
    });
    if own { Ok(()) } else { Err(ApiError::forbidden("forms of other pages are not taken")) }
}

/// The fields of a form: `file`, and the others as they are in JSON.
async fn read_form(request: Request, app: &App) -> Result<Upload, ApiError> {
    let broken = |status, text: String| ApiError::refused(status, format!("the form: {text}"));
    let mut form = Multipart::from_request(request, app)
        .await
        .map_err(|error| broken(error.status(), error.body_text()))?;
    let (mut content, mut fields) = (None, Map::new());
    while let Some(part) =
        form.next_field().await.map_err(|error| broken(error.status(), error.body_text()))?
    {
        let name = part.name().unwrap_or_default().to_owned();
        let file_name = part.file_name().map(str::to_owned);
        let bytes =
            part.bytes().await.map_err(|error| broken(error.status(), error.body_text()))?;
        if name == "file" || name == "content" {
            content = Some(bytes.to_vec());
            if let Some(file_name) = file_name.filter(|_| !fields.contains_key("name")) {
                fields.insert("name".to_owned(), last_part(&file_name).into());
            }
            continue;
        }
        let text = String::from_utf8(bytes.to_vec())
            .map_err(|_| ApiError::invalid(&name, format!("{name} is not UTF-8 text")))?;
        put(&mut fields, name, text);
    }
    let content = content.ok_or_else(|| {
        let error = ApiError::invalid("file", "file is required");
        ApiError { code: Some("missing_required_parameter"), ..error }
    })?;
    let mut fields = Fields::of_body(Value::Object(fields).to_string().as_bytes())?;
    NewChunk::with_content(&mut fields, content).map(Upload)
}

/// A form knows text alone; a tag more than once is a list.
fn put(fields: &mut Map<String, Value>, name: String, text: String) {
    let value = match name.as_str() {
        "metadata" | "encode" => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        "tags" | "tags[]" => {
            let tags = fields.entry("tags").or_insert_with(|| Value::Array(Vec::new()));
            tags.as_array_mut().expect("only put here").push(Value::String(text));
            return;
        }
        _ => Value::String(text),
    };
    fields.insert(name, value);
}

/// A file's name without folders, as some clients send them.
fn last_part(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}
