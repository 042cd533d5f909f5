//! One chunk with its KV as one file, to carry it elsewhere.
//!
//! FORMAT.md draws it. An import checks the whole file before it changes anything.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::{Damage, StoreError};
use super::index::{ChunkInfo, KvFile, StoredChunk};
use super::kv_file::{KvReader, ReadError};
use super::store::{Store, open_file, row};
use super::upkeep::Problem;
use crate::ChunkId;
use crate::context::ChunkKind;
use crate::tenant::SHARED;

const MAGIC: &[u8; 8] = b"STRANDCH";
const VERSION: u32 = 1;
const TRAILER: u64 = 32;
const UNKNOWN: u64 = u64::MAX;
/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// What an export wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// KV files that are in it.
    pub files: usize,
    /// Its length.
    pub bytes: u64,
    /// Why KV files are not in it.
    pub problems: Vec<Problem>,
}

/// What an import brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// As it is in the store now: one that was there keeps its name.
    pub chunk: ChunkInfo,
    pub already: bool,
    /// Files that were not there before.
    pub files: usize,
    pub bytes: u64,
}

impl Store {
    /// Writes a chunk, its text and its KV to one file, replacing what is there. Files that don't
    /// hold are put aside, told and left out.
    pub fn export(&self, chunk: ChunkId, to: &Path) -> Result<Exported, StoreError> {
        let text = self.chunk(chunk)?;
        let text = text.ok_or_else(|| StoreError::UnknownChunk { text: chunk.short() })?;
        let (mut files, mut problems) = (Vec::new(), Vec::new());
        for file in self.kv_files()?.into_iter().filter(|file| file.chunk == chunk) {
            match self.verify_file(&file)? {
                None => files.push(file),
                Some(problem) => problems.push(problem),
            }
        }
        let temporary = beside(to);
        let written = self.write_export(&temporary, &text, &files);
        let placed = written.and_then(|length| fs::rename(&temporary, to).map(|()| length));
        match placed {
            Ok(bytes) => Ok(Exported { files: files.len(), bytes, problems }),
            Err(error) => {
                // it may not have been made at all
                drop(fs::remove_file(&temporary));
                Err(StoreError::outside("write", to, error))
            }
        }
    }

    fn write_export(&self, path: &Path, chunk: &StoredChunk, files: &[KvFile]) -> io::Result<u64> {
        let mut out = Hashing { inner: File::create(path)?, digest: Sha256::new(), count: 0 };
        out.write_all(&chunk_header(chunk, files.len()))?;
        for file in files {
            let (mut source, length) = open_file(&self.folder.kv_path(file.kv_id))?;
            out.write_all(&length.to_le_bytes())?;
            if io::copy(&mut source, &mut out)? != length {
                return Err(io::Error::other("a file changed while it was read"));
            }
        }
        let trailer = out.digest.finalize();
        out.inner.write_all(&trailer)?;
        out.inner.sync_all()?;
        Ok(out.count + TRAILER)
    }

    /// Takes in what [`Store::export`] wrote, here or elsewhere.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] for a file that is not whole; nothing is changed then.
    pub fn import(&self, from: &Path) -> Result<Imported, StoreError> {
        let unusable = |error| match error {
            ReadError::Damage(damage) => StoreError::Unusable { path: from.to_owned(), damage },
            ReadError::Io(error) => StoreError::outside("read", from, error),
            ReadError::Refused(error) => error,
        };
        let (mut source, length) =
            open_file(from).map_err(|error| StoreError::outside("read", from, error))?;
        let (chunk, parts) = check(&mut source, length).map_err(unusable)?;
        let there = self.all_kv_files()?;
        // another tenant's KV is of no use here
        let own = |part: &&Part| [self.tenant(), SHARED].contains(&&*part.row.tenant);
        let own = parts.iter().filter(own);
        let new: Vec<&Part> =
            own.filter(|part| there.iter().all(|file| file.kv_id != part.row.kv_id)).collect();
        for (index, part) in new.iter().enumerate() {
            if let Err(error) = self.place(part.row.kv_id, |out| part.copy(&mut source, out)) {
                new[..index].iter().for_each(|placed| self.discard(placed.row.kv_id));
                return Err(error);
            }
        }
        let rows: Vec<KvFile> = new.iter().map(|part| part.row.clone()).collect();
        let there = self.index.chunk_info(chunk.info.id)?;
        self.commit(&rows, Some(&chunk))?;
        let (files, bytes) = (rows.len(), rows.iter().map(|row| row.bytes).sum());
        let (already, chunk) = (there.is_some(), there.unwrap_or(chunk.info));
        Ok(Imported { chunk, already, files, bytes })
    }
}

/// A `.kv` file inside the export.
struct Part {
    offset: u64,
    row: KvFile,
}

impl Part {
    fn copy(
        &self,
        source: &mut File,
        out: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        source.seek(SeekFrom::Start(self.offset))?;
        let mut piece = vec![0; PIECE];
        let mut left = self.row.bytes;
        while left > 0 {
            let now = left.min(PIECE as u64) as usize;
            source.read_exact(&mut piece[..now])?;
            out(&piece[..now])?;
            left -= now as u64;
        }
        Ok(())
    }
}

