//! The folder a bench keeps KV in, and its disk by itself: plain files written and read.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, process};

use anyhow::{Context, Result};
use strand_engine::cache::KvId;

use crate::args::CommonArgs;

/// A read asks for so many bytes at once.
const READ: usize = 1 << 20;

/// `--data-dir`; without one a new folder that is removed in the end.
pub struct Folder {
    path: PathBuf,
    is_temporary: bool,
}

impl Folder {
    pub fn new(common: &CommonArgs) -> Result<Self> {
        let is_temporary = common.data_dir.is_none();
        let path = common.data_dir.clone().unwrap_or_else(|| {
            let since = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
            env::temp_dir().join(format!("strand-bench-{}-{since}", process::id()))
        });
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path, is_temporary })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the store keeps a segment's KV.
    pub fn kv_file(&self, id: KvId) -> PathBuf {
        self.path.join("kv").join(format!("{id}.kv"))
    }

    /// Seconds that a plain file with the bytes of another takes: to be written and safe on the
    /// disk, and to be read from there.
    pub fn time_plain_file(&self, like: &Path) -> Result<PlainFile> {
        let path = self.path.join("plain-file-of-a-bench");
        let timed = || -> io::Result<PlainFile> {
            let bytes = fs::read(like)?;
            let started = Instant::now();
            let mut file = File::create(&path)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            drop(file);
            let write_seconds = started.elapsed().as_secs_f64();
            Ok(PlainFile { write_seconds, read_seconds: time_to_read(&path)? })
        };
        let plain = timed();
        drop(fs::remove_file(&path)); // it may never have been made
        plain.with_context(|| format!("cannot use {}", path.display()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.is_temporary
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            crate::note(&format!("cannot remove {}: {error}", self.path.display()));
        }
    }
}

/// What a file costs that only holds bytes.
#[derive(Debug, Clone, Copy)]
pub struct PlainFile {
    pub write_seconds: f64,
    pub read_seconds: f64,
}

/// Seconds to read a file from the disk, where [`drop_pages`] can make it come from there.
pub fn time_to_read(path: &Path) -> io::Result<f64> {
    drop_pages(path)?;
    let mut buffer = vec![0; READ];
    let started = Instant::now();
    let mut file = File::open(path)?;
    while file.read(&mut buffer)? > 0 {}
    Ok(started.elapsed().as_secs_f64())
}

/// True where [`drop_pages`] does something.
pub const READS_ARE_COLD: bool = cfg!(target_os = "linux");

/// Makes the system forget what it holds of a file that is safe on the disk. A file in memory (a
/// tmpfs) stays there.
#[cfg(target_os = "linux")]
pub fn drop_pages(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Other systems have no such call: reads are warm, and the results say so.
#[cfg(not(target_os = "linux"))]
pub fn drop_pages(_path: &Path) -> io::Result<()> {
    Ok(())
}
