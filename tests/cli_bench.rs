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
    assert_eq!(counts, (&"recall".into(), &4.into(), &30.into()));
    let rows = line["rows"].as_array().expect("a list");
    for policy in ["exact", "independent", "blend", "mask", "int8"] {
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

/// Rows of a list in a line of JSON, those whose fields have these values.
fn rows<'a>(line: &'a Value, list: &str, fields: &[(&str, &str)]) -> Vec<&'a Value> {
    let all = line[list].as_array().expect("a list").iter();
    all.filter(|row| fields.iter().all(|&(name, value)| row[name] == value)).collect()
}

fn count(row: &Value, name: &str) -> u64 {
    row[name].as_u64().unwrap_or_else(|| panic!("{name} is no count in {row}"))
}

/// 3 chunks of 40 tokens, a question of 8.
const SCENES: [&str; 10] = [
    "--num-chunks",
    "3",
    "--chunk-len",
    "40",
    "--question-len",
    "8",
    "--repeats",
    "2",
    "--cold-repeats",
    "2",
];

/// Device, host, disk, encoded, recomputed tokens of each policy's question in a scene.
fn accounts(line: &Value, scene: &str) -> Vec<[u64; 5]> {
    let names =
        ["device_tokens", "host_tokens", "disk_tokens", "encoded_tokens", "recomputed_tokens"];
    let found = rows(line, "rows", &[("scene", scene)]);
    let policies: Vec<&str> = found.iter().filter_map(|row| row["policy"].as_str()).collect();
    assert_eq!(policies, ["exact", "independent", "blend", "mask"]);
    found.iter().map(|row| names.map(|name| count(row, name))).collect()
}

#[test]
fn every_policy_encodes_what_its_scene_says_and_no_more() {
    let contexts = ["--contexts", "3", "--context-chunks", "2", "--context-chunk-len", "20"];
    let run = strand(&[&["bench", "reuse"], &SCENES[..], &contexts[..]].concat());
    let line = last_line(&run);
    for text in ["and on again", "switching a chunk", "bound", "half of them shared"] {
        assert!(run.out.contains(text), "{text} is not in {}", run.out);
    }
    // three chunks and the question; blend computes 16 rows of each chunk but the first twice
    assert_eq!(
        accounts(&line, "nothing cached"),
        [[0, 0, 0, 128, 0], [0, 0, 0, 128, 0], [0, 0, 0, 128, 32], [0, 0, 0, 128, 0]]
    );
    let resident = accounts(&line, "all on the device");
    let on_host = accounts(&line, "all on the host");
    let on_disk = accounts(&line, "all on the disk");
    for policy in [0, 1, 3] {
        assert_eq!(resident[policy], [120, 0, 0, 8, 0], "{policy}");
        assert_eq!(on_host[policy], [0, 120, 0, 8, 0], "{policy}");
        assert_eq!(on_disk[policy], [0, 0, 120, 8, 0], "{policy}");
    }
    assert_eq!(resident[2], [120, 0, 0, 8, 0]);
    assert_eq!(on_host[2], [32, 88, 0, 8, 0], "first rows stay where they are");
    assert_eq!(on_disk[2], [0, 0, 88, 8, 32], "first rows are not kept on the disk");
    let computed = |scene| -> Vec<u64> {
        accounts(&line, scene).iter().map(|&[.., encoded, again]| encoded + again).collect()
    };
    assert_eq!(computed("first chunk switched off"), [88, 8, 24, 8]);
    assert_eq!(computed("and on again"), [8, 8, 8, 8]);
    assert_eq!(computed("order reversed"), [128, 8, 40, 128]);
    for hit in rows(&line, "disk_hits", &[]) {
        assert!(count(hit, "file_bytes") > 0 && hit["bound_seconds"].is_f64(), "{hit}");
        let blends = hit["policy"] == "blend";
        let resident = if blends { "order reversed" } else { "all on the device" };
        assert_eq!(hit["resident_scene"], resident, "what computes as much as a disk hit");
        let rows = count(hit, "raw_bytes");
        assert_eq!(rows, 120 * 2 * 5 * 2 * 64 * 2, "5 layers of 2 heads of 64 numbers");
    }
}

#[test]
fn contexts_that_share_chunks_are_switched_without_encoding_any() {
    let contexts = ["--contexts", "6", "--context-chunks", "4", "--context-chunk-len", "20"];
    let policies = ["--policy", "exact,independent", "--json"];
    let line = last_line(&strand(
        &[&["bench", "reuse"], &SCENES[..], &contexts[..], &policies[..]].concat(),
    ));
    let switches = rows(&line, "switches", &[]);
    let visits = |visit: &str| -> Vec<u64> {
        switches.iter().map(|row| count(&row[visit], "encoded_tokens")).collect()
    };
    // 6 questions of 8 tokens, 2 chunks that all share, 2 of each one's own
    assert_eq!(visits("first")[1], 6 * 8 + 2 * 20 + 6 * 2 * 20);
    assert!(visits("first")[0] > visits("first")[1], "exact shares what stands first alone");
    assert_eq!(visits("again"), [6 * 8, 6 * 8]);
    let none = ["--contexts", "0", "--json", "--policy", "mask", "--repeats", "1"];
    let shape = ["--num-chunks", "2", "--chunk-len", "20", "--cold-repeats", "1"];
    let line = last_line(&strand(&[&["bench", "reuse"], &none[..], &shape[..]].concat()));
    assert_eq!(rows(&line, "switches", &[]).len(), 0);
}

