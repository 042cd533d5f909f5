//! Carries a batch out on the model, wherever that lies.

use strand_kernels::gpu::Gpu;

use crate::batch::{Batch, RowOutput, Runner};
use crate::cpu_runner::CpuRunner;
use crate::error::Error;
use crate::gpu_runner::GpuRunner;
use crate::segment_kv::SegmentKv;

/// The model and its KV pool.
pub enum ModelRunner {
    Cpu(Box<CpuRunner>),
    Gpu(Box<GpuRunner>),
}

impl ModelRunner {
    /// Fills blocks of the pool with NaN: whoever reads a row that holds nothing is found out.
    pub fn poison(&mut self, blocks: &[u32]) -> Result<(), Error> {
        match self {
            Self::Cpu(runner) => runner.poison(blocks),
            Self::Gpu(runner) => runner.poison(blocks),
        }
    }

    /// The GPU it computes on, if any: for those who count what it is asked.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Cpu(_) => None,
            Self::Gpu(runner) => Some(runner.gpu()),
        }
    }
}

impl Runner for ModelRunner {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error> {
        match self {
            Self::Cpu(runner) => runner.run(batch),
            Self::Gpu(runner) => runner.run(batch),
        }
    }

    fn gather(&mut self, slots: &[u32]) -> Result<SegmentKv, Error> {
        match self {
            Self::Cpu(runner) => runner.gather(slots),
            Self::Gpu(runner) => runner.gather(slots),
        }
    }

    fn scatter(&mut self, kv: &SegmentKv, first_row: usize, slots: &[u32]) -> Result<(), Error> {
        match self {
            Self::Cpu(runner) => runner.scatter(kv, first_row, slots),
            Self::Gpu(runner) => runner.scatter(kv, first_row, slots),
        }
    }
}
