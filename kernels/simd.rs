//! Sixteen f32 lanes, the unit all hot loops are written in.
//!
//! Every operation is exact IEEE arithmetic lane by lane, so each implementation gives the bits
//! of [`Portable`]. `max` and `min` return the second operand when either is NaN, as x86 does.

use half::{bf16, f16};

/// Trait methods that are one call of a function needing the token's features.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! with_token {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $out:ty = $function:path;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: the function asks for nothing but instructions, and `self` proves that
            // `detect` found them.
            unsafe { $function($($arg),*) }
        }
    )*};
}

mod int;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pairs;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_int;
#[cfg(target_arch = "x86_64")]
mod x86_pairs;
pub(crate) use int::IntSimd;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::{Dotprod, Neon};
pub(crate) use pairs::{Bf16Pair, PairSimd, dot as pair_dot};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_int::Vnni;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_pairs::Avx512Bf16;

/// Lanes in a vector, and partial sums in a dot product.
pub(crate) const LANES: usize = 16;

/// Added to a number in -2^22..2^22, leaves its nearest integer in the low bits.
pub(crate) const ROUNDING: f32 = 12_582_912.0; // 1.5 * 2^23

/// Numbers that are all below it become integers as zeros do: their scale has no reciprocal.
pub(crate) const SMALLEST: f32 = f32::MIN_POSITIVE * 256.0;

pub(crate) trait Simd: Copy {
    /// Sixteen lanes.
    type V: Copy;
    /// Whether 32 vectors of sixteen lanes fit the register file (otherwise 8).
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V;
    fn load_f16(self, x: &[f16; LANES]) -> Self::V;
    fn load_u8(self, x: &[u8; LANES]) -> Self::V;
    /// As [`Simd::load_u8`], of signed bytes.
    fn load_i8(self, x: &[u8; LANES]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; LANES]);
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Hints that the cache line at `data` will be read; the address need not be valid.
    fn prefetch<T>(self, data: *const T);
    /// As [`Simd::prefetch`], to the second cache: for what is not used soon.
    fn prefetch_far<T>(self, data: *const T);
    /// For `t = ROUNDING + n`: two powers of two whose product is 2^n.
    fn power_halves(self, t: Self::V) -> (Self::V, Self::V);
    /// The sum of the lanes: i with i + 8, then + 4, + 2, + 1.
    fn reduce(self, v: Self::V) -> f32;
    /// The largest lane; any number where a lane is NaN.
    fn reduce_max(self, v: Self::V) -> f32;
    /// [`Simd::reduce`] of sixteen vectors.
    #[inline(always)]
    fn reduce_all(self, v: [Self::V; LANES]) -> [f32; LANES] {
        let mut sums = [0.0; LANES];
        for (sum, v) in sums.iter_mut().zip(v) {
            *sum = self.reduce(v);
        }
        sums
    }
    /// [`Simd::reduce_max`] of sixteen vectors.
    #[inline(always)]
    fn reduce_max_all(self, v: [Self::V; LANES]) -> [f32; LANES] {
        let mut largest = [0.0; LANES];
        for (largest, v) in largest.iter_mut().zip(v) {
            *largest = self.reduce_max(v);
        }
        largest
    }
}

/// Plain Rust. The meaning of every operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Portable;

impl Portable {
    #[inline(always)]
    fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
        std::array::from_fn(|i| f(a[i], b[i]))
    }
}

impl Simd for Portable {
    type V = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V {
        x.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::V {
        x.map(f16::to_f32)
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::V {
        x.map(f32::from)
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::V {
        x.map(|x| f32::from(x.cast_signed()))
    }
    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    #[inline(always)]
    fn prefetch_far<T>(self, _: *const T) {}
    #[inline(always)]
    fn power_halves(self, t: Self::V) -> (Self::V, Self::V) {
        let halves = t.map(crate::math::power_halves);
        (halves.map(|(a, _)| a), halves.map(|(_, b)| b))
    }
    #[inline(always)]
    fn reduce(self, v: Self::V) -> f32 {
        crate::math::reduce(v)
    }
    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
