//! What the store's tests share: seeded rows, folders of their own, files that fail.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strand_kernels::{KvDtype, RotaryTable};

use super::codec::{Codec, Coding};
use super::files::{Disk, Files};
use super::index::StoredChunk;
use super::kv_file::{KvRecord, KvShape};
use super::store::{Expected, Loaded, Store};
use crate::cache::{KvId, KvIdentity, KvVariant};
use crate::context::ChunkKind;
use crate::tenant::salt;
use crate::{ChunkId, SegmentKv};

pub(super) const DTYPES: [KvDtype; 4] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8];
/// Those that the lossy codec takes.
pub(super) const FLOATS: [KvDtype; 3] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16];
const HEAD_DIM: usize = 8;

/// A linear congruential generator (Knuth's MMIX constants), its high bits.
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    /// Bell-shaped around zero, standard deviation one.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..6).map(|_| (self.next() >> 8) as f32 / (1u32 << 24) as f32).sum();
        (sum - 3.0) * std::f32::consts::SQRT_2
    }

    /// So many bell-shaped numbers as they lie in a frame.
    pub fn numbers(&mut self, dtype: KvDtype, count: usize) -> Vec<u8> {
        let number = |x: f32| match dtype {
            KvDtype::F32 => x.to_le_bytes().to_vec(),
            KvDtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
            KvDtype::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            KvDtype::Int8 => vec![(x * 30.0) as i8 as u8],
        };
        let mut bytes = Vec::new();
        for i in 1..=count {
            bytes.extend(number(self.normal()));
            if dtype == KvDtype::Int8 && i % HEAD_DIM == 0 {
                bytes.extend(self.normal().abs().to_le_bytes());
            }
        }
        bytes
    }
}

pub(super) fn shape(dtype: KvDtype) -> KvShape {
    KvShape { layers: 2, kv_heads: 2, head_dim: HEAD_DIM, dtype }
}

/// A segment of so many tokens, and its rows. The seed is the chunk's text.
pub(super) fn segment(seed: u64, dtype: KvDtype, tokens: usize) -> (KvRecord, SegmentKv) {
    let mut random = Random::new(seed);
    let shape = shape(dtype);
    let record = KvRecord {
        identity: identity(),
        variant: KvVariant::Lossless,
        chunk: ChunkId::of(text(seed).as_bytes()),
        first_position: 3,
        seen: Vec::new(),
        tokens: (0..tokens).map(|_| random.next()).collect(),
        shape,
    };
    let frames = (0..2 * shape.layers).map(|_| random.numbers(dtype, tokens * shape.width()));
    (record, SegmentKv::of_frames(&frames.collect::<Vec<_>>()))
}

/// The text of [`segment`]'s chunk.
pub(super) fn text(seed: u64) -> String {
    format!("text {seed}")
}

pub(super) fn identity() -> KvIdentity {
    KvIdentity {
        model: [7; 32],
        numerics: "f32".to_owned(),
        rope: "plain".to_owned(),
        anchor: vec![1, 2, 3],
        ..KvIdentity::default()
    }
}

/// Frequencies of heads as wide, cos and sin times a factor.
pub(super) fn rotation(width: usize, factor: f64) -> Arc<RotaryTable> {
    let frequency = |i: usize| 10_000f64.powf(-2.0 * i as f64 / width as f64);
    let frequencies: Vec<f64> = (0..width / 2).map(frequency).collect();
    Arc::new(RotaryTable::new(&frequencies, factor, 4096))
}

pub(super) fn coding(threads: usize) -> Coding {
    Coding { rotary: Some(rotation(8, 1.0)), threads, gpu: None }
}

/// A folder that goes with the test.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("strand-store-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("the temporary folder can be written");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("what was made can be removed");
    }
}

pub(super) const BF16: KvDtype = KvDtype::Bf16;

pub(super) fn load(store: &Store, record: &KvRecord) -> Loaded {
    let expected = Expected { identity: &record.identity, shape: record.shape };
    store.load(record.kv_id(), &expected, &coding(2)).unwrap()
}

pub(super) fn found(store: &Store, record: &KvRecord) -> SegmentKv {
    match load(store, record) {
        Loaded::Found { record: found, kv, .. } => {
            assert_eq!(*found, *record);
            kv
        }
        other => panic!("it should be there: {other:?}"),
    }
}

/// Puts the chunk of `segment(seed)` and its KV into the store.
pub(super) fn fill(store: &Store, seed: u64) -> (KvRecord, SegmentKv) {
    let (record, kv) = segment(seed, BF16, 50);
    put(store, seed);
    store.save(&record, &kv, Codec::Planes, &coding(2)).unwrap();
    (record, kv)
}

/// The KV of `segment(seed)` as a tenant's request makes it.
pub(super) fn fill_for(store: &Store, seed: u64, word: Option<&str>) -> (KvRecord, SegmentKv) {
    let (mut record, kv) = segment(seed, BF16, 50);
    record.identity.salt = salt(store.tenant(), word).into_bytes();
    store.save(&record, &kv, Codec::Planes, &coding(2)).unwrap();
    (record, kv)
}

pub(super) fn put(store: &Store, seed: u64) -> ChunkId {
    let chunk = StoredChunk::new(&format!("{seed}.txt"), ChunkKind::File, &text(seed), Some(50));
    store.put_chunk(&chunk).unwrap();
    chunk.info.id
}

pub(super) fn path_of(store: &Store, id: KvId) -> PathBuf {
    store.path().join("kv").join(format!("{id}.kv"))
}

pub(super) fn no_problems(store: &Store) {
    assert_eq!(store.verify(None).unwrap().problems, []);
}

/// Files that fail from step `at` on: one step as a disk does, or all of them as a power cut does.
pub(super) struct Failing {
    at: usize,
    step: Cell<usize>,
    failure: Failure,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Failure {
    /// This step and all after it don't happen; a write gets half through.
    Crash,
    /// This step has no room.
    Full,
}

impl Failing {
    pub fn new(at: usize, failure: Failure) -> Box<Self> {
        Box::new(Self { at, step: Cell::new(0), failure })
    }

    fn next(&self) -> io::Result<()> {
        let step = self.step.replace(self.step.get() + 1);
        match self.failure {
            Failure::Crash if step >= self.at => Err(io::Error::other("the power is gone")),
            Failure::Full if step == self.at => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl Files for Failing {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.next()?;
        Disk.create(path)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        self.next().inspect_err(|_| {
            if self.step.get() == self.at + 1 {
                Disk.write(file, &bytes[..bytes.len() / 2]).unwrap();
            }
        })?;
        Disk.write(file, bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.next()?;
        Disk.sync(file)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.next()?;
        Disk.rename(from, to)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.next()?;
        Disk.sync_folder(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.next()?;
        Disk.remove(path)
    }

    fn before_commit(&self) -> io::Result<()> {
        self.next()
    }
}
