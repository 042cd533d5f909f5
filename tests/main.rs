//! All integration tests, one binary.

mod binary;
mod chunks;
mod cli_bench;
mod cli_chat;
mod cli_errors;
mod cli_generate;
mod endings;
mod exactness;
mod parity;
mod random;
mod simulation;
mod tidy;