#[test]
fn kv_of_text_is_smaller_in_every_codec_but_raw() {
    let folder = scratch("tiers");
    let shape = ["--chunk-lens", "40,96", "--num-chunks", "2", "--repeats", "1"];
    let questions = ["--questions", "2", "--answer-len", "4"];
    let place = ["--data-dir", folder.to_str().expect("UTF-8")];
    let run = strand(&[&["bench", "tiers"], &shape[..], &questions[..], &place[..]].concat());
    let line = last_line(&run);
    for text in ["payload x", "disk MB/s", "encode ms", "loading is faster", "likeliest"] {
        assert!(run.out.contains(text), "{text} is not in {}", run.out);
    }
    assert_eq!((&line["bench"], &line["kv_dtype"]), (&"tiers".into(), &"bf16".into()));
    for (codec, least, most) in [("raw", 1.0, 1.0), ("planes", 1.2, 1.6), ("int8", 1.8, 2.0)] {
        let rows = rows(&line, "rows", &[("codec", codec)]);
        assert_eq!(rows.len(), 2, "a row for each length");
        for (row, len) in rows.into_iter().zip([40, 96]) {
            let ratio = row["payload_ratio"].as_f64().expect("a number");
            assert!((least..=most).contains(&ratio), "{row}");
            assert!(row["file_ratio"].as_f64() < Some(ratio), "frames are padded: {row}");
            assert!(count(row, "tokens") >= 2 * len);
            for speed in ["save_file", "disk_write", "load_file", "disk_read"] {
                let speed = &row[format!("{speed}_bytes_per_second")];
                assert!(speed.as_f64() > Some(0.0), "{row}");
            }
        }
    }
    let break_even = rows(&line, "break_even", &[]);
    assert!(break_even.iter().all(|row| row["tokens"].is_null() || row["tokens"].is_f64()));
    let agreement = &line["int8_agreement"];
    let counts = ["questions", "tokens", "agreeing"].map(|name| count(agreement, name));
    assert!(counts[0] > 0 && counts[1] >= counts[0] && counts[2] <= counts[1], "{agreement}");
    let left = std::fs::read_dir(folder.join("kv")).expect("a store was there").count();
    assert_eq!(left, 0, "nothing is left in a folder of the user's");
}

#[test]
fn tiers_are_measured_on_random_weights_and_a_short_file_is_refused() {
    let folder = copy_of_demo("tiers-shape");
    let config = folder.join("config.json");
    let weights = ["--random-weights", config.to_str().expect("UTF-8")];
    let shape = ["--chunk-lens", "32", "--num-chunks", "1", "--repeats", "1", "--json"];
    let questions = ["--questions", "1", "--answer-len", "3", "--codec", "int8"];
    let line = last_line(&strand(
        &[&["bench", "tiers"], &weights[..], &shape[..], &questions[..]].concat(),
    ));
    assert_eq!(count(rows(&line, "rows", &[("codec", "int8")])[0], "tokens"), 32);
    assert_eq!(count(&line["int8_agreement"], "tokens"), 3, "its answers don't end");
    let file = scratch("tiers").join("short.jsonl");
    std::fs::write(&file, format!("{}\n", items()[0])).expect("it can be written");
    let file = ["--file", file.to_str().expect("UTF-8")];
    let run = strand(&[&["bench", "tiers"], &file[..], &["--chunk-lens", "200"]].concat());
    run.refused(1, "has not enough text for all chunks");
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

#[test]
fn ops_are_measured_against_what_the_machine_can_do() {
    let run = strand(&["bench", "kernels", "--repeats", "1", "--only", "store_kv"]);
    let line = last_line(&run);
    for ceiling in ["read_bytes", "f32_operations", "int8_operations"] {
        assert!(line[format!("{ceiling}_per_second")].as_f64() > Some(0.0), "{ceiling}");
    }
    let rows = line["rows"].as_array().expect("a list");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(names, ["store_kv, bf16, 1", "store_kv, bf16, 512"]);
    for (row, name) in rows.iter().zip(names) {
        assert!(row["seconds"].as_f64() > Some(0.0) && row["share_of_read"].as_f64() > Some(0.0));
        assert!(run.out.contains(name), "{}", run.out);
    }
}
