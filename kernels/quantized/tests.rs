use super::*;
use crate::dtype::WeightDtype;
use crate::isa::Isa;
use crate::linear::{Linear, PackedWeight, linear_reference};
use crate::testing::{Random, assert_same_bits};
use crate::threads::Threads;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use std::convert::Infallible;
use std::sync::Arc;

fn ggml(format: BlockFormat) -> GgmlDType {
    match format {
        BlockFormat::Q4_0 => GgmlDType::Q4_0,
        BlockFormat::Q4_1 => GgmlDType::Q4_1,
        BlockFormat::Q5_0 => GgmlDType::Q5_0,
        BlockFormat::Q5_1 => GgmlDType::Q5_1,
        BlockFormat::Q8_0 => GgmlDType::Q8_0,
        BlockFormat::Q4K => GgmlDType::Q4K,
        BlockFormat::Q5K => GgmlDType::Q5K,
        BlockFormat::Q6K => GgmlDType::Q6K,
    }
}

/// The bytes of a random matrix as candle quantizes it.
fn quantized(format: BlockFormat, rows: usize, inputs: usize, random: &mut Random) -> Vec<u8> {
    let values = Tensor::from_vec(random.normals(rows * inputs), (rows, inputs), &Device::Cpu);
    let tensor = QTensor::quantize(&values.unwrap(), ggml(format)).unwrap();
    tensor.data().unwrap().into_owned()
}

