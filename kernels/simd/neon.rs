//! The lanes on NEON: four registers. [`Neon`] and [`Dotprod`] are tokens, as in `x86.rs`.
//!
//! Instructions whose intrinsics are not stable are written in assembly.

use super::int::{BYTES, IntSimd};
use super::{LANES, ROUNDING, Simd};
use crate::isa::{IntKernel, Kernel};
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::mem::transmute;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neon(());

/// NEON with products of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dotprod(Neon);

impl Neon {
    pub(crate) fn detect() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn compiled<K: Kernel>(simd: Neon, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that `detect` found the feature `compiled` enables.
        unsafe { compiled(self, kernel) }
    }

    #[inline]
    pub(crate) fn run_int<K: IntKernel>(self, kernel: K) {
        #[target_feature(enable = "neon")]
        fn compiled<K: IntKernel>(simd: Neon, kernel: K) {
            kernel.run(simd);
        }
        // SAFETY: as above.
        unsafe { compiled(self, kernel) }
    }
}

impl Dotprod {
    pub(crate) fn detect(neon: Neon) -> Option<Self> {
        is_aarch64_feature_detected!("dotprod").then_some(Self(neon))
    }

    #[inline]
    pub(crate) fn run<K: IntKernel>(self, kernel: K) {
        #[target_feature(enable = "neon,dotprod")]
        fn compiled<K: IntKernel>(simd: Dotprod, kernel: K) {
            kernel.run(simd);
        }
        // SAFETY: the tokens prove that every feature `compiled` enables was found.
        unsafe { compiled(self, kernel) }
    }
}

type Lanes = [float32x4_t; 4];

impl Simd for Neon {
    type V = Lanes;
    const WIDE: bool = false;

    #[inline(always)]
    fn prefetch<T>(self, data: *const T) {
        // SAFETY: a hint; the processor ignores addresses it cannot read.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) data, options(nomem, nostack, preserves_flags))
        }
    }
    #[inline(always)]
    fn prefetch_far<T>(self, data: *const T) {
        // SAFETY: as above.
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) data, options(nomem, nostack, preserves_flags))
        }
    }

    with_token! {
        fn splat(x: f32) -> Lanes = lanes::splat;
        fn load(x: &[f32; LANES]) -> Lanes = lanes::load;
        fn load_bf16(x: &[bf16; LANES]) -> Lanes = lanes::load_bf16;
        fn load_f16(x: &[f16; LANES]) -> Lanes = lanes::load_f16;
        fn load_u8(x: &[u8; LANES]) -> Lanes = lanes::load_u8;
        fn load_i8(x: &[u8; LANES]) -> Lanes = lanes::load_i8;
        fn store(v: Lanes, out: &mut [f32; LANES]) -> () = lanes::store;
        fn mul_add(a: Lanes, b: Lanes, c: Lanes) -> Lanes = lanes::mul_add;
        fn add(a: Lanes, b: Lanes) -> Lanes = lanes::add;
        fn sub(a: Lanes, b: Lanes) -> Lanes = lanes::sub;
        fn mul(a: Lanes, b: Lanes) -> Lanes = lanes::mul;
        fn div(a: Lanes, b: Lanes) -> Lanes = lanes::div;
        fn max(a: Lanes, b: Lanes) -> Lanes = lanes::max;
        fn min(a: Lanes, b: Lanes) -> Lanes = lanes::min;
        fn power_halves(t: Lanes) -> (Lanes, Lanes) = lanes::power_halves;
        fn reduce(v: Lanes) -> f32 = lanes::reduce;
        fn reduce_max(v: Lanes) -> f32 = lanes::reduce_max;
    }
}

type Bytes = [uint8x16_t; 4];
type Sums = [int32x4_t; 4];

