//! `strand bench serve` against a server of a few lines, whose every answer is known.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::binary::{Run, scratch, strand};

/// How the server treats the requests for completions, by their number; the first is the warm-up.
type Manners = fn(usize, &mut TcpStream);

/// A server that answers until the test process ends. Each request has a connection of its own.
struct Fake {
    url: String,
    /// Bodies of the requests for completions, as they came.
    asked: Arc<Mutex<Vec<Value>>>,
}

impl Fake {
    fn new(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let asked: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (bodies, count) = (asked.clone(), Arc::new(AtomicUsize::new(0)));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (bodies, count) = (bodies.clone(), count.clone());
                // a client may leave in the middle
                thread::spawn(move || drop(serve(stream, manners, &bodies, &count)));
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<Value> {
        self.asked.lock().expect("nobody panicked with it").clone()
    }
}

fn serve(
    mut stream: TcpStream,
    manners: Manners,
    bodies: &Mutex<Vec<Value>>,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut line, mut headers) = (String::new(), String::new());
    reader.read_line(&mut line)?;
    while reader.read_line(&mut headers)? > 2 {}
    let headers = headers.to_lowercase();
    if !headers.contains("authorization: bearer open sesame") {
        return answer(&mut stream, "401 Unauthorized", r#"{"error": {"message": "no key"}}"#);
    }
    if line.starts_with("GET /v1/models ") {
        return answer(&mut stream, "200 OK", r#"{"data": [{"id": "fake-1"}, {"id": "fake-2"}]}"#);
    }
    let length = headers.split("content-length: ").nth(1).expect("a body has a length");
    let length = length.split_whitespace().next().expect("a number").parse().expect("a number");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    bodies
        .lock()
        .expect("nobody panicked with it")
        .push(serde_json::from_slice(&body).expect("the client sends JSON"));
    manners(count.fetch_add(1, Ordering::SeqCst), &mut stream);
    Ok(())
}

fn answer(stream: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
}

/// Three pieces of text, five tokens.
fn polite(_: usize, stream: &mut TcpStream) {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    let piece = |text: &str| format!("data: {}\n\n", json!({"choices": [{"text": text}]}));
    let usage = json!({"choices": [], "usage": {"completion_tokens": 5}});
    let parts = [head.to_owned(), piece("a"), piece("b c"), piece("d e")];
    for part in parts.into_iter().chain([format!("data: {usage}\n\ndata: [DONE]\n\n")]) {
        drop(stream.write_all(part.as_bytes()));
    }
}

/// Every second one is told to come again, one of the others hears no end.
fn moody(number: usize, stream: &mut TcpStream) {
    match number {
        2 => {
            let text = r#"data: {"choices": [{"delta": {"content": "a"}}]}"#;
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
            drop(stream.write_all(format!("{head}{text}\n\n").as_bytes()));
        }
        _ if number % 2 == 1 => drop(answer(stream, "429 Too Many Requests", "{}")),
        _ => polite(number, stream),
    }
}

fn bench(fake: &Fake, arguments: &[&str]) -> Run {
    let to = ["bench", "serve", "--url", &fake.url, "--api-key", "open sesame"];
    strand(&[&to[..], arguments].concat())
}

fn last_line(run: &Run) -> Value {
    let line = run.out.lines().last().expect("it prints");
    serde_json::from_str(line).expect("the last line is JSON")
}

#[test]
fn a_load_is_counted_timed_and_drawn() {
    let fake = Fake::new(polite);
    let plot = scratch("bench-serve").join("plot.svg");
    let shape = ["--num-requests", "9", "--concurrency", "3", "--input-len", "7"];
    let plot_to = ["--output-len", "5", "--plot", plot.to_str().expect("UTF-8")];
    let run = bench(&fake, &[&shape[..], &plot_to[..]].concat());
    assert_eq!(run.status, 0, "{run:?}");
    for text in ["fake-1 at http", "between tokens", "9 answered, 0 failed", "3 at a time"] {
        assert!(run.out.contains(text), "{text} is not in {}", run.out);
    }
    let line = last_line(&run);
    assert_eq!((&line["bench"], &line["answered"]), (&json!("serve"), &json!(9)));
    assert_eq!(line["output_tokens"], 45);
    let [first, whole] =
        ["first_token_seconds", "answer_seconds"].map(|of| line[of]["p50"].as_f64());
    assert!(first > Some(0.0) && first <= whole && whole <= line["seconds"].as_f64(), "{line}");
    let svg = fs::read_to_string(plot).expect("it is drawn");
    assert_eq!(svg.matches("<circle").count(), 9);

    let asked = fake.asked();
    assert_eq!(asked.len(), 10, "a warm-up, then those that count");
    for body in &asked[1..] {
        assert_eq!((&body["model"], &body["max_tokens"]), (&json!("fake-1"), &json!(5)));
        assert_eq!((&body["stream"], &body["ignore_eos"]), (&json!(true), &json!(true)));
        assert_eq!(body["prompt"].as_array().map(Vec::len), Some(7));
    }
    let mut prompts: Vec<String> = asked.iter().map(|body| body["prompt"].to_string()).collect();
    prompts.sort();
    prompts.dedup();
    assert_eq!(prompts.len(), 10, "no prompt shares a prefix with another");
}

#[test]
fn chats_are_asked_at_random_times() {
    let fake = Fake::new(polite);
    let shape = ["--endpoint", "chat", "--num-requests", "5", "--request-rate", "200", "--json"];
    let run = bench(&fake, &[&shape[..], &["--served-model-name", "mine"]].concat());
    let line = last_line(&run);
    assert_eq!(run.out.lines().count(), 1, "the line of JSON alone");
    let facts = (&line["answered"], &line["request_rate"], &line["concurrency"]);
    assert_eq!(facts, (&json!(5), &json!(200.0), &Value::Null));
    let body = &fake.asked()[1];
    assert_eq!((&body["model"], &body["messages"][0]["role"]), (&json!("mine"), &json!("user")));
}

#[test]
fn failures_are_counted_by_their_reason() {
    let fake = Fake::new(moody);
    let run = bench(&fake, &["--num-requests", "6", "--concurrency", "1"]);
    assert_eq!(run.status, 0, "{run:?}");
    let line = last_line(&run);
    assert_eq!((&line["answered"], &line["failed"]), (&json!(2), &json!(4)), "{line}");
    assert_eq!(line["failures"][0], json!({"reason": "HTTP 429", "count": 3}));
    assert!(run.out.contains("failed: 1 x the stream ended without [DONE]"), "{}", run.out);
}

#[test]
fn a_server_that_is_not_there_or_wants_another_key_is_told() {
    let free = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let url = format!("http://{}", free.local_addr().expect("it is bound"));
    drop(free);
    strand(&["bench", "serve", "--url", &url]).refused(1, "cannot list the models");
    let fake = Fake::new(polite);
    let refused = strand(&["bench", "serve", "--url", &fake.url, "--api-key", "wrong"]);
    refused.refused(1, "401 Unauthorized");
    let secure = strand(&["bench", "serve", "--url", "https://127.0.0.1:1"]);
    secure.refused(1, "is not an address like http://127.0.0.1:8000");
    strand(&["bench", "serve", "--url", &url, "--request-rate", "0"]).refused(2, "above 0");
}

#[test]
fn a_server_of_its_own_is_compared_with_the_engine_without_it() {
    let shape = ["--num-requests", "4", "--concurrency", "2", "--input-len", "8"];
    let once = ["--output-len", "6", "--repeats", "2", "--kv-memory", "64MiB"];
    let run = strand(&[&["bench", "serve"], &shape[..], &once[..]].concat());
    assert_eq!(run.status, 0, "{run:?}");
    let line = last_line(&run);
    for figures in [&line, &line["direct"]] {
        assert_eq!((&figures["answered"], &figures["failed"]), (&json!(8), &json!(0)), "{line}");
        assert_eq!(figures["output_tokens"], 48, "stop tokens are gone past on both ways");
    }
    assert!(line["speed_over_direct"].as_f64() > Some(0.0), "{line}");
    assert!(run.out.contains("the same on the engine itself"), "{}", run.out);
    let random = ["bench", "serve", "--random-weights", "qwen3-0.6b"];
    strand(&random).refused(1, "random weights have no tokenizer");
}
