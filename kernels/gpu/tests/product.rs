//! Products, by the device's library and by our own kernel.

use super::*;
use crate::error::Error;
use crate::gpu::*;
use crate::testing::{Random, assert_same_bits};

/// The sums in f64, of what a device holds.
pub fn reference(x: &[f32], w: &[f32], bias: Option<&[f32]>, k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
    };
    let row = |x| {
        w.chunks(k).enumerate().map(move |(i, w)| dot(x, w) + bias.map_or(0.0, |b| b[i].into()))
    };
    x.chunks(k).flat_map(row).map(|x| x as f32).collect()
}

pub fn weight(gpu: &Gpu, float: Float, values: &[f32], k: usize) -> Weight {
    Weight::dense(gpu, float, values.len() / k, k, |rows, out| {
        out.copy_from_slice(&values[rows.start * k..rows.end * k]);
        Ok::<_, Error>(())
    })
    .unwrap()
}

#[test]
fn products_equal_the_sums_over_ragged_shapes() {
    let mut random = Random::new(21);
    for (rows, n, k) in [(1, 1, 8), (3, 70, 48), (65, 129, 80), (17, 64, 200), (130, 300, 64)] {
        let (x, w, bias) = (random.normals(rows * k), random.normals(n * k), random.normals(n));
        for float in [Float::Bf16, Float::F16] {
            let (x_held, w_held) = (rounded(float, &x), rounded(float, &w));
            for gpu in gpus() {
                let (x_on, bias_on) = (upload(&gpu, float, &x), upload_f32(&gpu, &bias).all());
                let weight = weight(&gpu, float, &w, k);
                for (has_bias, y_float) in
                    [(false, None), (true, None), (false, Some(float)), (true, Some(float))]
                {
                    let held = has_bias.then_some(&bias[..]);
                    let expected = reference(&x_held, &w_held, held, k);
                    let y = gpu.alloc(rows * n * if y_float.is_some() { 2 } else { 4 }).unwrap();
                    let (x, y_on) = (&x_on.all(), &y.all());
                    let bias = has_bias.then_some(&bias_on);
                    let op = Product { x, weight: &weight, bias, y: y_on, y_float, rows };
                    let found = || match y_float {
                        Some(float) => download(&gpu, float, &y),
                        None => download_f32(&gpu, &y),
                    };
                    // Sums of up to 200 numbers in f32; narrow with a bias is rounded twice.
                    let tolerance = if y_float.is_some() { 4.0 * rounding(float) } else { 1e-4 };
                    op.deterministic(&gpu).unwrap();
                    let what = format!("{rows} x {n} x {k} {float:?}");
                    assert_close(&expected, &found(), tolerance, &format!("own {what}"));
                    op.fast(&gpu).unwrap();
                    assert_close(&expected, &found(), tolerance, &format!("library's {what}"));
                }
            }
        }
    }
}

/// Whether (start, count) rows of x alone have the bits they have among all.
pub(super) fn assert_rows_stand_alone(
    (gpu, weight): (&Gpu, &Weight),
    (x, rows): (&Buffer, usize),
    parts: &[(usize, usize)],
    what: &str,
) {
    let (n, k) = (weight.out_features(), weight.in_features());
    let product = |start: usize, rows: usize| {
        let y = gpu.alloc(rows * n * 4).unwrap();
        let (x, y_on) = (&x.at(start * k * 2), &y.all());
        let op = Product { x, weight, bias: None, y: y_on, y_float: None, rows };
        op.deterministic(gpu).unwrap();
        download_f32(gpu, &y)
    };
    let all = product(0, rows);
    for &(start, rows) in parts {
        let expected = &all[start * n..(start + rows) * n];
        let what = format!("{what}, {rows} rows from {start}");
        assert_same_bits(expected, &product(start, rows), &what);
    }
}

/// The contract of the deterministic mode.
#[test]
fn no_bit_of_a_row_depends_on_other_rows() {
    let mut random = Random::new(22);
    let (n, k, rows) = (100, 136, 150);
    let (x, w) = (random.normals(rows * k), random.normals(n * k));
    let gpu = Gpu::emulated(MEMORY);
    let weight = weight(&gpu, Float::Bf16, &w, k);
    let x = upload(&gpu, Float::Bf16, &x);
    let parts = [(0, 1), (1, 1), (63, 2), (64, 64), (100, 17), (149, 1)];
    assert_rows_stand_alone((&gpu, &weight), (&x, rows), &parts, "bf16");
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let gpu = Gpu::emulated(MEMORY);
    let nothing = |_, _: &mut [f32]| Ok::<_, Error>(());
    let refusal = Weight::dense(&gpu, Float::F16, 3, 12, nothing).err().unwrap().to_string();
    assert_eq!(refusal, "weight: in_features is 12, must be a multiple of 8 on a GPU");
    let weight = Weight::dense(&gpu, Float::F16, 3, 16, nothing).unwrap();
    let (x, y) = (gpu.alloc(64).unwrap().all(), gpu.alloc(64).unwrap().all());
    let op = |x: &Slice, y: &Slice, y_float, rows| {
        Product { x, weight: &weight, bias: None, y, y_float, rows }
            .fast(&gpu)
            .unwrap_err()
            .to_string()
    };
    assert!(op(&x, &y, Some(Float::Bf16), 2).contains("f32 or of the weight's type"));
    assert!(op(&x, &y, None, 3).contains("x's length in bytes is 64, must be at least 96"));
    assert!(op(&x, &y.at(48), None, 2).contains("y's length in bytes is 16"));
    assert!(op(&x.at(8), &y, None, 1).contains("x's start in its buffer is 8"));
}
