//! What can be asked on the command line, and what each value means to the engine.
//!
//! Values are checked here, before anything is loaded, and a refusal names the flag. Defaults
//! live where they are used (`EngineConfig`, the model's generation_config); this file only
//! repeats them in the help by asking for them.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use strand_engine::context::ReusePolicy;
use strand_engine::store::Codec;
use strand_engine::{Device, EngineConfig, Restore};
use strand_kernels::{KvDtype, WeightDtype};
use strand_models::Training;

use crate::bench::recall::Way;
use crate::bench::serve::args::ServeBenchArgs;
use crate::byte_size;
use crate::chunks::ChunksArgs;
use crate::server::options::ServeArgs;

/// Flags under these headings can also be given by environment and file.
pub const ENGINE: &str = "Engine options";
pub const SAMPLING: &str = "Sampling options";
pub const COMMON: &str = "Common options";
pub const SERVER: &str = "Server options";

/// An inference engine for decoder-only language models.
///
/// Every engine, server, sampling and common option can also be given as an environment variable
/// (--block-size as STRAND_BLOCK_SIZE) or in a TOML file (block-size = 16) named by --config.
/// A flag wins over the environment, the environment over the file, the file over the default.
#[derive(Debug, Parser)]
#[command(name = "strand", version, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub common: CommonArgs,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = COMMON)]
pub struct CommonArgs {
    /// Read options from this TOML file [env: STRAND_CONFIG]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where chunks, their KV, contexts and history are kept [default: $XDG_DATA_HOME/strand]
    #[arg(long, global = true, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Print JSON, one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on standard error
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Chat in the terminal, or answer each line of standard input
    Chat(Box<ChatArgs>),
    /// Continue one prompt
    Generate(Box<GenerateArgs>),
    /// Serve OpenAI's API over HTTP
    Serve(Box<ServeArgs>),
    /// Measure speed
    #[command(subcommand)]
    Bench(BenchCommand),
    /// List, check, collect, export and import what is kept on the disk, without a model
    Chunks(ChunksArgs),
    /// List, download and describe models
    #[command(subcommand)]
    Models(ModelsCommand),
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    /// A folder, a .gguf file or a hub id [default: the bundled demo model]
    pub model: Option<String>,
    /// System text to start with
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Keep chunks and conversation under this name, and go on where it was left
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub context: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub reuse: ReuseArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A folder, a .gguf file or a hub id [default: the bundled demo model]
    pub model: Option<String>,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Apply the model's chat template: the prompt is the user's message
    #[arg(long, conflicts_with = "prompt_ids")]
    pub chat: bool,
    /// System text before the user's message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// Put a UTF-8 file before the prompt as a chunk; may be given more than once, in order
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub chunk: Vec<PathBuf>,
    /// Report log-probabilities of the prompt with N alternatives (with --json)
    #[arg(long, value_name = "N", requires = "json")]
    pub prompt_logprobs: Option<u32>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub reuse: ReuseArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct PromptArgs {
    /// Raw text to continue
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Token ids to continue; needs no tokenizer
    #[arg(long, value_name = "IDS", value_delimiter = ',', allow_negative_numbers = true)]
    pub prompt_ids: Option<Vec<u32>>,
    /// Read the prompt from a UTF-8 file, - for standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = ENGINE)]
pub struct EngineArgs {
    /// Where to compute: auto (the first GPU if there is one), cpu, or cuda[:N] in programs built
    /// with CUDA
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: Device,
    /// On a GPU, answer in the same bits whatever else it computes; slower
    #[arg(long)]
    pub deterministic: bool,
    /// Share of a GPU's memory for weights and KV together
    #[arg(long, value_name = "SHARE", value_parser = parse_share, allow_negative_numbers = true,
          default_value_t = EngineConfig::default().gpu_memory_utilization)]
    pub gpu_memory_utilization: f64,
    /// Type of the weights; auto takes what is stored
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Type of the KV cache; auto takes that of the weights; int8 is approximate, on the CPU
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvType::Auto)]
    pub kv_dtype: KvType,
    /// Tokens in a KV block
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().block_size,
          value_parser = parse_positive, allow_negative_numbers = true)]
    pub block_size: usize,
    /// Memory for KV, as 2GiB [default: up to half of what is free]
    #[arg(long, value_name = "BYTES", value_parser = byte_size::parse,
          allow_negative_numbers = true)]
    pub kv_memory: Option<u64>,
    /// Memory for KV of chunks beside the pool, as 4GiB [default: a quarter of what is left]
    #[arg(long, value_name = "BYTES", value_parser = parse_host_memory,
          allow_negative_numbers = true)]
    pub host_memory: Option<u64>,
    /// Space on the disk for KV, as 16GiB; the least valuable files go
    #[arg(long, value_name = "BYTES", default_value = "16GiB", value_parser = byte_size::parse,
          allow_negative_numbers = true)]
    pub disk_space: u64,
    /// How KV is written to disk: raw, planes (smaller, the same bits) or int8 (smaller still,
    /// approximate, and then also read)
    #[arg(long, value_name = "CODEC", default_value = Codec::default().as_str(),
          value_parser = parse_codec)]
    pub kv_codec: Codec,
    /// Sequences in a step
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_num_seqs,
          value_parser = parse_positive, allow_negative_numbers = true)]
    pub max_num_seqs: usize,
    /// Tokens in a step
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_num_batched_tokens,
          value_parser = parse_positive, allow_negative_numbers = true)]
    pub max_num_batched_tokens: usize,
    /// Tokens in a sequence, prompt and answer [default: the model's, at most 32768]
    #[arg(long, value_name = "N", value_parser = parse_positive, allow_negative_numbers = true)]
    pub max_model_len: Option<usize>,
    /// Threads that compute [default: one a core]
    #[arg(long, value_name = "N", value_parser = parse_positive, allow_negative_numbers = true)]
    pub threads: Option<usize>,
}

