//! Takes rows of the KV cache out as bytes, and puts them back: what tiers and files hold.
//!
//! A row is (kv_heads, d) in the cache's own type, little endian. Bits are never interpreted, so
//! NaNs keep theirs. Runs of consecutive slots are copied as one piece.

use crate::error::Error;
use crate::store_kv::not_kv;
use crate::view::CacheShape;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use half::{bf16, f16};

/// cache (blocks, block_size, kv_heads, d) f32, f16, bf16 or int8 -> the rows at `slots`, one after
/// another, in `out`; a slot is block * block_size + offset.
///
/// # Errors
/// If a slot lies outside the cache, if `out` is not as long as the rows, or if the cache is of
/// another type or not contiguous.
pub fn gather_rows(cache: &Tensor, slots: &[u32], out: &mut [u8]) -> candle_core::Result<()> {
    const OP: &str = "gather_rows";
    let (storage, layout) = cache.storage_and_layout();
    let shape = CacheShape::of(OP, "cache", cache.dtype(), layout)?;
    check_slots(OP, slots, shape)?;
    check_rows(OP, slots, out, shape.width() * cache.dtype().size_in_bytes())?;
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("{OP}: the cache must be in the processor's memory");
    };
    let start = layout.start_offset();
    match storage {
        CpuStorage::F32(cache) => gather(&cache[start..], slots, shape, out),
        CpuStorage::F16(cache) => gather(&cache[start..], slots, shape, out),
        CpuStorage::BF16(cache) => gather(&cache[start..], slots, shape, out),
        CpuStorage::U8(cache) => gather(&cache[start..], slots, shape, out),
        other => return Err(not_kv(OP, other.dtype()).into()),
    }
    Ok(())
}

/// cache (blocks, block_size, kv_heads, d): row i of `rows` goes to `slots[i]`. Two rows for one
/// slot: the later one stays.
pub struct ScatterRows<'a> {
    pub slots: &'a [u32],
    /// As [`gather_rows`] gives them.
    pub rows: &'a [u8],
}

impl InplaceOp1 for ScatterRows<'_> {
    fn name(&self) -> &'static str {
        "scatter_rows"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let shape = self.check_layout(layout, cache.dtype())?;
        let start = layout.start_offset();
        match cache {
            CpuStorage::F32(cache) => self.scatter(&mut cache[start..], shape),
            CpuStorage::F16(cache) => self.scatter(&mut cache[start..], shape),
            CpuStorage::BF16(cache) => self.scatter(&mut cache[start..], shape),
            CpuStorage::U8(cache) => self.scatter(&mut cache[start..], shape),
            other => return Err(not_kv(self.name(), other.dtype()).into()),
        }
        Ok(())
    }
}

impl ScatterRows<'_> {
    /// Whether `cache` takes it: for those who write to several caches, all or none.
    pub fn check(&self, cache: &Tensor) -> Result<(), Error> {
        self.check_layout(cache.layout(), cache.dtype()).map(drop)
    }

    fn check_layout(&self, layout: &Layout, dtype: DType) -> Result<CacheShape, Error> {
        const OP: &str = "scatter_rows";
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::U8) {
            return Err(not_kv(OP, dtype));
        }
        let shape = CacheShape::of(OP, "cache", dtype, layout)?;
        check_slots(OP, self.slots, shape)?;
        check_rows(OP, self.slots, self.rows, shape.width() * dtype.size_in_bytes())?;
        Ok(shape)
    }

    fn scatter<const N: usize, E: Bits<N>>(&self, cache: &mut [E], shape: CacheShape) {
        let mut rows = self.rows.as_chunks::<N>().0;
        for run in runs(self.slots) {
            let (values, rest) = rows.split_at(run.len() * shape.width());
            let place = &mut cache[run[0] as usize * shape.width()..][..values.len()];
            for (stored, bytes) in place.iter_mut().zip(values) {
                *stored = E::from_bits_of(*bytes);
            }
            rows = rest;
        }
    }
}

fn gather<const N: usize, E: Bits<N>>(
    cache: &[E],
    slots: &[u32],
    shape: CacheShape,
    out: &mut [u8],
) {
    let mut rows = out.as_chunks_mut::<N>().0;
    for run in runs(slots) {
        let (values, rest) = rows.split_at_mut(run.len() * shape.width());
        let stored = &cache[run[0] as usize * shape.width()..];
        for (bytes, stored) in values.iter_mut().zip(stored) {
            *bytes = stored.bits();
        }
        rows = rest;
    }
}

/// Slots cut where one does not follow the one before.
fn runs(slots: &[u32]) -> impl Iterator<Item = &[u32]> {
    slots.chunk_by(|before, slot| before.checked_add(1) == Some(*slot))
}

fn check_slots(op: &'static str, slots: &[u32], shape: CacheShape) -> Result<(), Error> {
    let limit = shape.blocks * shape.block_size;
    match slots.iter().find(|&&slot| slot as usize >= limit) {
        Some(slot) => Err(Error::value(op, "a slot", *slot, format!("below the cache's {limit}"))),
        None => Ok(()),
    }
}

fn check_rows(op: &'static str, slots: &[u32], rows: &[u8], row_bytes: usize) -> Result<(), Error> {
    let expected = slots.len() * row_bytes;
    if rows.len() == expected {
        return Ok(());
    }
    let expected = format!("{expected}: {} rows of {row_bytes}", slots.len());
    Err(Error::value(op, "the rows' length in bytes", rows.len(), expected))
}

