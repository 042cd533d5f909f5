//! The program `strand`. Everything is in the library beside it, where tests reach it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    strand::run(std::env::args_os().collect())
}
