//! One answer as it arrives from the engine, and as JSON.
//!
//! Waits for events without polling, and ends at once when Ctrl-C was pressed: dropping the
//! stream cancels the request. Knows nothing of prompts and terminals.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use strand_engine::context::Dropped;
use strand_engine::{
    EngineHandle, Event, EventStream, Exactness, FinishReason, Request, Reuse, TokenLogprobs,
};
use strand_models::Tokenizer;

use crate::interrupt::Interrupt;

/// Everything an answer is, once it has ended.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub prompt_tokens: usize,
    /// `None` when Ctrl-C ended it.
    pub finish_reason: Option<FinishReason>,
    pub logprobs: Option<Vec<TokenLogprobs>>,
    /// From the second token of the prompt on.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    pub timings: Timings,
    /// Unknown when Ctrl-C ended it, also below.
    pub reuse: Option<Reuse>,
    pub exactness: Option<Exactness>,
    /// What was left out of the prompt, as whoever made it says.
    pub dropped: Dropped,
}

/// What the answer took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// From the request to the first token, as seen here.
    pub first_token: Duration,
    /// From the request to the end, as seen here.
    pub total: Duration,
    /// Spent in the engine's steps on the prompt and on further tokens; zero when Ctrl-C ended
    /// the answer.
    pub prefill: Duration,
    pub decode: Duration,
}

/// A piece of the answer, handed out as soon as it is certain.
pub struct Piece<'a> {
    pub text: &'a str,
    /// `None` for text that was held back until the end was known.
    pub token: Option<u32>,
}

/// Sends a request and follows it to its end. `show` gets every piece in order.
pub fn ask(
    engine: &EngineHandle,
    request: Request,
    interrupt: &Interrupt,
    show: &mut dyn FnMut(Piece) -> io::Result<()>,
) -> Result<Answer> {
    let before = engine.stats()?;
    let started = Instant::now();
    let mut answer = Answer {
        prompt_tokens: request.prompt_tokens(),
        prompt_logprobs: request.limits.prompt_logprobs.map(|_| Vec::new()),
        ..Answer::default()
    };
    let mut stream = engine.submit(request)?;
    while let Some(event) = next(&mut stream, interrupt) {
        match event {
            Event::Prompt { logprobs } => {
                answer.prompt_logprobs.get_or_insert_default().extend(logprobs);
            }
            Event::Token { token, text, logprobs, .. } => {
                if answer.token_ids.is_empty() {
                    answer.timings.first_token = started.elapsed();
                }
                answer.token_ids.push(token);
                answer.text.push_str(&text);
                if let Some(one) = logprobs {
                    answer.logprobs.get_or_insert_default().push(one);
                }
                show(Piece { text: &text, token: Some(token) })?;
            }
            Event::Finished { reason, text, reuse, exactness, .. } => {
                answer.text.push_str(&text);
                answer.finish_reason = Some(reason);
                answer.reuse = Some(reuse);
                answer.exactness = Some(exactness);
                show(Piece { text: &text, token: None })?;
                break;
            }
            Event::Embedding { .. } => unreachable!("an answer was asked for"),
            Event::Failed(error) => return Err(error.into()),
        }
    }
    answer.timings.total = started.elapsed();
    if answer.finish_reason.is_some() {
        // No other request runs beside this one, so what the engine counted since is its own.
        let after = engine.stats()?;
        let since = |now: f64, then: f64| Duration::from_secs_f64(now - then);
        answer.timings.prefill = since(after.prefill_seconds, before.prefill_seconds);
        answer.timings.decode = since(after.decode_seconds, before.decode_seconds);
    } else if !interrupt.pressed() {
        return Err(strand_engine::Error::Stopped.into());
    }
    Ok(answer)
}

