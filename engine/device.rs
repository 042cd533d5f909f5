//! Where to compute: what was asked for, and what answers to it.

use std::fmt;

use strand_kernels::gpu::Gpu;

use crate::config::{EnginePlan, GpuFacts};
use crate::error::Error;

const HAS_CUDA: bool = cfg!(feature = "cuda");
const HAS_EMULATOR: bool = cfg!(feature = "cuda-emulator");

/// What to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The first GPU where this program can use it, else the CPU.
    Auto,
    #[default]
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
    /// A GPU's kernels on the CPU, in programs that were built to test them.
    Emulator,
}

impl Device {
    /// `auto`, `cpu`, `cuda` or `cuda:N`; `emulator` where there is one.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            "emulator" if HAS_EMULATOR => Some(Self::Emulator),
            _ => text.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda),
        }
    }

    /// The GPU by itself, for those who have no model to compute; `None` is the CPU.
    ///
    /// # Errors
    /// It was named, and can't be used.
    pub fn open(self) -> Result<Option<Gpu>, Error> {
        Ok(open(self)?.gpu.map(|(gpu, _)| gpu))
    }

    /// True where this program has what the device takes, be it there or not.
    pub fn is_built(self) -> bool {
        match self {
            Self::Auto | Self::Cpu => true,
            Self::Cuda(_) => HAS_CUDA,
            Self::Emulator => HAS_EMULATOR,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Emulator => f.write_str("emulator"),
        }
    }
}

/// A device at work.
pub(crate) struct Opened {
    /// `None` is the CPU.
    pub gpu: Option<(Gpu, GpuFacts)>,
    /// Why it is not what one might have expected.
    pub note: Option<String>,
}

/// # Errors
/// A GPU that was named can't be used.
pub(crate) fn open(device: Device) -> Result<Opened, Error> {
    let opened = match device {
        Device::Cpu => return Ok(Opened { gpu: None, note: None }),
        Device::Auto if !HAS_CUDA => return Ok(Opened { gpu: None, note: None }),
        Device::Auto => Gpu::cuda(0),
        Device::Cuda(number) => Gpu::cuda(number),
        Device::Emulator => emulated(),
    };
    let gpu = match opened {
        Err(error) if device == Device::Auto => {
            let note = Some(format!("computing on the CPU: {error}"));
            return Ok(Opened { gpu: None, note });
        }
        opened => opened?,
    };
    let device = if device == Device::Auto { Device::Cuda(0) } else { device };
    let facts = facts(&gpu, device)?;
    Ok(Opened { gpu: Some((gpu, facts)), note: None })
}

/// With so much memory, which is taken from the system page by page as it is written.
#[cfg(feature = "cuda-emulator")]
fn emulated() -> Result<Gpu, strand_kernels::Error> {
    Ok(Gpu::emulated(1 << 30))
}

/// As any device that isn't there.
#[cfg(not(feature = "cuda-emulator"))]
fn emulated() -> Result<Gpu, strand_kernels::Error> {
    Gpu::cuda(usize::MAX)
}

/// Of the kernels and of the order they are used in; another one gives other bits.
const REVISION: &str = "r2";

/// All that decides the bits of K and V but the model and its tokens, as
/// [`strand_kernels::numerics`] says it for the CPU.
pub(crate) fn numerics(gpu: &Gpu, plan: &EnginePlan) -> String {
    let family = gpu.family();
    let mode = if plan.deterministic { " det" } else { "" };
    let (weights, kv) = (plan.dtype.name(), plan.kv_dtype.name());
    format!("{family}{mode} {REVISION}, {weights} weights, {kv} kv")
}

fn facts(gpu: &Gpu, device: Device) -> Result<GpuFacts, Error> {
    let (free_memory, total_memory) = gpu.memory()?;
    Ok(GpuFacts { device: device.to_string(), free_memory, total_memory })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_spelt_as_they_are_read() {
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(3)] {
            assert_eq!(Device::parse(&device.to_string()), Some(device));
        }
        assert_eq!(Device::parse("cuda"), Some(Device::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"] {
            assert_eq!(Device::parse(text), None, "{text}");
        }
    }
}
