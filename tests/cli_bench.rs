//! `strand bench` and `strand models`: tables for people, JSON for programs.

use serde_json::{Value, json};

use crate::binary::{Run, copy_of_demo, scratch, strand};

fn last_line(run: &Run) -> Value {
    assert_eq!(run.status, 0, "{run:?}");
    let line = run.out.lines().last().expect("it prints");
    serde_json::from_str(line).expect("the last line is JSON")
}

const SMALL: [&str; 10] = [
    "--num-seqs",
    "6",
    "--min-input-len",
    "8",
    "--max-input-len",
    "40",
    "--min-output-len",
    "4",
    "--max-output-len",
    "9",
];

#[test]
fn throughput_is_a_table_and_a_line() {
    let run = strand(&[&["bench", "throughput", "--vs", "a note"], &SMALL[..]].concat());
    let line = last_line(&run);
    for text in ["prefill tokens/s", "decode tokens/s", "peak memory", "preemptions", "a note"] {
        assert!(run.out.contains(text), "{text} is not in {}", run.out);
    }
    assert_eq!((&line["bench"], &line["requests"]), (&"throughput".into(), &6.into()));
    let prompt = line["prompt_tokens"].as_u64().expect("a number");
    assert!((6 * 8..=6 * 40).contains(&prompt));
    assert_eq!(line["prefill"]["tokens"].as_u64(), Some(prompt), "no prompt shares a prefix");
    let output = line["output_tokens"].as_u64().expect("a number");
    assert!((6 * 4..=6 * 9).contains(&output));
    assert_eq!(line["decode"]["tokens"].as_u64(), Some(output - 6), "one token comes of prefill");
    assert!(line["seconds"].as_f64() > Some(0.0));
    assert!(line["peak_memory_bytes"].is_u64());
    assert_eq!(line["vs"], "a note");
}

#[test]
fn the_workload_is_a_function_of_the_seed() {
    let tokens = |seed: &str| {
        let options = ["bench", "throughput", "--json", "--seed", seed];
        let line = last_line(&strand(&[&options[..], &SMALL[..]].concat()));
        (line["prompt_tokens"].clone(), line["output_tokens"].clone())
    };
    assert_eq!(tokens("3"), tokens("3"));
    assert_ne!(tokens("3"), tokens("4"));
}

#[test]
fn a_bench_runs_on_random_weights_of_any_shape() {
    let folder = copy_of_demo("shape");
    let config = folder.join("config.json");
    let config = config.to_str().expect("UTF-8");
    let options = ["bench", "throughput", "--json", "--random-weights", config];
    let line = last_line(&strand(&[&options[..], &SMALL[..]].concat()));
    assert!(line["model"].as_str().is_some_and(|name| name.contains("random weights")));
    let run = strand(&["bench", "throughput", "--random-weights", "no-preset"]);
    run.refused(1, "no-preset is no preset");
}

#[test]
fn latency_has_a_row_for_each_pair() {
    let shape = ["--batch-sizes", "1,3", "--prompt-lens", "8,20"];
    let counts = ["--output-len", "4", "--repeats", "2"];
    let run = strand(&[&["bench", "latency"], &shape[..], &counts[..]].concat());
    let line = last_line(&run);
    let rows = line["rows"].as_array().expect("a list");
    let pairs: Vec<_> =
        rows.iter().map(|row| (row["prompt_len"].as_u64(), row["batch_size"].as_u64())).collect();
    let expected = [(8, 1), (8, 3), (20, 1), (20, 3)].map(|(a, b)| (Some(a), Some(b)));
    assert_eq!(pairs, expected);
    for row in rows {
        for figure in ["first_token_seconds", "per_token_seconds"] {
            assert!(row[figure]["p50"].as_f64() <= row[figure]["p90"].as_f64(), "{row}");
            assert!(row[figure]["p50"].as_f64() > Some(0.0), "{row}");
        }
    }
}

