//! The real server, and a small HTTP client that can also send what no client should.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binary::command;

/// A server of one test, killed when dropped.
pub struct Server {
    pub child: Child,
    pub port: u16,
    /// What it said on standard error so far.
    log: Arc<Mutex<String>>,
}

/// An answer, its body put together from chunks.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The head as it came.
    pub head: String,
    pub body: String,
}

/// Nothing a test waits for takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

impl Server {
    /// Starts with the bundled model on a free port, and waits until it listens.
    pub fn start(flags: &[&str]) -> Self {
        Self::start_with(flags, &[])
    }

    /// The same, with variables in its environment.
    pub fn start_with(flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = command(&[&["serve", "--addr", "127.0.0.1:0"][..], flags].concat());
        // a flag counts more than this
        command.env("STRAND_KV_MEMORY", "64MiB");
        command.stdout(Stdio::null()).envs(variables.iter().copied());
        let mut child = command.spawn().expect("the program starts");
        let errors = BufReader::new(child.stderr.take().expect("it is piped"));
        let log = Arc::new(Mutex::new(String::new()));
        let written = log.clone();
        thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok) {
                let mut log = written.lock().expect("nobody panics with it");
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut server = Self { child, port: 0, log };
        let listening = "://127.0.0.1:";
        until(|| server.log().contains(listening) || server.has_ended());
        let log = server.log();
        let address = log.split(listening).nth(1).unwrap_or_else(|| panic!("{log}"));
        server.port = address.lines().next().and_then(|port| port.parse().ok()).expect("a port");
        server
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("nobody panics with it").clone()
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it can be asked").is_some()
    }

    /// Waits for its end, and says with what status.
    pub fn wait(&mut self) -> Option<i32> {
        until(|| self.has_ended());
        self.child.wait().expect("it has ended").code()
    }

    /// Sends it a signal by name, as `kill` does.
    pub fn signal(&self, name: &str) {
        let (signal, pid) = (format!("-{name}"), self.child.id().to_string());
        let status = std::process::Command::new("kill").args([signal, pid]).status();
        assert!(status.expect("kill can be run").success());
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a deadline can be set");
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[], body.to_string().as_bytes())
    }

    /// A request with these headers besides the usual ones.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        // a server that refuses early need not read all of it
        drop(stream.write_all(&self.request(method, path, headers, body)));
        read_answer(stream)
    }

    /// The bytes of a request; a header that is given replaces the usual one of that name.
    pub fn request(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
        let usual = [
            format!("Host: 127.0.0.1:{}", self.port),
            "Content-Type: application/json".to_owned(),
            format!("Content-Length: {}", body.len()),
            "Connection: close".to_owned(),
        ];
        let name = |header: &str| header.split(':').next().unwrap_or_default().to_lowercase();
        let mut text = format!("{method} {path} HTTP/1.1\r\n");
        let is_given = |usual: &str| headers.iter().any(|given| name(given) == name(usual));
        for header in usual.iter().filter(|usual| !is_given(usual)) {
            text.push_str(&format!("{header}\r\n"));
        }
        headers.iter().for_each(|header| text.push_str(&format!("{header}\r\n")));
        [text.as_bytes(), b"\r\n", body].concat()
    }

    /// Exactly these bytes, and what comes back; empty where the connection is just closed.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        drop(stream.write_all(bytes));
        read_all(stream)
    }

    /// The `data:` of all events of a stream.
    pub fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.head.contains("text/event-stream"), "{}", answer.head);
        answer.events()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(':'));
        lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim()).next()
    }

    pub fn events(&self) -> Vec<String> {
        let events = self.body.split("\n\n").filter(|event| !event.is_empty());
        let data = |event: &str| {
            let lines = event.lines().filter_map(|line| line.strip_prefix("data: "));
            lines.collect::<Vec<_>>().join("\n")
        };
        events.filter(|event| !event.starts_with(':')).map(data).collect()
    }

    /// Asserts a refusal in OpenAI's shape: status, parameter, part of the message.
    pub fn refused(&self, status: u16, param: Option<&str>, message: &str) {
        assert_eq!(self.status, status, "{self:?}");
        let error = &self.json()["error"];
        assert_eq!(error["param"].as_str(), param, "{self:?}");
        let told = error["message"].as_str().expect("it has a message");
        assert!(told.contains(message), "{message} is not in {told}");
        assert!(error["type"].is_string() && error.get("code").is_some(), "{self:?}");
    }
}

/// Waits for a condition, not for ever.
pub fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it did not come to be");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Reads to the end of the connection.
pub fn read_answer(stream: TcpStream) -> Answer {
    let text = read_all(stream);
    parse(&text).unwrap_or_else(|| panic!("no HTTP: {text:?}"))
}

fn read_all(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // a reset behind the answer takes nothing of it away
    drop(stream.read_to_end(&mut bytes));
    String::from_utf8(bytes).expect("it speaks UTF-8")
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body)? } else { body.to_owned() };
    Some(Answer { status, head: head.to_owned(), body })
}

fn unchunked(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, behind) = rest.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.push_str(behind.get(..size)?);
        rest = behind.get(size..)?.strip_prefix("\r\n")?;
    }
}
