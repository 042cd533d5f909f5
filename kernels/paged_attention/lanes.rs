//! The fast version's inner loops: dot products, weights from scores, loads of values.
//!
//! No closures over lanes: what the compiler does not inline runs without the instruction set.

use super::PagedAttention;
use crate::dtype::Stored;
use crate::math::{exp_lanes, padded, tanh_lanes};
use crate::simd::{LANES, Simd};

/// Asks for every cache line of a row.
#[inline(always)]
pub(super) fn prefetch<S: Simd, E: Stored>(s: S, row: &[E]) {
    for line in row.chunks(64 / size_of::<E>()) {
        s.prefetch(line.as_ptr());
    }
}

/// Dot products of queries (padded) and keys as they are stored, of `d` numbers.
#[inline(always)]
pub(super) fn dots<S: Simd, E: Stored, const Q: usize, const J: usize>(
    s: S,
    q: &[&[[f32; LANES]]; Q],
    k: &[&[E]; J],
    d: usize,
) -> [[f32; J]; Q] {
    let whole = d / LANES;
    let mut chunks: [&[[E; LANES]]; J] = [&[]; J];
    for (chunks, k) in chunks.iter_mut().zip(k) {
        *chunks = &k.as_chunks().0[..whole];
    }
    let mut heads: [&[[f32; LANES]]; Q] = [&[]; Q];
    for (head, q) in heads.iter_mut().zip(q) {
        *head = &q[..whole];
    }
    let mut sums = [[s.splat(0.0); J]; Q];
    for c in 0..whole {
        let mut keys = [s.splat(0.0); J];
        for (key, chunks) in keys.iter_mut().zip(&chunks) {
            *key = E::load(s, &chunks[c]);
        }
        add_products(s, &mut sums, &heads, c, &keys);
    }
    if whole * LANES < d {
        let mut keys = [s.splat(0.0); J];
        for (key, k) in keys.iter_mut().zip(k) {
            *key = E::load(s, &padded(&k[whole * LANES..d]));
        }
        add_products(s, &mut sums, q, whole, &keys);
    }
    let mut dots = [[0.0; J]; Q];
    if Q * J == LANES {
        let mut flat = [s.splat(0.0); LANES];
        for (flat, sum) in flat.iter_mut().zip(sums.as_flattened()) {
            *flat = *sum;
        }
        dots.as_flattened_mut().copy_from_slice(&s.reduce_all(flat));
    } else {
        for (dot, sum) in dots.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            *dot = s.reduce(*sum);
        }
    }
    if E::SCALED {
        for dots in &mut dots {
            for (dot, k) in dots.iter_mut().zip(k) {
                *dot *= E::scale(k, d);
            }
        }
    }
    dots
}

/// Chunk `c` of the queries times a chunk of the keys.
#[inline(always)]
fn add_products<S: Simd, const Q: usize, const J: usize>(
    s: S,
    sums: &mut [[S::V; J]; Q],
    q: &[&[[f32; LANES]]; Q],
    c: usize,
    keys: &[S::V; J],
) {
    for (sums, q) in sums.iter_mut().zip(q) {
        let q = s.load(&q[c]);
        for (sum, key) in sums.iter_mut().zip(keys) {
            *sum = s.mul_add(q, *key, *sum);
        }
    }
}

/// `D` vectors out of a head's values; the last one may be padded.
#[inline(always)]
pub(super) fn load_vectors<S: Simd, E: Stored, const D: usize>(s: S, values: &[E]) -> [S::V; D] {
    let (chunks, tail) = values.as_chunks::<LANES>();
    let mut vectors = [s.splat(0.0); D];
    if chunks.len() == D {
        for (vector, chunk) in vectors.iter_mut().zip(chunks) {
            *vector = E::load(s, chunk);
        }
        return vectors;
    }
    for (vector, chunk) in vectors.iter_mut().zip(chunks) {
        *vector = E::load(s, chunk);
    }
    vectors[D - 1] = E::load(s, &padded(tail));
    vectors
}

/// Scales, caps, and turns scores into weights; returns the maximum that was taken off.
#[inline(always)]
pub(super) fn soften<S: Simd>(s: S, scores: &mut [f32], op: &PagedAttention) -> f32 {
    let (scale, cap) = (s.splat(op.scale), op.soft_cap.map(|cap| s.splat(cap)));
    let (chunks, tail) = scores.as_chunks_mut::<LANES>();
    let mut largest = s.splat(f32::NEG_INFINITY);
    for chunk in chunks.iter_mut() {
        let x = scaled(s, s.load(chunk), scale, cap);
        largest = s.max(largest, x);
        s.store(x, chunk);
    }
    let mut last = [f32::NEG_INFINITY; LANES];
    if !tail.is_empty() {
        s.store(scaled(s, s.load(&padded(tail)), scale, cap), &mut last);
        last[tail.len()..].fill(f32::NEG_INFINITY);
        largest = s.max(largest, s.load(&last));
    }
    let mut lanes = [0.0; LANES];
    s.store(largest, &mut lanes);
    let max = lanes.iter().fold(f32::NEG_INFINITY, |max, &x| if max > x { max } else { x });
    for chunk in chunks {
        s.store(exp_lanes(s, s.sub(s.load(chunk), s.splat(max))), chunk);
    }
    s.store(exp_lanes(s, s.sub(s.load(&last), s.splat(max))), &mut last);
    tail.copy_from_slice(&last[..tail.len()]);
    max
}

#[inline(always)]
fn scaled<S: Simd>(s: S, x: S::V, scale: S::V, cap: Option<S::V>) -> S::V {
    let x = s.mul(x, scale);
    match cap {
        Some(cap) => s.mul(cap, tanh_lanes(s, s.div(x, cap))),
        None => x,
    }
}
