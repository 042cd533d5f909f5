//! The log: a line for what happened, on standard error, for people or for programs.
//!
//! Never keys, prompts or answers. What comes from a client is written with its control
//! characters escaped.

use std::io::{self, IsTerminal};

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Begins the log. `RUST_LOG` says more finely than `verbose` what is in it.
pub fn begin(format: LogFormat, verbose: bool) -> Result<()> {
    let level = if verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    }
    .map_err(|error| anyhow!("cannot begin the log: {error}"))
}
