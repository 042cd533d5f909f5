//! `strand generate`: the shapes of its output, its options, its determinism.

use serde_json::{Value, json};

use crate::binary::{command, copy_of_demo, finish, scratch, strand};

fn one_object(arguments: &[&str]) -> Value {
    let run = strand(&[&["generate", "--json"], arguments].concat());
    assert_eq!(run.status, 0, "{run:?}");
    let mut lines = run.json();
    assert_eq!(lines.len(), 1, "one object");
    lines.remove(0)
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn the_bundled_model_answers_a_prompt() {
    let run = strand(&["generate", "--chat", "-p", "Hello!", "--max-tokens", "16"]);
    assert_eq!(run.status, 0, "{run:?}");
    assert!(run.out.ends_with('\n'), "the answer ends its line");
    assert_eq!(run.err, "", "nothing but the answer, not even colour");
}

#[test]
fn json_is_one_object_with_every_field() {
    let object = one_object(&["-p", "The code is", "--max-tokens", "5", "--ignore-eos"]);
    let expected = [
        "text",
        "token_ids",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "logprobs",
        "timings",
        "reuse",
        "exactness",
    ];
    assert_eq!(keys(&object), expected);
    assert_eq!(object["completion_tokens"], 5);
    assert_eq!(object["token_ids"].as_array().map(Vec::len), Some(5));
    assert_eq!(object["finish_reason"], "length");
    assert_eq!(object["logprobs"], Value::Null);
    let encoded = &object["prompt_tokens"];
    let reuse = json!({"device": 0, "host": 0, "disk": 0, "encoded": encoded, "recomputed": 0});
    assert_eq!((&object["reuse"], &object["exactness"]), (&reuse, &json!("bitwise")));
}

#[test]
fn logprobs_come_with_the_alternatives_asked_for() {
    let arguments = ["-p", "One two three", "--max-tokens", "4", "--ignore-eos"];
    let object =
        one_object(&[&arguments[..], &["--logprobs", "3", "--prompt-logprobs", "2"]].concat());
    let generated = object["logprobs"].as_array().expect("a list");
    assert_eq!(generated.len(), 4);
    for (entry, id) in generated.iter().zip(object["token_ids"].as_array().expect("a list")) {
        assert_eq!(keys(entry), ["token_id", "token", "logprob", "top"]);
        assert_eq!(&entry["token_id"], id);
        assert!(entry["token"].is_string());
        assert_eq!(entry["top"].as_array().map(Vec::len), Some(3));
        // the demo model is greedy: the token taken is the likeliest
        assert_eq!(entry["top"][0], json!([id, entry["logprob"]]));
    }
    let prompt = object["prompt_logprobs"].as_array().expect("a list");
    assert_eq!(Some(prompt.len() as u64), object["prompt_tokens"].as_u64());
    assert_eq!(prompt[0], Value::Null);
    assert!(prompt[1..].iter().all(|entry| entry["top"].as_array().map(Vec::len) == Some(2)));
}

#[test]
fn a_prompt_computed_in_pieces_reports_all_its_logprobs() {
    let reported = |prompt: &[&str]| {
        let ask = ["--max-tokens", "1", "--prompt-logprobs", "0", "--max-num-batched-tokens", "4"];
        let object = one_object(&[prompt, &ask[..]].concat());
        let all = object["prompt_logprobs"].as_array().expect("a list").clone();
        assert!(all[0].is_null() && all[1..].iter().all(Value::is_object), "{all:?}");
        all.len()
    };
    assert_eq!(reported(&["--prompt-ids", "5,6,7,8,9,10,11,12,13,14"]), 10);
    assert_eq!(reported(&["--prompt-ids", "5"]), 1);
}

#[test]
fn a_seed_makes_an_answer_repeatable() {
    let drawn = |seed: &str| {
        let options = ["-p", "Once", "--temperature", "1.5", "--max-tokens", "24", "--ignore-eos"];
        one_object(&[&options[..], &["--seed", seed]].concat())["token_ids"].clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn greedy_answers_do_not_depend_on_the_seed() {
    let greedy = |seed: &str| {
        let options = ["-p", "Once", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
        one_object(&[&options[..], &["--seed", seed]].concat())["token_ids"].clone()
    };
    assert_eq!(greedy("1"), greedy("2"));
}

#[test]
fn a_stop_string_ends_the_answer_and_is_not_part_of_it() {
    let options = ["-p", "Once upon a time", "--max-tokens", "24", "--ignore-eos"];
    let whole = one_object(&options);
    let text = whole["text"].as_str().expect("text");
    let stop: String = text.chars().skip(3).take(2).collect();
    let cut = one_object(&[&options[..], &["--stop", &stop]].concat());
    assert_eq!(cut["text"].as_str(), text.split(stop.as_str()).next());
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn a_prompt_can_come_from_a_file() {
    let file = scratch("prompts").join("prompt.txt");
    std::fs::write(&file, "Zwölf Boxkämpfer\n").expect("it can be written");
    let file = file.to_str().expect("UTF-8");
    let options = ["--max-tokens", "4", "--ignore-eos"];
    let by_file = one_object(&[&["-f", file], &options[..]].concat());
    let input = crate::binary::piped(
        &[&["generate", "--json", "-f", "-"], &options[..]].concat(),
        "Zwölf Boxkämpfer\n",
    );
    assert_eq!(input.json()[0]["token_ids"], by_file["token_ids"]);
    let by_flag = one_object(&[&["-p", "Zwölf Boxkämpfer\n"], &options[..]].concat());
    assert_eq!(by_file["token_ids"], by_flag["token_ids"]);
}

#[test]
fn token_ids_need_no_tokenizer() {
    let folder = copy_of_demo("no-tokenizer");
    std::fs::remove_file(folder.join("tokenizer.json")).expect("it was copied");
    let folder = folder.to_str().expect("UTF-8");
    let options = ["--prompt-ids", "5,6,7,8", "--max-tokens", "6", "--ignore-eos"];
    let with = one_object(&options);
    let without = one_object(&[&[folder], &options[..]].concat());
    assert_eq!(without["token_ids"], with["token_ids"]);
    assert_eq!((&without["text"], &without["prompt_tokens"]), (&json!(""), &json!(4)));
    let plain = strand(&[&["generate", folder], &options[..]].concat());
    let printed: Vec<u64> =
        plain.out.trim().split(',').map(|id| id.parse().expect("an id")).collect();
    assert_eq!(json!(printed), with["token_ids"], "ids are printed as --prompt-ids takes them");
    strand(&["generate", folder, "-p", "x"]).refused(1, "no tokenizer");
    strand(&["chat", folder]).refused(1, "no tokenizer");
}

#[test]
fn options_come_from_flags_then_the_environment_then_the_file() {
    let file = scratch("options").join("strand.toml");
    std::fs::write(&file, "max-tokens = 3\nignore-eos = true\n").expect("it can be written");
    let tokens = |variable: Option<&str>, flags: &[&str]| {
        let file = file.to_str().expect("UTF-8");
        let base = ["generate", "--json", "-p", "x", "--config", file];
        let mut command = command(&[&base[..], flags].concat());
        command.envs(variable.map(|value| ("STRAND_MAX_TOKENS", value)));
        let run = finish(command, b"");
        assert_eq!(run.status, 0, "{run:?}");
        run.json()[0]["completion_tokens"].as_u64()
    };
    assert_eq!(tokens(None, &[]), Some(3));
    assert_eq!(tokens(Some("2"), &[]), Some(2));
    assert_eq!(tokens(Some("2"), &["--max-tokens", "1"]), Some(1));
}

/// Two files in a folder of this name, as arguments.
fn two_files(name: &str) -> [String; 2] {
    let folder = scratch(name);
    [("a.txt", "Vienna lies on the Danube."), ("b.txt", "The code of the door is 4711.")].map(
        |(name, text)| {
            let file = folder.join(name);
            std::fs::write(&file, text).expect("it can be written");
            file.to_str().expect("UTF-8").to_owned()
        },
    )
}

#[test]
fn chunks_stand_before_the_prompt() {
    let [a, b] = two_files("chunks");
    let answer = |chunks: &[&str], policy: &str| {
        let mut arguments = vec!["--chat", "-p", "What is the code?", "--temperature", "0"];
        arguments.extend(["--max-tokens", "8", "--ignore-eos", "--reuse", policy]);
        arguments.extend(chunks.iter().flat_map(|chunk| ["--chunk", chunk]));
        one_object(&arguments)
    };
    for policy in ["exact", "independent", "blend", "mask"] {
        let tokens =
            |chunks: &[&str]| answer(chunks, policy)["prompt_tokens"].as_u64().expect("a number");
        let (none, first, both) = (tokens(&[]), tokens(&[&a]), tokens(&[&a, &b]));
        assert!(none < first && first < both);
        assert_eq!(tokens(&[&b, &a]), both);
        assert_eq!(tokens(&[&a, &a]), first, "the same content is one chunk");
        assert_eq!(answer(&[&a, &b], policy)["completion_tokens"], 8);
    }
    // a single first chunk sees the same under all policies
    let alone = answer(&[&a], "exact");
    for policy in ["independent", "blend", "mask"] {
        assert_eq!(answer(&[&a], policy)["token_ids"], alone["token_ids"], "{policy}");
    }
}

#[test]
fn files_that_are_no_chunks_are_refused() {
    let folder = scratch("no-chunks");
    let refused = |name: &str, content: &[u8], message: &str| {
        let file = folder.join(name);
        std::fs::write(&file, content).expect("it can be written");
        let file = file.to_str().expect("UTF-8");
        let run = strand(&["generate", "--chat", "-p", "x", "--chunk", file]);
        run.refused(1, &format!("{name} can't be a chunk: it is {message}"));
    };
    refused("empty.txt", b"", "empty");
    refused("binary.bin", b"ELF\0\0", "a binary file, it has a zero at byte 3");
    refused("latin1.txt", b"caf\xe9", "not UTF-8 text, first at byte 3");
    let absent = folder.join("absent.txt");
    let absent = absent.to_str().expect("UTF-8");
    let options = ["generate", "-p", "x", "--chunk"];
    strand(&[&options[..], &[absent, "--chat"]].concat()).refused(1, "cannot read the chunk");
    let here = folder.to_str().expect("UTF-8");
    strand(&[&options[..], &[here, "--chat"]].concat()).refused(1, "is a folder");
    strand(&[&options[..], &[absent]].concat()).refused(2, "--chat");
    strand(&["generate", "-p", "x", "--reuse", "no"])
        .refused(2, "expected exact, independent, blend or mask");
}
