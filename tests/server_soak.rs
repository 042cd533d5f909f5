//! Many clients at once for a while, as they are: patient, gone in the middle, wrong, slow.
//!
//! `STRAND_SOAK_SECONDS` says for how long; a minute without it.

use std::env;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::{Server, until};
use crate::random::Random;

const CLIENTS: usize = 64;
/// A reader that takes so much and then rests so long.
const SLOW: (usize, Duration) = (64, Duration::from_millis(20));
/// Memory may grow by so much once every client has been served: allocators keep some.
const GROWTH: u64 = 48 << 20;

/// What became of the requests.
#[derive(Debug, Default)]
struct Told {
    whole: usize,
    left: usize,
    refused: usize,
    slow: usize,
    /// What none of the clients asked for.
    wrong: Vec<String>,
    /// Seconds to the first event of each patient client's streams, by client.
    waited: Vec<Vec<f64>>,
}

fn seconds() -> Option<u64> {
    env::var("STRAND_SOAK_SECONDS").ok().and_then(|text| text.parse().ok())
}

/// A thousand where there is time, for they are files of the test too.
#[test]
fn sockets_that_say_nothing_keep_nobody_out_and_are_closed() {
    let count = if seconds().is_some() { 1000 } else { 200 };
    let server = Server::start(&["--read-timeout", "5"]);
    let mut idle: Vec<TcpStream> = (0..count).map(|_| server.connect()).collect();
    for half in idle.iter_mut().step_by(2) {
        half.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ").expect("it is taken");
    }
    let before = memory(&server);
    let body = json!({"prompt": "The gate", "max_tokens": 4, "ignore_eos": true});
    for _ in 0..4 {
        assert_eq!(server.post("/v1/completions", &body).status, 200);
    }
    for socket in &mut idle {
        // what is told before it closes is of no matter, nor is a reset
        drop(socket.read_to_end(&mut Vec::new()));
    }
    let grown = memory(&server).saturating_sub(before) >> 20;
    println!("{count} idle sockets, all closed; memory {} MiB, {grown} more", before >> 20);
    assert_eq!(server.post("/v1/completions", &body).status, 200);
}

#[test]
fn a_crowd_of_clients_leaves_nothing_behind_and_nobody_out() {
    let time = Duration::from_secs(seconds().unwrap_or(60));
    let server = Server::start(&["--max-num-seqs", "64"]);
    let blocks = gauge(&server, "strand:kv_blocks_free");
    let told = Mutex::new(Told { waited: vec![Vec::new(); CLIENTS], ..Told::default() });
    let started = Instant::now();
    let warm = thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, told) = (&server, &told);
            scope.spawn(move || {
                let mut random = Random::new(client as u64);
                while started.elapsed() < time {
                    ask(server, client, &mut random, told);
                }
            });
        }
        let warming = time / 3;
        thread::sleep(warming.saturating_sub(started.elapsed()));
        memory(&server)
    });
    until(|| gauge(&server, "vllm:num_requests_running") == 0.0);
    assert_eq!(gauge(&server, "vllm:num_requests_waiting"), 0.0);
    until(|| gauge(&server, "strand:kv_blocks_free") == blocks);
    let (after, told) = (memory(&server), told.into_inner().expect("nobody panicked with it"));
    let means = told.means();
    let (soonest, latest) = (means[0], means[means.len() - 1]);
    println!(
        "{CLIENTS} clients, {} s: {} streams whole, {} left, {} refused, {} read slowly; memory \
         {} MiB after a third of it, {} MiB at the end; first event after {soonest:.3} s in the \
         mean of the luckiest client, {latest:.3} s of the unluckiest",
        time.as_secs(),
        told.whole,
        told.left,
        told.refused,
        told.slow,
        warm >> 20,
        after >> 20
    );
    assert!(told.wrong.is_empty(), "{:?}", &told.wrong[..told.wrong.len().min(5)]);
    assert!(told.whole > 0 && told.left > 0 && told.refused > 0 && told.slow > 0, "{told:?}");
    assert!(after <= warm + GROWTH, "memory grew from {warm} to {after} bytes");
    assert_eq!(means.len(), CLIENTS, "everybody was served");
    assert!(latest < 10.0 * soonest + 1.0, "the unluckiest waits {latest} s, others {soonest} s");
}

impl Told {
    /// Mean waits of the clients that had streams, the shortest first.
    fn means(&self) -> Vec<f64> {
        let served = self.waited.iter().filter(|waits| !waits.is_empty());
        let mut means: Vec<f64> =
            served.map(|waits| waits.iter().sum::<f64>() / waits.len() as f64).collect();
        means.sort_unstable_by(f64::total_cmp);
        means
    }
}

/// One request of a client in the mood of the moment.
fn ask(server: &Server, client: usize, random: &mut Random, told: &Mutex<Told>) {
    let told = || told.lock().expect("nobody panics with it");
    let mood = random.between(0, 10);
    let mut body = json!({
        "messages": [{"role": "user", "content": format!("Question {}", random.next())}],
        "max_tokens": random.between(1, 48),
        "ignore_eos": true,
        "stream": true,
    });
    if mood == 0 {
        body["temperature"] = json!(-1);
    }
    match (mood, talk(server, &body, mood, random)) {
        (0, Ok((400, _, _))) => told().refused += 1,
        (1 | 2, Ok((200, _, _))) => told().left += 1,
        (3, Ok((200, true, _))) => told().slow += 1,
        (4.., Ok((200, true, waited))) => {
            let mut told = told();
            told.whole += 1;
            told.waited[client].push(waited);
        }
        (_, found) => told().wrong.push(format!("mood {mood}: {found:?}")),
    }
}

/// Status, whether the end was read, seconds to the first event.
fn talk(
    server: &Server,
    body: &Value,
    mood: usize,
    random: &mut Random,
) -> std::io::Result<(u16, bool, f64)> {
    let started = Instant::now();
    let mut stream = server.connect();
    let bytes = body.to_string();
    stream.write_all(&server.request("POST", "/v1/chat/completions", &[], bytes.as_bytes()))?;
    let (mut text, mut first) = (Vec::new(), None);
    let leaves_after = if mood < 3 { random.between(1, 2000) } else { usize::MAX };
    let mut piece = [0; 4096];
    let size = if mood == 3 { SLOW.0 } else { piece.len() };
    loop {
        match stream.read(&mut piece[..size]) {
            Ok(0) => break,
            Ok(count) => text.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if first.is_none() && text.windows(5).any(|part| part == b"data:") {
            first = Some(started.elapsed().as_secs_f64());
        }
        // a refusal is short, and read to its end
        if mood != 0 && text.len() >= leaves_after {
            break;
        }
        if mood == 3 {
            thread::sleep(SLOW.1);
        }
    }
    let text = String::from_utf8_lossy(&text);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, text.contains("data: [DONE]"), first.unwrap_or_default()))
}

/// A figure of `/metrics`.
fn gauge(server: &Server, name: &str) -> f64 {
    let metrics = server.get("/metrics").body;
    let line = metrics.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.unwrap_or_else(|| panic!("{name} is not in {metrics}"))
}

/// Bytes that the server has in memory.
fn memory(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id()));
    let status = status.expect("the system tells of its processes");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.expect("it has memory") * 1024
}
