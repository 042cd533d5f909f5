//! The lanes on AVX2 (two registers) and AVX-512 (one).
//!
//! [`Avx2`] and [`Avx512`] are tokens: `detect` alone makes them, so whoever holds one may run
//! their instructions. That is the proof behind every `unsafe` here.
//!
//! Arrays become vectors by `transmute` and not by load intrinsics: these check their pointers in
//! builds with debug assertions, and the tests generate text.

use super::{LANES, ROUNDING, Simd};
use crate::isa::Kernel;
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::mem::transmute;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512(());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let found = Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        found.then_some(Self(()))
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn compiled<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that `detect` found every feature `compiled` enables.
        unsafe { compiled(self, kernel) }
    }
}

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that `detect` found every feature `compiled` enables.
        unsafe { compiled(self, kernel) }
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn prefetch<T>(self, data: *const T) {
        // SAFETY: a hint; the processor ignores addresses it cannot read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.cast()) }
    }
    #[inline(always)]
    fn prefetch_far<T>(self, data: *const T) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(data.cast()) }
    }

    with_token! {
        fn splat(x: f32) -> __m512 = _mm512_set1_ps;
        fn load(x: &[f32; LANES]) -> __m512 = wide::load;
        fn load_bf16(x: &[bf16; LANES]) -> __m512 = wide::load_bf16;
        fn load_f16(x: &[f16; LANES]) -> __m512 = wide::load_f16;
        fn load_u8(x: &[u8; LANES]) -> __m512 = wide::load_u8;
        fn load_i8(x: &[u8; LANES]) -> __m512 = wide::load_i8;
        fn store(v: __m512, out: &mut [f32; LANES]) -> () = wide::store;
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps;
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps;
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps;
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps;
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps;
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps;
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps;
        fn power_halves(t: __m512) -> (__m512, __m512) = wide::power_halves;
        fn reduce(v: __m512) -> f32 = wide::reduce;
        fn reduce_max(v: __m512) -> f32 = wide::reduce_max;
        fn reduce_all(v: [__m512; LANES]) -> [f32; LANES] = wide::reduce_all;
        fn reduce_max_all(v: [__m512; LANES]) -> [f32; LANES] = wide::reduce_max_all;
    }
}

type Pair = [__m256; 2];

impl Simd for Avx2 {
    type V = Pair;
    const WIDE: bool = false;

    #[inline(always)]
    fn prefetch<T>(self, data: *const T) {
        // SAFETY: a hint; the processor ignores addresses it cannot read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.cast()) }
    }
    #[inline(always)]
    fn prefetch_far<T>(self, data: *const T) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(data.cast()) }
    }

    with_token! {
        fn splat(x: f32) -> Pair = pair::splat;
        fn load(x: &[f32; LANES]) -> Pair = pair::load;
        fn load_bf16(x: &[bf16; LANES]) -> Pair = pair::load_bf16;
        fn load_f16(x: &[f16; LANES]) -> Pair = pair::load_f16;
        fn load_u8(x: &[u8; LANES]) -> Pair = pair::load_u8;
        fn load_i8(x: &[u8; LANES]) -> Pair = pair::load_i8;
        fn store(v: Pair, out: &mut [f32; LANES]) -> () = pair::store;
        fn mul_add(a: Pair, b: Pair, c: Pair) -> Pair = pair::mul_add;
        fn add(a: Pair, b: Pair) -> Pair = pair::add;
        fn sub(a: Pair, b: Pair) -> Pair = pair::sub;
        fn mul(a: Pair, b: Pair) -> Pair = pair::mul;
        fn div(a: Pair, b: Pair) -> Pair = pair::div;
        fn max(a: Pair, b: Pair) -> Pair = pair::max;
        fn min(a: Pair, b: Pair) -> Pair = pair::min;
        fn power_halves(t: Pair) -> (Pair, Pair) = pair::power_halves;
        fn reduce(v: Pair) -> f32 = pair::reduce;
        fn reduce_max(v: Pair) -> f32 = pair::reduce_max;
    }
}

