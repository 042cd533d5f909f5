//! Rows of a tensor that lies in a mapped file, turned into f32.

use std::ops::Range;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use strand_kernels::{BlockFormat, Mmap, WeightDtype};

use crate::error::Error;
use crate::fingerprint::WeightsSource;

/// The largest page in use.
const PAGE: usize = 1 << 16;

/// A file's bytes: mapped, or part of the program.
pub(crate) struct FileBytes {
    path: PathBuf,
    content: Content,
}

enum Content {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl FileBytes {
    pub(crate) fn map(path: &Path) -> Result<Self, Error> {
        let map =
            Mmap::open(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        Ok(FileBytes { path: path.to_path_buf(), content: Content::Mapped(map) })
    }

    pub(crate) fn from_static(name: &str, bytes: &'static [u8]) -> Self {
        FileBytes { path: PathBuf::from(name), content: Content::Static(bytes) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Mapped(map) => map.bytes(),
            Content::Static(bytes) => bytes,
        }
    }

    pub(crate) fn as_source(&self) -> WeightsSource<'_> {
        match &self.content {
            Content::Mapped(map) => WeightsSource::File { path: &self.path, bytes: map.bytes() },
            Content::Static(bytes) => WeightsSource::Static(bytes),
        }
    }

    pub(crate) fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Damaged { path: self.path.clone(), reason: reason.into() }
    }

    /// Lets go of the pages of `range`; a later read brings them back.
    fn release(&self, range: Range<usize>) {
        if let Content::Mapped(map) = &self.content {
            map.release(range);
        }
    }
}

/// How numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Plain(WeightDtype),
    /// Blocks of numbers with common scales, as GGUF files hold them; little-endian.
    Blocks(BlockFormat),
}

impl Encoding {
    /// Numbers that are only written together.
    pub(crate) fn block_len(self) -> usize {
        match self {
            Encoding::Plain(_) => 1,
            Encoding::Blocks(format) => format.block_len(),
        }
    }

    /// Bytes of `numbers`, a multiple of [`Encoding::block_len`]; `None` beyond any file's size.
    pub(crate) fn bytes(self, numbers: usize) -> Option<usize> {
        match self {
            Encoding::Plain(dtype) => numbers.checked_mul(dtype.size()),
            Encoding::Blocks(format) => {
                (numbers / format.block_len()).checked_mul(format.block_bytes())
            }
        }
    }
}

/// A row-major matrix in a file; a vector is a matrix of one column.
pub(crate) struct StoredMatrix<'a> {
    pub(crate) file: &'a FileBytes,
    /// Where its bytes lie; checked to be inside the file when the file was opened.
    pub(crate) range: Range<usize>,
    pub(crate) columns: usize,
    pub(crate) encoding: Encoding,
    /// Head size of rows stored in pairs: row `2i + a` of a head is its row `a * half + i`.
    pub(crate) interleaved: Option<usize>,
}

impl StoredMatrix<'_> {
    /// `out` is `(rows.len(), columns)`.
    pub(crate) fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        if self.interleaved.is_none() {
            self.with_bytes(rows, |bytes| decode(self.encoding, bytes, out));
            return;
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(self.columns)) {
            let stored = self.stored_row(row);
            self.with_bytes(stored..stored + 1, |bytes| decode(self.encoding, bytes, out));
        }
    }

    /// The format of its blocks, if it has some.
    pub(crate) fn block_format(&self) -> Option<BlockFormat> {
        match self.encoding {
            Encoding::Plain(_) => None,
            Encoding::Blocks(format) => Some(format),
        }
    }

    /// A row's bytes as they are stored.
    pub(crate) fn read_bytes(&self, row: usize, out: &mut [u8]) {
        let stored = self.stored_row(row);
        self.with_bytes(stored..stored + 1, |bytes| out.copy_from_slice(bytes));
    }

    /// Where a row is stored.
    fn stored_row(&self, row: usize) -> usize {
        let Some(head_dim) = self.interleaved else { return row };
        let (head, inside) = (row / head_dim, row % head_dim);
        let (upper, pair) = (inside / (head_dim / 2), inside % (head_dim / 2));
        head * head_dim + 2 * pair + upper
    }

    fn with_bytes(&self, rows: Range<usize>, take: impl FnOnce(&[u8])) {
        let bytes_before = |row: usize| {
            let bytes = self.encoding.bytes(row * self.columns);
            bytes.expect("no row ends past the file's last byte")
        };
        let start = self.range.start + bytes_before(rows.start);
        let range = start..self.range.start + bytes_before(rows.end);
        assert!(range.end <= self.range.end, "rows {rows:?} lie outside their tensor");
        take(&self.file.bytes()[range.clone()]);
        // Only whole pages can be dropped: the one shared with the rows before goes along.
        self.file.release(range.start / PAGE * PAGE..range.end);
    }
}

fn decode(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    match encoding {
        Encoding::Plain(WeightDtype::F32) => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Encoding::Plain(WeightDtype::F16) => {
            let halves: Vec<f16> = words(bytes).map(f16::from_bits).collect();
            halves.convert_to_f32_slice(out);
        }
        Encoding::Plain(WeightDtype::Bf16) => {
            for (value, word) in out.iter_mut().zip(words(bytes)) {
                *value = bf16::from_bits(word).to_f32();
            }
        }
        Encoding::Plain(WeightDtype::Quantized) => unreachable!("blocks have a format"),
        Encoding::Blocks(format) => format.dequantize(bytes, out),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
}
