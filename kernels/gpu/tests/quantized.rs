//! Weights in blocks: products and rows of every format against what its blocks are worth.

use super::product::{assert_rows_stand_alone, reference};
use super::*;
use crate::gpu::*;
use crate::quantized::BlockFormat;
use crate::quantized::tests::random_rows;
use crate::testing::Random;
use crate::threads::Threads;

/// A weight whose parts have the given formats and numbers of rows, and what it is worth.
fn weight(
    gpu: &Gpu,
    parts: &[(BlockFormat, usize)],
    inputs: usize,
    random: &mut Random,
) -> (Weight, Vec<f32>) {
    let (rows, values) = random_rows(parts, inputs, random);
    let read = |row: usize, bytes: &mut [u8]| bytes.copy_from_slice(&rows[row]);
    (Weight::blocks((gpu, &Threads::new(2)), parts, inputs, read).unwrap(), values)
}

/// One group, a slice that is empty, slices of several groups, an odd number of groups.
fn widths(format: BlockFormat) -> [usize; 3] {
    if format.block_len() == 256 { [256, 512, 768] } else { [32, 288, 544] }
}

#[test]
fn products_with_blocks_equal_the_sums_of_what_they_are_worth() {
    let mut random = Random::new(41);
    for format in BlockFormat::ALL {
        for ((rows, n), k) in [(1, 1), (33, 70), (3, 140)].into_iter().zip(widths(format)) {
            let (x, bias) = (random.normals(rows * k), random.normals(n));
            for gpu in gpus() {
                let (weight, values) = weight(&gpu, &[(format, n)], k, &mut random);
                let (x_on, bias_on) = (upload(&gpu, Float::F16, &x), upload_f32(&gpu, &bias));
                for (bias, y_float) in [(None, None), (Some(&bias), Some(Float::F16))] {
                    let x_held = rounded(Float::F16, &x);
                    let expected = reference(&x_held, &values, bias.map(|b| &b[..]), k);
                    let y = gpu.alloc(rows * n * if y_float.is_some() { 2 } else { 4 }).unwrap();
                    let (x, y_on, bias_on) = (&x_on.all(), &y.all(), bias_on.all());
                    let bias = bias.map(|_| &bias_on);
                    let op = Product { x, weight: &weight, bias, y: y_on, y_float, rows };
                    op.fast(&gpu).unwrap();
                    let (found, tolerance) = match y_float {
                        Some(float) => (download(&gpu, float, &y), rounding(float)),
                        None => (download_f32(&gpu, &y), 1e-4),
                    };
                    let what = format!("{format:?}, {rows} x {n} x {k}");
                    assert_close(&expected, &found, tolerance, &what);
                }
            }
        }
    }
}

/// As q, k and v of files whose values have more bits.
#[test]
fn parts_of_other_formats_lie_beside_each_other_in_the_product() {
    let mut random = Random::new(42);
    let parts = [(BlockFormat::Q4K, 21), (BlockFormat::Q6K, 40), (BlockFormat::Q8_0, 3)];
    let (n, k, gpu) = (64, 256, Gpu::emulated(MEMORY));
    let (weight, values) = weight(&gpu, &parts, k, &mut random);
    assert_eq!((weight.out_features(), weight.float()), (n, Float::F16));
    for rows in [2, 40] {
        let (x, bias) = (random.normals(rows * k), random.normals(n));
        let expected = reference(&rounded(Float::F16, &x), &values, Some(&bias), k);
        let (x, bias) = (upload(&gpu, Float::F16, &x).all(), upload_f32(&gpu, &bias).all());
        let y = gpu.alloc(rows * n * 4).unwrap();
        let to = &y.all();
        let op = Product { x: &x, weight: &weight, bias: Some(&bias), y: to, y_float: None, rows };
        op.deterministic(&gpu).unwrap();
        assert_close(&expected, &download_f32(&gpu, &y), 1e-4, &format!("{rows} rows"));
    }
}

/// The contract of the deterministic mode, across both kernels.
#[test]
fn no_bit_of_a_row_of_blocks_depends_on_other_rows() {
    let mut random = Random::new(43);
    let gpu = Gpu::emulated(MEMORY);
    for format in [BlockFormat::Q8_0, BlockFormat::Q5K, BlockFormat::Q6K] {
        let (n, k, rows) = (37, 768, 66);
        let x = upload(&gpu, Float::F16, &random.normals(rows * k));
        let (weight, _) = weight(&gpu, &[(format, n)], k, &mut random);
        let parts = [(0, 1), (1, 17), (64, 2), (30, 36)];
        assert_rows_stand_alone((&gpu, &weight), (&x, rows), &parts, &format!("{format:?}"));
    }
}

#[test]
fn rows_of_blocks_are_found_and_others_are_nan() {
    let mut random = Random::new(44);
    for (gpu, format) in gpus().iter().flat_map(|gpu| BlockFormat::ALL.map(|format| (gpu, format)))
    {
        let (rows, width) = (35, widths(format)[1]);
        let (weight, values) = weight(gpu, &[(format, rows)], width, &mut random);
        let ids: Vec<u32> = (0..=rows as u32).rev().collect();
        let out = gpu.alloc(ids.len() * width * 4).unwrap();
        let (ids_on, to) = (upload_u32(gpu, &ids).all(), out.all());
        Embedding { ids: &ids_on, weight: &weight, out: &to, count: ids.len() }
            .launch(gpu)
            .unwrap();
        let found = download_f32(gpu, &out);
        assert!(found[..width].iter().all(|x| x.is_nan()), "{format:?}");
        for (id, found) in ids.iter().zip(found.chunks(width)).skip(1) {
            let expected = &values[*id as usize * width..][..width];
            assert_close(expected, found, 1e-6, &format!("{format:?}, row {id}"));
        }
    }
}

#[test]
fn blocks_take_about_as_much_memory_as_in_their_file() {
    let gpu = Gpu::emulated(MEMORY);
    for format in BlockFormat::ALL {
        let (weight, _) = weight(&gpu, &[(format, 64)], 512, &mut Random::new(45));
        let (here, there) = (weight.bytes(), 64 * format.row_bytes(512));
        assert_eq!(here, block_bytes(format, 64, 512));
        assert!(here >= there && here * 100 <= there * 103, "{format:?}: {here} of {there}");
    }
    let nothing = |_: usize, _: &mut [u8]| unreachable!("nothing is read");
    let parts = [(BlockFormat::Q4K, 3)];
    let refusal = Weight::blocks((&gpu, &Threads::new(1)), &parts, 96, nothing).err().unwrap();
    assert_eq!(refusal.to_string(), "weight: in_features is 96, must be a multiple of 256");
}
