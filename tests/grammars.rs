//! Answers that hold to a grammar: whatever the model would rather say, what comes out is valid.

use std::time::{Duration, Instant};

use serde_json::Value;
use strand_engine::{
    EngineConfig, EngineHandle, Error, Event, EventStream, FinishReason, Grammar, GrammarSpec,
    Grammars, Request, SamplingParams, TokenLogprobs,
};
use strand_models::{ModelFiles, ModelSource};

/// The longest that a hostile grammar may take, on a slow machine.
const SOON: Duration = Duration::from_secs(5);

fn demo(kv_memory: u64, max_model_len: usize) -> (EngineHandle, Grammars) {
    let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
    let config = EngineConfig {
        kv_memory: Some(kv_memory),
        max_model_len: Some(max_model_len),
        max_num_seqs: 64,
        ..EngineConfig::default()
    };
    let handle = strand_engine::start(files, &config, None, &mut |_, _| {}).expect("it fits");
    let grammars = handle.make_grammars().expect("the bundled model has a tokenizer");
    (handle, grammars)
}

fn request(handle: &EngineHandle, prompt: &str, grammar: Option<&Grammar>) -> Request {
    let tokenizer = handle.tokenizer().expect("the bundled model has one");
    let mut request = Request::new(tokenizer.encode(prompt).expect("any text can be encoded"));
    request.limits.grammar = grammar.cloned();
    request.limits.max_tokens = Some(200);
    request
}

/// A request whose tokens are drawn as the model weighs them.
fn drawn(handle: &EngineHandle, grammar: &Grammar, seed: u64) -> Request {
    let mut request = request(handle, "An example in JSON: ", Some(grammar));
    request.sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
    request
}

fn schema(grammars: &Grammars, schema: &str) -> Grammar {
    let spec = GrammarSpec::JsonSchema(schema.into());
    grammars.compile(&spec).unwrap_or_else(|error| panic!("{schema}: {error}"))
}

fn regex(grammars: &Grammars, pattern: &str) -> Grammar {
    grammars.compile(&GrammarSpec::Regex(pattern.into())).expect("it is sound")
}

/// A choice's text, tokens and end.
#[derive(Debug, Default, Clone, PartialEq)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    reason: Option<FinishReason>,
}

fn choices(mut events: EventStream, n: usize) -> Result<Vec<Answer>, Error> {
    let mut answers = vec![Answer::default(); n];
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Token { choice, token, text, logprobs } => {
                let answer = &mut answers[choice as usize];
                answer.text.push_str(&text);
                answer.tokens.push(token);
                answer.logprobs.extend(logprobs);
            }
            Event::Finished { choice, reason, text, .. } => {
                let answer = &mut answers[choice as usize];
                answer.text.push_str(&text);
                answer.reason = Some(reason);
            }
            Event::Failed(error) => return Err(error),
            Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
    Ok(answers)
}

fn finish(events: EventStream) -> Answer {
    choices(events, 1).expect("it answers").remove(0)
}

fn answer(handle: &EngineHandle, request: Request) -> Answer {
    finish(handle.submit(request).expect("the door is open"))
}

#[test]
fn a_json_object_is_one_whatever_is_drawn() {
    let (handle, grammars) = demo(32 << 20, 256);
    let grammar = grammars.compile(&GrammarSpec::JsonObject).expect("it is sound");
    let streams = (0..24).map(|seed| handle.submit(drawn(&handle, &grammar, seed)));
    let streams: Vec<EventStream> = streams.map(|stream| stream.expect("it is open")).collect();
    let mut whole = 0;
    for stream in streams {
        let answer = finish(stream);
        assert!(answer.text.starts_with('{'), "{answer:?}");
        if answer.reason == Some(FinishReason::Stop) {
            whole += 1;
            let value: Value = serde_json::from_str(&answer.text).expect("it is JSON");
            assert!(value.is_object(), "{answer:?}");
        }
    }
    assert!(whole > 0, "some come to their end");
}

#[test]
fn every_answer_to_two_hundred_schemas_validates() {
    let (handle, grammars) = demo(64 << 20, 512);
    let schemas: Vec<&str> = include_str!("fixtures/schemas.jsonl").lines().collect();
    assert_eq!(schemas.len(), 200);
    let (mut whole, mut cut) = (0, 0);
    for schemas in schemas.chunks(50) {
        let mut streams: Vec<(&str, EventStream)> = Vec::new();
        for &text in schemas {
            let grammar = schema(&grammars, text);
            for seed in 1..=3 {
                let mut request = drawn(&handle, &grammar, seed);
                request.limits.max_tokens = Some(400);
                // the bundled model loves a digit so much that it goes on with it for ever
                request.sampling.frequency_penalty = 2.0;
                streams.push((text, handle.submit(request).expect("it is open")));
            }
        }
        for (text, stream) in streams {
            let answer = finish(stream);
            if answer.reason == Some(FinishReason::Length) {
                cut += 1;
                continue;
            }
            whole += 1;
            assert_valid(text, &answer.text);
        }
    }
    eprintln!("{whole} whole, {cut} cut");
    assert!(cut * 20 <= whole, "{cut} of {} came to no end", whole + cut);
}

