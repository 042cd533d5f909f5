//! The folder as a whole: who has it open, what is in it, saving and loading.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use super::codec::{Codec, Coding};
use super::error::{Damage, StoreError};
use super::files::{Disk, Files};
use super::index::{Index, KvFile, StoredChunk};
use super::kv_file::{Encoded, KvReader, KvRecord, KvShape, ReadError};
use super::now;
use crate::SegmentKv;
use crate::cache::{KvId, KvIdentity, KvVariant};

/// A folder of KV files and its index, owned by this process while it is open.
///
/// A handle is one tenant's: it speaks of that tenant's chunks and contexts alone. Files are found
/// by their KvId, which no other tenant's have.
pub struct Store {
    pub(super) folder: Arc<Folder>,
    pub(super) index: Index,
    pub(super) files: Box<dyn Files>,
}

/// What all handles on one folder share.
pub(super) struct Folder {
    path: PathBuf,
    /// Held until the last handle is gone.
    _lock: File,
    /// Numbers temporary files.
    temporaries: AtomicU64,
    opened: OpenReport,
}

/// What opening found that a process before had left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Saves that never ended; their temporary files are removed.
    pub temporaries: usize,
    /// Files that had no row, or one that doesn't say whose they are, and have one again.
    pub indexed: usize,
    /// Rows that had no file, and are removed.
    pub forgotten: usize,
    pub quarantined: Vec<Quarantined>,
    /// Files that can't be read; they are left where they are and not listed.
    pub unreadable: Vec<PathBuf>,
}

/// A file that was put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// Its name in `kv/`.
    pub name: String,
    /// Where it lies now.
    pub path: PathBuf,
    pub damage: Damage,
}

/// What a save wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedFile {
    pub kv_id: KvId,
    pub file_bytes: u64,
    /// Of the encoded frames alone.
    pub payload_bytes: u64,
    /// Of the rows as the engine holds them.
    pub raw_bytes: u64,
}

/// What a file must be of to be of use to this engine.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    pub identity: &'a KvIdentity,
    pub shape: KvShape,
}

/// What became of a load.
#[derive(Debug, PartialEq, Eq)]
pub enum Loaded {
    Found {
        record: Box<KvRecord>,
        kv: SegmentKv,
        file_bytes: u64,
    },
    Absent,
    /// There was a file, but not one to be used; it counts as absent.
    Quarantined(Quarantined),
}

