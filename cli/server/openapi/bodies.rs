//! Bodies of requests, as `/openapi.json` tells them.
//!
//! Requests are read field by field, more leniently than a type can say; these say what a client
//! should send. Nothing is made of them but schemas, and a test holds them to the readers.
#![expect(dead_code, reason = "what is read is told here, and read elsewhere")]

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// How tokens are chosen.
#[derive(Serialize, ToSchema)]
pub struct Sampling {
    model: Option<String>,
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// 0 and -1 keep every token.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    #[schema(minimum = 0.01, maximum = 100)]
    repetition_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    seed: Option<i64>,
    /// Parts caches: 1 to 128 letters, none of them `@`, `/` or `\`.
    #[schema(min_length = 1, max_length = 128)]
    cache_salt: Option<String>,
    stream: Option<bool>,
}

/// What ends an answer and is no part of it.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

/// What chats and completions have in common.
#[derive(Serialize, ToSchema)]
pub struct Common {
    #[serde(flatten)]
    sampling: Sampling,
    #[schema(minimum = 1)]
    n: Option<u32>,
    /// Token id to what is added to its logit, from -100 to 100.
    logit_bias: Option<BTreeMap<String, f32>>,
    #[schema(minimum = 0)]
    min_tokens: Option<u64>,
    #[schema(max_items = 1024)]
    stop_token_ids: Option<Vec<u32>>,
    priority: Option<i32>,
    /// With `stream: true` alone.
    stream_options: Option<StreamOptions>,
    /// The conversation to go on with; it has its own chunks and policy.
    context: Option<String>,
    /// Chunks before this request alone.
    #[schema(max_items = 1024)]
    chunks: Option<Vec<String>>,
    reuse: Option<Policy>,
    return_token_ids: Option<bool>,
}

#[derive(Serialize, ToSchema)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// What a chunk's KV depends on.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Policy {
    Exact,
    Independent,
    Blend,
    Mask,
}

#[derive(Serialize, ToSchema)]
pub struct ChatRequest {
    #[serde(flatten)]
    common: Common,
    #[schema(min_items = 1, max_items = 4096)]
    messages: Vec<Message>,
    #[schema(minimum = 1)]
    max_tokens: Option<u64>,
    /// The newer name of `max_tokens`.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u64>,
    logprobs: Option<bool>,
    /// With `logprobs: true` alone.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    #[serde(flatten)]
    tools: ToolFields,
    #[serde(flatten)]
    form: FormFields,
}

#[derive(Serialize, ToSchema)]
struct Message {
    role: Role,
    content: Option<MessageContent>,
    name: Option<String>,
    /// Of a tool's answer.
    tool_call_id: Option<String>,
    reasoning_content: Option<String>,
    tool_calls: Option<Vec<MadeCall>>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    Function,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum MessageContent {
    Text(String),
    Parts(Vec<Part>),
}

/// Text, or an assistant's `refusal`.
#[derive(Serialize, ToSchema)]
struct Part {
    /// `text`, `input_text`, `output_text` or `refusal`
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
    /// A reusable prefix ends behind this part.
    prompt_cache_breakpoint: Option<Map<String, Value>>,
}

/// A call that was made before.
#[derive(Serialize, ToSchema)]
struct MadeCall {
    id: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    function: MadeCallFunction,
}

#[derive(Serialize, ToSchema)]
struct MadeCallFunction {
    name: String,
    /// JSON, as text or as it is.
    arguments: Option<Arguments>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Arguments {
    Text(String),
    Object(Map<String, Value>),
}

/// Functions that may be called.
#[derive(Serialize, ToSchema)]
pub struct ToolFields {
    #[schema(max_items = 128)]
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
}

/// As chat completions nest it, or flat, as responses have it.
#[derive(Serialize, ToSchema)]
struct Tool {
    /// `function`
    #[serde(rename = "type")]
    kind: String,
    function: Option<Function>,
    #[schema(max_length = 64)]
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Map<String, Value>>,
}

#[derive(Serialize, ToSchema)]
struct Function {
    #[schema(min_length = 1, max_length = 64)]
    name: String,
    description: Option<String>,
    /// A JSON schema.
    parameters: Option<Map<String, Value>>,
}

/// `none`, `auto`, `required`; or one function, or `allowed_tools`, as an object.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum ToolChoice {
    Mode(String),
    Named(Map<String, Value>),
}

/// What an answer has to look like; one of these at most.
#[derive(Serialize, ToSchema)]
struct FormFields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    guided_json: Option<JsonSchema>,
    guided_regex: Option<String>,
    #[schema(min_items = 1, max_items = 1024)]
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
    guided_json_object: Option<bool>,
}

