//! Responses over a WebSocket, as the official SDK's `responses.connect()` speaks it.
//!
//! A client sends `response.create`, and gets the events of the stream as messages. A request may
//! go on from an earlier answer of the same socket. A message that makes no sense is answered by
//! an `error` event and closes nothing; a client that leaves cancels its answer.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message as Frame, WebSocket, WebSocketUpgrade, close_code};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};
use tokio::time::{Instant, Interval, interval};

use super::play;
use crate::server::auth::Peer;
use crate::server::error::ApiError;
use crate::server::lenient::Fields;
use crate::server::quota::Turn;
use crate::server::sse::{Message, Play};
use crate::server::state::App;
use crate::server::wire::responses::{ResponseRequest, add_item};

use super::script::Events;

/// Requests that may wait on one socket.
const WAITING: usize = 4;
/// Answers that one socket can go on from.
const KEPT: usize = 16;
/// Nothing is silent for longer.
const PING: Duration = Duration::from_secs(20);
/// Closes a socket whose key has become invalid: a private code, as HTTP's 401.
const EXPIRED: u16 = 4401;
/// A client that doesn't answer for so long is gone.
const IDLE: Duration = Duration::from_secs(60);

pub async fn connect(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let Ok(upgrade) = upgrade else {
        let message = "GET opens a WebSocket here, and this request asks for none";
        return Err(ApiError::refused(StatusCode::UPGRADE_REQUIRED, message));
    };
    // sockets have no preflight: a page of another site is refused here
    if let Some(origin) = headers.get(header::ORIGIN)
        && !app.origins.contains(origin)
    {
        return Err(ApiError::forbidden("pages of this origin may not connect; see --cors-origin"));
    }
    let most = app.limits.body;
    let upgrade = upgrade.max_message_size(most).max_frame_size(most);
    Ok(upgrade.on_upgrade(move |socket| Session::new(app, headers, peer, socket).run()))
}

struct Session {
    app: App,
    /// The key that it came with, looked at again for every request: a token's time runs out.
    headers: HeaderMap,
    peer: Peer,
    socket: WebSocket,
    waiting: VecDeque<Value>,
    /// What was said up to and with each answer, by its id.
    kept: VecDeque<(String, Vec<Value>)>,
    ping: Interval,
    heard: Instant,
}

/// The client has left, or must.
struct Gone;

impl Session {
    fn new(app: App, headers: HeaderMap, peer: Peer, socket: WebSocket) -> Self {
        let (waiting, kept) = (VecDeque::new(), VecDeque::new());
        let (ping, heard) = (interval(PING), Instant::now());
        Self { app, headers, peer, socket, waiting, kept, ping, heard }
    }

    async fn run(mut self) {
        while let Ok(()) = self.turn().await {}
    }

    /// One request, from its arrival to the end of its answer.
    async fn turn(&mut self) -> Result<(), Gone> {
        while self.waiting.is_empty() {
            self.listen().await?;
        }
        let Some(request) = self.waiting.pop_front() else { return Ok(()) };
        let lane = request["stream_id"].as_str().map(str::to_owned);
        match self.begin(request).await {
            Ok((play, said, _turn)) => self.answer(play, said, lane.as_deref()).await,
            Err(error) => {
                self.refuse(&error, lane.as_deref()).await?;
                if error.status != StatusCode::UNAUTHORIZED {
                    return Ok(());
                }
                let frame = CloseFrame { code: EXPIRED, reason: "the key is not valid".into() };
                drop(self.socket.send(Frame::Close(Some(frame))).await);
                Err(Gone)
            }
        }
    }

    /// A request counts as one over HTTP does, while its turn lasts.
    async fn begin(
        &mut self,
        request: Value,
    ) -> Result<(Play<Events>, Vec<Value>, Turn), ApiError> {
        let principal = self.app.keys.principal(&self.headers, self.peer)?;
        let turn = self.app.quotas.enter(&principal.payer)?;
        let fields = Fields::of_value("", request)?.into_body();
        let asked: ResponseRequest = self.app.read(fields)?;
        let before = match &asked.previous {
            None => &[][..],
            Some(id) => {
                let kept = self.kept.iter().find(|(kept, _)| kept == id);
                kept.map(|(_, said)| said.as_slice()).ok_or_else(|| super::not_kept(id))?
            }
        };
        let said = [before, &asked.said].concat();
        Ok((play(&self.app, &principal, asked, before).await?, said, turn))
    }

