//! The scalar arithmetic all kernels share: our own exp, one dot order, bf16 rounding.
//!
//! Plain functions are the meaning; the lane versions beside them give the same bits.

use crate::isa::Kernel;
use crate::simd::{LANES, ROUNDING, Simd};

// Cody and Waite: ln 2 in two parts, the first with few enough bits that n * LN2_HIGH is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Below, the result rounds to zero; above, to infinity.
const EXP_RANGE: (f32, f32) = (-104.0, 89.0);
/// 1 / 7!, 1 / 6!, ..., 1: exp's own series; on |r| <= ln(2) / 2 the next term is below 2^-27.
const SERIES: [f32; 8] =
    [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// e^x within 2 ulp, without tables or libm: the same bits everywhere. NaN stays NaN.
pub fn exp(x: f32) -> f32 {
    let x = if EXP_RANGE.0 > x { EXP_RANGE.0 } else { x };
    let x = if EXP_RANGE.1 < x { EXP_RANGE.1 } else { x };
    let t = x.mul_add(std::f32::consts::LOG2_E, ROUNDING);
    let n = t - ROUNDING;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let series = SERIES[1..].iter().fold(SERIES[0], |sum, &c| sum.mul_add(r, c));
    let (first, second) = power_halves(t);
    series * first * second
}

/// [`exp`] of sixteen lanes.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(EXP_RANGE.0), x);
    let x = s.min(s.splat(EXP_RANGE.1), x);
    let t = s.mul_add(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUNDING));
    let n = s.sub(t, s.splat(ROUNDING));
    let r = s.mul_add(n, s.splat(-LN2_HIGH), x);
    let r = s.mul_add(n, s.splat(-LN2_LOW), r);
    let mut series = s.splat(SERIES[0]);
    for c in &SERIES[1..] {
        series = s.mul_add(series, r, s.splat(*c));
    }
    let (first, second) = s.power_halves(t);
    s.mul(s.mul(series, first), second)
}

/// tanh by [`exp`]; absolute error below 3e-7.
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(x + x) + 1.0)
}

/// [`tanh`] of sixteen lanes.
#[inline(always)]
pub(crate) fn tanh_lanes<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let e = exp_lanes(s, s.add(x, x));
    s.sub(one, s.div(s.splat(2.0), s.add(e, one)))
}

/// x * sigmoid(x).
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(0.0 - x))
}

/// [`silu`] of sixteen lanes.
#[inline(always)]
pub(crate) fn silu_lanes<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp_lanes(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// The dot product in the one order all kernels use: sixteen partial sums (element i goes to
/// sum i mod 16, by `mul_add`), both operands padded with zeros to a multiple of sixteen, then
/// the partial sums as a tree: i with i + 8, + 4, + 2, + 1.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: operands differ in length");
    let mut sums = [0f32; LANES];
    for i in 0..a.len().next_multiple_of(LANES) {
        let (a, b) = (a.get(i).unwrap_or(&0.0), b.get(i).unwrap_or(&0.0));
        sums[i % LANES] = a.mul_add(*b, sums[i % LANES]);
    }
    reduce(sums)
}

/// Sum of squares in the order of [`dot`].
#[inline(always)]
pub(crate) fn square_sum_lanes<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sums = s.splat(0.0);
    for chunk in chunks {
        let x = s.load(chunk);
        sums = s.mul_add(x, x, sums);
    }
    if !tail.is_empty() {
        let x = s.load(&padded(tail));
        sums = s.mul_add(x, x, sums);
    }
    s.reduce(sums)
}

/// `out = f(a, b)` by sixteen lanes; the last ones are padded with zeros.
pub(crate) trait Map2 {
    fn map<S: Simd>(&self, s: S, a: S::V, b: S::V) -> S::V;
}

#[inline(always)]
pub(crate) fn map2_lanes<S: Simd>(s: S, f: &impl Map2, ab: (&[f32], &[f32]), out: &mut [f32]) {
    let (a, a_tail) = ab.0.as_chunks::<LANES>();
    let (b, b_tail) = ab.1.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        s.store(f.map(s, s.load(a), s.load(b)), out);
    }
    if !out_tail.is_empty() {
        let (a, b) = (s.load(&padded(a_tail)), s.load(&padded(b_tail)));
        let mut last = [0.0; LANES];
        s.store(f.map(s, a, b), &mut last);
        out_tail.copy_from_slice(&last[..out_tail.len()]);
    }
}