// No doc comment: clap would show it in place of the command's own.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = ENGINE)]
pub struct ReuseArgs {
    /// What a chunk's KV depends on: exact (all before it), independent (itself alone), blend
    /// (itself, its first tokens on all before it) or mask (what was active when it was loaded)
    /// [default: independent for models trained so, else blend]
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    pub reuse: Option<ReusePolicy>,
    /// Under blend, how many tokens of a chunk are computed again for what stands before it
    /// [default: 16]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub blend_tokens: Option<usize>,
    /// When KV on disk is loaded rather than computed again: auto (when that is faster), always
    /// or never
    #[arg(long, value_name = "WHEN", default_value = Restore::default().as_str(),
          value_parser = parse_restore)]
    pub restore: Restore,
}

impl ReuseArgs {
    /// The policy asked for, or the one that the model was trained for.
    pub fn policy(self, training: Training) -> ReusePolicy {
        let independent = training.independent_chunks;
        let of_model = if independent { ReusePolicy::Independent } else { ReusePolicy::Blend };
        self.reuse.unwrap_or(of_model)
    }
}

// No doc comment: clap would show it in place of the command's own.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = SAMPLING)]
pub struct SamplingArgs {
    /// Randomness; 0 takes the likeliest token [default: the model's, else 1]
    ///
    /// "The model's" is its generation_config.json, as in vLLM. A model that says do_sample =
    /// false there takes the likeliest token, and its top-k, top-p and min-p are not used.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all [default: the model's, else all]
    #[arg(long, value_name = "K", value_parser = parse_top_k, allow_negative_numbers = true)]
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens that add up to P [default: the model's, else 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the likeliest [default: the model's, else 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens seen before [default: the model's, else 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtract from the logits of tokens in the answer [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtract for each occurrence in the answer [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Longest answer in tokens [default: the room left]
    #[arg(long, value_name = "N", value_parser = parse_positive, allow_negative_numbers = true)]
    pub max_tokens: Option<usize>,
    /// Text that ends the answer; may be given more than once
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Go on past the model's stop tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Seed of the draws [default: another in every run]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Report each token's log-probability with N alternatives (with --json)
    #[arg(long, value_name = "N", requires = "json")]
    pub logprobs: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Many random requests at once: tokens per second, memory
    Throughput(Box<ThroughputArgs>),
    /// Time to the first token and between tokens, by batch size and prompt length
    Latency(Box<LatencyArgs>),
    /// What a model reads out of its chunks: exact answers and refusals, by reuse policy
    Recall(Box<RecallArgs>),
    /// Time to the first token of a question over chunks, by what is cached and by reuse policy
    Reuse(Box<ReuseBenchArgs>),
    /// Every op against what this machine reads and multiplies at most
    Kernels(KernelsArgs),
    /// Save and restore of chunks by codec: speed against the disk's own, size, break-even
    Tiers(Box<TiersArgs>),
    /// Load on a server: time to the first token, between tokens, errors
    Serve(Box<ServeBenchArgs>),
}

#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// What to measure: cpu, or cuda[:N] in programs built with CUDA
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    pub device: Device,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub threads: Option<usize>,
    /// Measurements of each op, of which the median is told
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = parse_positive)]
    pub repeats: usize,
    /// Only the ops whose names contain this
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
}

