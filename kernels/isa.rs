//! Which instruction set the hot loops run on, chosen once at run time.
//!
//! A loop is written once over [`Simd`] and compiled for every instruction set. Each lane
//! operation is one IEEE operation (fused multiply-add included), so all sets give the same bits;
//! the choice changes speed alone. Where there are products of bf16 in pairs, weights are packed
//! for them ([`Isa::has_bf16_pairs`]), and what is packed decides the bits.

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Avx512Bf16, Vnni};
#[cfg(target_arch = "aarch64")]
use crate::simd::{Dotprod, Neon};
use crate::simd::{IntSimd, PairSimd, Portable, Simd};

/// An instruction set this processor has. Values come from detection only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Isa {
    /// Plain Rust: what every processor can run, and what the others are compared with.
    pub const PORTABLE: Isa = Isa(Level::Portable);

    /// The fastest one.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// All of this processor's, fastest first; [`Isa::PORTABLE`] is the last.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx512::detect().map(|token| Isa(Level::Avx512(token))));
            found.extend(Avx2::detect().map(|token| Isa(Level::Avx2(token))));
        }
        #[cfg(target_arch = "aarch64")]
        found.extend(Neon::detect().map(|token| Isa(Level::Neon(token))));
        found.push(Isa::PORTABLE);
        found
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => "neon",
        }
    }

    /// [`Simd::WIDE`] of the lanes it runs on.
    pub(crate) fn is_wide(self) -> bool {
        match self.0 {
            Level::Portable => Portable::WIDE,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => Avx2::WIDE,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => Avx512::WIDE,
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => Neon::WIDE,
        }
    }

    /// Runs a loop as compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(token) => token.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(token) => token.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(token) => token.run(kernel),
        }
    }

    /// As [`Isa::run`], for products of small integers.
    #[inline]
    pub(crate) fn run_int<K: IntKernel>(self, kernel: K) {
        match self.int_level() {
            IntLevel::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            IntLevel::Avx2(token) => token.run_int(kernel),
            #[cfg(target_arch = "x86_64")]
            IntLevel::Vnni(token) => token.run(kernel),
            #[cfg(target_arch = "aarch64")]
            IntLevel::Neon(token) => token.run_int(kernel),
            #[cfg(target_arch = "aarch64")]
            IntLevel::Dotprod(token) => token.run(kernel),
        }
    }

    /// Whether 32 vectors fit the registers of what [`Isa::run_int`] runs on.
    pub(crate) fn is_wide_int(self) -> bool {
        match self.int_level() {
            IntLevel::Portable => Portable::WIDE,
            #[cfg(target_arch = "x86_64")]
            IntLevel::Avx2(_) => Avx2::WIDE,
            #[cfg(target_arch = "x86_64")]
            IntLevel::Vnni(_) => Avx512::WIDE,
            #[cfg(target_arch = "aarch64")]
            IntLevel::Neon(_) | IntLevel::Dotprod(_) => Neon::WIDE,
        }
    }

    /// Whether it multiplies bf16 numbers in pairs. Weights in bf16 are then packed for that, and
    /// products with them have other bits than without.
    pub fn has_bf16_pairs(self) -> bool {
        !matches!(self.pair_level(), PairLevel::Portable)
    }

    /// As [`Isa::run`], for products of bf16 in pairs; sets that have none compute them in plain
    /// Rust.
    #[inline]
    pub(crate) fn run_pairs<K: PairKernel>(self, kernel: K) {
        match self.pair_level() {
            PairLevel::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            PairLevel::Avx512(token) => token.run(kernel),
        }
    }

    fn pair_level(self) -> PairLevel {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(token) => {
                Avx512Bf16::detect(token).map_or(PairLevel::Portable, PairLevel::Avx512)
            }
            _ => PairLevel::Portable,
        }
    }

    /// The first processors with AVX-512, or NEON, have no products of bytes in it.
    fn int_level(self) -> IntLevel {
        match self.0 {
            Level::Portable => IntLevel::Portable,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(token) => IntLevel::Avx2(token),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(token) => match (Vnni::detect(token), Avx2::detect()) {
                (Some(token), _) => IntLevel::Vnni(token),
                (None, Some(token)) => IntLevel::Avx2(token),
                (None, None) => IntLevel::Portable,
            },
            #[cfg(target_arch = "aarch64")]
            Level::Neon(token) => {
                Dotprod::detect(token).map_or(IntLevel::Neon(token), IntLevel::Dotprod)
            }
        }
    }
}

/// What products of small integers run on.
enum IntLevel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Vnni(Vnni),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    Dotprod(Dotprod),
}

/// What products of bf16 in pairs run on.
enum PairLevel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512Bf16),
}

/// A hot loop with its arguments. `run` and everything it calls must be `#[inline(always)]`:
/// only what is inlined into [`Isa::run`]'s instances is compiled with their instructions.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// As [`Kernel`], over [`IntSimd`].
pub(crate) trait IntKernel {
    fn run<S: IntSimd>(self, simd: S);
}

/// As [`Kernel`], over [`PairSimd`].
pub(crate) trait PairKernel {
    fn run<S: PairSimd>(self, simd: S);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_portable_set_is_always_there_and_last() {
        let all = Isa::available();
        assert_eq!(all.last(), Some(&Isa::PORTABLE));
        assert_eq!(all[0], Isa::detect());
        assert_eq!(Isa::PORTABLE.name(), "portable");
    }
}
