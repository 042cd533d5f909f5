//! A client of OpenAI's protocol: completions and chats, streamed and timed.
//!
//! Plain HTTP on loopback; no TLS, no retries: a refusal is a result.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use super::args::Endpoint;
use super::load::{Times, Work};

/// Where requests go, and as whom.
pub struct Client {
    http: HttpClient<HttpConnector, Full<Bytes>>,
    base: String,
    key: Option<String>,
    endpoint: Endpoint,
    pub model: String,
    temperature: f32,
    timeout: Duration,
}

/// What doesn't change from request to request.
pub struct Settings {
    pub endpoint: Endpoint,
    pub temperature: f32,
    pub timeout: Duration,
}

impl Client {
    /// Asks for the model's name where none is given.
    pub async fn new(
        url: &str,
        key: Option<String>,
        model: Option<String>,
        settings: Settings,
    ) -> Result<Self> {
        if !url.starts_with("http://") {
            bail!("{url} is not an address like http://127.0.0.1:8000");
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let http = HttpClient::builder(TokioExecutor::new()).build(connector);
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let Settings { endpoint, temperature, timeout } = settings;
        let model_name = model.clone().unwrap_or_default();
        let mut client =
            Self { http, base, key, endpoint, model: model_name, temperature, timeout };
        if model.is_none() {
            client.model = client.first_model().await?;
        }
        Ok(client)
    }

    async fn first_model(&self) -> Result<String> {
        let path = format!("{}/v1/models", self.base);
        let listed = async {
            let response = self.send(Method::GET, &path, Bytes::new()).await?;
            let status = response.status();
            let bytes = response.into_body().collect().await?.to_bytes();
            if !status.is_success() {
                bail!("{status}: {}", String::from_utf8_lossy(&bytes));
            }
            let models: Value = serde_json::from_slice(&bytes)?;
            let id = models["data"][0]["id"].as_str().context("it lists no model")?;
            Ok(id.to_owned())
        };
        listed.await.with_context(|| format!("cannot list the models at {path}"))
    }

    async fn send(&self, method: Method, uri: &str, body: Bytes) -> Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(uri);
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        Ok(self.http.request(request.body(Full::new(body))?).await?)
    }

    /// One streamed answer; the reason where there is none.
    pub async fn answer(&self, work: Work) -> Result<Times, String> {
        match tokio::time::timeout(self.timeout, self.stream(&work)).await {
            Ok(answer) => answer.map_err(|error| crate::describe(&error)),
            Err(_) => Err("no end in time".to_owned()),
        }
    }

    async fn stream(&self, work: &Work) -> Result<Times> {
        let (path, body) = self.body(work);
        let body = Bytes::from(serde_json::to_vec(&body)?);
        let started = Instant::now();
        let response = self.send(Method::POST, &format!("{}{path}", self.base), body).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            drop(body.collect().await?);
            bail!("HTTP {}", status.as_u16());
        }
        let (mut events, mut times) = (Events::default(), Times::default());
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            for event in events.take(&data)? {
                if event.has_text {
                    times.arrivals.push(started.elapsed().as_secs_f64());
                }
                times.tokens = event.tokens.unwrap_or(times.tokens);
            }
        }
        if !events.done {
            bail!("the stream ended without [DONE]");
        }
        times.end = started.elapsed().as_secs_f64();
        times.tokens = times.tokens.max(times.arrivals.len());
        Ok(times)
    }

    /// The path and what is asked there.
    fn body(&self, work: &Work) -> (&'static str, Value) {
        let mut body = json!({
            "model": self.model,
            "max_tokens": work.output_len,
            "temperature": self.temperature,
            "seed": work.seed,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.endpoint {
            Endpoint::Completions => {
                body["prompt"] = json!(work.prompt);
                ("/v1/completions", body)
            }
            Endpoint::Chat => {
                let words: Vec<String> = work.prompt.iter().map(u32::to_string).collect();
                body["messages"] = json!([{"role": "user", "content": words.join(" ")}]);
                ("/v1/chat/completions", body)
            }
        }
    }
}

/// A stream of server-sent events, as far as it has come.
#[derive(Default)]
struct Events {
    /// The start of a line whose end is still to come.
    rest: Vec<u8>,
    done: bool,
}

/// What an event says that matters here.
#[derive(Debug, PartialEq)]
struct Event {
    has_text: bool,
    /// In all so far, where it says so.
    tokens: Option<usize>,
}

impl Events {
    /// The events that end in these bytes.
    fn take(&mut self, bytes: &[u8]) -> Result<Vec<Event>> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else {
            return Ok(Vec::new());
        };
        let lines: Vec<u8> = self.rest.drain(..=end).collect();
        let mut events = Vec::new();
        for line in lines.split(|&byte| byte == b'\n') {
            let Some(data) = line.trim_ascii().strip_prefix(b"data:") else { continue };
            match data.trim_ascii() {
                b"[DONE]" => self.done = true,
                data => events.push(event(data)?),
            }
        }
        Ok(events)
    }
}

fn event(data: &[u8]) -> Result<Event> {
    let value: Value = serde_json::from_slice(data).context("an event that is no JSON")?;
    if let Some(message) = value["error"]["message"].as_str() {
        bail!("{message}");
    }
    let choice = &value["choices"][0];
    let texts = [&choice["text"], &choice["delta"]["content"]];
    Ok(Event {
        has_text: texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())),
        tokens: value["usage"]["completion_tokens"].as_u64().map(|tokens| tokens as usize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_wherever_the_bytes_are_cut() {
        let text = concat!(
            ": a comment\n\n",
            "data: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}}]}\n\n",
            "data: {\"choices\": [{\"delta\": {\"content\": \"hel\"}}], \"usage\": null}\r\n\r\n",
            "data: {\"choices\": [{\"text\": \"lo\"}]}\n\n",
            "data: {\"choices\": [], \"usage\": {\"completion_tokens\": 7}}\n\n",
            "data: [DONE]\n\n",
        );
        for piece in [1, 7, text.len()] {
            let mut events = Events::default();
            let found: Vec<Event> = (text.as_bytes().chunks(piece))
                .flat_map(|bytes| events.take(bytes).expect("it is well formed"))
                .collect();
            let says = |has_text, tokens| Event { has_text, tokens };
            let expected =
                [says(false, None), says(true, None), says(true, None), says(false, Some(7))];
            assert_eq!((found.as_slice(), events.done), (&expected[..], true), "{piece}");
        }
    }

    #[test]
    fn an_error_in_a_stream_is_one() {
        let error = b"data: {\"error\": {\"message\": \"the engine has stopped\"}}\n\n";
        let told = Events::default().take(error).expect_err("it is an error").to_string();
        assert_eq!(told, "the engine has stopped");
        assert!(Events::default().take(b"data: {oh\n").is_err());
    }
}
