//! What real processes leave to each other: restarts between turns, and kills in the middle.
//!
//! `STRAND_KILLS=300` kills more of them (tests/slow.sh).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::binary::{command, finish, scratch, strand};
use crate::random::Random;

/// An empty folder with two files in it.
fn folder(name: &str) -> PathBuf {
    let folder = scratch("processes").join(name);
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(&folder).expect("it can be made");
    write(&folder, "a.py", &"MAX_RETRIES = 47\nTIMEOUT = 30\n".repeat(6));
    write(&folder, "b.txt", &"Anna lives in Lisbon. The door is green. ".repeat(6));
    folder
}

fn write(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).expect("it can be written");
}

fn chat(data: &Path, flags: &[&str]) -> std::process::Command {
    let data = data.to_str().expect("UTF-8");
    let base = ["chat", "--json", "--data-dir", data, "--temperature", "0", "--max-tokens", "6"];
    command(&[&base, flags].concat())
}

/// The objects of a run in which nothing failed.
fn run(data: &Path, flags: &[&str], input: &str) -> Vec<Value> {
    let run = finish(chat(data, flags), input.as_bytes());
    assert_eq!((run.status, run.err.as_str()), (0, ""), "{}", run.out);
    run.json()
}

#[test]
fn after_three_restarts_logits_are_those_of_one_process_that_never_stopped() {
    for policy in ["exact", "independent", "blend"] {
        let folder = folder(policy);
        let files = folder.to_str().expect("UTF-8");
        let lives = [
            format!("/load {files}/a.py {files}/b.txt\n/save all\nWhat is MAX_RETRIES?\n"),
            "/deactivate a.py\nWhere does Anna live?\n".to_owned(),
            "/populate b.txt\n/activate a.py\nWhat is TIMEOUT?\n".to_owned(),
            "What is MAX_RETRIES?\n".to_owned(),
        ];
        let flags = ["--context", "one", "--reuse", policy, "--restore", "always"];
        let flags = [&flags[..], &["--logprobs", "40"]].concat();
        let apart = folder.join("apart");
        let mut said: Vec<_> = lives.iter().flat_map(|life| run(&apart, &flags, life)).collect();
        let apart = said.pop().expect("an answer");
        let whole = run(&folder.join("whole"), &flags, &lives.concat()).pop().expect("an answer");
        for key in ["token_ids", "logprobs", "prompt_tokens"] {
            assert_eq!(apart[key], whole[key], "{policy}: {key}");
        }
        let from_disk = apart["reuse"]["disk"].as_u64().expect("a number");
        assert!(from_disk > 0 || policy == "exact", "{policy}: {}", apart["reuse"]);
        drop(fs::remove_dir_all(&folder));
    }
}

/// Saves, restores and erases without end, until it is killed.
fn work_until_killed(folder: &Path, data: &Path, random: &mut Random) {
    let files = folder.to_str().expect("UTF-8");
    let mut child = chat(data, &["--context", "one"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut input = child.stdin.take().expect("it is piped");
    let output = BufReader::new(child.stdout.take().expect("it is piped"));
    writeln!(input, "/load {files}/a.py {files}/b.txt").expect("it reads");
    let mut lines = output.lines();
    lines.next().expect("it answers").expect("it prints UTF-8");
    let endless = std::thread::spawn(move || {
        // ends when the reader is gone
        while writeln!(input, "/save all\n/save a.py --codec raw\n/tag a.py t\n/restore b.txt")
            .is_ok()
        {}
    });
    std::thread::sleep(Duration::from_micros(random.between(0, 60_000) as u64));
    child.kill().expect("it can be killed");
    child.wait().expect("it was a child");
    drop(lines);
    endless.join().expect("it ended with its reader");
}

#[test]
fn killed_at_any_moment_the_store_opens_and_all_that_is_listed_verifies() {
    let asked = std::env::var("STRAND_KILLS").ok().map(|count| count.parse());
    let count: u64 = asked.map_or(8, |count| count.expect("STRAND_KILLS is a number"));
    let folder = folder("kills");
    let data = folder.join("data");
    let name = data.to_str().expect("UTF-8");
    let mut random = Random::new(3);
    let half_written = || {
        let files = fs::read_dir(data.join("kv")).expect("there is a store");
        let names = files.map(|file| file.expect("it can be listed").file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".tmp")).count()
    };
    let mut in_the_middle = 0;
    for round in 0..count {
        work_until_killed(&folder, &data, &mut random);
        in_the_middle += usize::from(half_written() > 0);
        let verified = strand(&["chunks", "verify", "--json", "--data-dir", name]);
        assert_eq!(verified.status, 0, "round {round}: {} {}", verified.out, verified.err);
        assert_eq!(half_written(), 0, "round {round}");
    }
    println!("{count} kills, {in_the_middle} in the middle of a file; every store verified");
    // what was said to be loaded under the context's name is still there
    let context = run(&data, &["--context", "one"], "/context\n").pop().expect("an answer");
    let names: Vec<_> = context["chunks"].as_array().expect("a list").iter().collect();
    assert_eq!(names.len(), 2, "{context}");
}