    async fn answer(
        &mut self,
        mut play: Play<Events>,
        mut said: Vec<Value>,
        lane: Option<&str>,
    ) -> Result<(), Gone> {
        loop {
            let message = tokio::select! {
                message = play.next() => message,
                heard = hear(&mut self.socket, &mut self.ping) => {
                    self.take_in(heard).await?;
                    continue;
                }
            };
            let Some(message) = message else { break };
            self.send(message, lane).await?;
        }
        for item in play.script().output() {
            // what this server said itself, it can read
            drop(add_item("output", item.clone(), &mut said));
        }
        self.kept.push_back((play.script().id().to_owned(), said));
        if self.kept.len() > KEPT {
            self.kept.pop_front();
        }
        Ok(())
    }

    /// Waits for what the client has to say.
    async fn listen(&mut self) -> Result<(), Gone> {
        let heard = hear(&mut self.socket, &mut self.ping).await;
        self.take_in(heard).await
    }

    async fn take_in(&mut self, heard: Heard) -> Result<(), Gone> {
        match heard {
            Heard::Nothing if self.heard.elapsed() > IDLE => {
                let frame = CloseFrame { code: close_code::AWAY, reason: "no answer".into() };
                drop(self.socket.send(Frame::Close(Some(frame))).await);
                Err(Gone)
            }
            Heard::Nothing => {
                let ping = self.socket.send(Frame::Ping(Vec::new().into())).await;
                ping.map_err(|_| Gone)
            }
            Heard::End => Err(Gone),
            Heard::Frame(frame) => {
                self.heard = Instant::now();
                match frame {
                    Frame::Text(text) => self.take_request(text.as_str()).await,
                    Frame::Binary(_) => {
                        let error = ApiError::bad_request("messages are text");
                        self.refuse(&error, None).await
                    }
                    Frame::Ping(_) | Frame::Pong(_) => Ok(()),
                    Frame::Close(_) => Err(Gone),
                }
            }
        }
    }

    async fn take_request(&mut self, text: &str) -> Result<(), Gone> {
        let request = match serde_json::from_str::<Value>(text) {
            Ok(request) => request,
            Err(error) => {
                let error = ApiError::bad_request(format!("the message is not JSON: {error}"));
                return self.refuse(&error, None).await;
            }
        };
        let lane = request["stream_id"].as_str().map(str::to_owned);
        let error = match request["type"].as_str() {
            Some("response.create") if self.waiting.len() < WAITING => {
                self.waiting.push_back(request);
                return Ok(());
            }
            Some("response.create") => ApiError::rate_limited("too many requests wait here", 1),
            Some("response.steer") => return self.refuse_steer(&request, lane.as_deref()).await,
            _ => ApiError::invalid("type", "type must be response.create"),
        };
        self.refuse(&error, lane.as_deref()).await
    }

    /// Answers are made as they were asked for.
    async fn refuse_steer(&mut self, request: &Value, lane: Option<&str>) -> Result<(), Gone> {
        let event = json!({
            "type": "response.steer.failed",
            "sequence_number": 0,
            "error": {"type": "invalid_request_error", "code": "steering_not_supported",
                      "message": "an answer can't be steered; send another request"},
            "steer": {"input": request["input"],
                      "previous_response_id": request["previous_response_id"]},
        });
        self.send(Message::new(&event), lane).await
    }

    async fn refuse(&mut self, error: &ApiError, lane: Option<&str>) -> Result<(), Gone> {
        let mut event = error.to_json();
        event["type"] = "error".into();
        event["status"] = error.status.as_u16().into();
        self.send(Message::new(&event), lane).await
    }

    async fn send(&mut self, message: Message, lane: Option<&str>) -> Result<(), Gone> {
        let mut text = message.into_data();
        if let Some(lane) = lane
            && let Some(fields) = text.strip_suffix('}')
        {
            text = format!("{fields},\"stream_id\":{}}}", Value::from(lane));
        }
        self.socket.send(Frame::Text(text.into())).await.map_err(|_| Gone)
    }
}

enum Heard {
    Frame(Frame),
    /// For the time of a ping.
    Nothing,
    End,
}

async fn hear(socket: &mut WebSocket, ping: &mut Interval) -> Heard {
    tokio::select! {
        frame = socket.recv() => match frame {
            Some(Ok(frame)) => Heard::Frame(frame),
            Some(Err(_)) | None => Heard::End,
        },
        _ = ping.tick() => Heard::Nothing,
    }
}
