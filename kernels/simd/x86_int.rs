//! Integer products on AVX2 (two registers) and AVX-512 with VNNI (one).

use super::Simd;
use super::int::{BYTES, IntSimd};
use super::x86::{Avx2, Avx512};
use crate::isa::IntKernel;
use std::arch::x86_64::*;
use std::mem::transmute;

/// AVX-512 with products of bytes. As with the other tokens, `detect` alone makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vnni(Avx512);

impl Vnni {
    pub(crate) fn detect(wide: Avx512) -> Option<Self> {
        is_x86_feature_detected!("avx512vnni").then_some(Self(wide))
    }

    #[inline]
    pub(crate) fn run<K: IntKernel>(self, kernel: K) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
        fn compiled<K: IntKernel>(simd: Vnni, kernel: K) {
            kernel.run(simd);
        }
        // SAFETY: the tokens prove that every feature `compiled` enables was found.
        unsafe { compiled(self, kernel) }
    }
}

impl Avx2 {
    #[inline]
    pub(crate) fn run_int<K: IntKernel>(self, kernel: K) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: IntKernel>(simd: Avx2, kernel: K) {
            kernel.run(simd);
        }
        // SAFETY: `self` proves that `detect` found every feature `compiled` enables.
        unsafe { compiled(self, kernel) }
    }
}

impl IntSimd for Vnni {
    type Float = Avx512;
    type Bytes = __m512i;
    type Sums = __m512i;

    #[inline(always)]
    fn float(self) -> Avx512 {
        self.0
    }

    with_token! {
        fn bytes(x: &[u8; BYTES]) -> __m512i = wide::bytes;
        fn to_array(x: __m512i) -> [u8; BYTES] = wide::to_array;
        fn field(x: __m512i, shift: u32, mask: u8) -> __m512i = wide::field;
        fn above(low: __m512i, high: __m512i) -> __m512i = wide::above;
        fn splat(x: i32) -> __m512i = _mm512_set1_epi32;
        fn dot(sums: __m512i, codes: __m512i, x: i32) -> __m512i = wide::dot;
        fn as_floats(sums: __m512i) -> __m512 = _mm512_castsi512_ps;
    }
}

type Pair = [__m256i; 2];

impl IntSimd for Avx2 {
    type Float = Self;
    type Bytes = Pair;
    type Sums = Pair;

    #[inline(always)]
    fn float(self) -> Self {
        self
    }

    with_token! {
        fn bytes(x: &[u8; BYTES]) -> Pair = pair::bytes;
        fn to_array(x: Pair) -> [u8; BYTES] = pair::to_array;
        fn field(x: Pair, shift: u32, mask: u8) -> Pair = pair::field;
        fn above(low: Pair, high: Pair) -> Pair = pair::above;
        fn splat(x: i32) -> Pair = pair::splat;
        fn dot(sums: Pair, codes: Pair, x: i32) -> Pair = pair::dot;
        fn as_floats(sums: Pair) -> <Self as Simd>::V = pair::as_floats;
    }
}

mod wide {
    use super::*;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn bytes(x: &[u8; BYTES]) -> __m512i {
        // SAFETY: both are 64 bytes, and any are valid.
        unsafe { transmute::<[u8; BYTES], __m512i>(*x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn to_array(x: __m512i) -> [u8; BYTES] {
        // SAFETY: as above.
        unsafe { transmute::<__m512i, [u8; BYTES]>(x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn field(x: __m512i, shift: u32, mask: u8) -> __m512i {
        // bits of the neighbour that come along are masked away
        let moved = _mm512_srl_epi16(x, _mm_cvtsi32_si128(shift.cast_signed()));
        _mm512_and_si512(moved, _mm512_set1_epi8(mask.cast_signed()))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn above(low: __m512i, high: __m512i) -> __m512i {
        _mm512_or_si512(low, _mm512_slli_epi16::<4>(high))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dot(sums: __m512i, codes: __m512i, x: i32) -> __m512i {
        _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x))
    }
}

mod pair {
    use super::*;

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn bytes(x: &[u8; BYTES]) -> Pair {
        // SAFETY: both are 64 bytes, and any are valid.
        unsafe { transmute::<[u8; BYTES], Pair>(*x) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn to_array(x: Pair) -> [u8; BYTES] {
        // SAFETY: as above.
        unsafe { transmute::<Pair, [u8; BYTES]>(x) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn field(x: Pair, shift: u32, mask: u8) -> Pair {
        let shift = _mm_cvtsi32_si128(shift.cast_signed());
        let mask = _mm256_set1_epi8(mask.cast_signed());
        // bits of the neighbour that come along are masked away
        [
            _mm256_and_si256(_mm256_srl_epi16(x[0], shift), mask),
            _mm256_and_si256(_mm256_srl_epi16(x[1], shift), mask),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn above(low: Pair, high: Pair) -> Pair {
        [
            _mm256_or_si256(low[0], _mm256_slli_epi16::<4>(high[0])),
            _mm256_or_si256(low[1], _mm256_slli_epi16::<4>(high[1])),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn splat(x: i32) -> Pair {
        [_mm256_set1_epi32(x); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn as_floats(sums: Pair) -> <Avx2 as Simd>::V {
        sums.map(|sums| _mm256_castsi256_ps(sums))
    }

    /// By words: sums of two products of bytes would not fit them.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn dot(sums: Pair, codes: Pair, x: i32) -> Pair {
        let x = _mm256_set1_epi32(x);
        let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
        let odd = _mm256_srai_epi16::<8>(x);
        [dot_half(sums[0], codes[0], even, odd), dot_half(sums[1], codes[1], even, odd)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn dot_half(sums: __m256i, codes: __m256i, even: __m256i, odd: __m256i) -> __m256i {
        let low = _mm256_and_si256(codes, _mm256_set1_epi16(255));
        let low = _mm256_madd_epi16(low, even);
        let high = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), odd);
        _mm256_add_epi32(sums, _mm256_add_epi32(low, high))
    }
}
