//! The number types weights and KV are stored in. Arithmetic is f32 in all of them.

use crate::simd::{LANES, ROUNDING, SMALLEST, Simd};
use candle_core::{CpuStorage, DType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::convert::identity;

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
    /// A head's vector as integers of 8 bits, and behind them their scale: the four bytes of an
    /// f32, little endian. The largest number is 127 scales.
    Int8,
}

/// Bytes of the scale of an int8 vector.
pub(crate) const SCALE_BYTES: usize = 4;

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
    /// Bytes a number takes, its vector's scale apart.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Numbers of the cache's type that a head's vector takes.
    pub fn stored_dim(self, head_dim: usize) -> usize {
        match self {
            Self::Int8 => head_dim.saturating_add(SCALE_BYTES),
            _ => head_dim,
        }
    }

    /// Bytes that a head's vector takes; the largest number where no memory holds it.
    pub fn vector_bytes(self, head_dim: usize) -> usize {
        self.stored_dim(head_dim).saturating_mul(self.size())
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// The type of the cache's tensors.
    pub fn tensor_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 => DType::U8,
        }
    }
}

/// A number as weights, K or V are stored.
pub(crate) trait Stored: Copy + Default + Send + Sync + 'static {
    /// Whether a vector's numbers are multiples of a scale that lies behind them.
    const SCALED: bool = false;
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::V;
    /// The scale of a vector of `head_dim` numbers; 1 where there are none.
    #[inline(always)]
    fn scale(_stored: &[Self], _head_dim: usize) -> f32 {
        1.0
    }
    /// The storage's numbers, if they are of this type.
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
}

/// A stored number, widened to f32 exactly and narrowed to nearest even.
pub(crate) trait Element: Stored {
    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
    /// [`Element::narrow`] of as many numbers as `out` has.
    fn narrow_all(x: &[f32], out: &mut [Self]);
}

macro_rules! element {
    ($type:ty, $load:ident, $variant:ident, $widen:expr, $narrow:expr, $narrow_all:expr) => {
        impl Stored for $type {
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

        impl Element for $type {
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(x: f32) -> Self {
                $narrow(x)
            }
            fn narrow_all(x: &[f32], out: &mut [Self]) {
                $narrow_all(out, x);
            }
        }
    };
}

element!(f32, load, F32, identity, identity, <[f32]>::copy_from_slice);
element!(f16, load_f16, F16, f16::to_f32, f16::from_f32, <[f16]>::convert_from_f32_slice);
element!(bf16, load_bf16, BF16, bf16::to_f32, bf16::from_f32, <[bf16]>::convert_from_f32_slice);

/// Signed, as in [`KvDtype::Int8`].
impl Stored for u8 {
    const SCALED: bool = true;
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::V {
        s.load_i8(x)
    }
    #[inline(always)]
    fn scale(stored: &[Self], head_dim: usize) -> f32 {
        let scale = stored[head_dim..].first_chunk().expect("a scale behind the numbers");
        f32::from_le_bytes(*scale)
    }
    fn slice(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::U8(data) => Some(data),
            _ => None,
        }
    }
}

/// A vector as [`KvDtype::Int8`] has it: to nearest even, scale NaN where a number is not finite.
pub(crate) fn quantize_vector(x: &[f32], out: &mut [u8]) {
    let (numbers, scale) = out.split_at_mut(x.len());
    let finite = x.iter().all(|x| x.is_finite());
    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let is_zero = largest < SMALLEST;
    let reciprocal = if is_zero { 0.0 } else { 127.0 / largest };
    let of_one = if is_zero { 0.0 } else { largest / 127.0 };
    scale.copy_from_slice(&if finite { of_one } else { f32::NAN }.to_le_bytes());
    for (number, x) in numbers.iter_mut().zip(x) {
        // the low bits hold the nearest integer
        *number = (x * reciprocal + ROUNDING).to_bits() as u8;
    }
}
