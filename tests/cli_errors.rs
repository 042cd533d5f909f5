//! Bad input: a clear error, the right exit status, nothing half made.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::binary::{copy_of_demo, scratch, strand};

/// `generate MODEL` with a short prompt and further options.
fn generate<'a>(model: &'a Path, options: &[&'a str]) -> Vec<&'a str> {
    let model = model.to_str().expect("UTF-8");
    [&["generate", model, "--prompt-ids", "1,2,3"], options].concat()
}

/// Replaces a part of a file.
fn change(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).expect("it is a text file");
    assert!(text.contains(from), "{from} is not in {}", path.display());
    fs::write(path, text.replace(from, to)).expect("it can be written");
}

#[test]
fn a_model_that_is_not_there_is_named() {
    strand(&["generate", "/no/such/folder", "-p", "x"]).refused(1, "/no/such/folder");
    strand(&["generate", "/no/such.gguf", "-p", "x"]).refused(1, "/no/such.gguf");
    strand(&["generate", "what is this", "-p", "x"]).refused(1, "what is this");
    strand(&["generate", "owner/absent", "-p", "x"]).refused(1, "HF_HUB_OFFLINE");
    strand(&["models", "show", "/no/such/folder"]).refused(1, "/no/such/folder");
    strand(&["models", "pull", "not-an-id"]).refused(2, "not-an-id");
    let empty = scratch("empty-model");
    strand(&generate(&empty, &[])).refused(1, "config.json");
}

#[test]
fn truncated_weights_are_refused() {
    let folder = copy_of_demo("truncated");
    let weights = folder.join("model.safetensors");
    let bytes = fs::read(&weights).expect("it was copied");
    for length in [0, 5, 200, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&weights, &bytes[..length]).expect("it can be written");
        strand(&generate(&folder, &[])).refused(1, "model.safetensors");
    }
}

#[test]
fn a_missing_shard_is_named() {
    let folder = copy_of_demo("missing-shard");
    let weights = folder.join("model.safetensors");
    fs::rename(&weights, folder.join("model-00001-of-00002.safetensors")).expect("it is there");
    let index = r#"{"metadata": {}, "weight_map": {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors"}}"#;
    fs::write(folder.join("model.safetensors.index.json"), index).expect("it can be written");
    strand(&generate(&folder, &[])).refused(1, "model-00002-of-00002.safetensors");
}

#[test]
fn what_the_config_asks_for_must_fit() {
    let folder = copy_of_demo("wrong-config");
    let config = folder.join("config.json");
    let original = fs::read_to_string(&config).expect("it was copied");
    for (from, to, text) in [
        ("Qwen3ForCausalLM", "MambaForCausalLM", "MambaForCausalLM"),
        ("\"intermediate_size\": ", "\"intermediate_size\": 1", "gate_proj"),
        ("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act"),
        ("{", "[", "config.json"),
    ] {
        change(&config, from, to);
        strand(&generate(&folder, &[])).refused(1, text);
        fs::write(&config, &original).expect("it can be written");
    }
    assert_eq!(strand(&generate(&folder, &["--max-tokens", "1"])).status, 0);
}

#[test]
fn quantization_that_is_not_known_is_refused() {
    let folder = copy_of_demo("quantized");
    let config = folder.join("config.json");
    change(
        &config,
        "\"use_cache\"",
        "\"quantization_config\": {\"quant_method\": \"awq\"}, \"use_cache\"",
    );
    strand(&generate(&folder, &[])).refused(1, "quantization_config");
}

