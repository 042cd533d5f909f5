//! Options from the environment and from a TOML file, beneath the flags.
//!
//! Flags win over `STRAND_*`, the environment over the file, the file over the defaults. Each
//! option keeps one parser and one message, because file and environment go through clap. Keys
//! of the file are the flags' names (`block-size` or `block_size`); an unknown one is refused.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{Arg, Command, CommandFactory, FromArgMatches};

use crate::args::{COMMON, Cli, ENGINE, SAMPLING, SERVER};
use crate::{UsageError, describe};

/// Values by the flag's long name.
type File = BTreeMap<String, Vec<String>>;

/// What the command line, the environment and the file say together.
///
/// Errors of usage are clap's own, or a [`UsageError`] for the file.
pub fn parse(argv: &[OsString]) -> Result<Cli> {
    let without_file = read(layered(Cli::command(), &File::new()), argv)?;
    let Some(path) = &without_file.common.config else {
        return Ok(without_file);
    };
    let file = load(path).map_err(|error| UsageError(describe(&error)))?;
    read(layered(Cli::command(), &file), argv)
}

fn read(command: Command, argv: &[OsString]) -> Result<Cli> {
    let matches = command.try_get_matches_from(argv)?;
    Ok(Cli::from_arg_matches(&matches)?)
}

/// The command with the file's values as defaults and the environment above them.
fn layered(command: Command, file: &File) -> Command {
    command
        .mut_args(|arg| with_sources(arg, file))
        .mut_subcommands(|subcommand| layered(subcommand, file))
}

fn with_sources(arg: Arg, file: &File) -> Arg {
    let Some(name) = settable(&arg) else { return arg };
    let variable = format!("STRAND_{}", name.to_uppercase().replace('-', "_"));
    let arg = arg.env(variable).hide_env(true);
    match file.get(&name) {
        Some(values) => arg.default_values(values.clone()),
        None => arg,
    }
}

/// The long name of an option that may come from elsewhere than the command line.
fn settable(arg: &Arg) -> Option<String> {
    let shared = [COMMON, ENGINE, SAMPLING, SERVER].contains(&arg.get_help_heading()?);
    let name = arg.get_long()?;
    (shared && !["json", "verbose"].contains(&name)).then(|| name.to_owned())
}

fn load(path: &Path) -> Result<File> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read the options in {}", path.display()))?;
    parse_file(&text).with_context(|| format!("cannot use the options in {}", path.display()))
}

fn parse_file(text: &str) -> Result<File> {
    let table: toml::Table = text.parse()?;
    let known = known_names(&Cli::command());
    let mut file = File::new();
    for (key, value) in table {
        let name = key.replace('_', "-");
        if name == "config" || !known.contains(&name) {
            bail!("there is no option {key}");
        }
        file.insert(name, texts(&key, value)?);
    }
    Ok(file)
}

fn known_names(command: &Command) -> Vec<String> {
    let deeper = command.get_subcommands().flat_map(known_names);
    command.get_arguments().filter_map(settable).chain(deeper).collect()
}

