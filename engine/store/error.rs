//! What can go wrong between the engine and the disk.

use std::io;
use std::path::{Path, PathBuf};

/// Why a file isn't taken for what its name says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("it is not a {0} file")]
    Magic(&'static str),
    #[error("it has version {found}, this program reads version {known}")]
    Version { found: u32, known: u32 },
    #[error("it is cut short")]
    Short,
    #[error("it is longer than its contents")]
    Long,
    #[error("its header is altered: {0}")]
    Header(String),
    #[error("its name is not that of its contents")]
    Name,
    #[error("it is from another model or setting: {0} differs")]
    Foreign(&'static str),
    #[error("its data is altered: {0}")]
    Frame(String),
    #[error("its checksum does not match")]
    Checksum,
}

/// What the store refuses or can't do. Nothing is half done then.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "the store at {} is in use by {}; end it or choose another --data-dir",
        path.display(),
        pid.map_or("another process".to_owned(), |pid| format!("process {pid}"))
    )]
    InUse { path: PathBuf, pid: Option<u32> },
    #[error(
        "cannot {action} {}: {source}; make it readable and writable, or choose another --data-dir",
        path.display()
    )]
    Access { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the disk is full: cannot {action} {}; nothing was changed", path.display())]
    DiskFull { action: &'static str, path: PathBuf },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the index {} can't be used: {source}; if it is damaged, move it away: KV files are found \
         again, texts and contexts are lost",
        path.display()
    )]
    Index { path: PathBuf, source: rusqlite::Error },
    #[error(
        "the index {} has version {found}, this program knows {known}; use the program that wrote \
         it or choose another --data-dir",
        path.display()
    )]
    FutureIndex { path: PathBuf, found: i64, known: i64 },
    #[error("the index {} holds a {what} that makes no sense: {value}", path.display())]
    BadRow { path: PathBuf, what: &'static str, value: String },
    #[error("No chunk found matching: {text}")]
    UnknownChunk { text: String },
    #[error(
        "Ambiguous chunk prefix: {text}. Matches: {}",
        matches.iter().map(|id| format!("{id}...")).collect::<Vec<_>>().join(", ")
    )]
    AmbiguousChunk { text: String, matches: Vec<String> },
    #[error("int8 needs the rotation of the keys, and none was given")]
    NoRotation,
    #[error("int8 needs {needed} positions, the rotation has {has}")]
    RotationTooShort { needed: usize, has: usize },
    #[error("the rotation is {table} wide, heads are {head_dim}")]
    RotationTooWide { table: usize, head_dim: usize },
    #[error("int8 can't hold a value that is infinite or no number; save it as planes")]
    NotFinite,
    #[error("KV is held as int8 already; save it as planes or raw")]
    AlreadyInt8,
    #[error("the rows are approximate; int8 is made from lossless ones only")]
    NotLossless,
    #[error("{what} is {found}, the record says {expected}")]
    Mismatch { what: &'static str, found: u64, expected: u64 },
    #[error("the manifest takes {bytes} bytes, it may take {most}; save a shorter chunk")]
    ManifestTooLarge { bytes: usize, most: usize },
    #[error("{} can't be used: {damage}", path.display())]
    Unusable { path: PathBuf, damage: Damage },
    #[error("{0}")]
    Damage(#[from] Damage),
}

impl StoreError {
    /// An operation on a file that failed, sorted by what helps against it.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { action, path }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Access { action, path, source }
            }
            _ => Self::Io { action, path, source },
        }
    }

    /// The same for a file outside of the store, where another `--data-dir` helps nothing.
    pub(super) fn outside(action: &'static str, path: &Path, source: io::Error) -> Self {
        match Self::io(action, path, source) {
            Self::Access { action, path, source } => Self::Io { action, path, source },
            error => error,
        }
    }

    pub(super) fn sql(path: &Path, source: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{CannotOpen, DiskFull, PermissionDenied, ReadOnly};
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(DiskFull) => Self::DiskFull { action: "write", path },
            Some(CannotOpen | PermissionDenied | ReadOnly) => {
                Self::Access { action: "open", path, source: io::Error::other(source) }
            }
            _ => Self::Index { path, source },
        }
    }
}
