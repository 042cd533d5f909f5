//! The front ends of Strand: the command line, the chat, the benches.
//!
//! Exit status: 0 done, 1 the work failed, 2 wrong usage, 130 ended by Ctrl-C. Standard output
//! is the answer; everything else goes to standard error. A reader that goes away ends the
//! program quietly.

#![forbid(unsafe_code)]

mod answer;
mod args;
mod bench;
mod byte_size;
mod chat;
mod chunk_file;
mod chunks;
mod data_dir;
mod date;
mod generate;
mod interrupt;
mod load;
mod models;
mod placing;
mod progress;
mod sampling;
mod server;
mod settings;

pub use server::reading;

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;

use args::{BenchCommand, Cli, Command};
use interrupt::Interrupt;

/// How a command ended that has reported its own failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Failed,
    Interrupted,
}

/// A mistake on the command line that clap can't see.
#[derive(Debug)]
pub(crate) struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for UsageError {}

/// Runs the program with these arguments, the program's name first.
pub fn run(argv: Vec<OsString>) -> ExitCode {
    match settings::parse(&argv).and_then(obey) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::from(1),
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::EXIT_STATUS),
        Err(error) => report(&error),
    }
}

fn obey(cli: Cli) -> Result<Outcome> {
    let common = &cli.common;
    if let Command::Serve(args) = &cli.command {
        // Ctrl-C means something else to a server
        return server::run(args, common);
    }
    let interrupt = Interrupt::install()?;
    match cli.command {
        Command::Serve(_) => unreachable!("served above"),
        Command::Generate(args) => generate::run(&args, common, &interrupt),
        Command::Chat(args) => chat::run(*args, common, &interrupt),
        Command::Chunks(args) => chunks::run(&args, common),
        Command::Models(command) => models::run(&command, common),
        Command::Bench(BenchCommand::Kernels(args)) => bench::kernels::run(&args, common),
        Command::Bench(BenchCommand::Throughput(args)) => bench::throughput::run(&args, common),
        Command::Bench(BenchCommand::Latency(args)) => bench::latency::run(&args, common),
        Command::Bench(BenchCommand::Recall(args)) => bench::recall::run(&args, common),
        Command::Bench(BenchCommand::Reuse(args)) => bench::reuse::run(&args, common),
        Command::Bench(BenchCommand::Tiers(args)) => bench::tiers::run(&args, common),
        Command::Bench(BenchCommand::Serve(args)) => bench::serve::run(&args, common),
    }
}

/// Says what went wrong and what the shell should hear.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(error) = error.downcast_ref::<clap::Error>() {
        // Help and version come this way too, with status 0; a closed output needs no report.
        drop(error.print());
        return ExitCode::from(error.exit_code() as u8);
    }
    let closed = |cause: &(dyn Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(closed) {
        return ExitCode::SUCCESS;
    }
    // A closed standard error changes nothing about the status.
    drop(writeln!(io::stderr(), "error: {}", describe(error)));
    ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
}

/// Something the user should know beside the result.
pub(crate) fn note(text: &str) {
    drop(writeln!(io::stderr(), "note: {text}"));
}

/// The error and its causes, without those whose text is part of what was said already.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match text.as_str() {
            "" => cause,
            said if said.contains(&cause) => text,
            said => format!("{said}: {cause}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_is_told_once() {
        let inner = io::Error::other("disk on fire");
        let told = anyhow::Error::new(inner).context("cannot read x: disk on fire");
        assert_eq!(describe(&told), "cannot read x: disk on fire");
        let plain: Result<()> = Err(io::Error::other("disk on fire")).context("cannot read x");
        assert_eq!(describe(&plain.unwrap_err()), "cannot read x: disk on fire");
    }
}