/// The tokens differ in one instruction: `$dot`.
macro_rules! int_simd {
    ($token:ty, |$self:ident| $neon:expr, $dot:path) => {
        impl IntSimd for $token {
            type Float = Neon;
            type Bytes = Bytes;
            type Sums = Sums;

            #[inline(always)]
            fn float($self) -> Neon {
                $neon
            }

            with_token! {
                fn bytes(x: &[u8; BYTES]) -> Bytes = ints::bytes;
                fn to_array(x: Bytes) -> [u8; BYTES] = ints::to_array;
                fn field(x: Bytes, shift: u32, mask: u8) -> Bytes = ints::field;
                fn above(low: Bytes, high: Bytes) -> Bytes = ints::above;
                fn splat(x: i32) -> Sums = ints::splat;
                fn dot(sums: Sums, codes: Bytes, x: i32) -> Sums = $dot;
                fn as_floats(sums: Sums) -> Lanes = ints::as_floats;
            }
        }
    };
}

int_simd!(Neon, |self| self, ints::dot);
int_simd!(Dotprod, |self| self.0, ints::dot_by_bytes);

mod lanes {
    use super::*;

    macro_rules! each {
        ($($name:ident($($arg:ident),*) = $one:expr;)*) => {$(
            #[inline]
            #[target_feature(enable = "neon")]
            pub(super) fn $name($($arg: Lanes),*) -> Lanes {
                [$one($($arg[0]),*), $one($($arg[1]),*), $one($($arg[2]),*), $one($($arg[3]),*)]
            }
        )*};
    }

