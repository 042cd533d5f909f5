//! A candle storage and layout, checked and turned into slices.

use crate::dtype::{SCALE_BYTES, Stored};
use crate::error::Error;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout};

/// A 2-D f32 operand: rows of `width` contiguous values at any distance (a `narrow` of a fused
/// product is one).
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    pub(crate) count: usize,
    pub(crate) width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(
        op: &'static str,
        operand: &'static str,
        storage: &'a CpuStorage,
        layout: &Layout,
    ) -> Result<Self, Error> {
        let data = slice::<f32>(op, operand, storage)?;
        let (&[count, width], &[stride, inner]) = (layout.dims(), layout.stride()) else {
            return Err(refused(op, operand, "2-D (rows, width)", layout));
        };
        if inner != 1 && width > 1 {
            return Err(refused(op, operand, "contiguous along its last dimension", layout));
        }
        if count * width == 0 {
            return Ok(Self { data: &[], count, width, stride: 0 });
        }
        let start = layout.start_offset();
        let data = &data[start..start + (count - 1) * stride + width];
        Ok(Self { data, count, width, stride })
    }

    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..i * self.stride + self.width]
    }
}

/// The shape of a layer's K or V: (blocks, block_size, kv_heads, stored_dim).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub blocks: usize,
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// What a head's vector takes: [`KvDtype::stored_dim`](crate::KvDtype::stored_dim).
    pub stored_dim: usize,
}

impl CacheShape {
    /// Values a token takes.
    pub fn width(&self) -> usize {
        self.kv_heads * self.stored_dim
    }

    pub(crate) fn of(
        op: &'static str,
        operand: &'static str,
        dtype: DType,
        layout: &Layout,
    ) -> Result<Self, Error> {
        let expected = "contiguous (blocks, block_size, kv_heads, head_dim)";
        let &[blocks, block_size, kv_heads, stored_dim] = layout.dims() else {
            return Err(refused(op, operand, expected, layout));
        };
        let scale = if dtype == DType::U8 { SCALE_BYTES } else { 0 };
        let head_dim = stored_dim.saturating_sub(scale);
        if !layout.is_contiguous() || block_size * kv_heads * head_dim == 0 {
            return Err(refused(op, operand, expected, layout));
        }
        Ok(Self { blocks, block_size, kv_heads, head_dim, stored_dim })
    }

    /// The cache's values out of its storage.
    pub(crate) fn values<'a, E: Stored>(
        &self,
        op: &'static str,
        operand: &'static str,
        storage: &'a CpuStorage,
        layout: &Layout,
    ) -> Result<&'a [E], Error> {
        let start = layout.start_offset();
        let len = self.blocks * self.block_size * self.width();
        Ok(&slice::<E>(op, operand, storage)?[start..start + len])
    }
}

fn slice<'a, E: Stored>(
    op: &'static str,
    operand: &'static str,
    storage: &'a CpuStorage,
) -> Result<&'a [E], Error> {
    let expected = std::any::type_name::<E>().rsplit("::").next().expect("split yields one");
    let found = storage.dtype();
    E::slice(storage).ok_or(Error::Dtype { op, operand, expected, found })
}

pub(crate) fn refused(
    op: &'static str,
    operand: &'static str,
    expected: impl Into<String>,
    layout: &Layout,
) -> Error {
    let (dims, strides) = (layout.dims().to_vec(), layout.stride().to_vec());
    Error::Layout { op, operand, expected: expected.into(), dims, strides }
}
