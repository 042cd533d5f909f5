//! Every kernel, emulated, against the reference of its op.

mod attention;
mod elementwise;
mod memory;
mod product;
mod quantized;
mod sample;

use super::{Buffer, Float, Gpu};
use half::{bf16, f16};

const MEMORY: u64 = 1 << 30;

/// Threads in both orders: what differs between them is a race.
fn gpus() -> [Gpu; 2] {
    [Gpu::emulated(MEMORY), Gpu::emulated_backwards(MEMORY)]
}

fn narrow(float: Float, x: f32) -> u16 {
    match float {
        Float::Bf16 => bf16::from_f32(x).to_bits(),
        Float::F16 => f16::from_f32(x).to_bits(),
    }
}

fn widen(float: Float, bits: u16) -> f32 {
    match float {
        Float::Bf16 => bf16::from_bits(bits).to_f32(),
        Float::F16 => f16::from_bits(bits).to_f32(),
    }
}

/// To the numbers a device would hold.
fn rounded(float: Float, x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| widen(float, narrow(float, x))).collect()
}

fn upload(gpu: &Gpu, float: Float, x: &[f32]) -> Buffer {
    let bytes: Vec<u8> = x.iter().flat_map(|&x| narrow(float, x).to_le_bytes()).collect();
    gpu.uploaded(&bytes).unwrap()
}

fn upload_f32(gpu: &Gpu, x: &[f32]) -> Buffer {
    gpu.uploaded(&x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap()
}

fn upload_u32(gpu: &Gpu, x: &[u32]) -> Buffer {
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    gpu.uploaded(if bytes.is_empty() { &[0; 4] } else { &bytes }).unwrap()
}

fn bytes(gpu: &Gpu, buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    gpu.download(&buffer.all(), &mut bytes).unwrap();
    bytes
}

fn download(gpu: &Gpu, float: Float, buffer: &Buffer) -> Vec<f32> {
    let bytes = bytes(gpu, buffer);
    bytes.as_chunks().0.iter().map(|&x| widen(float, u16::from_le_bytes(x))).collect()
}

fn download_f32(gpu: &Gpu, buffer: &Buffer) -> Vec<f32> {
    bytes(gpu, buffer).as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
}

fn download_u32(gpu: &Gpu, buffer: &Buffer) -> Vec<u32> {
    bytes(gpu, buffer).as_chunks().0.iter().map(|&x| u32::from_le_bytes(x)).collect()
}

/// |found - expected| at most `tolerance * (1 + |expected|)`; NaN where NaN is expected.
#[track_caller]
fn assert_close(expected: &[f32], found: &[f32], tolerance: f32, what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: lengths");
    for (i, (e, f)) in expected.iter().zip(found).enumerate() {
        let close = (e - f).abs() <= tolerance * (1.0 + e.abs()) || e.is_nan() && f.is_nan();
        assert!(close, "{what}: element {i} is {f:e}, expected {e:e}");
    }
}

/// What rounding the result alone may cost, with a little left for exp and sums.
fn rounding(float: Float) -> f32 {
    match float {
        Float::Bf16 => 1.0 / 200.0,
        Float::F16 => 1.0 / 1600.0,
    }
}
