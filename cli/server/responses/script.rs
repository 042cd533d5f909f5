//! A response as it comes to be, told in OpenAI's events.
//!
//! Its output is a list of items: messages with text, and calls of functions. Whoever wants the
//! whole at once reads it off at the end.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use strand_engine::{FinishReason, TokenLogprobs};
use strand_models::Tokenizer;
use uuid::Uuid;

use crate::server::error::ApiError;
use crate::server::generation::{Generation, Piece};
use crate::server::logprobs::ChatLogprobs;
use crate::server::prompt;
use crate::server::sse::{Message, Script};
use crate::server::state::{App, Server, now};
use crate::server::tools::{Said, Speech};
use crate::server::usage::Tally;

pub struct Events {
    server: Arc<Server>,
    tokenizer: Tokenizer,
    tally: Tally,
    speech: Speech,
    /// The response as it stands; its items are in `output`.
    fields: Map<String, Value>,
    output: Vec<Value>,
    /// The last item is not complete.
    is_open: bool,
    logprobs: Vec<Value>,
    sequence: u64,
    failed: Option<ApiError>,
}

impl Events {
    pub fn new(
        app: &App,
        generation: &Generation,
        echo: Map<String, Value>,
        speech: Speech,
    ) -> Result<Self, ApiError> {
        let mut fields = echo;
        let own = json!({
            "id": format!("resp_{}", Uuid::new_v4().simple()),
            "object": "response",
            "created_at": now(),
            "status": "in_progress",
            "error": null,
            "incomplete_details": null,
            "model": app.model.id,
            "usage": null,
        });
        fields.extend(own.as_object().cloned().unwrap_or_default());
        Ok(Self {
            server: app.clone(),
            tokenizer: prompt::tokenizer(app)?.clone(),
            tally: Tally::new(generation, 1),
            speech,
            fields,
            output: Vec::new(),
            is_open: false,
            logprobs: Vec::new(),
            sequence: 0,
            failed: None,
        })
    }