impl Store {
    /// Opens the store in `path` for the tenant without a name, making it if there is none, and
    /// puts right what a process that was killed has left: see [`Store::opened`].
    ///
    /// # Errors
    /// [`StoreError::InUse`] while another process has it open, [`StoreError::Access`] for a
    /// folder that can't be written.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, Box::new(Disk))
    }

    pub(super) fn open_with(path: &Path, files: Box<dyn Files>) -> Result<Self, StoreError> {
        for folder in [path.to_owned(), path.join("kv"), path.join("quarantine")] {
            fs::create_dir_all(&folder).map_err(|e| StoreError::io("create", &folder, e))?;
        }
        let lock = lock(path)?;
        let index = Index::open(&path.join("index.sqlite"), "")?;
        let mut folder = Folder {
            path: path.to_owned(),
            _lock: lock,
            temporaries: AtomicU64::new(0),
            opened: OpenReport::default(),
        };
        folder.opened = folder.reconcile(&index)?;
        Ok(Self { folder: Arc::new(folder), index, files })
    }

    /// A second handle on the same store, for another thread.
    pub fn another(&self) -> Result<Self, StoreError> {
        self.of_tenant(self.tenant())
    }

    /// A handle on the same store, for a tenant.
    pub fn of_tenant(&self, tenant: &str) -> Result<Self, StoreError> {
        let index = Index::open(&self.folder.path.join("index.sqlite"), tenant)?;
        Ok(Self { folder: Arc::clone(&self.folder), index, files: Box::new(Disk) })
    }

    pub fn path(&self) -> &Path {
        &self.folder.path
    }

    /// The tenant's chunks and contexts.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Whose chunks and contexts this handle speaks of.
    pub fn tenant(&self) -> &str {
        self.index.tenant()
    }

    /// What opening found.
    pub fn opened(&self) -> &OpenReport {
        &self.folder.opened
    }

    /// Writes a segment's KV, replacing a file of the same name; it is on the disk when this
    /// returns. Encodes all of it in memory first.
    ///
    /// Rows that are approximate already are never encoded again: where their file is there it
    /// counts as saved, else it is [`StoreError::NotLossless`].
    pub fn save(
        &self,
        record: &KvRecord,
        kv: &SegmentKv,
        codec: Codec,
        coding: &Coding,
    ) -> Result<SavedFile, StoreError> {
        if record.variant == KvVariant::Int8 && codec == Codec::Int8 {
            return self.saved_before(record.kv_id())?.ok_or(StoreError::NotLossless);
        }
        let encoded = Encoded::new(record, kv, codec, coding)?;
        let saved = SavedFile {
            kv_id: encoded.record.kv_id(),
            file_bytes: encoded.file_bytes(),
            payload_bytes: encoded.payload_bytes(),
            raw_bytes: kv.num_bytes(),
        };
        self.place(saved.kv_id, |out| encoded.write(out))?;
        let row = row(&encoded.record, codec, saved.file_bytes, saved.raw_bytes);
        self.commit(&[row], None)?;
        Ok(saved)
    }

    /// Reads a segment's KV and checks all that it is made of; [`Store::verify`] checks more.
    pub fn load(
        &self,
        id: KvId,
        expected: &Expected,
        coding: &Coding,
    ) -> Result<Loaded, StoreError> {
        let path = self.folder.kv_path(id);
        let read = || -> Result<_, ReadError> {
            let (source, length) = open_file(&path)?;
            let reader = open_named(source, length, id)?;
            let record = reader.record.clone();
            check_expected(&record, expected)?;
            let kv = reader.read(coding)?;
            Ok(Loaded::Found { record: Box::new(record), kv, file_bytes: length })
        };
        match read() {
            Ok(found) => {
                // a use that isn't counted is no reason to do without the rows
                drop(self.index.touch_file(id, now()));
                Ok(found)
            }
            Err(error) => Ok(match self.unusable(id, error)? {
                None => Loaded::Absent,
                Some(quarantined) => Loaded::Quarantined(quarantined),
            }),
        }
    }

    fn saved_before(&self, id: KvId) -> Result<Option<SavedFile>, StoreError> {
        let path = self.folder.kv_path(id);
        let read = || -> Result<_, ReadError> {
            let (source, length) = open_file(&path)?;
            let reader = open_named(source, length, id)?;
            Ok(SavedFile {
                kv_id: id,
                file_bytes: length,
                payload_bytes: reader.payload_bytes(),
                raw_bytes: reader.raw_bytes(),
            })
        };
        match read() {
            Ok(saved) => Ok(Some(saved)),
            Err(error) => self.unusable(id, error).map(|_| None),
        }
    }

    /// Writes a file of `kv/`: temporary file, fsync, rename, fsync of the folder.
    pub(super) fn place(
        &self,
        id: KvId,
        write: impl FnOnce(&mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let path = self.folder.kv_path(id);
        let temporary = self.folder.temporary(id);
        let written = (|| {
            let mut file = self.files.create(&temporary)?;
            write(&mut |bytes| self.files.write(&mut file, bytes))?;
            self.files.sync(&file)?;
            drop(file);
            self.files.rename(&temporary, &path)
        })();
        if let Err(error) = written {
            // what can't be removed now goes when the store is opened
            drop(self.files.remove(&temporary));
            return Err(StoreError::io("write", &path, error));
        }
        self.files.sync_folder(&self.folder.kv()).map_err(|error| {
            self.discard(id);
            StoreError::io("write", &path, error)
        })
    }

    /// Commits the rows of files that have been placed; without rows they don't stay.
    pub(super) fn commit(
        &self,
        rows: &[KvFile],
        chunk: Option<&StoredChunk>,
    ) -> Result<(), StoreError> {
        let committed = self
            .files
            .before_commit()
            .map_err(|error| StoreError::io("write", &self.folder.path, error))
            .and_then(|()| self.index.put_written(rows, chunk));
        if committed.is_err() {
            rows.iter().for_each(|row| self.discard(row.kv_id));
        }
        committed
    }

    /// Removes a file that was placed and got no row: nobody could erase it. One that replaced
    /// another keeps that one's row, and is as good.
    pub(super) fn discard(&self, id: KvId) {
        if matches!(self.index.file(id), Ok(None)) {
            // what can't be removed now gets its row when the store is opened
            drop(self.files.remove(&self.folder.kv_path(id)));
        }
    }

    /// What to do about a file that couldn't be read: `None` if there is none.
    pub(super) fn unusable(
        &self,
        id: KvId,
        error: ReadError,
    ) -> Result<Option<Quarantined>, StoreError> {
        match error {
            ReadError::Damage(damage) => self.quarantine(id, damage).map(Some),
            ReadError::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                self.index.remove_file(id)?;
                Ok(None)
            }
            ReadError::Io(error) => Err(StoreError::io("read", &self.folder.kv_path(id), error)),
            ReadError::Refused(error) => Err(error),
        }
    }

    fn quarantine(&self, id: KvId, damage: Damage) -> Result<Quarantined, StoreError> {
        let quarantined = self.folder.quarantine(id, damage)?;
        self.index.remove_file(id)?;
        self.index.count(&[("files put aside", 1)])?;
        Ok(quarantined)
    }
}

impl Folder {
    pub fn kv(&self) -> PathBuf {
        self.path.join("kv")
    }

    pub fn kv_path(&self, id: KvId) -> PathBuf {
        self.kv().join(format!("{id}.kv"))
    }

    pub fn quarantined(&self) -> PathBuf {
        self.path.join("quarantine")
    }

    fn temporary(&self, id: KvId) -> PathBuf {
        // no other process has the store open, and none before has left such a name
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        self.kv().join(format!("{id}.{number}.tmp"))
    }