fn dequantized(format: BlockFormat, bytes: &[u8], inputs: usize) -> Vec<f32> {
    let rows = bytes.len() / format.row_bytes(inputs);
    let tensor = qtensor_from_ggml(ggml(format), bytes, vec![rows, inputs], &Device::Cpu).unwrap();
    tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Random rows of the given formats, one part below the other, and what they are worth in f32.
pub(crate) fn random_rows(
    parts: &[(BlockFormat, usize)],
    inputs: usize,
    random: &mut Random,
) -> (Vec<Vec<u8>>, Vec<f32>) {
    let mut values = Vec::new();
    let mut rows: Vec<Vec<u8>> = Vec::new();
    for &(format, count) in parts {
        let bytes = quantized(format, count, inputs, random);
        values.extend(dequantized(format, &bytes, inputs));
        rows.extend(bytes.chunks_exact(format.row_bytes(inputs)).map(<[u8]>::to_vec));
    }
    (rows, values)
}

/// A weight whose parts have the given formats and numbers of rows, and what it is worth in f32.
fn weight(
    parts: &[(BlockFormat, usize)],
    inputs: usize,
    random: &mut Random,
) -> (PackedWeight, Vec<f32>) {
    let (rows, values) = random_rows(parts, inputs, random);
    let weight = PackedWeight::pack_blocks(parts, inputs, &Threads::new(2), |row, bytes| {
        bytes.copy_from_slice(&rows[row]);
        Ok::<_, Infallible>(())
    });
    (weight.unwrap(), values)
}

fn run(op: &Linear, x: &[f32], inputs: usize) -> Vec<f32> {
    let x = Tensor::from_slice(x, (x.len() / inputs, inputs), &Device::Cpu).unwrap();
    x.apply_op1_no_bwd(op).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_format_is_read_as_candle_reads_it_bit_for_bit() {
    let mut random = Random::new(1);
    for format in BlockFormat::ALL {
        let inputs = 512;
        let (weight, values) = weight(&[(format, 70)], inputs, &mut random);
        let all = (0..70).flat_map(|row| (0..inputs).map(move |k| (row, k)));
        let found: Vec<f32> = all.map(|(row, k)| weight.value(row, k)).collect();
        assert_same_bits(&values, &found, &format!("{format:?}"));
        assert_eq!(weight.dtype(), WeightDtype::Quantized);
    }
}

#[test]
fn random_bytes_are_read_as_candle_reads_them() {
    let mut random = Random::new(2);
    for format in BlockFormat::ALL {
        let inputs = 256;
        let mut bytes: Vec<u8> =
            (0..3 * format.row_bytes(inputs)).map(|_| random.next() as u8).collect();
        // scales that are numbers: the exponent's highest bit is off
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            for at in [1, 3, format.block_bytes() - 1] {
                block[at] &= 0xBF;
            }
        }
        let expected = dequantized(format, &bytes, inputs);
        let row_bytes = format.row_bytes(inputs);
        let read = |row: usize, out: &mut [u8]| {
            out.copy_from_slice(&bytes[row * row_bytes..][..row_bytes]);
            Ok::<_, Infallible>(())
        };
        let weight = PackedWeight::pack_blocks(&[(format, 3)], inputs, &Threads::new(1), read);
        let weight = weight.unwrap();
        let all = (0..3).flat_map(|row| (0..inputs).map(move |k| (row, k)));
        let found: Vec<f32> = all.map(|(row, k)| weight.value(row, k)).collect();
        assert_same_bits(&expected, &found, &format!("{format:?}"));
    }
}

#[test]
fn equals_the_reference_on_every_instruction_set() {
    let mut random = Random::new(3);
    let two = Threads::new(2);
    for format in BlockFormat::ALL {
        // the last is longer than a slab
        for (out, inputs) in [(1, 256), (33, 512), (70, 768)] {
            let (weight, _) = weight(&[(format, out)], inputs, &mut random);
            let weight = Arc::new(weight);
            let bias = random.normals(out);
            for rows in [0, 1, 2, 3, 5, 6, 7, 13, 30] {
                let x = random.normals(rows * inputs);
                let bias = (rows % 2 == 1).then_some(bias.as_slice());
                let expected = linear_reference(&weight, bias, &x);
                for isa in Isa::available() {
                    for threads in [two.with_isa(isa), Threads::new(1).with_isa(isa)] {
                        let what = format!("{format:?} {out}x{inputs} {rows} {threads:?}");
                        let bias = bias.map(|b| Arc::new(b.to_vec()));
                        let op = Linear { weight: Arc::clone(&weight), bias, threads };
                        assert_same_bits(&expected, &run(&op, &x, inputs), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn formats_stand_one_below_the_other() {
    let mut random = Random::new(4);
    let (inputs, parts) = (256, [(BlockFormat::Q4K, 40), (BlockFormat::Q6K, 7)]);
    let (weight, values) = weight(&parts, inputs, &mut random);
    let weight = Arc::new(weight);
    assert_eq!(weight.out_features(), 47);
    let x = random.normals(9 * inputs);
    let expected = linear_reference(&weight, None, &x);
    let op = Linear { weight: Arc::clone(&weight), bias: None, threads: Threads::new(2) };
    assert_same_bits(&expected, &run(&op, &x, inputs), "two formats");
    assert_eq!(weight.value(39, 5), values[39 * inputs + 5]);
    assert_eq!(weight.value(46, 200), values[46 * inputs + 200]);
}

#[test]
fn a_product_is_near_that_of_the_dequantized_weights() {
    let mut random = Random::new(5);
    for format in BlockFormat::ALL {
        let inputs = 1024;
        let (weight, values) = weight(&[(format, 64)], inputs, &mut random);
        let x = random.normals(inputs);
        let y = linear_reference(&weight, None, &x);
        for (row, y) in values.chunks_exact(inputs).zip(y) {
            let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let size: f64 = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
            // a number of x is off by at most half of 1/127 of its group's largest
            assert!((exact - f64::from(y)).abs() < 0.02 * size, "{format:?}: {y} not {exact}");
        }
    }
}

#[test]
fn what_is_no_number_reaches_its_row_only() {
    let mut random = Random::new(6);
    let inputs = 256;
    let (weight, _) = weight(&[(BlockFormat::Q4K, 40)], inputs, &mut random);
    let weight = Arc::new(weight);
    for isa in Isa::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = random.normals(15 * inputs);
            x[3 * inputs + 7] = bad;
            let threads = Threads::new(2).with_isa(isa);
            let op = Linear { weight: Arc::clone(&weight), bias: None, threads };
            for (row, y) in run(&op, &x, inputs).chunks_exact(40).enumerate() {
                assert!(y.iter().all(|y| y.is_nan() == (row == 3)), "{bad} {isa:?} row {row}");
            }
        }
    }
}

#[test]
fn zeros_and_the_smallest_numbers_are_multiplied_too() {
    let (inputs, mut random) = (256, Random::new(7));
    let (weight, _) = weight(&[(BlockFormat::Q8_0, 33)], inputs, &mut random);
    let op = Linear { weight: Arc::new(weight), bias: None, threads: Threads::new(1) };
    for size in [0.0, f32::from_bits(1), f32::MIN_POSITIVE] {
        let y = run(&op, &vec![size; inputs], inputs);
        assert!(y.iter().all(|y| y.abs() <= 1e-30), "{size}");
    }
    assert!(run(&op, &vec![1e30; inputs], inputs).iter().all(|y| y.is_finite()));
}

#[test]
fn codes_take_the_bits_they_have() {
    let mut random = Random::new(8);
    for format in BlockFormat::ALL {
        let (weight, _) = weight(&[(format, 64)], 512, &mut random);
        let stored = 64 * format.row_bytes(512);
        assert!(weight.bytes() * 100 <= stored * 103, "{format:?} {} {stored}", weight.bytes());
    }
}

#[test]
fn the_first_error_ends_the_packing() {
    let parts = [(BlockFormat::Q8_0, 100)];
    let result = PackedWeight::pack_blocks(&parts, 32, &Threads::new(2), |row, _| {
        if row == 64 { Err("row 64") } else { Ok(()) }
    });
    assert_eq!(result.err(), Some("row 64"));
}
