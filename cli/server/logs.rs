//! The log: a line for what happened, on standard error, for people or for programs.
//!
//! Never keys, prompts or answers. What comes from a client is written with its control
//! characters escaped.

use std::io::{self, IsTerminal};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use super::traces::Traces;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Begins the log. `RUST_LOG` says more finely than `verbose` what is in it. Spans are not for it:
/// what is returned sends them, as long as it is held.
pub fn begin(format: LogFormat, verbose: bool) -> Result<Option<Traces>> {
    let level = if verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let log = fmt::layer()
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => {
            log.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    let events = filter_fn(|metadata| metadata.is_event());
    let traces = Traces::begin()?;
    tracing_subscriber::registry()
        .with(traces.as_ref().map(Traces::layer))
        .with(log.with_filter(filter.and(events)))
        .try_init()
        .context("cannot begin the log")?;
    Ok(traces)
}