    /// Moves a file out of `kv/`.
    fn quarantine(&self, id: KvId, damage: Damage) -> Result<Quarantined, StoreError> {
        let from = self.kv_path(id);
        let name = format!("{id}.kv");
        let mut path = self.quarantined().join(&name);
        let mut number = 0;
        while path.exists() {
            number += 1;
            path = self.quarantined().join(format!("{name}.{number}"));
        }
        fs::rename(&from, &path).map_err(|error| StoreError::io("put aside", &from, error))?;
        // its age counts from now; a system without times keeps it longer
        drop(File::options().write(true).open(&path).map(|f| f.set_modified(SystemTime::now())));
        Ok(Quarantined { name, path, damage })
    }

    /// Makes files and rows agree.
    fn reconcile(&self, index: &Index) -> Result<OpenReport, StoreError> {
        let mut report = OpenReport::default();
        let mut rows: BTreeMap<KvId, KvFile> =
            index.files()?.into_iter().map(|row| (row.kv_id, row)).collect();
        let folder = self.kv();
        let entries = fs::read_dir(&folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.map_err(|error| StoreError::io("list", &folder, error))? {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_temporary(&name) {
                let removed = fs::remove_file(&path);
                removed.map_err(|error| StoreError::io("remove", &path, error))?;
                report.temporaries += 1;
            }
            let Some(id) = id_of(&name) else { continue };
            let known = rows.remove(&id);
            let length = entry.metadata().map(|metadata| metadata.len());
            if known.is_some_and(|row| length.is_ok_and(|length| length == row.bytes)) {
                continue;
            }
            match open_file(&path).map_err(ReadError::from).and_then(|(source, length)| {
                let reader = open_named(source, length, id)?;
                Ok(row(&reader.record, reader.codec, length, reader.raw_bytes()))
            }) {
                Ok(row) => {
                    index.put_files(&[row])?;
                    report.indexed += 1;
                }
                Err(ReadError::Damage(damage)) => {
                    index.remove_file(id)?;
                    report.quarantined.push(self.quarantine(id, damage)?);
                }
                Err(_) => {
                    index.remove_file(id)?;
                    report.unreadable.push(path);
                }
            }
        }
        for id in rows.into_keys() {
            index.remove_file(id)?;
            report.forgotten += 1;
        }
        index.remove_unowned()?;
        Ok(report)
    }
}

/// Takes the lock and writes this process's id into it.
fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join("lock");
    let io = |error| StoreError::io("lock", &path, error);
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
    let mut file = options.open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // unreadable: the id stays unknown
            drop(file.read_to_string(&mut text));
            return Err(StoreError::InUse {
                path: folder.to_owned(),
                pid: text.trim().parse().ok(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(io(error)),
    }
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| write!(file, "{}", std::process::id()));
    written.map_err(io)?;
    Ok(file)
}

/// A file and its length.
pub(super) fn open_file(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// Its header, which must be that of this name.
pub(super) fn open_named<R: Read>(
    source: R,
    length: u64,
    id: KvId,
) -> Result<KvReader<R>, ReadError> {
    let reader = KvReader::open(source, length)?;
    match reader.record.kv_id() == id {
        true => Ok(reader),
        false => Err(Damage::Name.into()),
    }
}

/// The row of a file as it was just written.
pub(super) fn row(record: &KvRecord, codec: Codec, bytes: u64, raw_bytes: u64) -> KvFile {
    KvFile {
        kv_id: record.kv_id(),
        tenant: record.tenant(),
        chunk: record.chunk,
        codec,
        tokens: record.tokens.len() as u64,
        bytes,
        raw_bytes,
        created: now(),
        last_used: now(),
        uses: 0,
    }
}

/// Whether the rows are of use to this engine; allocations are bounded by its own shape.
fn check_expected(record: &KvRecord, expected: &Expected) -> Result<(), Damage> {
    let (found, wanted) = (&record.identity, expected.identity);
    for (what, same) in [
        ("the model", found.model == wanted.model),
        ("the tokenizer", found.tokenizer == wanted.tokenizer),
        ("the arithmetic", found.numerics == wanted.numerics),
        ("the rotation", found.rope == wanted.rope),
        ("the anchor", found.anchor == wanted.anchor),
        ("the tenant", found.salt == wanted.salt),
        ("the shape", record.shape == expected.shape),
    ] {
        if !same {
            return Err(Damage::Foreign(what));
        }
    }
    Ok(())
}

/// The KvId in `<64 hex digits>.kv`.
fn id_of(name: &str) -> Option<KvId> {
    let hex = name.strip_suffix(".kv")?.as_bytes();
    if hex.len() != 64 || !hex.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let digit = |c: u8| if c <= b'9' { c - b'0' } else { c - b'a' + 10 };
    Some(KvId::from_bytes(std::array::from_fn(|i| digit(hex[2 * i]) << 4 | digit(hex[2 * i + 1]))))
}

/// `<64 hex digits>.<n>.tmp`
fn is_temporary(name: &str) -> bool {
    let id = |(id, _): (&str, &str)| id_of(&format!("{id}.kv")).is_some();
    name.strip_suffix(".tmp").and_then(|rest| rest.rsplit_once('.')).is_some_and(id)
}
