//! Chunks in `strand chat`: load, look, switch on and off, erase; what each says and what it
//! costs. The bundled model's wisdom is not asserted, only what is in front of it.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::binary::{Run, piped, scratch};

/// A folder of its own with some files in it.
fn files(name: &str) -> PathBuf {
    let folder = scratch("chunks").join(name);
    fs::create_dir_all(&folder).expect("it can be made");
    fs::write(folder.join("abc.txt"), "abc").expect("written");
    fs::write(folder.join("config.py"), "MAX_RETRIES = 47\nTIMEOUT = 30\n").expect("written");
    fs::write(folder.join("größe 🙂.txt"), "Anna lives in Lisbon.\n").expect("written");
    fs::write(folder.join("binary"), b"a\0b").expect("written");
    fs::write(folder.join("latin1"), b"gr\xf6\xdfe").expect("written");
    fs::write(folder.join("empty"), "").expect("written");
    folder
}

fn chat(folder: &str, flags: &[&str], input: &str) -> Run {
    let input = input.replace("DIR", files(folder).to_str().expect("it is UTF-8"));
    let arguments = [&["chat", "--max-tokens", "8", "--temperature", "0"], flags].concat();
    piped(&arguments, input)
}

fn chat_json(folder: &str, input: &str) -> Vec<Value> {
    let run = chat(folder, &["--json"], input);
    assert_eq!(run.err, "");
    run.json()
}

const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

#[test]
fn loading_says_hash_size_and_position() {
    let run = chat("says", &[], "/load DIR/abc.txt\n/load DIR/abc.txt\n/deactivate abc.txt\n");
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    let lines: Vec<&str> = run.out.lines().collect();
    assert_eq!(lines[..2], ["✓ Added chunk:", "  Hash: ba7816bf8f01cfea..."]);
    let size = lines[2].strip_prefix("  Size: ").and_then(|rest| rest.strip_suffix(" tokens"));
    let size: usize = size.expect("the size").parse().expect("a number");
    assert_eq!(lines[3], format!("  Position: 0-{}", size - 1));
    assert_eq!(lines[4], "✓ Chunk already loaded as abc.txt: ba7816bf8f01cfea...");
    assert_eq!(lines[5], "✓ Chunk deactivated: ba7816bf8f01cfea...");
}

#[test]
fn the_context_says_what_is_used_and_where_chunks_stand() {
    let lines = chat_json(
        "table",
        "/load DIR/*.txt DIR/config.py\n/context\n/deactivate #1\n/context\n/show abc.txt\n",
    );
    assert!(lines.iter().all(|line| line["ok"] == true), "{lines:?}");
    let (before, after) = (&lines[1], &lines[3]);
    let chunks = before["chunks"].as_array().expect("a list");
    let names: Vec<&Value> = chunks.iter().map(|chunk| &chunk["name"]).collect();
    assert_eq!(names, ["abc.txt", "größe 🙂.txt", "config.py"]);
    assert_eq!((&chunks[0]["id"], &chunks[0]["tiers"]), (&json!(ABC), &json!(["device"])));
    let tokens = |chunk: &Value| chunk["tokens"].as_u64().expect("a number");
    let all: u64 = chunks.iter().map(tokens).sum();
    assert_eq!(before["used_tokens"], json!(all));
    assert_eq!(before["free_tokens"].as_u64().map(|free| free + all), Some(4096));
    let first = tokens(&chunks[0]);
    assert_eq!(chunks[1]["position"], json!([first, first + tokens(&chunks[1]) - 1]));

    assert_eq!(after["used_tokens"], json!(all - first), "inactive chunks don't count");
    assert_eq!(after["chunks"][0]["position"], Value::Null);
    assert_eq!(after["chunks"][0]["tiers"], json!(["device"]), "its KV stays");
    assert_eq!(after["chunks"][1]["position"], json!([0, tokens(&chunks[1]) - 1]));
    assert_eq!((&lines[4]["text"], &lines[4]["kind"]), (&json!("abc"), &json!("file")));
}

