//! How rows become the bytes of a frame, and back: raw, planes, int8.
//!
//! Pure functions over one frame; FORMAT.md has the layouts. `raw` and `planes` give back the same
//! bits. Bytes from a file are not trusted: what doesn't decode is a [`Damage`], never a panic.

mod int8;
mod planes;

use std::borrow::Cow;
use std::sync::Arc;

use strand_kernels::gpu::Gpu;
use strand_kernels::{KvDtype, RotaryTable};

use super::error::{Damage, StoreError};
use super::kv_file::KvShape;
use crate::cache::KvVariant;

/// How KV is written to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// The rows as they are.
    Raw,
    /// Lossless: exponents apart from mantissas, each compressed where that gains something.
    #[default]
    Planes,
    /// Half the size of 16-bit rows, approximate.
    Int8,
}

impl Codec {
    pub const ALL: [Self; 3] = [Self::Raw, Self::Planes, Self::Int8];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Planes => "planes",
            Self::Int8 => "int8",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.as_str() == text)
    }

    /// Which KV a file of this codec holds: int8's has a name of its own.
    pub fn variant(self) -> KvVariant {
        match self {
            Self::Raw | Self::Planes => KvVariant::Lossless,
            Self::Int8 => KvVariant::Int8,
        }
    }
}

/// What encoding and decoding need besides the rows.
#[derive(Clone, Default)]
pub struct Coding {
    /// The rotation of the keys; int8 needs it.
    pub rotary: Option<Arc<RotaryTable>>,
    /// Threads to use; 0 counts as 1.
    pub threads: usize,
    /// Who copies the rows that are read.
    pub gpu: Option<Gpu>,
}

/// What decoding uses again, a thread each.
#[derive(Default)]
pub(super) struct Scratch {
    planes: planes::Scratch,
}

/// How one frame is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Raw,
    Planes,
    Int8K,
    Int8V,
}

impl Encoding {
    pub(super) const ALL: [Self; 4] = [Self::Raw, Self::Planes, Self::Int8K, Self::Int8V];

    /// Whether a file of this codec may have it in this frame (even ones are K).
    pub(super) fn suits(self, codec: Codec, frame: usize) -> bool {
        match codec {
            Codec::Raw => self == Self::Raw,
            Codec::Planes => matches!(self, Self::Raw | Self::Planes),
            Codec::Int8 => self == if frame.is_multiple_of(2) { Self::Int8K } else { Self::Int8V },
        }
    }
}

/// The rows of a frame, and how they lie.
pub(super) struct Rows {
    pub shape: KvShape,
    pub count: usize,
    /// Position at which row 0 of a K frame is rotated.
    pub first_position: usize,
}

impl Rows {
    pub fn bytes(&self) -> usize {
        self.count * self.shape.kv_heads * self.shape.dtype.vector_bytes(self.shape.head_dim)
    }

    /// The bytes an int8 frame takes: groups' scales for K, rows' for V, then the numbers.
    pub fn int8_bytes(&self, encoding: Encoding) -> usize {
        let scales = match encoding {
            Encoding::Int8K => self.count.div_ceil(int8::GROUP) * self.shape.width(),
            _ => self.count,
        };
        2 * scales + self.count * self.shape.width()
    }

    /// Refuses int8 without the rotation of all its keys.
    pub fn rotation<'a>(&self, coding: &'a Coding) -> Result<&'a RotaryTable, StoreError> {
        let table = coding.rotary.as_deref().ok_or(StoreError::NoRotation)?;
        let needed = self.first_position + self.count;
        if needed > table.max_position() {
            return Err(StoreError::RotationTooShort { needed, has: table.max_position() });
        }
        if table.head_dim() > self.shape.head_dim {
            let (table, head_dim) = (table.head_dim(), self.shape.head_dim);
            return Err(StoreError::RotationTooWide { table, head_dim });
        }
        Ok(table)
    }
}

