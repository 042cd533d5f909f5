//! Products of small integers for sixteen columns at a time, four inputs each.
//!
//! All of it is exact, so each implementation gives the results of [`Portable`].

use super::{LANES, Portable, Simd};

/// Four bytes of each of sixteen columns.
pub(crate) const BYTES: usize = 4 * LANES;

pub(crate) trait IntSimd: Copy {
    /// The lanes that scales are applied in.
    type Float: Simd;
    /// 64 bytes: byte i belongs to column i / 4.
    type Bytes: Copy;
    /// Sixteen i32.
    type Sums: Copy;

    fn float(self) -> Self::Float;
    fn bytes(self, x: &[u8; BYTES]) -> Self::Bytes;
    fn to_array(self, x: Self::Bytes) -> [u8; BYTES];
    /// (byte >> shift) & mask; the mask has no more than the 8 - shift bits that are there.
    fn field(self, x: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes;
    /// low | high << 4, of fields of at most four bits.
    fn above(self, low: Self::Bytes, high: Self::Bytes) -> Self::Bytes;
    fn splat(self, x: i32) -> Self::Sums;
    /// Adds the products of a column's four bytes, unsigned, with those of `x`, signed.
    fn dot(self, sums: Self::Sums, codes: Self::Bytes, x: i32) -> Self::Sums;
    /// The numbers whose bits the sums are.
    fn as_floats(self, sums: Self::Sums) -> <Self::Float as Simd>::V;
    #[inline(always)]
    fn prefetch<T>(self, data: *const T) {
        self.float().prefetch(data);
    }
    #[inline(always)]
    fn prefetch_far<T>(self, data: *const T) {
        self.float().prefetch_far(data);
    }
}

impl IntSimd for Portable {
    type Float = Self;
    type Bytes = [u8; BYTES];
    type Sums = [i32; LANES];

    #[inline(always)]
    fn float(self) -> Self {
        self
    }
    #[inline(always)]
    fn bytes(self, x: &[u8; BYTES]) -> Self::Bytes {
        *x
    }
    #[inline(always)]
    fn to_array(self, x: Self::Bytes) -> [u8; BYTES] {
        x
    }
    #[inline(always)]
    fn field(self, x: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes {
        x.map(|x| x >> shift & mask)
    }
    #[inline(always)]
    fn above(self, low: Self::Bytes, high: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| low[i] | high[i] << 4)
    }
    #[inline(always)]
    fn splat(self, x: i32) -> Self::Sums {
        [x; LANES]
    }
    #[inline(always)]
    fn dot(self, sums: Self::Sums, codes: Self::Bytes, x: i32) -> Self::Sums {
        let x = x.to_le_bytes().map(|x| i32::from(x.cast_signed()));
        let (columns, _) = codes.as_chunks::<4>();
        std::array::from_fn(|column| {
            let products = columns[column].iter().zip(x).map(|(&code, x)| i32::from(code) * x);
            products.fold(sums[column], i32::wrapping_add)
        })
    }
    #[inline(always)]
    fn as_floats(self, sums: Self::Sums) -> [f32; LANES] {
        sums.map(|sum| f32::from_bits(sum.cast_unsigned()))
    }
}