/// The next event; `None` after the last one, or when Ctrl-C was pressed.
fn next(stream: &mut EventStream, interrupt: &Interrupt) -> Option<Event> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut event = pin!(stream.next());
    loop {
        if interrupt.pressed() {
            return None;
        }
        if let Poll::Ready(event) = event.as_mut().poll(&mut context) {
            return event;
        }
        // An event and Ctrl-C both wake this thread; a wake-up that came before is not lost.
        thread::park();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Answer {
    /// Tokens a second after the first, in the engine's own time.
    pub fn decode_speed(&self) -> Option<f64> {
        let tokens = self.token_ids.len().checked_sub(1)?;
        speed(tokens, self.timings.decode)
    }

    /// Computed prompt tokens a second, in the engine's own time.
    pub fn prefill_speed(&self) -> Option<f64> {
        let reuse = self.reuse?;
        speed(reuse.encoded + reuse.recomputed, self.timings.prefill)
    }

    /// The object that `--json` prints.
    pub fn to_json(&self, tokenizer: Option<&Tokenizer>) -> Value {
        let list = |list: &[TokenLogprobs]| -> Vec<Value> {
            list.iter().map(|one| logprob_json(one, tokenizer)).collect()
        };
        let reason = self.finish_reason.map_or("abort", FinishReason::as_str);
        let mut object = json!({
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.token_ids.len(),
            "finish_reason": reason,
            "logprobs": self.logprobs.as_deref().map(list),
            "timings": {
                "first_token_seconds": self.timings.first_token.as_secs_f64(),
                "total_seconds": self.timings.total.as_secs_f64(),
                "prefill_seconds": self.timings.prefill.as_secs_f64(),
                "decode_seconds": self.timings.decode.as_secs_f64(),
                "prefill_tokens_per_second": self.prefill_speed(),
                "decode_tokens_per_second": self.decode_speed(),
            },
            "reuse": self.reuse.map(reuse_json),
            "exactness": self.exactness.map(Exactness::as_str),
        });
        if self.dropped.turns > 0 {
            let Dropped { turns, tokens } = self.dropped;
            object["dropped"] = json!({"turns": turns, "tokens": tokens});
        }
        if let Some(prompt) = &self.prompt_logprobs {
            let all = std::iter::once(Value::Null).chain(list(prompt));
            object["prompt_logprobs"] = all.collect();
        }
        object
    }
}

/// Tokens of a prompt by where their KV came from.
pub fn reuse_json(reuse: Reuse) -> Value {
    json!({
        "device": reuse.device,
        "host": reuse.host,
        "disk": reuse.disk,
        "encoded": reuse.encoded,
        "recomputed": reuse.recomputed,
    })
}

/// The same for people: what there is of each.
pub fn reuse_text(reuse: Reuse) -> String {
    let back = [(reuse.host, "from host memory"), (reuse.disk, "from disk")];
    let back = back.into_iter().filter(|(tokens, _)| *tokens > 0);
    let again = (reuse.recomputed > 0).then_some((reuse.recomputed, "blended"));
    let always = [(reuse.device, "reused")].into_iter().chain(back);
    let parts = always.chain([(reuse.encoded, "encoded")]).chain(again);
    parts.map(|(tokens, from)| format!("{tokens} {from}")).collect::<Vec<_>>().join(", ")
}

fn speed(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

fn logprob_json(one: &TokenLogprobs, tokenizer: Option<&Tokenizer>) -> Value {
    json!({
        "token_id": one.token,
        "token": tokenizer.and_then(|tokenizer| tokenizer.token_text(one.token)),
        "logprob": shortest(one.logprob),
        "top": one.top.iter().map(|&(id, x)| (id, shortest(x))).collect::<Vec<_>>(),
    })
}

/// The number that prints with the fewest digits and reads back as `x`.
pub fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("a printed number can be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_one_object() {
        let one = TokenLogprobs { token: 7, logprob: -0.5, top: vec![(7, -0.5), (2, -1.25)] };
        let answer = Answer {
            text: "hi".to_owned(),
            token_ids: vec![7, 9, 9],
            prompt_tokens: 4,
            finish_reason: Some(FinishReason::Stop),
            logprobs: Some(vec![one.clone()]),
            prompt_logprobs: Some(vec![one]),
            timings: Timings {
                first_token: Duration::from_millis(500),
                total: Duration::from_millis(1500),
                prefill: Duration::from_millis(500),
                decode: Duration::from_millis(1000),
            },
            reuse: Some(Reuse { device: 3, encoded: 1, ..Reuse::default() }),
            exactness: Some(Exactness::Bitwise),
            dropped: Dropped { turns: 2, tokens: 30 },
        };
        let entry = json!({
            "token_id": 7, "token": null, "logprob": -0.5, "top": [[7, -0.5], [2, -1.25]],
        });
        let expected = json!({
            "text": "hi",
            "token_ids": [7, 9, 9],
            "prompt_tokens": 4,
            "completion_tokens": 3,
            "finish_reason": "stop",
            "logprobs": [entry],
            "timings": {
                "first_token_seconds": 0.5,
                "total_seconds": 1.5,
                "prefill_seconds": 0.5,
                "decode_seconds": 1.0,
                "prefill_tokens_per_second": 2.0,
                "decode_tokens_per_second": 2.0,
            },
            "reuse": {"device": 3, "host": 0, "disk": 0, "encoded": 1, "recomputed": 0},
            "exactness": "bitwise",
            "dropped": {"turns": 2, "tokens": 30},
            "prompt_logprobs": [null, entry],
        });
        assert_eq!(answer.to_json(None), expected);
    }

    #[test]
    fn people_are_told_what_there_is() {
        let little = Reuse { encoded: 7, ..Reuse::default() };
        assert_eq!(reuse_text(little), "0 reused, 7 encoded");
        let all = Reuse { device: 1, host: 2, disk: 3, encoded: 4, recomputed: 5 };
        let text = "1 reused, 2 from host memory, 3 from disk, 4 encoded, 5 blended";
        assert_eq!(reuse_text(all), text);
    }

    #[test]
    fn an_answer_that_ctrl_c_ended_says_so() {
        let answer = Answer::default().to_json(None);
        assert_eq!(answer["finish_reason"], "abort");
        assert_eq!((&answer["logprobs"], &answer["reuse"]), (&Value::Null, &Value::Null));
        assert_eq!((answer.get("prompt_logprobs"), answer.get("dropped")), (None, None));
    }
}