/// A number as its bytes, little endian.
trait Bits<const N: usize>: Copy {
    fn bits(self) -> [u8; N];
    fn from_bits_of(bytes: [u8; N]) -> Self;
}

macro_rules! bits {
    ($type:ty, $bytes:expr) => {
        impl Bits<$bytes> for $type {
            #[inline(always)]
            fn bits(self) -> [u8; $bytes] {
                self.to_bits().to_le_bytes()
            }
            #[inline(always)]
            fn from_bits_of(bytes: [u8; $bytes]) -> Self {
                Self::from_le_bytes(bytes)
            }
        }
    };
}

bits!(f32, 4);
bits!(f16, 2);
bits!(bf16, 2);

impl Bits<1> for u8 {
    #[inline(always)]
    fn bits(self) -> [u8; 1] {
        [self]
    }
    #[inline(always)]
    fn from_bits_of([byte]: [u8; 1]) -> Self {
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use candle_core::Device;

    const DIMS: (usize, usize, usize, usize) = (5, 4, 1, 6); // 20 slots of 6 values

    /// Any bits: NaNs quiet and signalling with payloads, infinities, subnormals.
    fn random_rows(random: &mut Random, rows: usize, size: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..rows * 6 * size).map(|_| random.below(256) as u8).collect();
        let nan: &[u8] = if size == 4 { &[0x34, 0x12, 0x80, 0x7F] } else { &[0x93, 0x7F] };
        bytes[..nan.len()].copy_from_slice(nan);
        bytes
    }

    fn zeros(dtype: DType) -> Tensor {
        Tensor::zeros(DIMS, dtype, &Device::Cpu).unwrap()
    }

    fn gathered(cache: &Tensor, slots: &[u32]) -> candle_core::Result<Vec<u8>> {
        let mut out = vec![7; slots.len() * 6 * cache.dtype().size_in_bytes()];
        gather_rows(cache, slots, &mut out).map(|()| out)
    }

    #[test]
    fn rows_come_back_bit_for_bit_and_lie_where_they_were_put() {
        let mut random = Random::new(51);
        let slots = [7, 8, 9, 10, 2, 19, 0, 1, 15];
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::U8] {
            let (cache, size) = (zeros(dtype), dtype.size_in_bytes());
            let rows = random_rows(&mut random, slots.len(), size);
            cache.inplace_op1(&ScatterRows { slots: &slots, rows: &rows }).unwrap();
            assert!(gathered(&cache, &slots).unwrap() == rows, "{dtype:?}");
            for slot in 0..20 {
                let found = gathered(&cache, &[slot]).unwrap();
                match slots.iter().position(|&s| s == slot) {
                    Some(i) => assert_eq!(found, rows[i * 6 * size..(i + 1) * 6 * size]),
                    None => assert_eq!(found, vec![0; 6 * size]),
                }
            }
        }
    }

    #[test]
    fn bytes_are_those_of_the_numbers_little_endian() {
        let cache = zeros(DType::F32);
        let rows: Vec<u8> = (1..7).flat_map(|i| (i as f32).to_le_bytes()).collect();
        cache.inplace_op1(&ScatterRows { slots: &[6], rows: &rows }).unwrap();
        let found: Vec<f32> =
            cache.get(1).unwrap().get(2).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let narrow = cache.narrow(0, 1, 2).unwrap();
        assert_eq!(gathered(&narrow, &[2]).unwrap(), rows);
    }

    #[test]
    fn no_slots_are_no_rows() {
        let cache = zeros(DType::BF16);
        assert_eq!(gathered(&cache, &[]).unwrap(), Vec::<u8>::new());
        cache.inplace_op1(&ScatterRows { slots: &[], rows: &[] }).unwrap();
    }

    #[test]
    fn what_lies_outside_is_refused_and_nothing_written() {
        let cache = zeros(DType::F16);
        let refusal = |cache: &Tensor, slots: &[u32], rows: &[u8]| {
            cache.inplace_op1(&ScatterRows { slots, rows }).unwrap_err().to_string()
        };
        let ones = vec![1; 24];
        assert!(refusal(&cache, &[0, 20], &ones).contains("a slot is 20, must be below"));
        let found = refusal(&cache, &[0, 1], &ones[1..]);
        assert!(found.contains("length in bytes is 23, must be 24: 2 rows of 12"), "{found}");
        assert!(
            refusal(&zeros(DType::F64), &[0], &[0; 48])
                .contains("f32, f16, bf16 or u8 (int8), got F64")
        );
        assert_eq!(gathered(&cache, &[0, 1]).unwrap(), [0; 24]);
        let refusal = |cache: &Tensor| gathered(cache, &[0, 20]).unwrap_err().to_string();
        assert!(refusal(&cache).contains("a slot is 20, must be below the cache's 20"));
        assert!(refusal(&cache.transpose(0, 1).unwrap()).contains("contiguous"));
        let short = gather_rows(&cache, &[0, 1], &mut [0; 23]).unwrap_err().to_string();
        assert!(short.contains("length in bytes is 23, must be 24: 2 rows of 12"), "{short}");
    }
}
