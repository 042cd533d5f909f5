//! Memory of results: not zeroed in one go before it is written, nor given back between two steps.

use crate::threads::{Disjoint, Threads};
use std::mem::MaybeUninit;

/// A vector of `len` numbers as `write` leaves them; builds with debug assertions begin with NaN.
///
/// # Safety
/// `write` writes every number.
pub(crate) unsafe fn written(
    len: usize,
    write: impl FnOnce(Disjoint<MaybeUninit<f32>>),
) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(len);
    let spare = &mut numbers.spare_capacity_mut()[..len];
    if cfg!(debug_assertions) {
        spare.fill(MaybeUninit::new(f32::NAN));
    }
    write(Disjoint::new(spare));
    // SAFETY: the capacity is no less, and the caller promises that all of them are written.
    unsafe { numbers.set_len(len) };
    numbers
}

/// A vector of `len` numbers, piece by piece of `size` (the last may be shorter) as
/// `f(index, piece)` leaves it. A piece begins as zeros: its thread has it in its cache anyway.
pub(crate) fn by_pieces(
    threads: &Threads,
    len: usize,
    size: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let write = |out: Disjoint<MaybeUninit<f32>>| {
        threads.run(len.div_ceil(size), |i| {
            // SAFETY: pieces don't overlap, and each is one part's.
            let piece = unsafe { out.slice(i * size..len.min((i + 1) * size)) };
            piece.fill(MaybeUninit::new(0.0));
            // SAFETY: just filled.
            f(i, unsafe { piece.assume_init_mut() });
        });
    };
    // SAFETY: the pieces are all of it.
    unsafe { written(len, write) }
}

/// From here on freed memory is kept for what is asked for next, up to 256 MiB of each of the
/// allocator's heaps, and not given back: each step frees and needs the same again, and its pages
/// would be cleared for it each time. Of the whole process, so for programs, once what stays is
/// allocated; nothing where the C library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        const KEPT: c_int = 256 << 20;
        // what is larger is on pages of its own and given back at once; more is not accepted
        const LARGEST: c_int = 32 << 20;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        // SAFETY: settings of the allocator, valid at any time; it refuses what it can't do.
        unsafe { mallopt(M_TRIM_THRESHOLD, KEPT) };
        // SAFETY: as above.
        unsafe { mallopt(M_MMAP_THRESHOLD, LARGEST) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_begin_as_zeros_and_are_all_there() {
        for (len, size) in [(0, 3), (1, 3), (7, 3), (9, 3), (1000, 64)] {
            let numbers = by_pieces(&Threads::new(2), len, size, |i, piece| {
                assert!(piece.iter().all(|&x| x == 0.0));
                for (at, x) in piece.iter_mut().enumerate() {
                    *x = (i * size + at) as f32;
                }
            });
            let expected: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(numbers, expected);
        }
    }

    #[test]
    fn what_is_written_is_there() {
        for len in [0, 1, 100] {
            let write = |out: Disjoint<MaybeUninit<f32>>| {
                for i in 0..len {
                    // SAFETY: one slice at a time.
                    let one = unsafe { out.slice(i..i + 1) };
                    one[0].write(i as f32);
                }
            };
            // SAFETY: all of the range is written.
            let numbers = unsafe { written(len, write) };
            let expected: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(numbers, expected);
        }
    }
}
