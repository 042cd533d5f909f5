//! What a device hands out, and takes back on drop: memory, page-locked memory, events, graphs.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Driver, Stream};
use crate::error::Error;

/// Memory of a device. Clones are the same memory; it is freed with the last of them and of the
/// slices and graphs that name it.
#[derive(Clone)]
pub struct Buffer(Arc<Allocation>);

struct Allocation {
    driver: Arc<dyn Driver>,
    address: u64,
    bytes: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

impl Buffer {
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, Error> {
        if bytes == 0 {
            return Err(Error::value("alloc", "the number of bytes", 0, "at least 1"));
        }
        let address = driver.alloc(bytes)?;
        Ok(Self(Arc::new(Allocation { driver: driver.clone(), address, bytes })))
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.0.bytes
    }

    pub fn all(&self) -> Slice {
        Slice { buffer: self.clone(), start: 0, bytes: self.len() }
    }

    /// From byte `start` to the end.
    ///
    /// # Panics
    /// If that is past the end.
    pub fn at(&self, start: usize) -> Slice {
        self.all().at(start)
    }

    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer of {} bytes", self.len())
    }
}

/// A part of a buffer, which it keeps.
#[derive(Clone, Debug)]
pub struct Slice {
    buffer: Buffer,
    start: usize,
    bytes: usize,
}

impl Slice {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// From byte `start` to the end.
    ///
    /// # Panics
    /// If that is past the end.
    pub fn at(&self, start: usize) -> Self {
        assert!(start <= self.bytes, "byte {start} of a slice of {}", self.bytes);
        Self { buffer: self.buffer.clone(), start: self.start + start, bytes: self.bytes - start }
    }

    /// The first `bytes`.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn first(&self, bytes: usize) -> Self {
        assert!(bytes <= self.bytes, "the first {bytes} bytes of {}", self.bytes);
        Self { buffer: self.buffer.clone(), start: self.start, bytes }
    }

    pub(super) fn part(&self, op: &'static str, start: usize, bytes: usize) -> Result<Self, Error> {
        check_range(op, (start, bytes), ("slice", self.bytes))?;
        Ok(Self { buffer: self.buffer.clone(), start: self.start + start, bytes })
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.0.address + self.start as u64
    }

    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The address of an operand of `count` values of `size` bytes that is read `alignment` bytes
    /// at a time.
    pub(super) fn operand(
        &self,
        (op, operand): (&'static str, &'static str),
        count: usize,
        size: usize,
        alignment: u64,
    ) -> Result<u64, Error> {
        let needed = count.saturating_mul(size);
        if self.bytes < needed {
            let what = format!("{operand}'s length in bytes");
            let expected = format!("at least {needed}: {count} values of {size}");
            return Err(Error::value(op, what, self.bytes, expected));
        }
        if !self.address().is_multiple_of(alignment) {
            let what = format!("{operand}'s start in its buffer");
            let expected = format!("a multiple of {alignment}");
            return Err(Error::value(op, what, self.start, expected));
        }
        Ok(self.address())
    }
}

/// Refuses `bytes` from `start` on that don't lie in memory of so many.
fn check_range(
    op: &'static str,
    (start, bytes): (usize, usize),
    (memory, length): (&str, usize),
) -> Result<(), Error> {
    let end = start.checked_add(bytes);
    if end.is_some_and(|end| end <= length) {
        return Ok(());
    }
    let expected = format!("at most {length}, the length of the {memory}");
    Err(Error::value(op, "the end in bytes", end.unwrap_or(usize::MAX), expected))
}

/// A place in a stream's work.
pub struct Event {
    driver: Arc<dyn Driver>,
    stream: Stream,
    id: u64,
}

impl Event {
    pub(super) fn record(driver: &Arc<dyn Driver>, stream: Stream) -> Result<Self, Error> {
        Ok(Self { driver: driver.clone(), stream, id: driver.record(stream)? })
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Returns when the device has come to this place.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.driver.await_event(self.id)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.driver.free_event(self.id);
    }
}

/// Work recorded by `Gpu::capture`, with the memory it names.
pub struct Graph {
    driver: Arc<dyn Driver>,
    id: u64,
    /// Freed behind the graph.
    #[expect(dead_code, reason = "held for its drop")]
    kept: Vec<Buffer>,
}

impl Graph {
    pub(super) fn new(driver: &Arc<dyn Driver>, id: u64, kept: Vec<Buffer>) -> Self {
        Self { driver: driver.clone(), id, kept }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.driver.free_graph(self.id);
    }
}

/// Page-locked memory of the processor. To look at it is to wait for the copies into it, to change
/// it is to wait for all that use it.
pub struct Pinned {
    driver: Arc<dyn Driver>,
    address: *mut u8,
    bytes: usize,
    /// The copies under way that read it, and those that write it.
    readers: Mutex<Vec<Event>>,
    writers: Mutex<Vec<Event>>,
}

// SAFETY: the memory belongs to this value alone; `&Pinned` only reads it.
unsafe impl Send for Pinned {}
// SAFETY: as above, and the lists of events are behind mutexes.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, Error> {
        let address = driver.alloc_pinned(bytes.max(1))?;
        let (readers, writers) = (Mutex::default(), Mutex::default());
        Ok(Self { driver: driver.clone(), address, bytes, readers, writers })
    }

    pub(super) fn address_of(
        &self,
        op: &'static str,
        start: usize,
        bytes: usize,
    ) -> Result<*const u8, Error> {
        check_range(op, (start, bytes), ("pinned memory", self.bytes))?;
        Ok(self.address.wrapping_add(start))
    }

    pub(super) fn read_until(&self, event: Event) {
        push(&self.readers, event);
    }

    pub(super) fn written_until(&mut self, event: Event) {
        push(&self.writers, event);
    }
}

/// Keeps the last event of each stream: it comes behind those before.
fn push(events: &Mutex<Vec<Event>>, event: Event) {
    let mut events = events.lock().unwrap_or_else(PoisonError::into_inner);
    events.retain(|before| before.stream != event.stream);
    events.push(event);
}

/// # Panics
/// If the device failed: what the memory holds then is unknown.
fn wait_for(events: &mut Vec<Event>) {
    for event in events.drain(..) {
        event.synchronize().expect("the device does its copies");
    }
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        wait_for(&mut self.writers.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: the memory is as long and initialized; no copy writes to it now, and to start
        // one needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        wait_for(self.writers.get_mut().unwrap_or_else(PoisonError::into_inner));
        wait_for(self.readers.get_mut().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: the memory is as long and initialized; no copy uses it now, and to start one
        // needs `self`.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let writers = self.writers.get_mut().unwrap_or_else(PoisonError::into_inner);
        let readers = self.readers.get_mut().unwrap_or_else(PoisonError::into_inner);
        for event in writers.drain(..).chain(readers.drain(..)) {
            // A device that failed copies nothing any more.
            drop(event.synchronize());
        }
        self.driver.free_pinned(self.address);
    }
}
