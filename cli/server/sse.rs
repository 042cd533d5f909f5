//! Server-sent events, as OpenAI's SDKs read them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use serde_json::Value;

use super::error::ApiError;
use super::generation::{Generation, Piece};

/// Nothing is silent for longer: proxies close what looks dead.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// One API's way to tell a generation in messages.
pub trait Script: Send + 'static {
    /// Before the first piece.
    fn opening(&mut self) -> Vec<Message>;
    fn piece(&mut self, piece: Piece) -> Vec<Message>;
    /// After the last piece.
    fn closing(&mut self) -> Vec<Message>;
    /// Instead of what would have followed.
    fn failure(&mut self, error: &ApiError) -> Vec<Message> {
        vec![Message::new(&error.to_json())]
    }
}

/// One message of a script.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    event: Option<&'static str>,
    data: String,
}

impl Message {
    pub fn new(data: &impl Serialize) -> Self {
        let data = serde_json::to_string(data).expect("wire types are JSON");
        Self { event: None, data }
    }

    /// For APIs that name their events.
    pub fn named(event: &'static str, data: &Value) -> Self {
        Self { event: Some(event), ..Self::new(data) }
    }

    /// What ends OpenAI's streams.
    pub fn done() -> Self {
        Self { event: None, data: "[DONE]".to_owned() }
    }

    fn into_event(self) -> Event {
        let event = Event::default();
        let named = match self.event {
            None => event,
            Some(name) => event.event(name),
        };
        named.data(self.data)
    }

    /// The JSON alone.
    pub fn into_data(self) -> String {
        self.data
    }
}

/// A script as it is played: messages one by one, the generation dropped with it.
pub struct Play<S> {
    generation: Generation,
    script: S,
    ready: VecDeque<Message>,
    ended: bool,
}

impl<S: Script> Play<S> {
    pub fn new(generation: Generation, mut script: S) -> Self {
        let ready = script.opening().into();
        Self { generation, script, ready, ended: false }
    }

    pub fn script(&self) -> &S {
        &self.script
    }

    /// The next message; `None` after the last one.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(message);
            }
            if self.ended {
                return None;
            }
            let messages = match self.generation.next().await {
                Some(Ok(piece)) => self.script.piece(piece),
                Some(Err(error)) => {
                    self.ended = true;
                    self.script.failure(&error)
                }
                None => {
                    self.ended = true;
                    self.script.closing()
                }
            };
            self.ready.extend(messages);
        }
    }
}

/// The whole play as an answer.
pub fn response<S: Script>(play: Play<S>) -> Response {
    let messages = stream::unfold(play, |mut play| async {
        let message = play.next().await?;
        Some((message, play))
    });
    streamed(messages, KEEP_ALIVE)
}

fn streamed(
    messages: impl Stream<Item = Message> + Send + 'static,
    longest_silence: Duration,
) -> Response {
    let events = messages.map(|message| Ok::<_, Infallible>(message.into_event()));
    let keep_alive = KeepAlive::new().interval(longest_silence);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    let unbuffered = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(unbuffered, HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_comment_breaks_a_silence_that_is_too_long() {
        let first = Message::new(&1);
        let silent = stream::iter([first]).chain(stream::pending());
        let mut body = streamed(silent, Duration::from_millis(2)).into_body();
        let mut frames = Vec::new();
        for _ in 0..3 {
            let frame = body.frame().await.expect("it goes on").expect("nothing fails");
            frames.push(frame.into_data().expect("it is data"));
        }
        assert_eq!(frames, ["data: 1\n\n", ":\n\n", ":\n\n"]);
    }
}
