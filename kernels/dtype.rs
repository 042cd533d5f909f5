//! The number types weights and KV are stored in. Arithmetic is f32 in all of them.

use crate::simd::{LANES, Simd};
use candle_core::{CpuStorage, DType};
use half::{bf16, f16};

/// How a weight is stored. With [`WeightDtype::Bf16`] activations are rounded to bf16 as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    F32,
    F16,
    Bf16,
    /// In the blocks of its file ([`BlockFormat`](crate::BlockFormat)), f16 where it has none.
    /// Activations become integers of 8 bits, 32 to a scale.
    Quantized,
}

/// How K and V are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    F32,
    F16,
    Bf16,
}

impl WeightDtype {
    /// Bytes a number takes; of quantized ones, roughly.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Quantized => 1,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Quantized => "quantized",
        }
    }
}

impl KvDtype {
    /// Bytes a number takes.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The type of the cache's tensors.
    pub fn tensor_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// A stored number, widened to f32 exactly and narrowed to nearest even.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::V;
    /// The storage's numbers, if they are of this type.
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
}

macro_rules! element {
    ($type:ty, $load:ident, $variant:ident, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(x: f32) -> Self {
                $narrow(x)
            }
            #[inline(always)]
            fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::V {
                s.$load(x)
            }
            fn slice(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}

element!(f32, load, F32, std::convert::identity, std::convert::identity);
element!(f16, load_f16, F16, f16::to_f32, f16::from_f32);
element!(bf16, load_bf16, BF16, bf16::to_f32, bf16::from_f32);
