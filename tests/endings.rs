//! Every request ends and returns its blocks, whatever ends it.

use std::path::Path;

use strand_engine::{
    EngineConfig, EngineHandle, Error, Event, FinishReason, Request, SamplingParams,
};
use strand_models::{ModelFiles, ModelSource};

use crate::random::Random;

fn demo(config: &EngineConfig) -> EngineHandle {
    let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
    strand_engine::start(files, config, None, &mut |_, _| {}).expect("it fits")
}

pub fn small() -> EngineConfig {
    EngineConfig {
        kv_memory: Some(1 << 20),
        max_model_len: Some(256),
        max_num_seqs: 4,
        max_queue: 6,
        ..EngineConfig::default()
    }
}

fn request(handle: &EngineHandle, text: &str, max_tokens: usize) -> Request {
    let tokenizer = handle.tokenizer().expect("the bundled model has one");
    let mut request = Request::new(tokenizer.encode(text).expect("any text can be encoded"));
    request.limits.max_tokens = Some(max_tokens);
    request.limits.ignore_eos = true;
    request
}

/// Text, number of tokens and how it ended.
fn answer(handle: &EngineHandle, request: Request) -> Result<(String, usize, FinishReason), Error> {
    let mut events = handle.submit(request)?;
    let (mut all, mut tokens) = (String::new(), 0);
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Token { text, .. } => {
                all.push_str(&text);
                tokens += 1;
            }
            Event::Finished { text, reason, .. } => return Ok((all + &text, tokens, reason)),
            Event::Failed(error) => return Err(error),
            Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
    panic!("the stream ended without an end");
}

/// Waits until the engine has nothing to do and looks at its books.
fn assert_whole(handle: &EngineHandle) {
    loop {
        let stats = handle.stats().expect("it runs");
        if stats.running + stats.waiting == 0 {
            assert_eq!(stats.blocks_free, stats.blocks, "{stats:?}");
            return;
        }
        std::thread::yield_now();
    }
}

#[test]
fn length_stop_token_and_stop_string_end_an_answer() {
    let handle = demo(&small());
    let (text, tokens, reason) =
        answer(&handle, request(&handle, "Hello", 24)).expect("it answers");
    assert_eq!((tokens, reason), (24, FinishReason::Length));

    // a piece from the middle of the answer, cut across tokens
    let characters: Vec<char> = text.chars().collect();
    let middle = characters.len() / 2;
    let stop: String = characters[middle..middle + 3].iter().collect();
    let mut stopped = request(&handle, "Hello", 24);
    stopped.limits.stop = vec![stop.clone()];
    let (shown, tokens, reason) = answer(&handle, stopped).expect("it answers");
    let before = text.split(&stop).next().expect("split gives a part");
    assert_eq!((shown.as_str(), reason), (before, FinishReason::Stop));
    assert!(tokens <= 24);
    let mut later = request(&handle, "Hello", 24);
    later.limits.stop = vec![text.chars().next().expect("not empty").to_string()];
    later.limits.min_tokens = 12;
    let (shown, tokens, _) = answer(&handle, later).expect("it answers");
    assert!(tokens >= 12 && text.starts_with(&shown), "no stop string before min_tokens");

    let tokenizer = handle.tokenizer().expect("it has one").clone();
    let second = tokenizer.encode(&text).expect("it can be encoded")[1];
    let mut stopped = request(&handle, "Hello", 24);
    stopped.limits.stop_token_ids = vec![second];
    let (_, tokens, reason) = answer(&handle, stopped.clone()).expect("it answers");
    assert!(tokens < 24 && reason == FinishReason::Stop);
    stopped.limits.min_tokens = 12;
    let (_, tokens, _) = answer(&handle, stopped).expect("it answers");
    assert!(tokens >= 12, "no stop token before min_tokens");
    assert_whole(&handle);
}

