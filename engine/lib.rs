//! Tokens in, tokens out: scheduling, the KV pool, sampling, the engine's thread.
//!
//! A request's life: `EngineHandle::submit` -> `Engine::submit` -> `Scheduler::schedule` (a
//! [`batch::Batch`], a value) -> `Runner::run` -> `Engine::postprocess` -> [`Event`]s.
//!
//! What is absent here: HTTP and its JSON, the terminal (they live in `cli`); locks and globals.

#![forbid(unsafe_code)]

pub mod batch;
pub mod cache;
pub mod config;
pub mod context;
mod cpu_runner;
mod device;
pub mod engine;
pub mod error;
mod gpu_runner;
pub mod grammar;
pub mod handle;
pub mod io;
pub mod load;
mod machine;
pub mod model_runner;
mod output;
mod queue_times;
pub mod request;
mod row_output;
pub mod scheduler;
mod segment_kv;
pub mod sequence;
pub mod store;
pub mod tenant;
mod tiering;

pub use cache::{ChunkId, DiskFile, KvVariant, Sees, Tier, TiersOf};
pub use config::{EngineConfig, EnginePlan, GpuFacts, Machine, TenantLimits};
pub use device::Device;
pub use engine::pins::PinOutcome;
pub use engine::verbs::{Erased, Unloaded};
pub use engine::{DiskSetup, Engine, Outcome, Stats, TierSetup};
pub use error::Error;
pub use grammar::{Grammar, GrammarSpec, Grammars};
pub use handle::{EngineHandle, EventStream, ModelFacts};
pub use load::{load, start};
pub use queue_times::QueueTimes;
pub use request::{
    Event, Exactness, FinishReason, Limits, Request, Restore, Reuse, Segment, num_blocks,
};
pub use scheduler::Restored;
pub use segment_kv::SegmentKv;
pub use strand_layers::sampler::{SamplingParams, TokenLogprobs};
pub use tiering::{IoDone, IoJob, Ticket};
