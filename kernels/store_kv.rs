//! Writes rows of K or V into the paged cache, in place.

use crate::dtype::{Element, quantize_vector};
use crate::error::Error;
use crate::view::{CacheShape, Rows, refused};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result};
use half::{bf16, f16};
use std::sync::Arc;

/// cache (blocks, block_size, kv_heads, d) of a [`KvDtype`](crate::KvDtype); x (rows, kv_heads * d)
/// f32, any row stride: row r goes to cache row `slot_mapping[r]` = block * block_size + offset,
/// rounded to nearest even. Two rows for one place: the later one stays.
pub struct StoreKv {
    pub slot_mapping: Arc<Vec<u32>>,
}

impl InplaceOp2 for StoreKv {
    fn name(&self) -> &'static str {
        "store_kv"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        x: &CpuStorage,
        layout: &Layout,
    ) -> Result<()> {
        let shape = CacheShape::of("store_kv", "cache", cache.dtype(), cache_layout)?;
        let x = Rows::new("store_kv", "x", x, layout)?;
        if x.width != shape.kv_heads * shape.head_dim {
            let expected = format!("(rows, {})", shape.kv_heads * shape.head_dim);
            return Err(refused("store_kv", "x", expected, layout).into());
        }
        if self.slot_mapping.len() != x.count {
            let (found, expected) = (self.slot_mapping.len(), format!("x's {} rows", x.count));
            return Err(Error::value("store_kv", "slot_mapping's length", found, expected).into());
        }
        let slots = shape.blocks * shape.block_size;
        if let Some(slot) = self.slot_mapping.iter().find(|&&slot| slot as usize >= slots) {
            let expected = format!("below the cache's {slots}");
            return Err(Error::value("store_kv", "a slot", *slot, expected).into());
        }
        let start = cache_layout.start_offset();
        match cache {
            CpuStorage::F32(cache) => self.store(&mut cache[start..], shape, x, f32::narrow_all),
            CpuStorage::F16(cache) => self.store(&mut cache[start..], shape, x, f16::narrow_all),
            CpuStorage::BF16(cache) => self.store(&mut cache[start..], shape, x, bf16::narrow_all),
            CpuStorage::U8(cache) => self.store(&mut cache[start..], shape, x, |x, row| {
                let vectors = x.chunks_exact(shape.head_dim);
                for (x, stored) in vectors.zip(row.chunks_exact_mut(shape.stored_dim)) {
                    quantize_vector(x, stored);
                }
            }),
            other => return Err(not_kv("store_kv", other.dtype()).into()),
        }
        Ok(())
    }
}

impl StoreKv {
    /// `put` writes a row as the cache has it.
    fn store<E>(
        &self,
        cache: &mut [E],
        shape: CacheShape,
        x: Rows,
        put: impl Fn(&[f32], &mut [E]),
    ) {
        for (r, slot) in self.slot_mapping.iter().enumerate() {
            put(x.row(r), &mut cache[*slot as usize * shape.width()..][..shape.width()]);
        }
    }
}

pub(crate) fn not_kv(op: &'static str, found: DType) -> Error {
    Error::Dtype { op, operand: "the cache", expected: "f32, f16, bf16 or u8 (int8)", found }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn rows_land_in_their_slots_and_nowhere_else() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let cache = Tensor::zeros((3, 4, 2, 5), dtype, &Device::Cpu).unwrap();
            let x: Vec<f32> = (0..3 * 13).map(|i| 1.0 + i as f32 * 0.37).collect();
            let x = Tensor::from_vec(x, (3, 13), &Device::Cpu).unwrap().narrow(1, 2, 10).unwrap();
            let op = StoreKv { slot_mapping: Arc::new(vec![11, 0, 6]) };
            cache.inplace_op2(&x, &op).unwrap();
            let found: Vec<Vec<f32>> =
                cache.to_dtype(DType::F32).unwrap().reshape((12, 10)).unwrap().to_vec2().unwrap();
            let rounded: Vec<Vec<f32>> =
                x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec2().unwrap();
            for (slot, row) in found.iter().enumerate() {
                match [11, 0, 6].iter().position(|&s| s == slot) {
                    Some(r) => assert_eq!(row, &rounded[r]),
                    None => assert!(row.iter().all(|&x| x == 0.0)),
                }
            }
        }
    }

    #[test]
    fn int8_vectors_have_their_scale_behind_them() {
        let cache = Tensor::zeros((1, 2, 2, 3 + 4), DType::U8, &Device::Cpu).unwrap();
        let x = [[1.0f32, -2.0, 0.5, 0.0, 1e-40, 0.0], [f32::NAN, 1.0, 0.0, 254.0, -1.0, 3.0]];
        let x = Tensor::new(&x, &Device::Cpu).unwrap();
        cache.inplace_op2(&x, &StoreKv { slot_mapping: Arc::new(vec![1, 0]) }).unwrap();
        let stored: Vec<Vec<u8>> = cache.reshape((4, 7)).unwrap().to_vec2().unwrap();
        let vector = |i: usize| {
            let (numbers, scale) = stored[i].split_first_chunk::<3>().unwrap();
            (numbers.map(u8::cast_signed), f32::from_le_bytes(scale.try_into().unwrap()))
        };
        assert_eq!(vector(2), ([64, -127, 32], 2.0 / 127.0)); // 63.5 and 31.75
        assert_eq!(vector(3), ([0, 0, 0], 0.0));
        assert_eq!(vector(1), ([127, 0, 2], 2.0)); // -0.5 and 1.5, to even
        assert!(vector(0).1.is_nan());
    }

    #[test]
    fn what_lies_outside_is_refused_and_nothing_written() {
        let cache = Tensor::zeros((2, 2, 1, 2), DType::F32, &Device::Cpu).unwrap();
        let x = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
        let refusal = |cache: &Tensor, slots: Vec<u32>| {
            let op = StoreKv { slot_mapping: Arc::new(slots) };
            cache.inplace_op2(&x, &op).unwrap_err().to_string()
        };
        assert!(refusal(&cache, vec![0, 4]).contains("a slot is 4, must be below the cache's 4"));
        assert!(refusal(&cache, vec![0]).contains("slot_mapping's length is 1"));
        let other = Tensor::zeros((2, 2, 1, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(refusal(&other, vec![0, 1]).contains("x must be (rows, 3)"));
        let other = Tensor::zeros((2, 2, 1, 2), DType::F64, &Device::Cpu).unwrap();
        assert!(
            refusal(&other, vec![0, 1]).contains("must be f32, f16, bf16 or u8 (int8), got F64")
        );
        let sum: f32 = cache.sum_all().unwrap().to_scalar().unwrap();
        assert_eq!(sum, 0.0);
    }
}