#[test]
fn switching_a_chunk_encodes_no_chunk_again() {
    let question = "What is MAX_RETRIES?\n/reset\n";
    let input = format!(
        "/load DIR/config.py DIR/abc.txt\n{question}/deactivate config.py\n{question}\
         /activate config.py\n{question}/erase config.py\n{question}/load DIR/config.py\n"
    );
    let lines = chat_json("switch", &input);
    let answers: Vec<&Value> = lines.iter().filter(|line| line["text"].is_string()).collect();
    let encoded = |n: usize| answers[n]["reuse"]["encoded"].as_u64().expect("a number");
    let device = |n: usize| answers[n]["reuse"]["device"].as_u64().expect("a number");
    let tokens = |n: usize| lines[0]["chunks"][n]["tokens"].as_u64().expect("a number");
    // under `independent`, the bundled model's policy, only turns are computed
    assert_eq!(device(0), tokens(0) + tokens(1));
    assert_eq!((device(1), encoded(1)), (tokens(1), encoded(0)));
    assert!(device(2) >= device(0) && encoded(2) <= encoded(0), "toggling back finds it all");
    assert_eq!(answers[0]["text"], answers[2]["text"]);
    assert_eq!(device(3) + encoded(3), device(1) + encoded(1), "an erased chunk is gone");
    assert_eq!(lines.last().expect("there are lines")["chunks"][0]["already_loaded"], false);
}

#[test]
fn what_cannot_be_a_chunk_is_refused_and_changes_nothing() {
    let cases = [
        ("/load", "Usage: /load <file>..."),
        ("/load DIR/abc.txt DIR/none", "none: No such file"),
        ("/load DIR/abc.txt DIR/binary", "a binary file, it has a zero at byte 1"),
        ("/load DIR/latin1", "not UTF-8 text, first at byte 2"),
        ("/load DIR/empty", "empty"),
        ("/load DIR", "is a folder"),
        ("/load DIR/*.none", "no file matches"),
        ("/load DIR/abc.txt DIR/config.py --name x", "Usage: /load <file>..."),
        ("/load DIR/*.txt --name x", "--name names one chunk, 2 files match"),
        ("/activate", "Usage: /activate <chunk>..."),
        ("/activate ffff", "No chunk found matching: ffff"),
        ("/deactivate #1", "No chunk found matching: #1"),
        ("/show", "Usage: /show <chunk>"),
        ("/erase x y", "Usage: /erase <chunk>"),
        ("/policy best", "Unknown policy: best. Policies: exact, independent"),
    ];
    for (line, expected) in cases {
        let run = chat("refused", &[], &format!("{line}\n/context\n"));
        assert_eq!(run.status, 1, "{line}");
        assert!(run.err.contains(expected), "{line}: {}", run.err);
        assert!(run.out.contains("Used: 0 tokens") && !run.out.contains('#'), "{line}");
    }
}

#[test]
fn a_chunk_larger_than_the_model_is_refused() {
    let folder = files("large");
    fs::write(folder.join("large.txt"), "word ".repeat(2000)).expect("written");
    let run = chat("large", &["--max-model-len", "256"], "/load DIR/large.txt\n/context\n");
    assert_eq!(run.status, 1);
    assert!(run.err.contains("large.txt has") && run.err.contains("takes 256"), "{}", run.err);
    assert!(run.out.contains("Used: 0 tokens"));
}

#[test]
fn names_with_blanks_are_quoted_and_clear_leaves_nothing() {
    let run = chat(
        "quoted",
        &[],
        "/load 'DIR/größe 🙂.txt' --name \"my notes\" --inactive\n/activate \"my notes\"\n\
         /clear\n/context\n",
    );
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    assert!(!run.out.contains("Position:"), "an inactive chunk stands nowhere");
    assert!(run.out.contains("✓ Chunk activated: "));
    assert!(run.out.contains("✓ All chunks cleared\nContext Status:\n"));
    assert!(run.out.contains("Used: 0 tokens"));
}
