//! All integration tests, one binary.

mod random;
mod simulation;
mod tidy;