    each! {
        mul_add(a, b, c) = mul_add_of;
        add(a, b) = vaddq_f32;
        sub(a, b) = vsubq_f32;
        mul(a, b) = vmulq_f32;
        div(a, b) = vdivq_f32;
        max(a, b) = max_of;
        min(a, b) = min_of;
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn mul_add_of(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn max_of(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vbslq_f32(vcgtq_f32(a, b), a, b)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn min_of(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vbslq_f32(vcltq_f32(a, b), a, b)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn splat(x: f32) -> Lanes {
        [vdupq_n_f32(x); 4]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load(x: &[f32; LANES]) -> Lanes {
        // SAFETY: both are sixteen f32.
        unsafe { transmute::<[f32; LANES], Lanes>(*x) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load_bf16(x: &[bf16; LANES]) -> Lanes {
        // SAFETY: both are 32 bytes, and any are valid.
        let bits = unsafe { transmute::<[bf16; LANES], [uint16x8_t; 2]>(*x) };
        let [a, b] = bits.map(|bits| {
            let low = vshll_n_u16::<16>(vget_low_u16(bits));
            [low, vshll_n_u16::<16>(vget_high_u16(bits))].map(|x| vreinterpretq_f32_u32(x))
        });
        [a[0], a[1], b[0], b[1]]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load_f16(x: &[f16; LANES]) -> Lanes {
        // SAFETY: both are 32 bytes, and any are valid.
        let bits = unsafe { transmute::<[f16; LANES], [float16x4_t; 4]>(*x) };
        bits.map(|bits| vcvt_f32_f16(bits))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load_u8(x: &[u8; LANES]) -> Lanes {
        // SAFETY: both are 16 bytes, and any are valid.
        let bytes = unsafe { transmute::<[u8; LANES], uint8x16_t>(*x) };
        let [a, b] = [vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)].map(|words| {
            [vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words)].map(|x| vcvtq_f32_u32(x))
        });
        [a[0], a[1], b[0], b[1]]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load_i8(x: &[u8; LANES]) -> Lanes {
        // SAFETY: both are 16 bytes, and any are valid.
        let bytes = unsafe { transmute::<[u8; LANES], int8x16_t>(*x) };
        let [a, b] = [vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)].map(|words| {
            [vmovl_s16(vget_low_s16(words)), vmovl_high_s16(words)].map(|x| vcvtq_f32_s32(x))
        });
        [a[0], a[1], b[0], b[1]]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn store(v: Lanes, out: &mut [f32; LANES]) {
        // SAFETY: both are sixteen f32.
        *out = unsafe { transmute::<Lanes, [f32; LANES]>(v) };
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn power_halves(t: Lanes) -> (Lanes, Lanes) {
        let rounding = vreinterpretq_s32_f32(vdupq_n_f32(ROUNDING));
        let one = vreinterpretq_s32_f32(vdupq_n_f32(1.0));
        let power = |n| vreinterpretq_f32_s32(vaddq_s32(one, vshlq_n_s32::<23>(n)));
        let n = t.map(|t| vsubq_s32(vreinterpretq_s32_f32(t), rounding));
        let first = n.map(|n| vshrq_n_s32::<1>(n));
        let second = n.map(|n| vsubq_s32(n, vshrq_n_s32::<1>(n)));
        (first.map(power), second.map(power))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn reduce(v: Lanes) -> f32 {
        let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
        vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn reduce_max(v: Lanes) -> f32 {
        vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(v[0], v[1]), vmaxnmq_f32(v[2], v[3])))
    }
}

mod ints {
    use super::*;

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn bytes(x: &[u8; BYTES]) -> Bytes {
        // SAFETY: both are 64 bytes, and any are valid.
        unsafe { transmute::<[u8; BYTES], Bytes>(*x) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn to_array(x: Bytes) -> [u8; BYTES] {
        // SAFETY: as above.
        unsafe { transmute::<Bytes, [u8; BYTES]>(x) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn field(x: Bytes, shift: u32, mask: u8) -> Bytes {
        // a shift to the left by less than nothing
        let shift = vdupq_n_s8(-(shift as i8));
        x.map(|x| vandq_u8(vshlq_u8(x, shift), vdupq_n_u8(mask)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn above(low: Bytes, high: Bytes) -> Bytes {
        std::array::from_fn(|i| vorrq_u8(low[i], vshlq_n_u8::<4>(high[i])))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn splat(x: i32) -> Sums {
        [vdupq_n_s32(x); 4]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn as_floats(sums: Sums) -> Lanes {
        sums.map(|sums| vreinterpretq_f32_s32(sums))
    }

    /// By words.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn dot(sums: Sums, codes: Bytes, x: i32) -> Sums {
        let x = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(x)));
        let [a, b, c, d] = codes;
        let [e, f, g, h] = sums;
        [four_columns(e, a, x), four_columns(f, b, x), four_columns(g, c, x), four_columns(h, d, x)]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn four_columns(sums: int32x4_t, codes: uint8x16_t, x: int16x8_t) -> int32x4_t {
        let low = two_columns(vmovl_u8(vget_low_u8(codes)), x);
        let high = two_columns(vmovl_high_u8(codes), x);
        vaddq_s32(sums, vpaddq_s32(low, high))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn two_columns(codes: uint16x8_t, x: int16x8_t) -> int32x4_t {
        let codes = vreinterpretq_s16_u16(codes);
        let first = vmull_s16(vget_low_s16(codes), vget_low_s16(x));
        vpaddq_s32(first, vmull_high_s16(codes, x))
    }

    /// The instruction's bytes are signed on both sides: of each code it gets 128 less, which is
    /// added again as twice 64.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn dot_by_bytes(sums: Sums, codes: Bytes, x: i32) -> Sums {
        let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
        let half = vdupq_n_s8(64);
        let rest = sdot(sdot(vdupq_n_s32(0), half, x), half, x);
        let [a, b, c, d] = codes.map(|codes| vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))));
        let [e, f, g, h] = sums.map(|sums| vaddq_s32(sums, rest));
        [sdot(e, a, x), sdot(f, b, x), sdot(g, c, x), sdot(h, d, x)]
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn sdot(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        let mut out = sums;
        // SAFETY: it computes, and touches nothing but its registers.
        unsafe {
            asm!(
                "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                inout(vreg) out, in(vreg) a, in(vreg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        out
    }
}