/// Reads the whole file and believes it only then.
fn check(source: &mut File, length: u64) -> Result<(StoredChunk, Vec<Part>), ReadError> {
    let contents = length.checked_sub(TRAILER).ok_or(Damage::Short)?;
    let mut input = BufReader::with_capacity(PIECE, &mut *source).take(contents);
    check_magic(&mut input)?;
    drop(input);
    source.rewind()?;
    check_trailer(source, contents)?;
    source.rewind()?;
    let mut input = BufReader::with_capacity(PIECE, &mut *source).take(contents);
    check_magic(&mut input)?;
    let chunk = read_chunk(&mut input)?;
    let count = number(&mut input)?;
    let mut parts = Vec::new();
    for _ in 0..count {
        let length = number(&mut input)?;
        let offset = contents - input.limit();
        if length > input.limit() {
            return Err(Damage::Short.into());
        }
        let reader = KvReader::open((&mut input).take(length), length)?;
        if reader.record.chunk != chunk.info.id {
            return Err(Damage::Header("it holds KV of another chunk".to_owned()).into());
        }
        let row = row(&reader.record, reader.codec, length, reader.raw_bytes());
        reader.verify()?;
        parts.push(Part { offset, row });
    }
    match input.limit() {
        0 => Ok((chunk, parts)),
        _ => Err(Damage::Long.into()),
    }
}

fn check_magic(input: &mut impl Read) -> Result<(), ReadError> {
    if bytes::<8>(input)? != *MAGIC {
        return Err(Damage::Magic("chunk").into());
    }
    let found = u32::from_le_bytes(bytes(input)?);
    match found {
        VERSION => Ok(()),
        _ => Err(Damage::Version { found, known: VERSION }.into()),
    }
}

fn check_trailer(source: &mut File, contents: u64) -> Result<(), ReadError> {
    let mut out = Hashing { inner: io::sink(), digest: Sha256::new(), count: 0 };
    if io::copy(&mut source.take(contents), &mut out)? != contents {
        return Err(Damage::Short.into());
    }
    match out.digest.finalize()[..] == bytes::<32>(source)? {
        true => Ok(()),
        false => Err(Damage::Checksum.into()),
    }
}

fn chunk_header(chunk: &StoredChunk, files: usize) -> Vec<u8> {
    let info = &chunk.info;
    let mut out = Vec::new();
    let string = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(info.id.as_bytes());
    string(&mut out, &info.name);
    string(&mut out, info.kind.as_str());
    string(&mut out, &chunk.text);
    out.extend(info.tokens.map_or(UNKNOWN, u64::from).to_le_bytes());
    out.extend(info.created.to_le_bytes());
    out.extend((info.tags.len() as u64).to_le_bytes());
    for tag in &info.tags {
        string(&mut out, tag);
    }
    out.extend((files as u64).to_le_bytes());
    out
}

fn read_chunk<R: Read>(input: &mut io::Take<R>) -> Result<StoredChunk, ReadError> {
    let wrong = |what: &str| Damage::Header(format!("its {what} makes no sense"));
    let id = ChunkId::from_bytes(bytes(input)?);
    let name = string(input)?;
    let kind = ChunkKind::parse(&string(input)?).ok_or_else(|| wrong("kind"))?;
    let text = string(input)?;
    if ChunkId::of(text.as_bytes()) != id {
        return Err(wrong("text").into());
    }
    let tokens = match number(input)? {
        UNKNOWN => None,
        tokens => Some(u32::try_from(tokens).map_err(|_| wrong("number of tokens"))?),
    };
    let created = number(input)?;
    if created > i64::MAX as u64 {
        return Err(wrong("date").into());
    }
    let mut tags = Vec::new();
    for _ in 0..number(input)? {
        tags.push(string(input)?);
    }
    tags.sort();
    let text_bytes = text.len() as u64;
    let info = ChunkInfo { id, name, kind, tokens, created, text_bytes, tags, metadata: None };
    Ok(StoredChunk { info, text })
}

fn bytes<const N: usize>(input: &mut impl Read) -> Result<[u8; N], ReadError> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn number(input: &mut impl Read) -> Result<u64, ReadError> {
    Ok(u64::from_le_bytes(bytes(input)?))
}

fn string<R: Read>(input: &mut io::Take<R>) -> Result<String, ReadError> {
    let length = number(input)?;
    if length > input.limit() {
        return Err(Damage::Short.into());
    }
    let mut bytes = vec![0; length as usize];
    input.read_exact(&mut bytes)?;
    String::from_utf8(bytes)
        .map_err(|_| Damage::Header("a text in it is not UTF-8".to_owned()).into())
}

/// Hashes and counts what passes through.
struct Hashing<W> {
    inner: W,
    digest: Sha256,
    count: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.digest.update(&bytes[..written]);
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A name in the same folder, so that a rename puts it in place.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests;
