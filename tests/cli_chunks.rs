//! Chunks in `strand chat`: load, look, switch on and off, erase; what each says and what it
//! costs. The bundled model's wisdom is not asserted, only what is in front of it.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use strand_engine::ChunkId;

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
        ("/load DIR/abc.txt --name ''", "can't be a chunk: it is named by nothing"),
        ("/load DIR/*.txt --name x", "--name names one chunk, 2 files match"),
        ("/activate", "Usage: /activate <chunk>..."),
        ("/activate ffff", "No chunk found matching: ffff"),
        ("/deactivate #1", "No chunk found matching: #1"),
        ("/show", "Usage: /show <chunk>"),
        ("/erase x y", "Usage: /erase <chunk>"),
        ("/policy best", "Unknown policy: best. Policies: exact, independent, blend, mask"),
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

/// Two texts whose hashes begin with the same four digits.
fn of_one_prefix() -> (String, String, String) {
    let mut known = HashMap::new();
    for number in 0.. {
        let text = format!("text {number}");
        let prefix = ChunkId::of(text.as_bytes()).to_string()[..4].to_owned();
        if let Some(other) = known.insert(prefix.clone(), text.clone()) {
            return (other, text, prefix);
        }
    }
    unreachable!("there are 65,536 prefixes")
}

#[test]
fn a_prefix_of_two_chunks_names_neither() {
    let folder = files("ambiguous");
    let (one, other, prefix) = of_one_prefix();
    fs::write(folder.join("one"), &one).expect("written");
    fs::write(folder.join("other"), &other).expect("written");
    let input = format!("/load DIR/one DIR/other --inactive\n/activate {prefix}\n/context\n");
    let run = chat("ambiguous", &[], &input);
    assert_eq!(run.status, 1);
    let [first, second] = [one, other].map(|text| ChunkId::of(text.as_bytes()).short());
    let told = format!("Ambiguous chunk prefix: {prefix}. Matches: {first}..., {second}...\n");
    assert_eq!(run.err, told);
    assert!(!run.out.contains(" active "), "{}", run.out);
}

#[test]
fn fifty_megabytes_are_refused_before_they_are_tokenized() {
    let folder = files("huge");
    fs::write(folder.join("huge.txt"), "0123456789".repeat(5 << 20)).expect("written");
    let run = chat("huge", &[], "/load DIR/abc.txt DIR/huge.txt\n/context\n");
    assert_eq!(run.status, 1);
    let told = "huge.txt has 52428800 bytes, more than 4096 tokens of this model can hold\n";
    assert_eq!(run.err, told);
    assert!(run.out.contains("Used: 0 tokens") && !run.out.contains('#'));
}

#[test]
fn blend_computes_the_first_tokens_of_later_chunks_again() {
    let input = "/load DIR/config.py DIR/größe*\nWhat is MAX_RETRIES?\n/reset\n/deactivate #1\n\
                 What is MAX_RETRIES?\n";
    let asked = |flags: &[&str]| {
        let run = chat("blend", &[&["--json", "--reuse", "blend"], flags].concat(), input);
        assert_eq!((run.status, run.err.as_str()), (0, ""));
        let lines = run.json();
        let tokens = |n: usize| lines[0]["chunks"][n]["tokens"].as_u64().expect("a number");
        let all = tokens(0) + tokens(1);
        let reuse = |answer: &Value| {
            ["device", "recomputed"].map(|key| answer["reuse"][key].as_u64().expect("a number"))
        };
        (all, tokens(1), reuse(&lines[1]), reuse(&lines[4]))
    };
    let (all, last, both, alone) = asked(&[]);
    assert_eq!(both, [all - 16, 16]);
    assert_eq!(alone, [last, 0], "the first is as it is stored");
    let (_, _, five, _) = asked(&["--blend-tokens", "5"]);
    assert_eq!(five, [all - 5, 5]);
    let (_, _, none, _) = asked(&["--blend-tokens", "0"]);
    assert_eq!(none, [all, 0]);
}

#[test]
fn mask_switches_chunks_for_nothing_and_says_that_it_is_approximate() {
    let question = format!("What is MAX_RETRIES{}?\n", ", again".repeat(20));
    let input = format!(
        "/policy mask\n/load DIR/config.py DIR/abc.txt\n{question}/deactivate abc.txt\n\
         {question}/activate abc.txt\n{question}"
    );
    let lines = chat_json("mask", &input);
    let answers: Vec<&Value> = lines.iter().filter(|line| line["text"].is_string()).collect();
    assert!(answers.iter().all(|answer| answer["exactness"] == "approximate"));
    let number = |value: &Value| value.as_u64().expect("a number");
    let asked = |n: usize| number(&answers[n]["prompt_tokens"]);
    let found = |n: usize| number(&answers[n]["reuse"]["device"]);
    let abc = number(&lines[1]["chunks"][1]["tokens"]);
    // all that was asked before is found, but for what the switch hides and what opened the answer
    let opening = 8;
    assert!(found(1) + opening >= asked(0) - abc, "{answers:#?}");
    assert!(found(2) + opening >= asked(1) + abc, "{answers:#?}");
}
