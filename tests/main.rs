//! All integration tests, one binary.

mod binary;
mod block_mask;
mod chunks;
mod cli_bench;
mod cli_chat;
mod cli_chunks;
mod cli_errors;
mod cli_generate;
mod cli_store;
mod cli_tiers;
mod counters;
mod dense;
mod endings;
mod exactness;
mod histories;
mod memory;
mod parity;
mod processes;
mod query_shift;
mod random;
mod simulation;
mod tidy;