#[test]
fn numbers_that_are_none_are_traced_to_their_layer() {
    let folder = copy_of_demo("not-a-number");
    let weights = folder.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("it was copied");
    // eight bytes of length, the header, then the data that its offsets count from
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("it is JSON");
    let offsets = &header["model.layers.2.mlp.down_proj.weight"]["data_offsets"];
    let start = 8 + length + offsets[0].as_u64().expect("a number") as usize;
    bytes[start..start + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    fs::write(&weights, bytes).expect("it can be written");
    let run = strand(&generate(&folder, &[]));
    run.refused(1, "not a number");
    assert!(run.err.contains("layer 2") || run.err.contains("layers.2"), "{}", run.err);
}

#[test]
fn prompts_that_cannot_work_are_refused() {
    let file = scratch("prompts").join("binary");
    fs::write(&file, b"abc\xff").expect("it can be written");
    let path = file.to_str().expect("UTF-8");
    strand(&["generate", "-f", path]).refused(1, "not UTF-8, first at byte 3");
    strand(&["generate", "-f", "/no/such/prompt"]).refused(1, "/no/such/prompt");
    strand(&["generate", "-p", ""]).refused(1, "the prompt is empty");
    strand(&["generate", "--prompt-ids", "1,99999999"]).refused(1, "token id 99999999");
    strand(&["generate", "--prompt-ids", "1,-2"]).refused(2, "--prompt-ids");
    strand(&["generate", "--prompt-ids", ""]).refused(2, "--prompt-ids");
    let long = "word ".repeat(100);
    let options = ["generate", "-p", &long, "--max-model-len", "64"];
    strand(&options).refused(1, "the model takes at most 64");
    let options = ["generate", "-p", "word", "--max-model-len", "64", "--max-tokens", "64"];
    strand(&options).refused(1, "max_tokens (64)");
}

#[test]
fn limits_are_named_with_their_flag() {
    for flag in [
        "--block-size",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--max-model-len",
        "--max-tokens",
        "--threads",
        "--kv-memory",
    ] {
        for value in ["0", "-1"] {
            strand(&["generate", "-p", "x", flag, value]).refused(2, flag);
            strand(&["chat", flag, value]).refused(2, flag);
        }
    }
    strand(&["generate", "-p", "x", "--temperature", "-1"]).refused(2, "temperature is -1");
    strand(&["generate", "-p", "x", "--top-p", "0"]).refused(2, "top_p is 0");
    strand(&["generate", "-p", "x", "--stop", ""]).refused(2, "--stop");
    strand(&["generate", "-p", "x", "--kv-memory", "1KiB"]).refused(1, "--kv-memory");
    strand(&["generate", "-p", "x", "--max-model-len", "99999999"]).refused(1, "max_model_len");
    strand(&["bench", "throughput", "--num-seqs", "0"]).refused(2, "--num-seqs");
    let options = ["bench", "throughput", "--min-input-len", "9", "--max-input-len", "3"];
    strand(&options).refused(2, "--min-input-len 9 exceeds --max-input-len 3");
}

#[test]
fn numbers_beyond_any_machine_are_refused_in_words() {
    let too_large = usize::MAX.to_string();
    let run = strand(&["generate", "-p", "x", "--block-size", &too_large]);
    run.refused(2, "must be at most 4294967295");
    let largest = u32::MAX.to_string();
    for (flag, value, text) in [
        ("--kv-memory", "1000TiB", "lower --kv-memory"),
        ("--block-size", largest.as_str(), "block_size is 4294967295"),
        ("--threads", largest.as_str(), "threads is 4294967295"),
        ("--max-tokens", largest.as_str(), "exceed the model's length"),
    ] {
        strand(&["generate", "-p", "x", flag, value]).refused(1, text);
    }
    let served = strand(&["generate", "-p", "x", "--max-tokens", "1", "--max-num-seqs", &largest]);
    assert_eq!(served.status, 0, "{served:?}");
}

#[test]
fn wrong_usage_is_status_two() {
    strand(&["generate"]).refused(2, "--prompt");
    let gpu = strand(&["generate", "-p", "x", "--device", "cuda:99"]);
    if cfg!(feature = "cuda") {
        gpu.refused(1, "cuda"); // no machine has that many
    } else {
        gpu.refused(2, "not built into this program; use auto or cpu, or build it with");
    }
    strand(&["generate", "-p", "x", "--device", "tpu"]).refused(2, "cuda[:N]");
    strand(&["generate", "-p", "x", "--dtype", "int3"]).refused(2, "--dtype");
    strand(&["generate", "-p", "x", "--kv-memory", "lots"]).refused(2, "2GiB");
    strand(&["generate", "-p", "x", "--host-memory", "-1"]).refused(2, "--host-memory");
    strand(&["generate", "-p", "x", "--blend-tokens", "-1"]).refused(2, "--blend-tokens");
    strand(&["generate", "-p", "x", "--kv-codec", "zip"]).refused(2, "raw, planes or int8");
    strand(&["generate", "-p", "x", "--restore", "now"]).refused(2, "auto, always or never");
    strand(&["chat", "--context", ""]).refused(2, "--context");
    strand(&["generate", "-p", "x", "--no-such-flag"]).refused(2, "--no-such-flag");
    strand(&["dance"]).refused(2, "dance");
    let file = scratch("options").join("wrong.toml");
    fs::write(&file, "blok-size = 3").expect("it can be written");
    let path = file.to_str().expect("UTF-8");
    strand(&["generate", "-p", "x", "--config", path]).refused(2, "blok-size");
    strand(&["generate", "-p", "x", "--config", "/no/such.toml"]).refused(2, "/no/such.toml");
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [&["--help"][..], &["--version"], &["chat", "--help"], &["bench", "--help"]] {
        let run = strand(arguments);
        assert_eq!((run.status, run.err.as_str()), (0, ""));
        assert!(!run.out.is_empty());
    }
}
