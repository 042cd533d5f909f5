//! All integration tests, one binary.

mod binary;
mod cli_bench;
mod cli_chat;
mod cli_errors;
mod cli_generate;
mod exactness;
mod random;
mod simulation;
mod tidy;