mod wide {
    use super::*;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn load(x: &[f32; LANES]) -> __m512 {
        // SAFETY: both are sixteen f32.
        unsafe { transmute::<[f32; LANES], __m512>(*x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn load_bf16(x: &[bf16; LANES]) -> __m512 {
        // SAFETY: both are 32 bytes, and any are valid.
        let bits = unsafe { transmute::<[bf16; LANES], __m256i>(*x) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn load_f16(x: &[f16; LANES]) -> __m512 {
        // SAFETY: both are 32 bytes, and any are valid.
        let bits = unsafe { transmute::<[f16; LANES], __m256i>(*x) };
        _mm512_cvtph_ps(bits)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn load_u8(x: &[u8; LANES]) -> __m512 {
        // SAFETY: both are 16 bytes, and any are valid.
        let bytes = unsafe { transmute::<[u8; LANES], __m128i>(*x) };
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn load_i8(x: &[u8; LANES]) -> __m512 {
        // SAFETY: both are 16 bytes, and any are valid.
        let bytes = unsafe { transmute::<[u8; LANES], __m128i>(*x) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn store(v: __m512, out: &mut [f32; LANES]) {
        // SAFETY: both are sixteen f32.
        *out = unsafe { transmute::<__m512, [f32; LANES]>(v) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn power_halves(t: __m512) -> (__m512, __m512) {
        let rounding = _mm512_castps_si512(_mm512_set1_ps(ROUNDING));
        let n = _mm512_sub_epi32(_mm512_castps_si512(t), rounding);
        let first = _mm512_srai_epi32::<1>(n);
        let second = _mm512_sub_epi32(n, first);
        let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
        let first = _mm512_add_epi32(one, _mm512_slli_epi32::<23>(first));
        let second = _mm512_add_epi32(one, _mm512_slli_epi32::<23>(second));
        (_mm512_castsi512_ps(first), _mm512_castsi512_ps(second))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2")]
    pub(super) fn reduce(v: __m512) -> f32 {
        let high = _mm512_extractf32x8_ps::<1>(v);
        pair::reduce_half(_mm256_add_ps(_mm512_castps512_ps256(v), high))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2")]
    pub(super) fn reduce_max(v: __m512) -> f32 {
        pair::reduce_max([_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)])
    }

    /// Four rounds of "interleave two vectors and add" (or take the larger): the tree of `reduce`,
    /// sixteen at a time.
    macro_rules! reduce_all {
        ($name:ident, $pairwise:ident) => {
            #[inline]
            #[target_feature(enable = "avx512f")]
            pub(super) fn $name(v: [__m512; LANES]) -> [f32; LANES] {
                let mut eights = [v[0]; 8];
                for (i, eight) in eights.iter_mut().enumerate() {
                    let (a, b) = (v[2 * i], v[2 * i + 1]);
                    let low = _mm512_shuffle_f32x4::<0x44>(a, b);
                    *eight = $pairwise(low, _mm512_shuffle_f32x4::<0xEE>(a, b));
                }
                let mut fours = [v[0]; 4];
                for (i, four) in fours.iter_mut().enumerate() {
                    let (a, b) = (eights[2 * i], eights[2 * i + 1]);
                    let low = _mm512_shuffle_f32x4::<0x88>(a, b);
                    *four = $pairwise(low, _mm512_shuffle_f32x4::<0xDD>(a, b));
                }
                let mut twos = [v[0]; 2];
                for (i, two) in twos.iter_mut().enumerate() {
                    let (a, b) = (fours[2 * i], fours[2 * i + 1]);
                    let low = _mm512_shuffle_ps::<0x44>(a, b);
                    *two = $pairwise(low, _mm512_shuffle_ps::<0xEE>(a, b));
                }
                let low = _mm512_shuffle_ps::<0x88>(twos[0], twos[1]);
                let high = _mm512_shuffle_ps::<0xDD>(twos[0], twos[1]);
                // Lane 4 i + j of the sum belongs to vector 4 j + i.
                let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                let mut sums = [0.0; LANES];
                store(_mm512_permutexvar_ps(order, $pairwise(low, high)), &mut sums);
                sums
            }
        };
    }
    reduce_all!(reduce_all, _mm512_add_ps);
    reduce_all!(reduce_max_all, _mm512_max_ps);
}

pub(super) mod pair {
    use super::*;

    macro_rules! both {
        ($($name:ident($($arg:ident),*) = $intrinsic:ident;)*) => {$(
            #[inline]
            #[target_feature(enable = "avx2,fma")]
            pub(super) fn $name($($arg: Pair),*) -> Pair {
                [$intrinsic($($arg[0]),*), $intrinsic($($arg[1]),*)]
            }
        )*};
    }

    both! {
        mul_add(a, b, c) = _mm256_fmadd_ps;
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        max(a, b) = _mm256_max_ps;
        min(a, b) = _mm256_min_ps;
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn splat(x: f32) -> Pair {
        [_mm256_set1_ps(x); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load(x: &[f32; LANES]) -> Pair {
        // SAFETY: both are sixteen f32.
        unsafe { transmute::<[f32; LANES], Pair>(*x) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load_bf16(x: &[bf16; LANES]) -> Pair {
        // SAFETY: both are 32 bytes, and any are valid.
        let bits = unsafe { transmute::<[bf16; LANES], __m256i>(*x) };
        let low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits));
        let high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(bits));
        let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low));
        [low, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn load_f16(x: &[f16; LANES]) -> Pair {
        // SAFETY: both are 32 bytes, and any are valid.
        let bits = unsafe { transmute::<[f16; LANES], __m256i>(*x) };
        let low = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
        [low, _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(bits))]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::simd) fn to_float(x: [__m256i; 2]) -> Pair {
        [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load_u8(x: &[u8; LANES]) -> Pair {
        // SAFETY: both are 16 bytes, and any are valid.
        let bytes = unsafe { transmute::<[u8; LANES], __m128i>(*x) };
        let high = _mm_srli_si128::<8>(bytes);
        to_float([_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(high)])
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load_i8(x: &[u8; LANES]) -> Pair {
        // SAFETY: both are 16 bytes, and any are valid.
        let bytes = unsafe { transmute::<[u8; LANES], __m128i>(*x) };
        let high = _mm_srli_si128::<8>(bytes);
        to_float([_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(high)])
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn store(v: Pair, out: &mut [f32; LANES]) {
        // SAFETY: both are sixteen f32.
        *out = unsafe { transmute::<Pair, [f32; LANES]>(v) };
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn power_halves(t: Pair) -> (Pair, Pair) {
        let (low, high) = (power_halves_of(t[0]), power_halves_of(t[1]));
        ([low.0, high.0], [low.1, high.1])
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn power_halves_of(t: __m256) -> (__m256, __m256) {
        let rounding = _mm256_castps_si256(_mm256_set1_ps(ROUNDING));
        let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
        let n = _mm256_sub_epi32(_mm256_castps_si256(t), rounding);
        let first = _mm256_srai_epi32::<1>(n);
        let second = _mm256_sub_epi32(n, first);
        let first = _mm256_add_epi32(one, _mm256_slli_epi32::<23>(first));
        let second = _mm256_add_epi32(one, _mm256_slli_epi32::<23>(second));
        (_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn reduce(v: Pair) -> f32 {
        reduce_half(_mm256_add_ps(v[0], v[1]))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn reduce_max(v: Pair) -> f32 {
        let eight = _mm256_max_ps(v[0], v[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }

    /// The sum of eight lanes: i with i + 4, then + 2, + 1.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn reduce_half(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}