fn texts(key: &str, value: toml::Value) -> Result<Vec<String>> {
    Ok(match value {
        toml::Value::String(text) => vec![text],
        toml::Value::Integer(number) => vec![number.to_string()],
        toml::Value::Float(number) => vec![number.to_string()],
        toml::Value::Boolean(flag) => vec![flag.to_string()],
        toml::Value::Array(values) => {
            let each: Result<Vec<_>> = values.into_iter().map(|v| texts(key, v)).collect();
            each?.concat()
        }
        other => bail!("{key} is a {}, expected a text or a number", other.type_str()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command as Task;

    fn with_file(argv: &[&str], text: &str) -> Result<Cli> {
        let argv: Vec<OsString> = argv.iter().map(OsString::from).collect();
        read(layered(Cli::command(), &parse_file(text)?), &argv)
    }

    fn generate(cli: Cli) -> crate::args::GenerateArgs {
        let Task::Generate(args) = cli.command else { panic!("not generate") };
        *args
    }

    #[test]
    fn the_command_tree_is_sound() {
        layered(Cli::command(), &File::new()).debug_assert();
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let text = "block-size = 32\nkv_memory = \"1GiB\"\nstop = [\"a\", \"b\"]\n\
                    ignore-eos = true\ntemperature = 0.5";
        let argv = ["strand", "generate", "-p", "x", "--temperature", "0.25"];
        let args = generate(with_file(&argv, text).unwrap());
        assert_eq!(args.engine.block_size, 32);
        assert_eq!(args.engine.kv_memory, Some(1 << 30));
        assert_eq!(args.sampling.stop, ["a", "b"]);
        assert_eq!(args.sampling.temperature, Some(0.25));
        assert!(args.sampling.ignore_eos);
    }

    #[test]
    fn the_file_in_the_readme_has_every_option_of_the_server() {
        let readme = include_str!("../README.md");
        let block = readme.split("```toml\n").nth(1).expect("there is a file in it");
        let text = block.split("```").next().expect("a block ends");
        let file = parse_file(text).expect("its options are known");
        let command = Cli::command();
        let serve = command.find_subcommand("serve").expect("there is a server");
        let options = serve.get_arguments().filter(|arg| arg.get_help_heading() == Some(SERVER));
        let options: Vec<&str> = options.filter_map(Arg::get_long).collect();
        let mut named: Vec<&str> = file.keys().map(String::as_str).collect();
        named.sort_by_key(|name| options.iter().position(|option| option == name));
        assert_eq!(named, options);
        let cli = with_file(&["strand", "serve", "--max-n", "3"], text).unwrap();
        let Task::Serve(args) = cli.command else { panic!("not serve") };
        let server = args.server;
        assert_eq!((server.max_n, server.max_queue, server.max_body), (3, 1024, 32 << 20));
        assert_eq!(server.api_key, ["secret", "another"]);
        assert_eq!((server.max_per_minute, server.allow_no_key), (Some(600), false));
        assert_eq!((args.library.max_chunks, args.library.max_chunk_bytes), (10_000, 1 << 30));
    }

    #[test]
    fn the_file_does_not_touch_the_workload_of_a_bench() {
        let cli = with_file(&["strand", "bench", "throughput"], "temperature = 0.1").unwrap();
        let Task::Bench(crate::args::BenchCommand::Throughput(args)) = cli.command else {
            panic!("not a bench")
        };
        assert_eq!(args.temperature, 0.6);
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        let message = |text: &str| {
            with_file(&["strand", "generate", "-p", "x"], text).unwrap_err().to_string()
        };
        assert_eq!(message("blok-size = 3"), "there is no option blok-size");
        assert_eq!(message("config = \"x\""), "there is no option config");
        assert!(message("[block-size]\nx = 1").contains("block-size is a table"));
        assert!(message("block-size = 0").contains("'0' for '--block-size <N>'"));
        assert!(message("block-size = ").contains("TOML parse error"));
    }

    #[test]
    fn limits_below_one_are_named_with_their_flag() {
        let flags = [
            "--block-size",
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--threads",
            "--max-model-len",
            "--kv-memory",
            "--max-tokens",
        ];
        for flag in flags {
            for value in ["0", "-3"] {
                let argv = ["strand", "generate", "-p", "x", flag, value];
                let message = with_file(&argv, "").unwrap_err().to_string();
                assert!(message.contains(&format!("'{value}' for '{flag}")), "{message}");
            }
        }
    }

    #[test]
    fn a_prompt_is_given_in_exactly_one_way() {
        for argv in [
            vec!["strand", "generate"],
            vec!["strand", "generate", "-p", "x", "--prompt-ids", "1"],
            vec!["strand", "generate", "--prompt-ids", "1,x"],
            vec!["strand", "generate", "--prompt-ids", "1", "--chat"],
            vec!["strand", "generate", "-p", "x", "--logprobs", "2"],
            vec!["strand", "generate", "-p", "x", "--device", "gpu"],
            vec!["strand", "generate", "-p", "x", "--gpu-memory-utilization", "1.5"],
        ] {
            let error = with_file(&argv, "").unwrap_err();
            assert_eq!(error.downcast::<clap::Error>().unwrap().exit_code(), 2, "{argv:?}");
        }
        let ids = ["strand", "generate", "--prompt-ids", "1,2,3"];
        let args = generate(with_file(&ids, "").unwrap());
        assert_eq!(args.prompt.prompt_ids, Some(vec![1, 2, 3]));
    }
}
