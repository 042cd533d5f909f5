//! The most that a processor multiplies: loops that do nothing else, to compare the others with.

use std::hint::black_box;

use crate::isa::{IntKernel, Kernel, PairKernel};
use crate::simd::{Bf16Pair, IntSimd, LANES, PairSimd, Simd};
use crate::threads::Threads;

/// Sums that grow side by side: enough to hide what one product takes, and they fit the registers.
const WIDE_SUMS: usize = 16;
const NARROW_SUMS: usize = 5;
/// Products of a sum between two looks at the clock.
const STEPS: usize = 1 << 20;

/// Computes nothing on all threads, as fast as f32 products go; returns how many operations (an
/// addition and a multiplication each) that were.
pub fn f32_products(threads: &Threads) -> u64 {
    threads.run(threads.count(), |_| threads.isa().run(Floats));
    let sums = if threads.isa().is_wide() { WIDE_SUMS } else { NARROW_SUMS };
    (threads.count() * sums * STEPS * LANES * 2) as u64
}

/// As [`f32_products`], of bf16 in pairs where the processor has them.
pub fn bf16_products(threads: &Threads) -> u64 {
    if !threads.isa().has_bf16_pairs() {
        return f32_products(threads);
    }
    threads.run(threads.count(), |_| threads.isa().run_pairs(Pairs));
    (threads.count() * WIDE_SUMS * STEPS * LANES * 2 * 2) as u64
}

/// As [`f32_products`], of integers of 8 bits.
pub fn int8_products(threads: &Threads) -> u64 {
    threads.run(threads.count(), |_| threads.isa().run_int(Ints));
    let sums = if threads.isa().is_wide_int() { WIDE_SUMS } else { NARROW_SUMS };
    (threads.count() * sums * STEPS * LANES * 4 * 2) as u64
}

/// Reads all of `data` on all threads, as fast as memory gives it.
pub fn read(threads: &Threads, data: &[f32]) {
    let parts = 8 * threads.count();
    threads.run(parts, |part| {
        let piece = &data[part * data.len() / parts..(part + 1) * data.len() / parts];
        threads.isa().run(Read { data: piece });
    });
}

struct Read<'a> {
    data: &'a [f32],
}

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = [s.splat(0.0); 4];
        for lines in self.data.as_chunks::<LANES>().0.as_chunks::<4>().0 {
            for (sum, line) in sums.iter_mut().zip(lines) {
                // across page borders, where the processor's own prefetching stops
                s.prefetch(line.as_ptr().wrapping_byte_add(4 << 10));
                *sum = s.add(*sum, s.load(line));
            }
        }
        for sum in sums {
            black_box(s.reduce(sum));
        }
    }
}

struct Floats;

impl Kernel for Floats {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE { floats::<S, WIDE_SUMS>(s) } else { floats::<S, NARROW_SUMS>(s) }
    }
}

#[inline(always)]
fn floats<S: Simd, const N: usize>(s: S) {
    let (a, b) = (s.splat(black_box(0.5)), s.splat(black_box(0.25)));
    let mut sums = [s.splat(0.0); N];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = s.mul_add(a, *sum, b);
        }
    }
    for sum in sums {
        black_box(s.reduce(sum));
    }
}

struct Pairs;

impl PairKernel for Pairs {
    #[inline(always)]
    fn run<S: PairSimd>(self, s: S) {
        let one = Bf16Pair::new(black_box(0.5), black_box(0.25));
        let weights = s.pairs(&[one; LANES]);
        let mut sums = [s.float().splat(0.0); WIDE_SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = s.dot(*sum, weights, one);
            }
        }
        for sum in sums {
            black_box(s.float().reduce(sum));
        }
    }
}

struct Ints;

impl IntKernel for Ints {
    #[inline(always)]
    fn run<S: IntSimd>(self, s: S) {
        if S::Float::WIDE { ints::<S, WIDE_SUMS>(s) } else { ints::<S, NARROW_SUMS>(s) }
    }
}

#[inline(always)]
fn ints<S: IntSimd, const N: usize>(s: S) {
    let codes = s.bytes(&black_box([1; 4 * LANES]));
    let x = black_box(0x0101_0101);
    let mut sums = [s.splat(0); N];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = s.dot(*sum, codes, x);
        }
    }
    for sum in sums {
        black_box(s.float().reduce(s.as_floats(sum)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn work_is_counted_by_threads_and_lanes() {
        for isa in Isa::available() {
            let (one, two) = (Threads::new(1).with_isa(isa), Threads::new(2).with_isa(isa));
            assert_eq!(f32_products(&two), 2 * f32_products(&one), "{isa:?}");
            assert!(bf16_products(&one) >= f32_products(&one), "{isa:?}");
            assert!(int8_products(&one) >= f32_products(&one), "{isa:?}");
        }
    }
}
