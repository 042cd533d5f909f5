//! Products of bf16 in pairs on AVX-512.

use super::LANES;
use super::pairs::{Bf16Pair, PairSimd};
use super::x86::Avx512;
use crate::isa::PairKernel;
use std::arch::x86_64::*;
use std::mem::transmute;

/// AVX-512 with products of bf16. As with the other tokens, `detect` alone makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    pub(crate) fn detect(wide: Avx512) -> Option<Self> {
        is_x86_feature_detected!("avx512bf16").then_some(Self(wide))
    }

    #[inline]
    pub(crate) fn run<K: PairKernel>(self, kernel: K) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
        fn compiled<K: PairKernel>(simd: Avx512Bf16, kernel: K) {
            kernel.run(simd);
        }
        // SAFETY: the tokens prove that every feature `compiled` enables was found.
        unsafe { compiled(self, kernel) }
    }
}

impl PairSimd for Avx512Bf16 {
    type Float = Avx512;
    type Pairs = __m512bh;

    #[inline(always)]
    fn float(self) -> Avx512 {
        self.0
    }

    with_token! {
        fn pairs(x: &[Bf16Pair; LANES]) -> __m512bh = pairs;
        fn dot(sums: __m512, pairs: __m512bh, x: Bf16Pair) -> __m512 = dot;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(x: &[Bf16Pair; LANES]) -> __m512bh {
    // SAFETY: both are 64 bytes, and any are valid.
    unsafe { transmute::<[Bf16Pair; LANES], __m512bh>(*x) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(sums: __m512, pairs: __m512bh, x: Bf16Pair) -> __m512 {
    let x = _mm512_set1_epi32(x.0.cast_signed());
    // SAFETY: both are 64 bytes, and any are valid.
    let x = unsafe { transmute::<__m512i, __m512bh>(x) };
    _mm512_dpbf16_ps(sums, pairs, x)
}
