//! `strand bench` and `strand models`: tables for people, JSON for programs.

use serde_json::Value;

use crate::binary::{Run, copy_of_demo, strand};

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
