//! What `strand bench serve` can be asked on the command line.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::args::{BenchModelArgs, parse_positive};

/// Load over HTTP, streamed: so many requests at a time, or so many a second as they come.
///
/// Without --url a server of its own is started, and the same load is put on the engine without
/// HTTP for comparison. Prompts are new each time: no prefix is ever found again.
#[derive(Debug, Args)]
pub struct ServeBenchArgs {
    /// Another server that speaks OpenAI's protocol, as http://127.0.0.1:8000
    #[arg(long, value_name = "URL", conflicts_with_all = ["model", "random_weights"])]
    pub url: Option<String>,
    /// The key it asks for
    #[arg(long, value_name = "KEY", requires = "url")]
    pub api_key: Option<String>,
    /// The model's name there [default: the first it lists]
    #[arg(long, value_name = "NAME", requires = "url")]
    pub served_model_name: Option<String>,
    /// What is asked: completions of token ids, or chats of words
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Endpoint::Completions)]
    pub endpoint: Endpoint,
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub num_requests: usize,
    /// Requests at a time: one that ends makes room for the next
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = parse_positive,
          allow_negative_numbers = true, conflicts_with = "request_rate")]
    pub concurrency: usize,
    /// Requests a second, at random times (Poisson), however many are under way
    #[arg(long, value_name = "R", value_parser = parse_rate, allow_negative_numbers = true)]
    pub request_rate: Option<f64>,
    /// Tokens in each prompt (of a chat: words)
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub input_len: usize,
    /// Tokens in each answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub output_len: usize,
    /// Randomness of the draws
    #[arg(long, value_name = "T", default_value_t = 0.6, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Seconds after which an answer counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = parse_positive,
          allow_negative_numbers = true)]
    pub timeout: usize,
    /// Without --url: how often the load is put on server and engine in turn
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_positive,
          allow_negative_numbers = true, conflicts_with = "url")]
    pub repeats: usize,
    /// Draw the figures into this file
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    // Last: its headings hold for what follows.
    #[command(flatten)]
    pub model: BenchModelArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    Completions,
    Chat,
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.trim().parse().map_err(|_| "expected a number".to_owned())?;
    if rate > 0.0 && rate.is_finite() { Ok(rate) } else { Err("must be above 0".to_owned()) }
}