/// Up to sixteen values, followed by zeros.
#[inline(always)]
pub(crate) fn padded<T: Copy + Default>(tail: &[T]) -> [T; LANES] {
    let mut all = [T::default(); LANES];
    all[..tail.len()].copy_from_slice(tail);
    all
}

/// For `t = ROUNDING + n`: two powers of two whose product is 2^n.
#[inline(always)]
pub(crate) fn power_halves(t: f32) -> (f32, f32) {
    let n = t.to_bits().wrapping_sub(ROUNDING.to_bits()).cast_signed();
    let first = n >> 1;
    let second = n.wrapping_sub(first);
    let power = |n: i32| f32::from_bits(1f32.to_bits().wrapping_add((n << 23).cast_unsigned()));
    (power(first), power(second))
}

/// The sum of sixteen numbers: i with i + 8, then + 4, + 2, + 1.
#[inline(always)]
pub(crate) fn reduce(v: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The nearest bf16 (ties to even), as f32. NaN stays NaN.
#[inline(always)]
pub fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    f32::from_bits((if x.is_nan() { quiet } else { nearest }) & 0xFFFF_0000)
}

/// Rounds to bf16 in place.
pub(crate) struct RoundToBf16<'a>(pub &'a mut [f32]);

impl Kernel for RoundToBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for x in self.0.iter_mut() {
            *x = round_to_bf16(*x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::testing::{Random, assert_same_bits};

    struct Exp<'a>(&'a mut [f32]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.as_chunks_mut::<LANES>().0 {
                s.store(exp_lanes(s, s.load(chunk)), chunk);
            }
        }
    }

    struct Reduce([[f32; LANES]; LANES]);
    impl Kernel for Reduce {
        type Output = ([f32; LANES], [f32; LANES]);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let v = self.0.map(|v| s.load(&v));
            (s.reduce_all(v), v.map(|v| s.reduce(v)))
        }
    }

    #[test]
    fn exp_is_within_two_ulp_and_ends_where_f32_ends() {
        for i in -1_030_000..887_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::MIN_POSITIVE).max(exact) * f64::from(f32::EPSILON);
            assert!((f64::from(exp(x)) - exact).abs() <= 2.0 * ulp, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp_has_the_same_bits_on_every_instruction_set() {
        let mut inputs: Vec<f32> = (-70_000..60_000).map(|i| i as f32 * 1.7e-3).collect();
        inputs.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-30, 3e38, -3e38]);
        inputs.resize(inputs.len().next_multiple_of(LANES), 1.0);
        let expected: Vec<f32> = inputs.iter().map(|&x| exp(x)).collect();
        for isa in Isa::available() {
            let mut found = inputs.clone();
            isa.run(Exp(&mut found));
            assert_same_bits(&expected, &found, isa.name());
        }
    }

    #[test]
    fn lanes_are_summed_in_one_order_everywhere() {
        let mut random = Random::new(5);
        let vectors = std::array::from_fn(|_| std::array::from_fn(|_| random.normal()));
        let expected = vectors.map(reduce);
        for isa in Isa::available() {
            let (all, single) = isa.run(Reduce(vectors));
            assert_same_bits(&expected, &all, isa.name());
            assert_same_bits(&expected, &single, isa.name());
        }
    }

    #[test]
    fn bf16_rounding_is_to_nearest_even_and_keeps_nan() {
        let mut random = Random::new(3);
        for _ in 0..10_000 {
            let x = random.normal();
            assert_eq!(round_to_bf16(x), half::bf16::from_f32(x).to_f32());
        }
        assert_eq!(round_to_bf16(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(round_to_bf16(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
        assert_eq!(round_to_bf16(f32::MAX), f32::INFINITY);
        assert!(round_to_bf16(f32::from_bits(0x7F80_0001)).is_nan());
    }

    #[test]
    fn tanh_and_silu_are_close() {
        for i in -2000..2000 {
            let x = i as f32 * 0.01;
            assert!((tanh(x) - x.tanh()).abs() < 3e-7);
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(silu(x)) - exact).abs() < 1e-6 * (1.0 + exact.abs()));
        }
        assert!(tanh(f32::NAN).is_nan() && silu(f32::NAN).is_nan());
    }
}