/// Encodes frame number `frame`; `raw` are its rows.
pub(super) fn encode<'a>(
    codec: Codec,
    frame: usize,
    raw: &'a [u8],
    rows: &Rows,
    coding: &Coding,
) -> Result<(Encoding, Cow<'a, [u8]>), StoreError> {
    match codec {
        Codec::Raw => Ok((Encoding::Raw, Cow::Borrowed(raw))),
        Codec::Int8 if rows.shape.dtype == KvDtype::Int8 => Err(StoreError::AlreadyInt8),
        Codec::Planes => Ok(match planes::encode(raw, rows.shape.dtype.size()) {
            Some(bytes) => (Encoding::Planes, Cow::Owned(bytes)),
            None => (Encoding::Raw, Cow::Borrowed(raw)),
        }),
        Codec::Int8 if frame.is_multiple_of(2) => {
            let bytes = int8::encode_keys(raw, rows, rows.rotation(coding)?)?;
            Ok((Encoding::Int8K, Cow::Owned(bytes)))
        }
        Codec::Int8 => Ok((Encoding::Int8V, Cow::Owned(int8::encode_values(raw, rows)?))),
    }
}

/// Writes the rows of a frame to `out`, which is as long as they are.
pub(super) fn decode(
    encoding: Encoding,
    stored: &[u8],
    rows: &Rows,
    coding: &Coding,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<(), StoreError> {
    let damage = |text: &str| StoreError::from(Damage::Frame(text.to_owned()));
    match encoding {
        Encoding::Raw if stored.len() == out.len() => out.copy_from_slice(stored),
        Encoding::Raw => return Err(damage("its length is not that of its rows")),
        Encoding::Planes => {
            let size = rows.shape.dtype.size();
            let decoded = planes::decode(stored, size, &mut scratch.planes, out);
            decoded.ok_or_else(|| damage("its planes do not decode"))?;
        }
        _ if stored.len() != rows.int8_bytes(encoding) => {
            return Err(damage("its length is not that of its rows"));
        }
        _ if rows.shape.dtype == KvDtype::Int8 => return Err(damage("its rows are int8 already")),
        Encoding::Int8K => int8::decode_keys(stored, rows, rows.rotation(coding)?, out),
        Encoding::Int8V => int8::decode_values(stored, rows, out),
    }
    Ok(())
}

/// Numbers of a frame as f32.
fn widen(dtype: KvDtype, bytes: &[u8], out: &mut [f32]) {
    let pairs = || bytes.chunks_exact(2).map(|x| u16::from_le_bytes([x[0], x[1]]));
    match dtype {
        KvDtype::F32 => {
            for (out, x) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *out = f32::from_le_bytes([x[0], x[1], x[2], x[3]]);
            }
        }
        KvDtype::F16 => {
            for (out, x) in out.iter_mut().zip(pairs()) {
                *out = half::f16::from_bits(x).to_f32();
            }
        }
        KvDtype::Bf16 => {
            for (out, x) in out.iter_mut().zip(pairs()) {
                *out = f32::from_bits(u32::from(x) << 16);
            }
        }
        KvDtype::Int8 => unreachable!("refused before"),
    }
}

/// f32 as numbers of a frame, to nearest even.
fn narrow(dtype: KvDtype, x: &[f32], out: &mut [u8]) {
    match dtype {
        KvDtype::F32 => {
            for (out, x) in out.chunks_exact_mut(4).zip(x) {
                out.copy_from_slice(&x.to_le_bytes());
            }
        }
        KvDtype::F16 => {
            for (out, &x) in out.chunks_exact_mut(2).zip(x) {
                out.copy_from_slice(&half::f16::from_f32(x).to_le_bytes());
            }
        }
        KvDtype::Bf16 => {
            for (out, &x) in out.chunks_exact_mut(2).zip(x) {
                out.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
            }
        }
        KvDtype::Int8 => unreachable!("refused before"),
    }
}

#[cfg(test)]
mod tests;
