//! What a device must do for the launchers: the one seam between us and a driver.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;

/// The numbers activations, weights and KV are made of on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    Bf16,
    F16,
}

impl Float {
    /// Bytes a number takes.
    pub const SIZE: usize = 2;

    /// As kernels' names end.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Compute,
    Copy,
}

/// A kernel and how it is started.
#[cfg_attr(
    not(any(feature = "cuda", feature = "cuda-emulator")),
    expect(dead_code, reason = "read by drivers alone")
)]
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'a str,
    pub(crate) grid: [u32; 3],
    /// Threads of a block, a multiple of 32.
    pub(crate) block: u32,
    /// Bytes of shared memory.
    pub(crate) shared: u32,
    /// One word an argument.
    pub(crate) args: &'a [u64],
}

/// y (m, n) = x (m, k) times w (n, k) transposed, all row-major; `y += ` with `accumulate`.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(feature = "cuda", feature = "cuda-emulator")),
    expect(dead_code, reason = "read by drivers alone")
)]
pub(crate) struct MatrixProduct {
    pub(crate) x: u64,
    pub(crate) w: u64,
    pub(crate) y: u64,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) float: Float,
    /// Whether y is of f32 rather than `float`.
    pub(crate) wide: bool,
    pub(crate) accumulate: bool,
}

/// Addresses, events and graphs are the driver's own numbers, never 0.
///
/// # Safety
/// `alloc` and `alloc_pinned` give memory of that length that nobody else has until it is freed.
/// The unsafe methods touch nothing but what their arguments name, in the order of the stream.
pub(crate) unsafe trait Driver: Send + Sync {
    fn name(&self) -> String;
    fn family(&self) -> String;
    /// Bytes (free, in all).
    fn memory(&self) -> Result<(u64, u64), Error>;
    fn multiprocessors(&self) -> u32;

    /// Aligned to 256 bytes or, emulated, 16.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;
    /// Waits for all work before.
    fn free(&self, address: u64);
    /// Memory of the processor that holds some bytes, whatever they are.
    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, Error>;
    fn free_pinned(&self, address: *mut u8);

    /// # Safety
    /// `bytes` lie behind both; pageable memory is read before this returns.
    unsafe fn upload(&self, s: Stream, from: *const u8, to: u64, bytes: usize)
    -> Result<(), Error>;
    /// # Safety
    /// `bytes` lie behind both, until the stream has passed this copy.
    unsafe fn download(&self, s: Stream, from: u64, to: *mut u8, bytes: usize)
    -> Result<(), Error>;
    /// # Safety
    /// `bytes` lie behind both, until the stream has passed this copy.
    unsafe fn copy(&self, s: Stream, from: u64, to: u64, bytes: usize) -> Result<(), Error>;
    /// # Safety
    /// `bytes` lie behind the address, until the stream has passed this.
    unsafe fn zero(&self, s: Stream, address: u64, bytes: usize) -> Result<(), Error>;
    /// # Safety
    /// The arguments are the kernel's, and what they make it touch lives until it has run.
    unsafe fn launch(&self, s: Stream, launch: &Launch) -> Result<(), Error>;
    /// # Safety
    /// The three matrices live until it has run.
    unsafe fn product(&self, s: Stream, product: &MatrixProduct) -> Result<(), Error>;

    /// An event behind all that the stream has.
    fn record(&self, stream: Stream) -> Result<u64, Error>;
    fn wait(&self, stream: Stream, event: u64) -> Result<(), Error>;
    /// Returns when the event has come.
    fn await_event(&self, event: u64) -> Result<(), Error>;
    fn free_event(&self, event: u64);
    fn synchronize(&self, stream: Stream) -> Result<(), Error>;

    /// From here on the compute stream records.
    fn begin_capture(&self) -> Result<(), Error>;
    fn end_capture(&self) -> Result<u64, Error>;
    fn replay(&self, graph: u64) -> Result<(), Error>;
    /// Waits for all work before.
    fn free_graph(&self, graph: u64);
}

/// How often a device was asked for what, over all its handles.
#[derive(Debug, Default)]
pub struct Counters {
    launches: AtomicU64,
    uploads: AtomicU64,
    synchronizations: AtomicU64,
    captures: AtomicU64,
    replays: AtomicU64,
}

impl Counters {
    /// Kernels launched or recorded, without the matrix products of the device's library.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    pub fn uploads(&self) -> u64 {
        self.uploads.load(Ordering::Relaxed)
    }

    /// Times the processor waited for a stream.
    pub fn synchronizations(&self) -> u64 {
        self.synchronizations.load(Ordering::Relaxed)
    }

    pub fn captures(&self) -> u64 {
        self.captures.load(Ordering::Relaxed)
    }

    pub fn replays(&self) -> u64 {
        self.replays.load(Ordering::Relaxed)
    }

    pub(crate) fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_upload(&self) {
        self.uploads.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_synchronize(&self) {
        self.synchronizations.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_capture(&self) {
        self.captures.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_replay(&self) {
        self.replays.fetch_add(1, Ordering::Relaxed);
    }
}
