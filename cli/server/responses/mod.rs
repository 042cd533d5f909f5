//! `POST /v1/responses`, and the same over a socket.
//!
//! Nothing is stored: a later request brings what was said, or goes on within one socket.

mod script;
mod socket;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::asking;
use super::auth::Principal;
use super::body::Asked;
use super::error::ApiError;
use super::generation::Generation;
use super::library::sight;
use super::prompt::{Chat, Ending};
use super::sse::{self, Play};
use super::state::App;
use super::structured;
use super::wire::responses::ResponseRequest;
use script::Events;
pub use socket::connect;

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    Asked(asked): Asked<ResponseRequest>,
) -> Result<Response, ApiError> {
    if let Some(previous) = &asked.previous {
        return Err(not_kept(previous));
    }
    let streams = asked.common.stream.is_some();
    let mut play = play(&app, &principal, asked, &[]).await?;
    if streams {
        return Ok(sse::response(play));
    }
    while play.next().await.is_some() {}
    Ok(Json(play.script().response()?).into_response())
}

fn not_kept(id: &str) -> ApiError {
    let message = format!("the response {id:?} is not kept; send what was said as input");
    let error = ApiError::invalid("previous_response_id", message);
    ApiError { code: Some("previous_response_not_found"), ..error }
}

/// Begins the answer to a request that follows on messages `before`.
async fn play(
    app: &App,
    principal: &Principal,
    asked: ResponseRequest,
    before: &[Value],
) -> Result<Play<Events>, ApiError> {
    app.model.check(asked.common.model.as_deref())?;
    let (messages, marks) = asked.messages(before)?;
    let ResponseRequest { common, tools, form, echo, .. } = asked;
    let shape = structured::shape(app, form, &tools).await?;
    let chat = Chat { messages, tools: tools.offered(), ending: Ending::Opening, marks };
    let style = shape.style;
    let making = asking::prepare(app, principal, &common, move |server, sight| {
        sight::chat(server, sight, chat, style)
    });
    let (segments, sight) = making.await?;
    let mut request = asking::request(app, principal, &common, segments);
    request.limits.grammar = shape.grammar;
    let generation = Generation::start(app, principal, vec![request], sight).await?;
    let speech = tools.speech(style);
    let events = Events::new(app, &generation, echo, speech)?;
    Ok(Play::new(generation, events))
}
