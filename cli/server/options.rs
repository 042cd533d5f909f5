//! What `strand serve` can be asked on the command line.

use std::path::PathBuf;

use clap::Args;

use crate::args::{EngineArgs, ReuseArgs, SERVER, parse_positive, parse_share};
use crate::byte_size;
use crate::server::jwt::JwtAlgorithm;
use crate::server::logs::LogFormat;

// No doc comment: clap would show it in place of the command's own.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A folder, a .gguf file or a hub id [default: the bundled demo model]
    pub model: Option<String>,
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub library: LibraryArgs,
    #[command(flatten)]
    pub reuse: ReuseArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

// No doc comment: clap would show it in place of the command's own.
#[derive(Debug, Args)]
#[command(next_help_heading = SERVER)]
pub struct ServerArgs {
    /// Where to listen; port 0 takes one that is free
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    pub addr: String,
    /// The model's name in requests and answers [default: its own]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// A model of the BERT family for /v1/embeddings [default: the language model's hidden states]
    #[arg(long, value_name = "FOLDER")]
    pub embedding_model: Option<PathBuf>,
    /// A key that may do everything; may be given more than once
    #[arg(long, value_name = "KEY,...", value_delimiter = ',')]
    pub api_key: Vec<String>,
    /// A file of keys, a line each: name, role (user or admin), the key or its SHA-256
    #[arg(long, value_name = "FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// Listen on other than loopback although nobody needs a key
    #[arg(long)]
    pub allow_no_key: bool,
    /// A name under which the server is reached, besides its address; may be given more than once
    #[arg(long, value_name = "HOST,...", value_delimiter = ',')]
    pub allowed_host: Vec<String>,
    /// Largest body of a request
    #[arg(long, value_name = "BYTES", default_value = "32MiB", value_parser = byte_size::parse)]
    pub max_body: u64,
    /// Most answers to one prompt
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_positive)]
    pub max_n: usize,
    /// Requests that may wait for the engine; more are told to come again
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_positive)]
    pub max_queue: usize,
    /// Connections at a time; more wait to be accepted
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_positive)]
    pub max_connections: usize,
    /// Seconds that a request's headers may take to arrive, its body, and a client to read
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = parse_positive)]
    pub read_timeout: usize,
    /// Seconds that answers may still take when the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = parse_positive)]
    pub drain_timeout: usize,
    /// Requests of one key (or address, where nobody needs a key) at a time [default: any number]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub max_concurrent: Option<usize>,
    /// Requests of one key or address in a minute; more are refused [default: any number]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub max_per_minute: Option<usize>,
    /// Tokens, of prompts and answers, of one key or address in a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub max_tokens_per_minute: Option<usize>,
    /// Requests of one address without a key that is known, in a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub max_wrong_per_minute: Option<usize>,
    /// Let tenants find each other's KV of the same text, but for requests with a cache_salt
    #[arg(long)]
    pub share_kv: bool,
    /// Share of the pool and of the running sequences that one tenant may take [default: all]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    pub tenant_share: Option<f64>,
    /// Take tokens (JWT) that this secret or public key (PEM) can verify, as keys
    #[arg(long, value_name = "FILE", requires = "jwt_algorithm")]
    pub jwt_key: Option<PathBuf>,
    /// The one algorithm that tokens are signed with
    #[arg(long, value_enum, value_name = "NAME", requires = "jwt_key")]
    pub jwt_algorithm: Option<JwtAlgorithm>,
    /// A site whose pages may use this server (CORS); may be given more than once
    #[arg(long, value_name = "ORIGIN,...", value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// Speak TLS with this chain of certificates (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// How the log on standard error is written
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

// No doc comment: clap would show it in place of the command's own.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = SERVER)]
pub struct LibraryArgs {
    /// Chunks that a tenant may have
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = parse_positive)]
    pub max_chunks: usize,
    /// What a tenant's chunks may have in all, as text
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = byte_size::parse)]
    pub max_chunk_bytes: u64,
    /// Contexts that a tenant may have
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = parse_positive)]
    pub max_contexts: usize,
}