/// One item for each kind of task.
fn items() -> Vec<Value> {
    let chunk =
        |name: &str, content: &str| json!({"kind": "file", "name": name, "content": content});
    let chunks = [chunk("a.txt", "The code is 4711."), chunk("b.txt", "The port is 8080.")];
    let item = |task: &str, answer: &str, answer_chunk: Option<usize>| {
        json!({
            "id": task, "task": task, "kind": "file/code", "chunks": chunks, "system": null,
            "turns": [{"user": "Hi", "assistant": "Hello!"}],
            "question": "What is the code?", "answer": answer, "answer_chunk": answer_chunk,
        })
    };
    vec![
        item("recall", "The code is 4711.", Some(0)),
        item("missing", "I don't know.", None),
        item("stale", "I don't know.", None),
        item("json", "{\"mood\": \"calm\"}", None),
    ]
}

#[test]
fn recall_has_rows_for_each_policy_and_measure() {
    let file = scratch("recall").join("items.jsonl");
    let lines: String = items().iter().map(|item| format!("{item}\n")).collect();
    std::fs::write(&file, &lines).expect("it can be written");
    let file = file.to_str().expect("UTF-8");
    let run = strand(&["bench", "recall", "--file", file]);
    let line = last_line(&run);
    for text in ["exact answers from a chunk", "  2 chunks", "reversed", "independent"] {
        assert!(run.out.contains(text), "{text} is not in {}", run.out);
    }
    let counts = (&line["bench"], &line["items"], &line["requests"]);
    assert_eq!(counts, (&"recall".into(), &4.into(), &12.into()));
    let rows = line["rows"].as_array().expect("a list");
    for policy in ["exact", "independent"] {
        let of = |row: &&Value| row["policy"] == policy && row["kind"] == Value::Null;
        let measured: Vec<_> = rows
            .iter()
            .filter(of)
            .filter(|row| row["chunks"] == Value::Null)
            .map(|row| row["measure"].as_str().expect("a name"))
            .collect();
        let expected = ["recall_given", "recall_reversed", "refused", "inactive", "missing"];
        let json = ["stale", "json_parses", "json_fields", "json_exact"];
        assert_eq!(measured, [&expected[..], &json[..]].concat());
    }
    assert!(rows.iter().all(|row| row["found"].as_u64() <= row["items"].as_u64()));
    let options = ["bench", "recall", "--json", "--limit", "1", "--policy", "exact"];
    let line = last_line(&strand(&[&options[..], &["--file", file]].concat()));
    assert_eq!((&line["items"], &line["requests"]), (&1.into(), &1.into()));
}

#[test]
fn a_line_that_is_no_item_is_named() {
    let file = scratch("recall").join("bad.jsonl");
    let lines = format!("{}\n{}\n", items()[0], "{\"id\": 5}");
    std::fs::write(&file, lines).expect("it can be written");
    let file = file.to_str().expect("UTF-8");
    strand(&["bench", "recall", "--file", file]).refused(1, "bad.jsonl: line 2: invalid type");
    strand(&["bench", "recall", "--file", "no.jsonl"]).refused(1, "cannot read no.jsonl");
    let run = strand(&["bench", "recall", "--policy", "exact,no"]);
    run.refused(2, "expected exact, independent, blend or mask");
}

#[test]
fn the_bundled_model_is_listed_and_shown() {
    let run = strand(&["models", "list"]);
    assert!(run.status == 0 && run.out.contains("strand-demo"), "{run:?}");
    let listed = strand(&["models", "list", "--json"]).json();
    assert_eq!((&listed[0]["id"], &listed[0]["bundled"]), (&"strand-demo".into(), &true.into()));
    let run = strand(&["models", "show"]);
    assert!(run.status == 0 && run.out.contains("Qwen3"), "{run:?}");
    let folder = copy_of_demo("shown");
    let shown = strand(&["models", "show", folder.to_str().expect("UTF-8"), "--json"]).json();
    assert_eq!(shown.len(), 1);
    for (name, expected) in [("architecture", "Qwen3"), ("dtype", "bf16")] {
        assert_eq!(shown[0][name], expected);
    }
    assert_eq!((&shown[0]["tokenizer"], &shown[0]["chat_template"]), (&true.into(), &true.into()));
    assert!(shown[0]["parameters"].as_u64() > Some(1_000_000));
    assert!(shown[0]["context"].as_u64() > Some(0));
    let files = shown[0]["files"].as_array().expect("a list");
    assert!(files.iter().any(|file| file["name"] == "model.safetensors"));
}
