//! The manifest of a `.kv` file: what is in it, checked before anything is believed.

use bincode::{Decode, Encode};
use strand_kernels::KvDtype;

use super::codec::{Codec, Encoding, Rows};
use super::error::{Damage, StoreError};
use super::kv_file::{ALIGN, HEADER, KvRecord, KvShape, TRAILER};
use crate::ChunkId;
use crate::cache::{KvId, KvIdentity, KvVariant};

/// Its largest length, and what decoding may allocate: 8 million tokens and more.
pub(super) const MAX_MANIFEST: usize = 64 << 20;

/// A frame's place and how to read it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Frame {
    pub offset: u64,
    pub stored: u64,
    pub raw: u64,
    encoding: u8,
    pub xxh3: u64,
}

impl Frame {
    pub fn new(offset: u64, stored: &[u8], raw: u64, encoding: Encoding) -> Self {
        let xxh3 = xxhash_rust::xxh3::xxh3_64(stored);
        let encoding = position(&Encoding::ALL, encoding);
        Self { offset, stored: stored.len() as u64, raw, encoding, xxh3 }
    }

    pub fn encoding(&self) -> Option<Encoding> {
        Encoding::ALL.get(usize::from(self.encoding)).copied()
    }
}

/// As it lies in the file; FORMAT.md says what the fields mean.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Manifest {
    model: [u8; 32],
    tokenizer: [u8; 32],
    numerics: String,
    rope: String,
    anchor: Vec<u32>,
    salt: Vec<u8>,
    variant: u8,
    kv_id: [u8; 32],
    chunk: [u8; 32],
    first_position: u32,
    seen: Vec<[u8; 32]>,
    tokens: Vec<u32>,
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
    dtype: u8,
    codec: u8,
    pub frames: Vec<Frame>,
}

const DTYPES: [KvDtype; 4] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8];
const VARIANTS: [KvVariant; 2] = [KvVariant::Lossless, KvVariant::Int8];

impl Manifest {
    pub fn new(record: &KvRecord, codec: Codec, frames: Vec<Frame>) -> Self {
        let KvIdentity { model, tokenizer, numerics, rope, anchor, salt } = record.identity.clone();
        let KvShape { layers, kv_heads, head_dim, dtype } = record.shape;
        Self {
            model,
            tokenizer,
            numerics,
            rope,
            anchor,
            salt,
            variant: position(&VARIANTS, record.variant),
            kv_id: *record.kv_id().as_bytes(),
            chunk: *record.chunk.as_bytes(),
            first_position: record.first_position,
            seen: record.seen.iter().map(|id| *id.as_bytes()).collect(),
            tokens: record.tokens.clone(),
            layers: layers as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            dtype: position(&DTYPES, dtype),
            codec: position(&Codec::ALL, codec),
            frames,
        }
    }

    pub fn to_bytes(&self) -> Result<Vec<u8>, StoreError> {
        let bytes = bincode::encode_to_vec(self, bincode::config::standard())
            .expect("numbers and lists of them always encode");
        match bytes.len() {
            len if len > MAX_MANIFEST => {
                Err(StoreError::ManifestTooLarge { bytes: len, most: MAX_MANIFEST })
            }
            _ => Ok(bytes),
        }
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, Damage> {
        let config = bincode::config::standard().with_limit::<MAX_MANIFEST>();
        let (manifest, read): (Self, usize) = bincode::decode_from_slice(bytes, config)
            .map_err(|error| Damage::Header(error.to_string()))?;
        if read != bytes.len() {
            return Err(Damage::Header("its manifest has bytes left over".to_owned()));
        }
        Ok(manifest)
    }

    /// What it says, if it is consistent in itself and with a file of `length` bytes.
    pub fn check(&self, manifest_bytes: u64, length: u64) -> Result<(KvRecord, Codec), Damage> {
        let wrong = |what: &str| Damage::Header(format!("its {what} makes no sense"));
        let record = self.record().ok_or_else(|| wrong("type or variant"))?;
        let codec = Codec::ALL.get(usize::from(self.codec)).copied();
        let codec = codec.filter(|codec| codec.variant() == record.variant);
        let is_twice = |codec: &Codec| *codec == Codec::Int8 && record.shape.dtype == KvDtype::Int8;
        let codec = codec.filter(|codec| !is_twice(codec));
        let codec = codec.ok_or_else(|| wrong("codec"))?;
        if *record.kv_id().as_bytes() != self.kv_id {
            return Err(Damage::Name);
        }
        let shape = [self.layers, self.kv_heads, self.head_dim];
        let fits = record.shape.frame_bytes(record.tokens.len()).is_some();
        if shape.contains(&0) || record.tokens.is_empty() || !fits {
            return Err(wrong("shape"));
        }
        if self.frames.len() as u64 != 2 * u64::from(self.layers) {
            return Err(wrong("number of frames"));
        }
        let rows = record.rows();
        let mut at = HEADER as u64 + manifest_bytes;
        for (index, frame) in self.frames.iter().enumerate() {
            let encoding = frame.encoding().filter(|encoding| encoding.suits(codec, index));
            let encoding = encoding.ok_or_else(|| wrong("encoding"))?;
            let holds = frame.raw == rows.bytes() as u64
                && frame.offset == at.next_multiple_of(ALIGN)
                && match encoding {
                    Encoding::Raw => frame.stored == frame.raw,
                    Encoding::Planes => frame.stored < frame.raw,
                    _ => frame.stored == rows.int8_bytes(encoding) as u64,
                };
            if !holds {
                return Err(wrong("table of frames"));
            }
            at = frame.offset.checked_add(frame.stored).ok_or_else(|| wrong("table of frames"))?;
            if at > length {
                return Err(Damage::Short);
            }
        }
        match at.next_multiple_of(ALIGN) + TRAILER as u64 {
            end if end > length => Err(Damage::Short),
            end if end < length => Err(Damage::Long),
            _ => Ok((record, codec)),
        }
    }

    fn record(&self) -> Option<KvRecord> {
        Some(KvRecord {
            identity: KvIdentity {
                model: self.model,
                tokenizer: self.tokenizer,
                numerics: self.numerics.clone(),
                rope: self.rope.clone(),
                anchor: self.anchor.clone(),
                salt: self.salt.clone(),
            },
            variant: *VARIANTS.get(usize::from(self.variant))?,
            chunk: ChunkId::from_bytes(self.chunk),
            first_position: self.first_position,
            seen: self.seen.iter().map(|id| KvId::from_bytes(*id)).collect(),
            tokens: self.tokens.clone(),
            shape: KvShape {
                layers: self.layers as usize,
                kv_heads: self.kv_heads as usize,
                head_dim: self.head_dim as usize,
                dtype: *DTYPES.get(usize::from(self.dtype))?,
            },
        })
    }
}

impl KvRecord {
    pub(super) fn rows(&self) -> Rows {
        Rows {
            shape: self.shape,
            count: self.tokens.len(),
            first_position: self.first_position as usize,
        }
    }
}

/// The number a value has in the file.
fn position<T: PartialEq>(all: &[T], value: T) -> u8 {
    all.iter().position(|other| *other == value).expect("the list has all values") as u8
}
