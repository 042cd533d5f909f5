//! Bytes in the computer's memory, page-locked where a device copies them.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::{Gpu, Pinned, Slice};
use crate::error::Error;
use crate::pages::zeros;

/// Bytes that a device reads and writes. Who looks at page-locked ones waits for its copies.
pub enum HostBytes {
    Plain(Vec<u8>),
    Pinned {
        /// As long, or longer. Shared with whoever has a device read it: dropping it waits.
        bytes: Arc<Pinned>,
        len: usize,
    },
}

impl HostBytes {
    /// Of any content. Without a GPU, or where that much can't be locked, plain memory: copies are
    /// slower then, and whoever asks for one waits.
    pub fn new(gpu: Option<&Gpu>, len: usize) -> Self {
        match gpu.map(|gpu| gpu.pinned(len)) {
            Some(Ok(bytes)) => Self::Pinned { bytes: Arc::new(bytes), len },
            _ => Self::Plain(zeros(len)),
        }
    }

    /// Without waiting for the bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(bytes) => bytes.len(),
            Self::Pinned { len, .. } => *len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// To be held until the uploads are done: the last one to drop it waits for them.
    pub fn pinned(&self) -> Option<Arc<Pinned>> {
        match self {
            Self::Plain(_) => None,
            Self::Pinned { bytes, .. } => Some(bytes.clone()),
        }
    }

    /// As [`Gpu::upload_pinned`], or [`Gpu::upload`] where it is plain.
    ///
    /// # Errors
    /// A range outside of it, or longer than `to`.
    pub fn upload(&self, gpu: &Gpu, range: (usize, usize), to: &Slice) -> Result<(), Error> {
        match self {
            Self::Plain(bytes) => gpu.upload(&bytes[range.0..range.0 + range.1], to),
            Self::Pinned { bytes, .. } => gpu.upload_pinned(bytes, range, to),
        }
    }

    /// As [`Gpu::download_pinned`], or [`Gpu::download`] where it is plain.
    ///
    /// # Errors
    /// More bytes than there are behind `start`.
    pub fn download(&mut self, gpu: &Gpu, from: &Slice, start: usize) -> Result<(), Error> {
        match self {
            Self::Plain(bytes) => gpu.download(from, &mut bytes[start..start + from.len()]),
            Self::Pinned { bytes, .. } => gpu.download_pinned(from, sole(bytes), start),
        }
    }
}

impl Deref for HostBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Plain(bytes) => bytes,
            Self::Pinned { bytes, len } => &bytes[..*len],
        }
    }
}

impl DerefMut for HostBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Plain(bytes) => bytes,
            Self::Pinned { bytes, len } => &mut sole(bytes)[..*len],
        }
    }
}

/// # Panics
/// If a device reads it still.
fn sole(bytes: &mut Arc<Pinned>) -> &mut Pinned {
    Arc::get_mut(bytes).expect("bytes are written before anybody uploads them")
}
