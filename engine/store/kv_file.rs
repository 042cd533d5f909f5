//! A segment's K and V as a file: one pass to write it, one to read or to check it.
//!
//! FORMAT.md draws the bytes. Reading trusts nothing: every length is bounded by the file's before
//! it is used, and whatever doesn't hold is a [`Damage`].

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{self, Read};

use sha2::{Digest, Sha256};
use strand_kernels::KvDtype;
use strand_kernels::gpu::HostBytes;
use xxhash_rust::xxh3::xxh3_64;

use super::codec::{self, Codec, Coding, Encoding};
use super::error::{Damage, StoreError};
use super::manifest::{Frame, MAX_MANIFEST, Manifest};
use super::pipeline::in_order;
use crate::cache::{KvId, KvIdentity, KvVariant};
use crate::tenant::tenant_of;
use crate::{ChunkId, SegmentKv};

const MAGIC: &[u8; 8] = b"STRANDKV";
const VERSION: u32 = 1;
/// Magic, version, the manifest's length and hash.
pub(super) const HEADER: usize = 24;
/// SHA-256 of all before it.
pub(super) const TRAILER: usize = 32;
/// Frames start at multiples of it: pages of the system, and what direct I/O asks for.
pub(super) const ALIGN: u64 = 4096;

/// How the rows of a model's KV lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: KvDtype,
}

impl KvShape {
    /// Numbers in a row of K or V.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of one frame; `None` beyond any memory.
    pub fn frame_bytes(&self, rows: usize) -> Option<usize> {
        let row = self.kv_heads.checked_mul(self.dtype.vector_bytes(self.head_dim))?;
        // four times as much, so that sums of what is derived from it can't overflow either
        row.checked_mul(rows)?.checked_mul(4).map(|bytes| bytes / 4)
    }
}

/// What a segment's rows are, so that nobody takes them for others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvRecord {
    pub identity: KvIdentity,
    /// Whether the rows are the computed ones.
    pub variant: KvVariant,
    pub chunk: ChunkId,
    /// Position at which row 0's key is rotated; row r's at `first_position + r`.
    pub first_position: u32,
    /// What the segment saw after the anchor, in order.
    pub seen: Vec<KvId>,
    /// One per row.
    pub tokens: Vec<u32>,
    pub shape: KvShape,
}

impl KvRecord {
    pub fn kv_id(&self) -> KvId {
        self.identity.root(self.variant).kv_id(&self.tokens, &self.seen)
    }

    /// Whose they are, as their salt says.
    pub fn tenant(&self) -> String {
        tenant_of(&String::from_utf8_lossy(&self.identity.salt)).to_owned()
    }

    /// Refuses rows that aren't those the record speaks of.
    fn check(&self, kv: &SegmentKv) -> Result<(), StoreError> {
        let mismatch = |what, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => {
                Err(StoreError::Mismatch { what, found: found as u64, expected: expected as u64 })
            }
        };
        mismatch("number of frames", kv.num_frames(), 2 * self.shape.layers)?;
        let expected = self.shape.frame_bytes(self.tokens.len()).unwrap_or(usize::MAX);
        mismatch("length of a frame", kv.frame_bytes(), expected)?;
        if kv.num_bytes() == 0 {
            let what = "number of bytes of KV";
            return Err(StoreError::Mismatch { what, found: 0, expected: 1 });
        }
        Ok(())
    }
}

/// A file that is ready to be written: its frames are encoded, so its length is known.
pub(super) struct Encoded<'a> {
    /// The one that the file has, of the codec's variant.
    pub record: KvRecord,
    head: Vec<u8>,
    frames: Vec<Cow<'a, [u8]>>,
}

impl<'a> Encoded<'a> {
    pub fn new(
        record: &KvRecord,
        kv: &'a SegmentKv,
        codec: Codec,
        coding: &Coding,
    ) -> Result<Self, StoreError> {
        if record.variant != KvVariant::Lossless {
            return Err(StoreError::NotLossless);
        }
        record.check(kv)?;
        let record = KvRecord { variant: codec.variant(), ..record.clone() };
        let rows = record.rows();
        let mut encoded: Vec<(Encoding, Cow<[u8]>)> = Vec::with_capacity(kv.num_frames());
        in_order(
            coding.threads,
            kv.frames().enumerate().map(Ok),
            |(): &mut (), (index, raw)| codec::encode(codec, index, raw, &rows, coding),
            |frame| {
                encoded.push(frame);
                Ok(())
            },
        )?;
        let head = head(&record, codec, &encoded, rows.bytes() as u64)?;
        let frames = encoded.into_iter().map(|(_, bytes)| bytes).collect();
        Ok(Self { record, head, frames })
    }