#[derive(Debug, Args)]
pub struct BenchModelArgs {
    /// A folder, a .gguf file or a hub id [default: the bundled demo model]
    pub model: Option<String>,
    /// Random weights in the shape of a preset (qwen3-0.6b, llama-3.2-1b) or a config.json, in
    /// blocks if :q8_0, :q4_0 or :q4_k_m follows
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub random_weights: Option<String>,
    /// A note on what this run is compared with; printed with the results
    #[arg(long, value_name = "NOTE")]
    pub vs: Option<String>,
    /// Seed of the workload and of the random weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// The workload of nano-vLLM's bench.py: random token ids, all requests at once, no stop tokens.
///
/// Every number of it can be set. Prefill and decode speed are tokens over the seconds the
/// engine spent on them; a step that did both is divided by its share of tokens.
#[derive(Debug, Args)]
pub struct ThroughputArgs {
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub num_seqs: usize,
    /// Shortest prompt in tokens
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub min_input_len: usize,
    /// Longest prompt in tokens
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub max_input_len: usize,
    /// Shortest answer in tokens
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub min_output_len: usize,
    /// Longest answer in tokens
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub max_output_len: usize,
    /// Randomness of the draws
    #[arg(long, value_name = "T", default_value_t = 0.6, allow_negative_numbers = true)]
    pub temperature: f32,
    // Last: its headings hold for what follows.
    #[command(flatten)]
    pub model: BenchModelArgs,
}

#[derive(Debug, Args)]
pub struct LatencyArgs {
    /// Requests at the same time, one table row each
    #[arg(long, value_name = "N,...", default_value = "1,2,4,8", value_delimiter = ',',
          value_parser = parse_positive, allow_negative_numbers = true)]
    pub batch_sizes: Vec<usize>,
    /// Tokens in each prompt, one table row each
    #[arg(long, value_name = "N,...", default_value = "128,512", value_delimiter = ',',
          value_parser = parse_positive, allow_negative_numbers = true)]
    pub prompt_lens: Vec<usize>,
    /// Tokens in each answer
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub output_len: usize,
    /// Runs of each row; the table shows figures over all of them
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub repeats: usize,
    // Last: its headings hold for what follows.
    #[command(flatten)]
    pub model: BenchModelArgs,
}

/// Chunks of random tokens, and questions that are new each time.
///
/// KV on disk lies in --data-dir, else in a temporary folder; --kv-codec says how.
#[derive(Debug, Args)]
pub struct ReuseBenchArgs {
    /// Chunks before the question
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub num_chunks: usize,
    /// Tokens in each chunk
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub chunk_len: usize,
    /// Tokens in the question
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub question_len: usize,
    /// What a chunk's KV depends on, rows for each
    #[arg(long, value_name = "POLICY,...", default_value = "exact,independent,blend,mask",
          value_delimiter = ',', value_parser = parse_policy)]
    pub policy: Vec<ReusePolicy>,
    /// Questions asked where all chunks have KV somewhere, each time that they are encoded
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub repeats: usize,
    /// How often all chunks are encoded anew
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub cold_repeats: usize,
    /// Contexts to switch between, half of whose chunks they share; 0 for none
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub contexts: usize,
    /// Chunks in each of these
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub context_chunks: usize,
    /// Tokens in each chunk of these
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub context_chunk_len: usize,
    // Last: its headings hold for what follows.
    #[command(flatten)]
    pub model: BenchModelArgs,
}

/// Chunks of text where the model has a tokenizer and a chat template, else of random tokens.
///
/// They are encoded independently and written to --data-dir, else to a temporary folder.
#[derive(Debug, Args)]
pub struct TiersArgs {
    /// Tokens in each chunk (of text: or a few more), rows for each
    #[arg(long, value_name = "N,...", default_value = "64,256,1024", value_delimiter = ',',
          value_parser = parse_positive, allow_negative_numbers = true)]
    pub chunk_lens: Vec<usize>,
    /// Chunks of each length
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub num_chunks: usize,
    /// How often each is encoded, saved and restored
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub repeats: usize,
    /// How KV is written, rows for each
    #[arg(long, value_name = "CODEC,...", default_value = "raw,planes,int8",
          value_delimiter = ',', value_parser = parse_codec)]
    pub codec: Vec<Codec>,
    /// Questions about each of the longest chunks, answered on lossless and on int8 KV; 0 for none
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub questions: usize,
    /// Longest answer in tokens
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub answer_len: usize,
    /// Where the text and the questions come from, as models/demo/README.md describes it
    #[arg(long, value_name = "FILE", default_value = "models/demo/eval.jsonl")]
    pub file: PathBuf,
    // Last: its headings hold for what follows.
    #[command(flatten)]
    pub model: BenchModelArgs,
}

