//! All integration tests, one binary.

mod binary;
mod chunks;
mod cli_bench;
mod cli_chat;
mod cli_chunks;
mod cli_errors;
mod cli_generate;
mod dense;
mod endings;
mod exactness;
mod memory;
mod parity;
mod random;
mod simulation;
mod tidy;