    /// Bytes of the encoded frames.
    pub fn payload_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        let mut at = (self.head.len() as u64).next_multiple_of(ALIGN);
        for frame in &self.frames {
            at = (at + frame.len() as u64).next_multiple_of(ALIGN);
        }
        at + TRAILER as u64
    }

    /// Writes the file from its first byte to its last.
    pub fn write(&self, mut out: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut digest = Sha256::new();
        let head = std::iter::once(&self.head[..]);
        for part in head.chain(self.frames.iter().map(|frame| &frame[..])) {
            let padding = (part.len() as u64).next_multiple_of(ALIGN) - part.len() as u64;
            for bytes in [part, &ZEROS[..padding as usize]] {
                digest.update(bytes);
                out(bytes)?;
            }
        }
        out(&digest.finalize())
    }
}

const ZEROS: [u8; ALIGN as usize] = [0; ALIGN as usize];

/// Header and manifest. Where frames start depends on the manifest's length and that, by
/// variable-length integers, on where they start: repeated until it holds.
fn head(
    record: &KvRecord,
    codec: Codec,
    frames: &[(Encoding, Cow<[u8]>)],
    raw: u64,
) -> Result<Vec<u8>, StoreError> {
    let mut table: Vec<Frame> =
        (frames.iter()).map(|(encoding, stored)| Frame::new(0, stored, raw, *encoding)).collect();
    let mut manifest = Vec::new();
    loop {
        let mut at = (HEADER + manifest.len()) as u64;
        for frame in &mut table {
            frame.offset = at.next_multiple_of(ALIGN);
            at = frame.offset + frame.stored;
        }
        let again = Manifest::new(record, codec, table.clone()).to_bytes()?;
        // lengths only grow from round to round, so it ends
        let holds = again.len() == manifest.len();
        manifest = again;
        if holds {
            break;
        }
    }
    let mut head = Vec::with_capacity(HEADER + manifest.len());
    head.extend(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend((manifest.len() as u32).to_le_bytes());
    head.extend(xxh3_64(&manifest).to_le_bytes());
    head.extend(manifest);
    Ok(head)
}

/// Why reading stopped: the file is not what it should be, or the disk doesn't answer.
#[derive(Debug)]
pub(super) enum ReadError {
    Damage(Damage),
    Io(io::Error),
    /// The file may well be right; what is needed to decode it is missing.
    Refused(StoreError),
}

impl From<Damage> for ReadError {
    fn from(damage: Damage) -> Self {
        Self::Damage(damage)
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damage(Damage::Short),
            _ => Self::Io(error),
        }
    }
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damage(damage) => Self::Damage(damage),
            error => Self::Refused(error),
        }
    }
}

/// A file whose header holds.
pub(super) struct KvReader<R> {
    source: R,
    /// Of all that was read; `None` where the end won't be compared.
    digest: Option<Sha256>,
    at: u64,
    pub record: KvRecord,
    pub codec: Codec,
    pub length: u64,
    frames: Vec<Frame>,
}

impl<R: Read> KvReader<R> {
    /// Reads and checks the header; `length` is that of the whole file.
    pub fn open(mut source: R, length: u64) -> Result<Self, ReadError> {
        let mut header = [0; HEADER];
        source.read_exact(&mut header)?;
        let word = |at: usize| {
            u32::from_le_bytes(header[at..at + 4].try_into().expect("a word has four bytes"))
        };
        if header[..8] != *MAGIC {
            return Err(Damage::Magic("KV").into());
        }
        if word(8) != VERSION {
            return Err(Damage::Version { found: word(8), known: VERSION }.into());
        }
        let manifest_len = word(12) as usize;
        if manifest_len > MAX_MANIFEST {
            return Err(Damage::Header("its manifest is too long".to_owned()).into());
        }
        if (HEADER + manifest_len + TRAILER) as u64 > length {
            return Err(Damage::Short.into());
        }
        let mut bytes = vec![0; manifest_len];
        source.read_exact(&mut bytes)?;
        if xxh3_64(&bytes).to_le_bytes() != header[16..] {
            return Err(Damage::Header("its checksum does not match".to_owned()).into());
        }
        let manifest = Manifest::parse(&bytes)?;
        let (record, codec) = manifest.check(manifest_len as u64, length)?;
        let digest = Some(Sha256::new_with_prefix(header).chain_update(&bytes));
        let at = (HEADER + manifest_len) as u64;
        Ok(Self { source, digest, at, record, codec, length, frames: manifest.frames })
    }

