//! What one tenant can learn of another's chunks and prompts: nothing in words, nothing in time.
//!
//! Whether times differ is a question of many probes: `STRAND_PROBES` says how many, and then the
//! answer is part of the test. Without it a few are made, and only their words are compared.

use std::env;
use std::fs;
use std::time::Instant;

use serde_json::json;

use crate::binary::scratch;
use crate::http::{Answer, Server};
use crate::random::Random;

/// How well time alone may tell two kinds of probes apart: 0.5 is not at all, 1 always.
const TELLING: f64 = 0.6;

/// A server with the tenants anna and ben.
fn server() -> Server {
    let file = scratch("timing").join("keys");
    fs::write(&file, "anna user anna-key\nben user ben-key\n").unwrap();
    Server::start(&["--api-keys-file", file.to_str().unwrap()])
}

fn ask(server: &Server, who: &str, method: &str, path: &str, body: &[u8]) -> Answer {
    server.send(method, path, &[&format!("Authorization: Bearer {who}-key")], body)
}

fn digits(random: &mut Random) -> String {
    (0..8).map(|_| format!("{:08x}", random.next() as u32)).collect()
}

/// The chance that a value of the one list is larger than one of the other.
fn telling(ones: &[f64], others: &[f64]) -> f64 {
    let wins = |one: &f64| -> f64 {
        let win = |other: &f64| f64::from(u8::from(one > other) + u8::from(one >= other)) / 2.0;
        others.iter().map(win).sum()
    };
    ones.iter().map(wins).sum::<f64>() / (ones.len() * others.len()) as f64
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Times of probes of both kinds, and what they say where there are enough.
struct Times {
    name: &'static str,
    anothers: Vec<f64>,
    nobodys: Vec<f64>,
}

impl Times {
    fn new(name: &'static str) -> Self {
        Self { name, anothers: Vec::new(), nobodys: Vec::new() }
    }

    /// Asks for both in random order, so that whatever else happens happens to both.
    fn probe(&mut self, random: &mut Random, mut ask: impl FnMut(bool)) {
        let first = random.chance(50);
        for is_anothers in [first, !first] {
            let started = Instant::now();
            ask(is_anothers);
            let times = if is_anothers { &mut self.anothers } else { &mut self.nobodys };
            times.push(started.elapsed().as_secs_f64());
        }
    }

    fn judge(&self, is_asked: bool) {
        let found = telling(&self.anothers, &self.nobodys);
        let micros = |values| median(values) * 1e6;
        println!(
            "{}: {} probes of each kind, medians {:.0} and {:.0} us, told apart with {found:.3}",
            self.name,
            self.anothers.len(),
            micros(&self.anothers),
            micros(&self.nobodys)
        );
        let is_told = !(1.0 - TELLING..=TELLING).contains(&found);
        assert!(!is_asked || !is_told, "{}: time tells them apart with {found}", self.name);
    }
}

fn probes() -> Option<usize> {
    env::var("STRAND_PROBES").ok().and_then(|text| text.parse().ok())
}

#[test]
fn another_tenants_chunk_answers_like_a_random_hash() {
    let server = server();
    let mut random = Random::new(7);
    let text = "The password of the harbour gate is swordfish-81. ".repeat(20);
    let body = json!({"content": text}).to_string();
    let made = ask(&server, "anna", "POST", "/v1/chunks", body.as_bytes());
    assert_eq!(made.status, 201, "{made:?}");
    let id = made.json()["id"].as_str().expect("it is made").to_owned();
    let chat =
        json!({"chunks": ["ID"], "messages": [{"role": "user", "content": "x"}]}).to_string();
    let asked = probes();
    for (name, method, path, body) in [
        ("get", "GET", "/v1/chunks/ID", ""),
        ("populate", "POST", "/v1/chunks/ID/populate", ""),
        ("restore", "POST", "/v1/chunks/ID/restore", ""),
        ("context", "POST", "/v1/contexts", "{\"chunks\": [\"ID\"]}"),
        ("chat", "POST", "/v1/chat/completions", &chat),
    ] {
        let mut times = Times::new(name);
        let mut words = Vec::new();
        for _ in 0..asked.unwrap_or(4) {
            let nobodys = digits(&mut random);
            times.probe(&mut random, |is_anothers| {
                let id = if is_anothers { &id } else { &nobodys };
                let (path, body) = (path.replace("ID", id), body.replace("ID", id));
                let answer = ask(&server, "ben", method, &path, body.as_bytes());
                words.push((answer.status, answer.body.replace(id, "ID")));
            });
        }
        assert_eq!(words[0].0, 404, "{name}: {words:?}");
        words.dedup();
        assert_eq!(words.len(), 1, "{name}: {words:?}");
        times.judge(asked.is_some());
    }
}

#[test]
fn a_prompt_that_another_tenant_has_asked_takes_as_long_as_a_new_one() {
    let server = server();
    let mut random = Random::new(8);
    let asked = probes();
    // also as a chunk: whether the same text is there already must not show either
    for (name, path) in [("prompt", "/v1/completions"), ("content", "/v1/chunks")] {
        let mut times = Times::new(name);
        for _ in 0..asked.unwrap_or(4) {
            let text = |random: &mut Random| format!("{} is the key. ", digits(random)).repeat(6);
            let (known, new) = (text(&mut random), text(&mut random));
            let body =
                |text: &str| json!({"prompt": text, "content": text, "max_tokens": 1}).to_string();
            assert!(ask(&server, "anna", "POST", path, body(&known).as_bytes()).status < 300);
            times.probe(&mut random, |is_anothers| {
                let text = if is_anothers { &known } else { &new };
                let answer = ask(&server, "ben", "POST", path, body(text).as_bytes());
                let told = answer.json();
                assert!(answer.status < 300, "{answer:?}");
                match name {
                    "prompt" => {
                        assert_eq!(told["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
                    }
                    _ => assert_eq!((answer.status, &told["encoded"]), (201, &told["tokens"])),
                }
            });
        }
        times.judge(asked.is_some());
    }
}

#[test]
fn how_well_times_tell_is_counted_in_pairs() {
    assert_eq!(telling(&[1.0, 2.0], &[1.0, 2.0]), 0.5);
    assert_eq!(telling(&[3.0, 4.0], &[1.0, 2.0]), 1.0);
    assert_eq!(telling(&[1.0], &[1.0, 2.0, 3.0, 4.0]), 0.125);
    assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
}