/// Questions over chunks, answered greedily, all at once.
///
/// Each is asked with its chunks in the order given, reversed, and without the chunk that holds
/// the answer. The model needs a tokenizer and a chat template.
#[derive(Debug, Args)]
pub struct RecallArgs {
    /// The questions, one JSON object a line, as models/demo/README.md describes them
    #[arg(long, value_name = "FILE", default_value = "models/demo/eval.jsonl")]
    pub file: PathBuf,
    /// What a chunk's KV depends on, one column each; int8 is independent through a lossy file
    #[arg(long, value_name = "POLICY,...", default_value = "exact,independent,blend,mask,int8",
          value_delimiter = ',', value_parser = parse_way)]
    pub policy: Vec<Way>,
    /// Ask N of the questions, spread evenly over the file [default: all]
    #[arg(long, value_name = "N", value_parser = parse_positive, allow_negative_numbers = true)]
    pub limit: Option<usize>,
    // Last: its headings hold for what follows.
    #[command(flatten)]
    pub model: BenchModelArgs,
}

#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// The bundled model and what the hub's cache holds
    List,
    /// Download a model into the hub's cache
    Pull {
        /// A hub id like Qwen/Qwen3-0.6B
        id: String,
    },
    /// Architecture, sizes, types and files of a model
    Show {
        /// A folder, a .gguf file or a hub id [default: the bundled demo model]
        model: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Auto,
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub fn weights(self) -> Option<WeightDtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(WeightDtype::F32),
            Self::Bf16 => Some(WeightDtype::Bf16),
            Self::F16 => Some(WeightDtype::F16),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    Auto,
    F32,
    Bf16,
    F16,
    Int8,
}

impl KvType {
    pub fn kv(self) -> Option<KvDtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(KvDtype::F32),
            Self::Bf16 => Some(KvDtype::Bf16),
            Self::F16 => Some(KvDtype::F16),
            Self::Int8 => Some(KvDtype::Int8),
        }
    }
}

/// Refuses what this build can't do, so the text is an error of usage.
fn parse_device(text: &str) -> Result<Device, String> {
    let device = Device::parse(text).ok_or("expected auto, cpu or cuda[:N]")?;
    if !device.is_built() {
        return Err(format!(
            "{device} is not built into this program; use auto or cpu, or build it with \
             --features cuda"
        ));
    }
    Ok(device)
}

/// Above 0 and at most 1.
pub fn parse_share(text: &str) -> Result<f64, String> {
    let share: f64 = text.trim().parse().map_err(|_| "expected a number like 0.9".to_owned())?;
    let is_share = share > 0.0 && share <= 1.0;
    is_share.then_some(share).ok_or_else(|| "must be above 0 and at most 1".to_owned())
}

fn parse_policy(text: &str) -> Result<ReusePolicy, String> {
    ReusePolicy::parse(text).ok_or_else(|| expected(ReusePolicy::ALL.map(ReusePolicy::as_str)))
}

fn parse_way(text: &str) -> Result<Way, String> {
    Way::parse(text)
        .ok_or_else(|| format!("{}, int8", expected(ReusePolicy::ALL.map(ReusePolicy::as_str))))
}

fn parse_restore(text: &str) -> Result<Restore, String> {
    Restore::parse(text).ok_or_else(|| expected(Restore::ALL.map(Restore::as_str)))
}

pub fn parse_codec(text: &str) -> Result<Codec, String> {
    Codec::parse(text).ok_or_else(|| expected(Codec::ALL.map(Codec::as_str)))
}

fn expected<const N: usize>(names: [&str; N]) -> String {
    let (last, others) = names.split_last().expect("there are names");
    format!("expected {} or {last}", others.join(", "))
}

/// 0 keeps nothing beside the pool.
fn parse_host_memory(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { byte_size::parse(text) }
}

pub fn parse_positive(text: &str) -> Result<usize, String> {
    let number: i128 = text.trim().parse().map_err(|_| "expected a whole number".to_owned())?;
    if number < 1 {
        return Err("must be at least 1".to_owned());
    }
    // beyond any machine, and small enough that sums of a few can't overflow
    usize::try_from(number)
        .ok()
        .filter(|&number| number <= LARGEST)
        .ok_or_else(|| format!("must be at most {LARGEST}"))
}

const LARGEST: usize = u32::MAX as usize;

/// 0 and -1 keep every token, as in vLLM.
fn parse_top_k(text: &str) -> Result<u32, String> {
    match text.trim() {
        "-1" => Ok(0),
        other => other.parse().map_err(|_| "expected a whole number, 0 keeps all".to_owned()),
    }
}
