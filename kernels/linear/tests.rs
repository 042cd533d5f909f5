use super::*;
use crate::isa::Isa;
use crate::testing::{Random, assert_same_bits};
use candle_core::{Device, Tensor};
use std::convert::Infallible;

use super::weight::pack;

fn packed(out: usize, inputs: usize, dtype: WeightDtype, random: &mut Random) -> PackedWeight {
    let values = random.normals(out * inputs);
    PackedWeight::pack(out, inputs, dtype, &Threads::new(2), rows_of(&values, inputs)).unwrap()
}

fn rows_of(
    values: &[f32],
    inputs: usize,
) -> impl Fn(Range<usize>, &mut [f32]) -> Result<(), Infallible> + Sync {
    move |range, into| {
        into.copy_from_slice(&values[range.start * inputs..range.end * inputs]);
        Ok(())
    }
}

/// In bf16, both as it is packed for processors that multiply pairs and for others.
fn packed_both_ways(out: usize, inputs: usize, random: &mut Random) -> [PackedWeight; 2] {
    let values = random.normals(out * inputs);
    let (threads, size) = (Threads::new(2), (out, inputs));
    let Ok(tiles) = pack(size, &threads, rows_of(&values, inputs));
    let Ok(pairs) = pack(size, &threads, rows_of(&values, inputs));
    [Tiles::Bf16(tiles), Tiles::Bf16Pairs(pairs)].map(|tiles| PackedWeight {
        out_features: out,
        in_features: inputs,
        tiles,
    })
}

fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn equals_the_reference_over_ragged_shapes() {
    let mut random = Random::new(1);
    let sizes = [(1, 1), (31, 7), (32, 16), (33, 65), (100, 129), (257, 40)];
    let two = Threads::new(2);
    for (out, inputs) in sizes {
        let both = packed_both_ways(out, inputs, &mut random);
        let weights = [WeightDtype::F32, WeightDtype::F16]
            .map(|dtype| packed(out, inputs, dtype, &mut random));
        for weight in weights.into_iter().chain(both).map(Arc::new) {
            let bias = random.normals(out);
            for rows in [0, 1, 2, 3, 5, 6, 7, 12, 13, 33] {
                let x = random.normals(rows * inputs);
                let bias = (rows % 2 == 1).then_some(bias.as_slice());
                let expected = linear_reference(&weight, bias, &x);
                for isa in Isa::available() {
                    for threads in [two.with_isa(isa), Threads::new(1).with_isa(isa)] {
                        let what =
                            format!("{out}x{inputs} {} {rows} {threads:?}", weight.dtype().name());
                        let bias = bias.map(|b| Arc::new(b.to_vec()));
                        let op = Linear { weight: Arc::clone(&weight), bias, threads };
                        let y = tensor(&x, (rows, inputs)).apply_op1_no_bwd(&op).unwrap();
                        assert_eq!(y.dims(), [rows, out]);
                        assert_same_bits(&expected, &values(&y), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn many_row_chunks_and_strided_rows_change_nothing() {
    let mut random = Random::new(2);
    // more than one part of rows, also in pairs
    let (rows, inputs, out) = (120, 3000, 40);
    let x = tensor(&random.normals(rows * (inputs + 9)), (rows, inputs + 9));
    let x = x.narrow(1, 5, inputs).unwrap();
    for weight in packed_both_ways(out, inputs, &mut random).map(Arc::new) {
        let op = Linear { weight: Arc::clone(&weight), bias: None, threads: Threads::new(2) };
        let all = values(&x.apply_op1_no_bwd(&op).unwrap());
        for row in [0, 1, 41, 42, 47, 48, 89, 90, 95, 96, 119] {
            let one = x.narrow(0, row, 1).unwrap();
            let alone = values(&one.apply_op1_no_bwd(&op).unwrap());
            assert_same_bits(&all[row * out..(row + 1) * out], &alone, "a row alone");
            let expected = linear_reference(&weight, None, &values(&one));
            assert_same_bits(&expected, &alone, "reference");
        }
    }
}

#[test]
fn rows_longer_than_a_part_are_multiplied_too() {
    let inputs = CHUNK_BYTES / 4 + 1;
    let weight = Arc::new(packed(1, inputs, WeightDtype::F32, &mut Random::new(7)));
    let op = Linear { weight: Arc::clone(&weight), bias: None, threads: Threads::new(1) };
    let x = vec![1.0; inputs];
    let y = tensor(&x, (1, inputs)).apply_op1_no_bwd(&op).unwrap();
    assert_same_bits(&linear_reference(&weight, None, &x), &values(&y), "a long row");
}

#[test]
fn a_product_is_close_to_its_f64_value() {
    let mut random = Random::new(3);
    let weight = Arc::new(packed(5, 300, WeightDtype::F32, &mut random));
    let x = random.normals(300);
    for (n, y) in linear_reference(&weight, None, &x).iter().enumerate() {
        let terms = (0..300).map(|k| f64::from(x[k]) * f64::from(weight.value(n, k)));
        assert!((terms.sum::<f64>() - f64::from(*y)).abs() < 1e-4);
    }
}

#[test]
fn pairs_hold_the_numbers_of_bf16_and_differ_in_small_ones_alone() {
    let mut random = Random::new(6);
    for inputs in [0, 1, 6, 7] {
        let [single, pairs] = packed_both_ways(40, inputs, &mut random);
        assert_eq!(pairs.bytes(), 64 * inputs.next_multiple_of(2) * 2);
        for (row, k) in (0..40).flat_map(|row| (0..inputs).map(move |k| (row, k))) {
            assert_eq!(single.value(row, k), pairs.value(row, k));
        }
        let x = random.normals(3 * inputs);
        let y = [&single, &pairs].map(|weight| linear_reference(weight, None, &x));
        assert_same_bits(&y[0], &y[1], "sums of normal numbers");
        let tiny = vec![1e-39; inputs];
        assert!(linear_reference(&pairs, None, &tiny).iter().all(|y| *y == 0.0));
        let y = linear_reference(&single, None, &tiny);
        assert!(y.iter().all(|y| (*y == 0.0) == (inputs == 0)));
    }
}

#[test]
fn nan_and_infinity_reach_their_row_only() {
    let mut random = Random::new(4);
    let weight = Arc::new(packed(40, 20, WeightDtype::Bf16, &mut random));
    let mut x = random.normals(15 * 20);
    x[3 * 20 + 7] = f32::NAN;
    let op = Linear { weight, bias: None, threads: Threads::new(2) };
    let y = values(&tensor(&x, (15, 20)).apply_op1_no_bwd(&op).unwrap());
    for (row, y) in y.chunks_exact(40).enumerate() {
        assert!(y.iter().all(|y| y.is_nan() == (row == 3)));
    }
}

#[test]
fn wrong_operands_are_refused_with_their_sizes() {
    let weight = Arc::new(packed(4, 6, WeightDtype::F32, &mut Random::new(5)));
    let mut op = Linear { weight, bias: None, threads: Threads::new(1) };
    let refusal = |op: &Linear, x: &Tensor| x.apply_op1_no_bwd(op).unwrap_err().to_string();
    let x = tensor(&[0.0; 10], (2, 5));
    assert!(refusal(&op, &x).contains("linear: x's width is 5, must be the weight's 6"));
    let x = Tensor::zeros((2, 6), candle_core::DType::F64, &Device::Cpu).unwrap();
    assert!(refusal(&op, &x).contains("linear: x must be f32, got F64"));
    let x = tensor(&[0.0; 12], (6, 2)).t().unwrap();
    assert!(refusal(&op, &x).contains("contiguous along its last dimension"));
    op.bias = Some(Arc::new(vec![0.0; 3]));
    let x = tensor(&[0.0; 12], (2, 6));
    assert!(refusal(&op, &x).contains("the bias's length is 3"));
}

#[test]
fn the_first_error_ends_the_packing() {
    let result = PackedWeight::pack(100, 3, WeightDtype::F16, &Threads::new(2), |range, _| {
        if range.start == 64 { Err("strip 64") } else { Ok(()) }
    });
    assert_eq!(result.err(), Some("strip 64"));
}