#[derive(Serialize, ToSchema)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: FormatKind,
    json_schema: Option<NamedSchema>,
    schema: Option<JsonSchema>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum FormatKind {
    Text,
    JsonObject,
    JsonSchema,
}

#[derive(Serialize, ToSchema)]
struct NamedSchema {
    name: Option<String>,
    schema: JsonSchema,
    strict: Option<bool>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum JsonSchema {
    Object(Map<String, Value>),
    /// Everything, or nothing.
    Flag(bool),
}

#[derive(Serialize, ToSchema)]
struct StructuredOutputs {
    json: Option<JsonSchema>,
    regex: Option<String>,
    #[schema(min_items = 1, max_items = 1024)]
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct TextRequest {
    #[serde(flatten)]
    common: Common,
    prompt: Prompt,
    /// 0 with `echo: true` alone.
    #[schema(minimum = 0)]
    max_tokens: Option<u64>,
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<u32>,
    echo: Option<bool>,
    add_special_tokens: Option<bool>,
    /// As many as `n`.
    #[schema(minimum = 1, maximum = 128)]
    best_of: Option<u32>,
    /// Nothing, where it is given.
    #[schema(max_length = 0)]
    suffix: Option<String>,
}

/// Text, token ids, or a list of either.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    Lists(Vec<Vec<u32>>),
}

#[derive(Serialize, ToSchema)]
pub struct ResponseRequest {
    #[serde(flatten)]
    sampling: Sampling,
    input: Input,
    instructions: Option<String>,
    #[schema(minimum = 1)]
    max_output_tokens: Option<u64>,
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    include: Option<Vec<String>>,
    text: Option<TextFields>,
    /// Known to the same socket alone.
    previous_response_id: Option<String>,
    /// `disabled`, where it is given.
    truncation: Option<String>,
    /// False, where it is given.
    background: Option<bool>,
    #[serde(flatten)]
    tools: ToolFields,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Input {
    Text(String),
    /// Messages, `function_call` and `function_call_output`.
    Items(Vec<Map<String, Value>>),
}

#[derive(Serialize, ToSchema)]
struct TextFields {
    format: Option<ResponseFormat>,
}

#[derive(Serialize, ToSchema)]
pub struct EmbeddingRequest {
    model: Option<String>,
    input: Prompt,
    encoding_format: Option<Encoding>,
    /// As many as the model's vectors have.
    #[schema(minimum = 1)]
    dimensions: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Encoding {
    Float,
    Base64,
}

#[derive(Serialize, ToSchema)]
pub struct TokenizeRequest {
    model: Option<String>,
    /// This, or messages.
    prompt: Option<String>,
    #[schema(min_items = 1, max_items = 4096)]
    messages: Option<Vec<Message>>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    #[serde(flatten)]
    tools: ToolFields,
}

#[derive(Serialize, ToSchema)]
pub struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Serialize, ToSchema)]
pub struct ChunkRequest {
    content: String,
    #[serde(flatten)]
    about: ChunkFields,
}

/// As a form, where the content is a file.
#[derive(Serialize, ToSchema)]
pub struct ChunkForm {
    #[schema(format = Binary)]
    file: String,
    #[serde(flatten)]
    about: ChunkFields,
}

#[derive(Serialize, ToSchema)]
struct ChunkFields {
    /// The file's name, or the first digits of its hash, where none is said.
    #[schema(min_length = 1, max_length = 256)]
    name: Option<String>,
    kind: Option<ChunkKind>,
    metadata: Option<Map<String, Value>>,
    #[schema(max_items = 64)]
    tags: Option<Vec<String>>,
    /// False: its KV is computed when it is first asked for.
    encode: Option<bool>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ChunkKind {
    File,
    Persona,
    Memory,
    Note,
}

#[derive(Serialize, ToSchema)]
pub struct PinRequest {
    #[schema(minimum = 1)]
    seconds: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct ContextRequest {
    #[schema(min_length = 1, max_length = 256)]
    name: Option<String>,
    policy: Option<Policy>,
    /// The empty text: none.
    system: Option<String>,
    #[schema(minimum = 0)]
    blend_tokens: Option<u64>,
    /// All its chunks, in order.
    #[schema(max_items = 1024)]
    chunks: Option<Vec<Placed>>,
    /// An empty list forgets the conversation.
    #[schema(max_items = 0)]
    messages: Option<Vec<Value>>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Placed {
    Id(String),
    Flagged(PlacedChunk),
}

#[derive(Serialize, ToSchema)]
#[schema(as = ContextChunk)]
struct PlacedChunk {
    id: String,
    active: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct PutRequest {
    active: Option<bool>,
    /// Its place among the context's chunks, from 0.
    #[schema(minimum = 0)]
    position: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct ForkRequest {
    #[schema(min_length = 1, max_length = 256)]
    name: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::document;
    use super::*;
    use crate::server::reading::{Body, Reading};

    /// Each body, its schema, and the least that is taken of it.
    fn bodies() -> [(Body, &'static str, Value); 8] {
        let chat = json!({"messages": [{"role": "user", "content": "x"}]});
        [
            (Body::Chat, "ChatRequest", chat.clone()),
            (Body::Text, "TextRequest", json!({"prompt": "x"})),
            (Body::Response, "ResponseRequest", json!({"input": "x"})),
            (Body::Embedding, "EmbeddingRequest", json!({"input": "x"})),
            (Body::Tokenize, "TokenizeRequest", chat),
            (Body::Detokenize, "DetokenizeRequest", json!({"tokens": [1]})),
            (Body::Chunk, "ChunkRequest", json!({"content": "x"})),
            (Body::Context, "ContextRequest", json!({})),
        ]
    }

    /// The fields of a schema, those that are flattened into it included.
    fn fields(all: &Value, schema: &Value) -> BTreeMap<String, Value> {
        let mut found = BTreeMap::new();
        if let Some(reference) = schema["$ref"].as_str() {
            let path = reference.strip_prefix('#').expect("it is in the document");
            found.extend(fields(all, all.pointer(path).expect("it is there")));
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            found.extend(fields(all, part));
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            found.insert(name.clone(), field.clone());
        }
        found
    }

    #[test]
    fn every_field_of_the_document_is_read() {
        let all = serde_json::to_value(document()).expect("it is JSON");
        for (body, name, least) in bodies() {
            let schema = &all["components"]["schemas"][name];
            let found = fields(&all, schema);
            assert!(!found.is_empty(), "{name} has no fields");
            for field in found.keys() {
                // of no type that any field has
                let mut asked = least.clone();
                asked[field] = json!([[true]]);
                let told = body.read(asked.to_string().as_bytes());
                let Reading::Refused { param, .. } = &told else {
                    panic!("{name}.{field}: {told:?}")
                };
                let param = param.as_ref().unwrap_or_else(|| panic!("{name}.{field}: {told:?}"));
                assert!(param.starts_with(field.as_str()), "{name}.{field}: {told:?}");
            }
            assert_eq!(body.read(least.to_string().as_bytes()), Reading::Taken { unknown: 0 });
        }
    }

    #[test]
    fn what_completions_promise_is_in_the_document() {
        let all = serde_json::to_value(document()).expect("it is JSON");
        let fields = |name: &str| fields(&all, &all["components"]["schemas"][name]);
        let (chat, text) = (fields("ChatRequest"), fields("TextRequest"));
        for name in [
            "model",
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "n",
            "stream",
            "stream_options",
            "stop",
            "seed",
            "logprobs",
            "logit_bias",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "ignore_eos",
            "min_tokens",
            "cache_salt",
            "priority",
            "context",
            "chunks",
            "reuse",
        ] {
            assert!(chat.contains_key(name) && text.contains_key(name), "{name}");
        }
        for name in [
            "messages",
            "max_completion_tokens",
            "top_logprobs",
            "response_format",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
        ] {
            assert!(chat.contains_key(name), "{name}");
        }
        assert!(text.contains_key("prompt") && text.contains_key("echo"));
    }
}