fn assert_valid(schema: &str, answer: &str) {
    let schema: Value = serde_json::from_str(schema).expect("the corpus is JSON");
    let validator = jsonschema::options().should_validate_formats(true).build(&schema);
    let validator = validator.expect("the corpus holds schemas");
    let value: Value = serde_json::from_str(answer)
        .unwrap_or_else(|error| panic!("{error}: {answer} for {schema}"));
    if let Err(error) = validator.validate(&value) {
        panic!("{error}: {answer} for {schema}");
    }
}

/// A JSON text of `count` items.
fn list(item: &dyn Fn(usize) -> String, count: usize) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(",")
}

/// Schemas that would take memory or time without end, and what is said of them.
fn hostile_schemas() -> Vec<(String, &'static str)> {
    let deep = |depth: usize| r#"{"items":"#.repeat(depth) + "{}" + &"}".repeat(depth);
    let values = list(&|n| n.to_string(), 20_000);
    let options = list(&|_| "true".into(), 4000);
    let wide = list(&|n| format!(r#""p{n}":{{"type":"integer"}}"#), 4000);
    let patterns = list(&|n| format!(r#""^a{n}.*b$":true"#), 2000);
    let product = list(&|n| format!(r#"{{"anyOf":[{{"minimum":{n}}},{{"maximum":{n}}}]}}"#), 40);
    let doubled = list(
        &|n| {
            format!(
                r##""d{n}":{{"allOf":[{{"$ref":"#/$defs/d{0}"}},{{"$ref":"#/$defs/d{0}"}}]}}"##,
                n + 1
            )
        },
        60,
    );
    let large = "its parts combine to more than 200000 schemas";
    vec![
        (deep(3000), "recursion limit"),
        (format!(r#"{{"enum":[{values}]}}"#), "more than 10000 values in enums"),
        (r#"{"type":"array","minItems":1000000000}"#.into(), "minItems is 1000000000"),
        (r#"{"type":"string","minLength":1000000000}"#.into(), "minLength is 1000000000"),
        (r##"{"$ref":"#"}"##.into(), "no text can come next"),
        (
            r##"{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}"##
                .into(),
            "no text can come next",
        ),
        (r##"{"$ref":"#","type":"object"}"##.into(), "circular references"),
        (format!(r#"{{"oneOf":[{options}],"properties":{{{wide}}}}}"#), large),
        (format!(r#"{{"type":"integer","allOf":[{product}]}}"#), large),
        (
            format!(r##"{{"$defs":{{{doubled},"d60":{{"minimum":0}}}},"$ref":"#/$defs/d0"}}"##),
            large,
        ),
        (format!(r#"{{"patternProperties":{{{patterns}}}}}"#), "more than 50 patternProperties"),
        (format!(r#"{{"title":"{}"}}"#, "a".repeat(300_000)), "at most 262144"),
    ]
}

#[test]
fn what_a_grammar_cannot_hold_to_is_refused_by_name_and_in_time() {
    let (_handle, grammars) = demo(16 << 20, 256);
    let schemas = [
        (r#"{"$ref":"https://example.org/schema"}"#, "\"https://example.org/schema\" is outside"),
        (r#"{"properties":{"a":{"$ref":"file:///etc/passwd"}}}"#, "is outside the schema"),
        (r##"{"$ref":"#/$defs/nowhere"}"##, "/$defs/nowhere"),
        (r#"{"not":{"type":"string"}}"#, "[\"not\"]"),
        (r#"{"not":{},"x-guidance":{"lenient":true}}"#, "[\"not\"]"),
        (r#"{"type":"array","uniqueItems":true}"#, "[\"uniqueItems\"]"),
        (r#"{"if":{},"then":{}}"#, "[\"if\", \"then\"]"),
        (r#"{"type":"string","format":"credit-card"}"#, "credit-card"),
        (r#"{"oneOf":[{"minimum":1},{"maximum":2}]}"#, "oneOf"),
        (r#"{"type":"integer","minimum":3,"maximum":2}"#, "minimum (3) is greater than maximum"),
        (r#"{"type":"string","pattern":"(?=a)b"}"#, "look-ahead"),
        ("{", "not JSON"),
        ("[1]", "must be an object"),
    ];
    let schemas = schemas.map(|(text, says)| (text.to_string(), says)).into_iter();
    let schemas = schemas.chain(hostile_schemas());
    let schemas = schemas.map(|(text, says)| (GrammarSpec::JsonSchema(text), says));
    let deep = |count: usize| "(".repeat(count) + "a" + &")".repeat(count);
    let others = [
        (GrammarSpec::Regex(r"(a)\1".into()), "backreferences"),
        (GrammarSpec::Regex("(".into()), "unclosed group"),
        (GrammarSpec::Regex(deep(100_000)), "nest 100000 deep"),
        (GrammarSpec::Lark(format!("start: {}", deep(20_000))), "nest 20000 deep"),
        (GrammarSpec::Lark("start: nothing".into()), "\"nothing\""),
        (GrammarSpec::Lark(String::new()), "no start rule"),
        (GrammarSpec::Lark(r#"start: %json {"minItems":99999}"#.into()), "minItems is 99999"),
        (GrammarSpec::Lark("start: %json {\"a\"".into()), "no JSON"),
    ];
    for (spec, says) in schemas.chain(others) {
        let started = Instant::now();
        let error = grammars.compile(&spec).map(|_| spec.clone()).expect_err("it is refused");
        let (error, took) = (error.to_string(), started.elapsed());
        assert!(error.contains(says), "{says:?} is not in {error:?}");
        assert!(took < SOON, "{error} took {took:?}");
    }
}

#[test]
fn what_looks_hostile_but_is_not_costs_little() {
    let (handle, grammars) = demo(16 << 20, 256);
    let chain = list(&|n| format!(r##""c{n}":{{"$ref":"#/$defs/c{}"}}"##, n + 1), 8000);
    let rules = (0..9000).map(|n| format!("r{n}: r{}\n", n + 1)).collect::<String>();
    let schema = |text: &str| GrammarSpec::JsonSchema(text.into());
    for spec in [
        schema(r#"{"type":"string","maxLength":1000000000}"#),
        schema(r#"{"type":"array","minItems":10000,"maxItems":1000000000}"#),
        schema(r#"{"type":"string","pattern":"^((a{1,100}){1,100}){1,100}$"}"#),
        schema(&format!(r##"{{"$defs":{{{chain},"c8000":{{}}}},"$ref":"#/$defs/c0"}}"##)),
        GrammarSpec::Lark(format!("start: r0\n{rules}r9000: \"a\"\n")),
        GrammarSpec::Lark("start: start start | \"a\" | \"\"".into()),
        GrammarSpec::Regex("(.*a.*b.*c.*d){1,500}".into()),
        GrammarSpec::Regex("[ab]*a[ab]{3000}".into()),
    ] {
        let started = Instant::now();
        let grammar = grammars.compile(&spec).expect("it is sound");
        let mut request = drawn(&handle, &grammar, 1);
        request.limits.max_tokens = Some(20);
        // whether a mask is found or too much work: it is said soon
        drop(choices(handle.submit(request).expect("it is open"), 1));
        let took = started.elapsed();
        assert!(took < SOON, "{took:?}");
    }
}

#[test]
fn a_grammar_that_becomes_too_large_fails_its_request_alone() {
    let (handle, grammars) = demo(16 << 20, 256);
    let starts: String = (0..100).map(|n| format!("x{n} ")).collect();
    let rules: String = (0..100).map(|n| format!("x{n}: \"\" | x{n} \"a\"\n")).collect();
    let ambiguous = format!("start: {starts}\n{rules}");
    let ambiguous = grammars.compile(&GrammarSpec::Lark(ambiguous)).expect("it is sound");
    let word = regex(&grammars, "[a-z]{40}");
    let alone = answer(&handle, drawn(&handle, &word, 1));
    let mut long = drawn(&handle, &ambiguous, 1);
    long.limits.min_tokens = 200;
    let failing = handle.submit(long).expect("it is open");
    let beside = answer(&handle, drawn(&handle, &word, 1));
    let error = choices(failing, 1).expect_err("too many readings");
    assert!(matches!(&error, Error::Grammar { .. }), "{error}");
    assert_eq!(beside, alone);
    let stats = handle.stats().expect("it runs");
    assert_eq!(stats.blocks_free, stats.blocks, "{stats:?}");
}

#[test]
fn where_all_is_allowed_the_answer_is_the_same_to_the_bit() {
    let (handle, grammars) = demo(32 << 20, 256);
    let anything = regex(&grammars, "(?s:.*)");
    for prompt in ["Hello", "# file: notes.txt\nThe key is 7.\n\nWhat is the key?"] {
        let ask = |grammar| {
            let mut request = request(&handle, prompt, grammar);
            request.limits.max_tokens = Some(40);
            request.limits.logprobs = Some(8);
            answer(&handle, request)
        };
        let free = ask(None);
        assert_eq!(ask(Some(&anything)), free);
        // nor by a grammar that allows nothing else: it ends where the text ends
        let quoted: String = free.text.chars().map(|c| format!("\\x{{{:x}}}", c as u32)).collect();
        let same = ask(Some(&regex(&grammars, &quoted)));
        assert_eq!(same.text, free.text);
        assert_eq!(same.reason, Some(FinishReason::Stop));
        assert_eq!(same.logprobs, free.logprobs[..same.tokens.len()]);
    }
}

#[test]
fn neighbours_and_preemption_change_no_answer() {
    let (handle, grammars) = demo(32 << 20, 256);
    let person = schema(&grammars, PERSON);
    let date = schema(&grammars, r#"{"type":"string","format":"date"}"#);
    let word = regex(&grammars, "[a-z]{40}");
    let asked = |n: u64| drawn(&handle, [&person, &date, &word][n as usize % 3], n);
    let alone: Vec<Answer> = (0..24).map(|n| answer(&handle, asked(n))).collect();
    // 1 MiB: far less than 24 answers take, so that some give way and come back
    let (small, _) = demo(1 << 20, 256);
    for handle in [&handle, &small] {
        let together: Vec<EventStream> =
            (0..24).map(|n| handle.submit(asked(n)).expect("it is open")).collect();
        let together: Vec<Answer> = together.into_iter().map(finish).collect();
        assert_eq!(together, alone);
    }
    let stats = small.stats().expect("it runs");
    assert!(stats.preemptions > 0, "{stats:?}");
}

const PERSON: &str = r#"{"type": "object", "required": ["name", "age"],
    "properties": {"name": {"type": "string", "maxLength": 30},
    "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "additionalProperties": false}"#;

#[test]
fn every_choice_has_its_own_place_in_the_grammar() {
    let (handle, grammars) = demo(32 << 20, 256);
    let grammar = schema(&grammars, PERSON);
    let mut request = drawn(&handle, &grammar, 5);
    request.limits.n = 5;
    let answers = choices(handle.submit(request).expect("it is open"), 5).expect("it answers");
    for answer in &answers {
        assert_eq!(answer.reason, Some(FinishReason::Stop));
        assert_valid(PERSON, &answer.text);
    }
    assert!(answers.iter().any(|answer| answer.text != answers[0].text), "drawn apart");
}

#[test]
fn a_complete_grammar_ends_the_answer_and_stops_end_it_before() {
    let (handle, grammars) = demo(32 << 20, 256);
    let grammar = regex(&grammars, "[a-z]{6}-[a-z]{6}");
    let ask = |change: &dyn Fn(&mut Request)| {
        let mut request = drawn(&handle, &grammar, 3);
        change(&mut request);
        answer(&handle, request)
    };
    let whole = ask(&|_| {});
    assert_eq!((whole.text.len(), whole.reason), (13, Some(FinishReason::Stop)));
    assert_eq!(ask(&|r| r.limits.ignore_eos = true), whole);
    assert_eq!(ask(&|r| r.limits.min_tokens = 150), whole, "there is nothing more to say");
    let first = &whole.text.split('-').next().expect("split gives a part");
    let stopped = ask(&|r| r.limits.stop = vec!["-".into()]);
    assert_eq!((stopped.text.as_str(), stopped.reason), (*first, Some(FinishReason::Stop)));
    let cut = ask(&|r| r.limits.max_tokens = Some(2));
    assert_eq!((cut.tokens.len(), cut.reason), (2, Some(FinishReason::Length)));
    let biased = ask(&|r| r.sampling.logit_bias = vec![(whole.tokens[0], -100.0), (0, 100.0)]);
    assert_eq!(biased.text.len(), 13);
    assert_ne!(biased.tokens[0], whole.tokens[0]);
    // where more may follow, min_tokens keeps the end away
    let open = regex(&grammars, "a+");
    let mut request = drawn(&handle, &open, 3);
    request.limits.min_tokens = 20;
    assert!(answer(&handle, request).tokens.len() >= 20);
}

#[test]
fn text_cannot_spell_a_special_token() {
    let (handle, grammars) = demo(32 << 20, 256);
    let tokenizer = handle.tokenizer().expect("the bundled model has one");
    let special = (0..tokenizer.vocab_size() as u32).find(|&id| tokenizer.is_special(id));
    let special = special.expect("the bundled model has special tokens");
    let name = tokenizer.token_text(special).expect("it has a name");
    let grammar = regex(&grammars, &name.replace('|', "\\|"));
    let mut request = drawn(&handle, &grammar, 0);
    request.sampling.logit_bias = vec![(special, 100.0)];
    let answer = answer(&handle, request);
    assert_eq!(answer.text, name, "its name, letter by letter");
    assert!(!answer.tokens.contains(&special));
}