    /// The response as it stands, or why there is none.
    pub fn response(&self) -> Result<Value, ApiError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => Ok(self.snapshot()),
        }
    }

    pub fn id(&self) -> &str {
        self.fields["id"].as_str().unwrap_or_default()
    }

    /// The items of the answer.
    pub fn output(&self) -> &[Value] {
        &self.output
    }

    fn snapshot(&self) -> Value {
        let mut response = self.fields.clone();
        response.insert("output".to_owned(), self.output.clone().into());
        Value::Object(response)
    }

    fn event(&mut self, kind: &'static str, fields: Value) -> Message {
        let mut event = json!({"type": kind, "sequence_number": self.sequence});
        self.sequence += 1;
        let object = event.as_object_mut().expect("it was written as one");
        object.extend(fields.as_object().cloned().unwrap_or_default());
        Message::named(kind, &event)
    }

    fn whole(&mut self, kind: &'static str) -> Message {
        let response = self.snapshot();
        self.event(kind, json!({"response": response}))
    }

    fn tell(&mut self, said: Vec<Said>, logprobs: Option<TokenLogprobs>) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut logprobs = logprobs.map(|one| self.logprob(&one));
        for said in said {
            match said {
                Said::Text(text) => self.text(&text, logprobs.take(), &mut messages),
                Said::Call { id, name, .. } => self.call(id, name, &mut messages),
                Said::Arguments { text, .. } => self.arguments(&text, &mut messages),
            }
        }
        // a token without text of its own
        self.logprobs.extend(logprobs);
        messages
    }

    fn text(&mut self, text: &str, logprob: Option<Value>, messages: &mut Vec<Message>) {
        if !(self.is_open && self.output.last().is_some_and(|item| item["type"] == "message")) {
            self.close(messages);
            let item = json!({"id": format!("msg_{}", Uuid::new_v4().simple()), "type": "message",
                "status": "in_progress", "role": "assistant", "content": []});
            self.open(item, messages);
            let part = text_part("", &[]);
            let place = self.place();
            messages.push(self.event("response.content_part.added", with(place, "part", &part)));
            self.item()["content"] = json!([part]);
        }
        let whole =
            self.item()["content"][0]["text"].as_str().unwrap_or_default().to_owned() + text;
        self.item()["content"][0]["text"] = whole.into();
        let mut fields = with(self.place(), "delta", &json!(text));
        let mut told = std::mem::take(&mut self.logprobs);
        told.extend(logprob);
        fields["logprobs"] = told.clone().into();
        if let Some(all) = self.item()["content"][0]["logprobs"].as_array_mut() {
            all.extend(told);
        }
        messages.push(self.event("response.output_text.delta", fields));
    }

    fn call(&mut self, id: String, name: String, messages: &mut Vec<Message>) {
        self.close(messages);
        let item = json!({"id": format!("fc_{}", Uuid::new_v4().simple()),
            "type": "function_call", "status": "in_progress", "call_id": id, "name": name,
            "arguments": ""});
        self.open(item, messages);
    }

    fn arguments(&mut self, text: &str, messages: &mut Vec<Message>) {
        let whole = self.item()["arguments"].as_str().unwrap_or_default().to_owned() + text;
        self.item()["arguments"] = whole.into();
        let fields = with(self.item_place(), "delta", &json!(text));
        messages.push(self.event("response.function_call_arguments.delta", fields));
    }

    fn open(&mut self, item: Value, messages: &mut Vec<Message>) {
        self.output.push(item.clone());
        self.is_open = true;
        let fields = json!({"output_index": self.output.len() - 1, "item": item});
        messages.push(self.event("response.output_item.added", fields));
    }

    /// Completes the item that is open, if one is.
    fn close(&mut self, messages: &mut Vec<Message>) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let status = if self.fields["status"] == "incomplete" { "incomplete" } else { "completed" };
        self.item()["status"] = status.into();
        let item = self.item().clone();
        if item["type"] == "message" {
            let part = &item["content"][0];
            let mut fields = with(self.place(), "text", &part["text"]);
            fields["logprobs"] = part.get("logprobs").cloned().unwrap_or_else(|| json!([]));
            messages.push(self.event("response.output_text.done", fields));
            let fields = with(self.place(), "part", part);
            messages.push(self.event("response.content_part.done", fields));
        } else {
            let mut fields = with(self.item_place(), "arguments", &item["arguments"]);
            fields["name"] = item["name"].clone();
            messages.push(self.event("response.function_call_arguments.done", fields));
        }
        let fields = json!({"output_index": self.output.len() - 1, "item": item});
        messages.push(self.event("response.output_item.done", fields));
    }

    fn item(&mut self) -> &mut Value {
        self.output.last_mut().expect("an item was begun")
    }

    fn item_place(&mut self) -> Value {
        let index = self.output.len() - 1;
        json!({"output_index": index, "item_id": self.item()["id"]})
    }

    fn place(&mut self) -> Value {
        with(self.item_place(), "content_index", &json!(0))
    }

    /// As responses spell it: `bytes` is always a list.
    fn logprob(&self, one: &TokenLogprobs) -> Value {
        let mut logprobs = ChatLogprobs::default();
        logprobs.push(&self.tokenizer, one);
        let mut value = json!(logprobs.content[0]);
        let some = |entry: &mut Value| {
            if entry["bytes"].is_null() {
                entry["bytes"] = json!([]);
            }
        };
        value["top_logprobs"].as_array_mut().into_iter().flatten().for_each(some);
        some(&mut value);
        value
    }

    fn usage(&self) -> Value {
        let usage = self.tally.usage();
        json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": usage.prompt_tokens_details,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": usage.completion_tokens_details,
            "total_tokens": usage.total_tokens,
        })
    }
}

impl Script for Events {
    fn opening(&mut self) -> Vec<Message> {
        vec![self.whole("response.created"), self.whole("response.in_progress")]
    }

    fn piece(&mut self, piece: Piece) -> Vec<Message> {
        self.tally.count(&piece);
        match piece {
            Piece::Prompt { .. } => Vec::new(),
            Piece::Token { text, logprobs, .. } => {
                let said = self.speech.push(&text);
                self.tell(said, logprobs)
            }
            Piece::End { reason, text, .. } => {
                let mut said = self.speech.push(&text);
                said.extend(self.speech.finish());
                let mut messages = self.tell(said, None);
                let (status, details) = match reason {
                    FinishReason::Stop => ("completed", Value::Null),
                    FinishReason::Length => ("incomplete", json!({"reason": "max_output_tokens"})),
                };
                self.fields.insert("status".to_owned(), status.into());
                self.fields.insert("incomplete_details".to_owned(), details);
                self.close(&mut messages);
                messages
            }
        }
    }

    fn closing(&mut self) -> Vec<Message> {
        self.fields.insert("usage".to_owned(), self.usage());
        self.fields.insert("completed_at".to_owned(), now().into());
        self.fields.insert("strand".to_owned(), json!(self.tally.provenance()));
        let complete = self.fields["status"] == "completed";
        vec![self.whole(if complete { "response.completed" } else { "response.incomplete" })]
    }

    fn failure(&mut self, error: &ApiError) -> Vec<Message> {
        tracing::warn!(model = self.server.model.id, message = error.message, "an answer broke");
        self.failed = Some(error.clone());
        let told = json!({"code": "server_error", "message": error.message});
        self.fields.insert("status".to_owned(), "failed".into());
        self.fields.insert("error".to_owned(), told);
        vec![self.whole("response.failed")]
    }
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

fn with(mut fields: Value, name: &str, value: &Value) -> Value {
    fields[name] = value.clone();
    fields
}
