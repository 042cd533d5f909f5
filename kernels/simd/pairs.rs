//! Products of bf16 numbers in pairs, for sixteen columns at a time: two steps of a sum at once.
//!
//! What one instruction of newer processors computes, and no other rounds: to a sum is added the
//! product of the first numbers, then that of the second ones, each rounded once. Numbers too
//! small to be normal count as zeros, whether read or computed. (Where a result is so near to the
//! smallest normal number that it is rounded up to it, the instruction may give a zero instead.)

use super::{LANES, Portable, Simd};

/// Two bf16 numbers, the first in the high half: the instruction begins there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Bf16Pair(pub(crate) u32);

impl Bf16Pair {
    /// Of numbers that are rounded to bf16 already.
    #[inline(always)]
    pub(crate) fn new(first: f32, second: f32) -> Self {
        Self(first.to_bits() & 0xFFFF_0000 | second.to_bits() >> 16)
    }
    #[inline(always)]
    pub(crate) fn numbers(self) -> [f32; 2] {
        [f32::from_bits(self.0 & 0xFFFF_0000), f32::from_bits(self.0 << 16)]
    }
}

pub(crate) trait PairSimd: Copy {
    /// The lanes of the sums.
    type Float: Simd;
    /// A pair for each of sixteen columns.
    type Pairs: Copy;

    fn float(self) -> Self::Float;
    fn pairs(self, x: &[Bf16Pair; LANES]) -> Self::Pairs;
    /// Adds to each sum the products of its column's pair with that of `x`.
    fn dot(
        self,
        sums: <Self::Float as Simd>::V,
        pairs: Self::Pairs,
        x: Bf16Pair,
    ) -> <Self::Float as Simd>::V;
}

impl PairSimd for Portable {
    type Float = Self;
    type Pairs = [Bf16Pair; LANES];

    #[inline(always)]
    fn float(self) -> Self {
        self
    }
    #[inline(always)]
    fn pairs(self, x: &[Bf16Pair; LANES]) -> Self::Pairs {
        *x
    }
    #[inline(always)]
    fn dot(self, sums: [f32; LANES], pairs: Self::Pairs, x: Bf16Pair) -> [f32; LANES] {
        std::array::from_fn(|i| dot(sums[i], pairs[i], x))
    }
}

/// One column of [`PairSimd::dot`].
#[inline(always)]
pub(crate) fn dot(sum: f32, a: Bf16Pair, b: Bf16Pair) -> f32 {
    let products = a.numbers().into_iter().zip(b.numbers());
    products.fold(flush(sum), |sum, (a, b)| flush(flush(a).mul_add(flush(b), sum)))
}

#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, PairKernel};
    use crate::math::round_to_bf16;
    use crate::testing::{Random, assert_same_bits};

    struct Dots<'a> {
        pairs: [Bf16Pair; LANES],
        x: &'a [Bf16Pair],
        sums: &'a mut [f32; LANES],
    }

    impl PairKernel for Dots<'_> {
        #[inline(always)]
        fn run<S: PairSimd>(self, s: S) {
            let mut sums = s.float().load(self.sums);
            for x in self.x {
                sums = s.dot(sums, s.pairs(&self.pairs), *x);
            }
            s.float().store(sums, self.sums);
        }
    }

    fn dots(isa: Isa, pairs: [Bf16Pair; LANES], x: &[Bf16Pair], sums: f32) -> [f32; LANES] {
        let mut sums = [sums; LANES];
        isa.run_pairs(Dots { pairs, x, sums: &mut sums });
        sums
    }

    fn pair(first: f32, second: f32) -> Bf16Pair {
        Bf16Pair::new(round_to_bf16(first), round_to_bf16(second))
    }

    #[test]
    fn a_pair_gives_its_numbers_back() {
        assert_eq!(pair(1.5, -2.0).numbers(), [1.5, -2.0]);
        assert_eq!(pair(1.5, -2.0), Bf16Pair(0x3FC0_C000));
    }

    #[test]
    fn the_first_product_is_added_first_and_the_sum_is_rounded_between() {
        for isa in Isa::available() {
            // 2^24 + 1 is 2^24 in f32; the other way round, or exactly, this would be 1
            let x = [pair(1.0, 16_777_216.0)];
            let sums = dots(isa, [pair(1.0, -1.0); LANES], &x, 16_777_216.0);
            assert_eq!(sums, [0.0; LANES], "{isa:?}");
        }
    }

    #[test]
    fn what_is_too_small_to_be_normal_is_zero() {
        let (tiny, small) = (pair(1e-39, 0.0), pair(1e-20, 1e-20));
        for isa in Isa::available() {
            assert_eq!(dots(isa, [tiny; LANES], &[pair(1e30, 1.0)], 0.0), [0.0; LANES]);
            assert_eq!(dots(isa, [pair(1e30, 1.0); LANES], &[tiny], 0.0), [0.0; LANES]);
            assert_eq!(dots(isa, [small; LANES], &[small], 0.0), [0.0; LANES]);
            assert_eq!(dots(isa, [small; LANES], &[small], 1.0), [1.0; LANES]);
            assert_eq!(dots(isa, [small; LANES], &[small], 1e-39), [0.0; LANES]);
            let minus = dots(isa, [small; LANES], &[pair(-1e-20, -1e-20)], -0.0);
            assert!(minus.iter().all(|x| *x == 0.0 && x.is_sign_negative()), "{isa:?}");
        }
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_portable_one() {
        let mut random = Random::new(8);
        let mut pairs = |count: usize| -> Vec<Bf16Pair> {
            random.normals(2 * count).as_chunks().0.iter().map(|&[a, b]| pair(a, b)).collect()
        };
        let (columns, x) = (pairs(LANES), pairs(500));
        let columns = *columns.first_chunk().unwrap();
        let expected = dots(Isa::PORTABLE, columns, &x, 0.25);
        for isa in Isa::available() {
            assert_same_bits(&expected, &dots(isa, columns, &x, 0.25), &format!("{isa:?}"));
            for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let sums = dots(isa, [pair(special, 0.5); LANES], &[pair(0.0, 1.0)], 0.0);
                assert!(sums.iter().all(|x| x.is_nan()), "{isa:?}");
                let sums = dots(isa, [pair(0.5, special); LANES], &[pair(0.0, 1.0)], 0.0);
                assert!(sums.iter().all(|x| x.is_nan() == special.is_nan()), "{isa:?}");
            }
        }
    }
}