    /// Bytes of the encoded frames.
    pub fn payload_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.stored).sum()
    }

    /// Bytes of the rows as the engine holds them.
    pub fn raw_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.raw).sum()
    }

    /// Reads, checks and decodes the rows. What they are made of is checked, frame by frame, and
    /// that nothing lies between; the SHA-256 of it all would say the same again, and is left to
    /// [`KvReader::verify`]. Takes the memory of all rows at once: whether so many can be of use
    /// is for the caller to know.
    pub fn read(mut self, coding: &Coding) -> Result<SegmentKv, ReadError> {
        self.digest = None;
        let rows = self.record.rows();
        let frames = std::mem::take(&mut self.frames);
        let bytes = HostBytes::new(coding.gpu.as_ref(), frames.len() * rows.bytes());
        let mut kv = SegmentKv::new(bytes, frames.len());
        // Buffers are used again: memory that is new costs more than what is done with it.
        let spare: RefCell<Vec<Vec<u8>>> = RefCell::default();
        let stored = frames.into_iter().zip(kv.frames_mut()).map(|(frame, out)| {
            let buffer = spare.borrow_mut().pop().unwrap_or_default();
            let stored = self.stored(&frame, buffer)?;
            Ok((frame, stored, out))
        });
        let decode = |scratch: &mut codec::Scratch, (frame, stored, out): (Frame, Vec<u8>, _)| {
            check_frame(&frame, &stored)?;
            codec::decode(encoding(&frame), &stored, &rows, coding, scratch, out)?;
            Ok::<_, ReadError>(stored)
        };
        in_order(coding.threads, stored, decode, |buffer| {
            spare.borrow_mut().push(buffer);
            Ok(())
        })?;
        self.skip_to(self.length - TRAILER as u64)?;
        Ok(kv)
    }

    /// Checks every byte without keeping any. Frames are not decoded: what is not known to be of
    /// this engine's shape may be made to take all memory.
    pub fn verify(mut self) -> Result<(), ReadError> {
        let mut stored = Vec::new();
        for frame in std::mem::take(&mut self.frames) {
            stored = self.stored(&frame, stored)?;
            check_frame(&frame, &stored)?;
        }
        self.skip_to(self.length - TRAILER as u64)?;
        let digest = self.digest.take().expect("it is kept until the end").finalize();
        let mut trailer = [0; TRAILER];
        self.fill(&mut trailer)?;
        match digest[..] == trailer {
            true => Ok(()),
            false => Err(Damage::Checksum.into()),
        }
    }

    /// The bytes of the next frame, in a buffer that may hold anything.
    fn stored(&mut self, frame: &Frame, mut buffer: Vec<u8>) -> Result<Vec<u8>, ReadError> {
        self.skip_to(frame.offset)?;
        // the header has been checked against the file's length
        buffer.resize(frame.stored as usize, 0);
        self.fill(&mut buffer)?;
        Ok(buffer)
    }

    /// Reads the zeros before `offset`.
    fn skip_to(&mut self, offset: u64) -> Result<(), ReadError> {
        let mut padding = ZEROS;
        let padding = &mut padding[..(offset - self.at) as usize];
        self.fill(padding)?;
        match padding.iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(Damage::Frame("there is something between frames".to_owned()).into()),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ReadError> {
        self.source.read_exact(bytes)?;
        self.at += bytes.len() as u64;
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
        }
        Ok(())
    }
}

fn check_frame(frame: &Frame, stored: &[u8]) -> Result<(), Damage> {
    match xxh3_64(stored) == frame.xxh3 {
        true => Ok(()),
        false => Err(Damage::Frame("a frame's checksum does not match".to_owned())),
    }
}

fn encoding(frame: &Frame) -> Encoding {
    frame.encoding().expect("the header was checked")
}

#[cfg(test)]
mod tests;
