use std::path::PathBuf;

use super::*;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// The config asks for exactly the tensors the checkpoint holds.
fn check_complete(files: &ModelFiles) {
    for (name, shape) in files.config.tensors() {
        let [rows, columns] = shape[..] else {
            files.weights.vector(&name, shape[0]).unwrap();
            continue;
        };
        let threads = strand_kernels::Threads::new(1);
        let dtype = files.config.dtype;
        files.weights.packed(&[(&name, rows)], columns, dtype, &threads).unwrap();
    }
    assert_eq!(files.weights.unused(), [""; 0]);
}

#[test]
fn every_fixture_opens_and_is_complete() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(fixtures().join("models")).unwrap() {
        let source = ModelSource::Folder(entry.unwrap().path());
        let files = ModelFiles::open(&source).unwrap();
        check_complete(&files);
        assert!(files.tokenizer.is_none());
        names.push(files.name);
    }
    names.sort();
    let expected = "linear llama2 llama3 mistral mistral-wide qwen2 qwen2-wide qwen3 qwen3-wide \
                    smollm2 yarn";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn every_gguf_fixture_opens_and_is_complete() {
    for name in ["llama", "qwen3"] {
        for kind in ["f32", "f16", "bf16", "q8_0", "q4_0"] {
            let path = fixtures().join(format!("gguf/{name}-{kind}.gguf"));
            let files = ModelFiles::open(&ModelSource::Gguf(path)).unwrap();
            check_complete(&files);
            assert_eq!(files.name, format!("{name}-{kind}"));
            assert_eq!(files.generation.stop_token_ids, [2]);
            assert_eq!(files.config.tie_word_embeddings, name == "qwen3");
        }
    }
}

#[test]
fn the_bundled_model_is_complete_and_speaks() {
    let files = ModelFiles::open(&ModelSource::Demo).unwrap();
    check_complete(&files);
    assert!(files.chat_template.is_some());
    let tokenizer = files.tokenizer.unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode_text("hello there").unwrap()), "hello there");
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    assert!(files.generation.stop_token_ids.contains(&end));
}

#[test]
fn random_weights_need_only_a_config() {
    let config_json = PRESETS[0].1.to_string();
    let files =
        ModelFiles::open(&ModelSource::Random { config_json, seed: 1, recipe: None }).unwrap();
    assert_eq!(files.weights.vector("model.norm.weight", 1024).unwrap(), [1.0; 1024]);
    assert_eq!(files.generation.stop_token_ids, [151645]);
}

#[test]
fn stop_tokens_come_from_every_place_that_names_them() {
    let demo = ModelFiles::open(&ModelSource::Demo).unwrap();
    let mut config = demo.config;
    config.eos_token_ids = vec![7];
    let tokenizer = demo.tokenizer.unwrap();
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    let generation = r#"{"eos_token_id": [9, 7], "temperature": 0.6, "top_k": 20}"#;
    for tokenizer_config in [
        r#"{"eos_token": "<|im_end|>"}"#,
        r#"{"eos_token": {"content": "<|im_end|>", "lstrip": false}}"#,
    ] {
        let defaults = GenerationDefaults::new(
            Some(generation),
            Some(tokenizer_config),
            Some(&tokenizer),
            &config,
        );
        let defaults = defaults.unwrap();
        assert_eq!(defaults.stop_token_ids, [7, 9, end]);
        assert_eq!((defaults.temperature, defaults.top_k), (Some(0.6), Some(20)));
        assert_eq!((defaults.top_p, defaults.do_sample), (None, None));
    }
}

#[test]
fn a_source_is_told_by_its_spelling_and_by_what_exists() {
    let parse = |text: &str| ModelSource::parse(text);
    let demo = format!("{}/demo", env!("CARGO_MANIFEST_DIR"));
    assert_eq!(parse(&demo).unwrap(), ModelSource::Folder(PathBuf::from(&demo)));
    let gguf = fixtures().join("gguf/llama-f32.gguf");
    assert_eq!(parse(gguf.to_str().unwrap()).unwrap(), ModelSource::Gguf(gguf));
    for id in ["Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d"] {
        assert_eq!(parse(id).unwrap(), ModelSource::Hub(id.to_string()));
    }
    let error = |text: &str| parse(text).unwrap_err().to_string();
    assert_eq!(error("./none"), "no model at ./none: there is no such folder");
    assert_eq!(error("~/models/none"), "no model at ~/models/none: there is no such folder");
    assert_eq!(error("org/none.gguf"), "no model at org/none.gguf: there is no such file");
    assert_eq!(
        error("qwen3"),
        "qwen3 is neither a folder, a .gguf file nor a hub id like Qwen/Qwen3-0.6B"
    );
    for text in ["", "a/b/c", "a/", "/b", "a/-b", "a b/c", "a/b\u{e9}"] {
        parse(text).unwrap_err();
    }
    let config = format!("{demo}/config.json");
    assert!(error(&config).contains("it is a file, but no .gguf"));
}

#[test]
fn a_folder_without_config_is_named() {
    let folder = std::env::temp_dir().join(format!("strand-none-{}", std::process::id()));
    let open = || {
        let error = ModelFiles::open(&ModelSource::Folder(folder.clone())).err().unwrap();
        error.to_string().replace(&folder.display().to_string(), "FOLDER")
    };
    assert_eq!(open(), "no model at FOLDER: there is no such folder");
    std::fs::create_dir_all(&folder).unwrap();
    assert_eq!(open(), "no model at FOLDER: it holds no config.json");
    std::fs::remove_dir_all(&folder).unwrap();
}
