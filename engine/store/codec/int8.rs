//! Rows as 8-bit numbers with 16-bit scales. Approximate; deterministic.
//!
//! A channel of K keeps its size over many tokens once the rotation is taken out, so keys are
//! turned back and share a scale per channel and group of rows. V has no such channels: a scale
//! per row. An error is at most 0.57 scales: half a step, and what a scale loses as f16.

use half::f16;
use strand_kernels::RotaryTable;

use super::{Rows, narrow, widen};
use crate::store::error::StoreError;

/// Rows of K that share scales, counted from the segment's start.
pub(super) const GROUP: usize = 64;
/// The largest number, by size; symmetric.
const LARGEST: f32 = 127.0;
/// Added to a number below 2^22 and taken away again, rounds it to nearest even.
const ROUNDING: f32 = 12_582_912.0; // 1.5 * 2^23

/// K (rows, kv_heads * head_dim), rotated -> scales (groups, channels), numbers (rows, channels).
pub(super) fn encode_keys(
    raw: &[u8],
    rows: &Rows,
    table: &RotaryTable,
) -> Result<Vec<u8>, StoreError> {
    let width = rows.shape.width();
    let mut scales = Vec::new();
    let mut numbers = Vec::with_capacity(rows.count * width);
    let mut x = vec![0f32; GROUP * width];
    for (group, raw) in raw.chunks(GROUP * width * rows.shape.dtype.size()).enumerate() {
        let x = &mut x[..raw.len() / rows.shape.dtype.size()];
        widen(rows.shape.dtype, raw, x);
        let mut peaks = vec![0f32; width];
        for (row, x) in x.chunks_exact_mut(width).enumerate() {
            let position = rows.first_position + group * GROUP + row;
            let (cos, sin) = table.angles(position);
            for head in x.chunks_exact_mut(rows.shape.head_dim) {
                turn_back(head, cos, sin);
            }
            check_finite(x)?;
            for (peak, x) in peaks.iter_mut().zip(&*x) {
                *peak = peak.max(x.abs());
            }
        }
        let of_group: Vec<f16> = peaks.into_iter().map(scale).collect();
        let steps: Vec<f32> = of_group.iter().map(|scale| scale.to_f32()).collect();
        for row in x.chunks_exact(width) {
            numbers.extend(row.iter().zip(&steps).map(|(&x, &step)| quantize(x, step)));
        }
        scales.extend(of_group);
    }
    Ok(frame(&scales, numbers))
}

/// The inverse, rotated once; `stored` has the length of such a frame, `out` that of its rows.
pub(super) fn decode_keys(stored: &[u8], rows: &Rows, table: &RotaryTable, out: &mut [u8]) {
    let (width, size) = (rows.shape.width(), rows.shape.dtype.size());
    let (scales, numbers) = stored.split_at(2 * width * rows.count.div_ceil(GROUP));
    let mut steps = vec![0f32; width];
    let mut x = vec![0f32; width];
    for (row, (out, numbers)) in
        out.chunks_exact_mut(width * size).zip(numbers.chunks_exact(width)).enumerate()
    {
        if row % GROUP == 0 {
            let start = row / GROUP * 2 * width;
            widen(strand_kernels::KvDtype::F16, &scales[start..start + 2 * width], &mut steps);
        }
        for ((x, &q), step) in x.iter_mut().zip(numbers).zip(&steps) {
            *x = f32::from(q as i8) * step;
        }
        let (cos, sin) = table.angles(rows.first_position + row);
        for head in x.chunks_exact_mut(rows.shape.head_dim) {
            turn(head, cos, sin);
        }
        narrow(rows.shape.dtype, &x, out);
    }
}

/// V (rows, kv_heads * head_dim) -> scales (rows), numbers (rows, channels).
pub(super) fn encode_values(raw: &[u8], rows: &Rows) -> Result<Vec<u8>, StoreError> {
    let width = rows.shape.width();
    let mut scales = Vec::with_capacity(rows.count);
    let mut numbers = Vec::with_capacity(rows.count * width);
    let mut x = vec![0f32; width];
    for raw in raw.chunks_exact(width * rows.shape.dtype.size()) {
        widen(rows.shape.dtype, raw, &mut x);
        check_finite(&x)?;
        let of_row = scale(x.iter().fold(0f32, |peak, x| peak.max(x.abs())));
        let step = of_row.to_f32();
        numbers.extend(x.iter().map(|&x| quantize(x, step)));
        scales.push(of_row);
    }
    Ok(frame(&scales, numbers))
}

/// The inverse; `stored` has the length of such a frame, `out` that of its rows.
pub(super) fn decode_values(stored: &[u8], rows: &Rows, out: &mut [u8]) {
    let (width, size) = (rows.shape.width(), rows.shape.dtype.size());
    let (scales, numbers) = stored.split_at(2 * rows.count);
    let mut x = vec![0f32; width];
    let each = out.chunks_exact_mut(width * size).zip(numbers.chunks_exact(width));
    for ((out, numbers), scale) in each.zip(scales.chunks_exact(2)) {
        let step = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
        for (x, &q) in x.iter_mut().zip(numbers) {
            *x = f32::from(q as i8) * step;
        }
        narrow(rows.shape.dtype, &x, out);
    }
}

/// Scales first, then the numbers.
fn frame(scales: &[f16], numbers: Vec<u8>) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 * scales.len() + numbers.len());
    out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    out.extend(numbers);
    out
}

/// The step that lets `peak` be the largest number. Beyond f16's range, its largest.
fn scale(peak: f32) -> f16 {
    f16::from_f32((peak / LARGEST).min(f16::MAX.to_f32()))
}

fn quantize(x: f32, step: f32) -> u8 {
    let ratio = if step == 0.0 { 0.0 } else { x / step };
    let nearest = (ratio.clamp(-LARGEST, LARGEST) + ROUNDING) - ROUNDING;
    nearest as i8 as u8
}

fn check_finite(x: &[f32]) -> Result<(), StoreError> {
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(()),
        false => Err(StoreError::NotFinite),
    }
}

/// Rotates the first dimensions of a head, as many as the table has: pairs (i, i + half).
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, rest) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// The inverse of [`turn`], whatever factor the table's cos and sin carry.
fn turn_back(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, rest) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(rest).zip(cos).zip(sin) {
        let square = c * c + s * s;
        (*a, *b) = ((*a * c + *b * s) / square, (*b * c - *a * s) / square);
    }
}