#[test]
fn what_cannot_be_served_is_refused_with_its_numbers() {
    let handle = demo(&small());
    let refusal = |change: &dyn Fn(&mut Request)| {
        let mut bad = request(&handle, "Hello", 4);
        change(&mut bad);
        answer(&handle, bad).expect_err("it must be refused").to_string()
    };
    let long = refusal(&|r| r.prompt[0].tokens = vec![5; 256]);
    assert_eq!(
        long,
        "the prompt has 256 tokens, the model takes at most 256 including at least one to \
         generate; shorten it or raise --max-model-len"
    );
    assert!(refusal(&|r| r.prompt[0].tokens.clear()).contains("prompt is empty"));
    assert!(refusal(&|r| r.prompt.clear()).contains("prompt is empty"));
    assert!(refusal(&|r| r.prompt[0].tokens[0] = 1 << 30).contains("token id 1073741824"));
    assert!(refusal(&|r| r.limits.max_tokens = Some(1000)).contains("max_tokens (1000)"));
    assert_eq!(
        refusal(&|r| r.limits.max_tokens = Some(0)),
        "max_tokens is 0, it must be at least 1"
    );
    assert_eq!(refusal(&|r| r.limits.n = 0), "n is 0, it must be at least 1");
    assert_eq!(refusal(&|r| r.limits.stop = vec![String::new()]), "stop string 0 is empty");
    let sampling = SamplingParams { temperature: -1.0, ..SamplingParams::default() };
    assert!(refusal(&|r| r.sampling = sampling.clone()).starts_with("temperature is -1"));
    assert_whole(&handle);
}

#[test]
fn a_full_queue_and_dropped_receivers_leave_the_pool_whole() {
    let handle = demo(&small());
    let mut random = Random::new(11);
    let mut refused = 0;
    for _ in 0..20 {
        let mut streams = Vec::new();
        for _ in 0..30 {
            let mut asked = request(&handle, "Hello there", 1 + random.between(0, 40));
            asked.limits.n = 1 + random.between(0, 2) as u32;
            streams.push(handle.submit(asked).expect("the door is open"));
        }
        for mut stream in streams {
            for _ in 0..random.between(0, 6) {
                match stream.next_blocking() {
                    Some(Event::Failed(Error::QueueFull { limit: 6 })) => refused += 1,
                    Some(Event::Failed(error)) => panic!("{error}"),
                    Some(_) => {}
                    None => break,
                }
            } // dropped here, finished or not
        }
        assert_whole(&handle);
    }
    assert!(refused > 0, "the queue was meant to overflow");
}

#[test]
fn not_a_number_names_the_layer_and_spares_the_neighbours() {
    not_a_number(&small());
}

/// A model whose second layer multiplies with a NaN; `base` says on what.
pub fn not_a_number(base: &EngineConfig) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/qwen3-wide");
    let folder =
        std::env::temp_dir().join(format!("strand-nan-{}-{}", base.device, std::process::id()));
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    std::fs::copy(fixtures.join("config.json"), folder.join("config.json")).expect("copied");
    let mut bytes = std::fs::read(fixtures.join("model.safetensors")).expect("the fixture");
    poison(&mut bytes, "model.layers.1.mlp.down_proj.weight");
    std::fs::write(folder.join("model.safetensors"), bytes).expect("written");

    let files = ModelFiles::open(&ModelSource::Folder(folder.clone())).expect("it loads");
    let config = EngineConfig { max_model_len: Some(256), ..base.clone() };
    let handle = strand_engine::start(files, &config, None, &mut |_, _| {}).expect("it starts");
    for _ in 0..2 {
        let error = answer(&handle, Request::new(vec![5, 6, 7])).expect_err("nothing to sample");
        assert_eq!(
            error.to_string(),
            "the model produced a value that is not a number, first in model.layers.1.mlp"
        );
    }
    assert_whole(&handle);
    std::fs::remove_dir_all(folder).expect("the folder can be removed");
}

/// Writes a bf16 NaN over the first value of a tensor in a safetensors file.
fn poison(file: &mut [u8], tensor: &str) {
    let length = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Value =
        serde_json::from_slice(&file[8..8 + length]).expect("the header is JSON");
    let start = header[tensor]["data_offsets"][0].as_u64().expect("it is there") as usize;
    file[8 + length + start..][..2].copy_from_slice(&0x7FC0u16.to_le_bytes());
}
