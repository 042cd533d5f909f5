//! Devices that run the kernels of `cuda/`: memory, streams, graphs, and one launcher per kernel.
//!
//! Above [`Driver`] nothing knows what kind of device it is: NVIDIA's own driver (feature `cuda`)
//! or the processor running the same sources (feature `cuda-emulator`, for tests). Launchers
//! check every length before they launch and refuse with an [`Error`] that names the value;
//! numbers that only the device knows (token ids, slots, page entries) are bounded in the kernels
//! or by the caller, as each launcher says.
//!
//! All work is queued. [`Gpu`] is a handle on the compute stream, [`Gpu::copies`] the same device
//! on its copy stream; [`Event`]s order one behind the other. A [`Graph`] is work recorded once and
//! replayed: it keeps the memory it names.

mod attention;
mod decode_attention;
mod driver;
mod elementwise;
mod filter_view;
mod host_bytes;
mod linear;
mod memory;
mod move_rows;
mod prefill_attention;
mod quantized;
mod rms_norm;
mod rope_store;
mod sample;

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda-emulator")]
mod emulated;
#[cfg(all(test, feature = "cuda-emulator"))]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
pub use attention::{AttentionOperands, AttentionShape, Partials, Rotary, SplitPlan, Tables};
pub use decode_attention::DecodeAttention;
use driver::Driver;
pub use driver::{Counters, Float};
pub use elementwise::{Embedding, GatherRows, SiluMul};
pub use filter_view::{FilterView, PAGE_BYTES, page_bytes};
pub use host_bytes::HostBytes;
pub use linear::{Product, Weight};
pub use memory::{Buffer, Event, Graph, Pinned, Slice};
pub use move_rows::{KvFrames, MoveRows, PoisonRows};
pub use prefill_attention::PrefillAttention;
pub use quantized::block_bytes;
pub use rms_norm::{AddRmsNorm, RmsNorm};
pub use rope_store::RopeStore;
pub use sample::{CheckFinite, SampleRow, SampleRows};

pub(crate) use driver::{Launch, Stream};

/// A device and one of its two streams. Clones are the same device.
#[derive(Clone)]
pub struct Gpu {
    driver: Arc<dyn Driver>,
    stream: Stream,
    /// Memory named since a capture began; `None` when none is under way.
    captured: Arc<Mutex<Option<Vec<Buffer>>>>,
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({}, {:?})", self.driver.name(), self.stream)
    }
}

impl Gpu {
    /// Opens NVIDIA device `ordinal`.
    ///
    /// # Errors
    /// Built without CUDA, no driver library, no such device, or one that is too old.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self, Error> {
        Ok(Self::new(Arc::new(cuda::Cuda::open(ordinal)?)))
    }

    /// Opens NVIDIA device `ordinal`.
    ///
    /// # Errors
    /// Built without CUDA, no driver library, no such device, or one that is too old.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(ordinal: usize) -> Result<Self, Error> {
        Err(Error::device(
            format!("opening CUDA device {ordinal}"),
            "this program was built without CUDA; build it with `--features cuda`, or use the cpu",
        ))
    }

    /// The processor in the part of a device with `memory` bytes, for tests.
    #[cfg(feature = "cuda-emulator")]
    pub fn emulated(memory: u64) -> Self {
        Self::new(Arc::new(emulated::Emulated::new(memory, false)))
    }

    /// As [`Gpu::emulated`], but threads run in descending order: a kernel whose results change
    /// has a race.
    #[cfg(feature = "cuda-emulator")]
    pub fn emulated_backwards(memory: u64) -> Self {
        Self::new(Arc::new(emulated::Emulated::new(memory, true)))
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn new(driver: Arc<dyn Driver>) -> Self {
        let counters = Arc::new(Counters::default());
        let captured = Arc::new(Mutex::new(None));
        Self { driver, stream: Stream::Compute, captured, counters }
    }

    /// The same device on its copy stream: work there runs beside that of the compute stream.
    pub fn copies(&self) -> Self {
        Self { stream: Stream::Copy, ..self.clone() }
    }

    /// As the driver names it, for people.
    pub fn name(&self) -> String {
        self.driver.name()
    }

    /// The kernel family, a part of what names KV: `cuda-sm90`.
    pub fn family(&self) -> String {
        self.driver.family()
    }

    /// Bytes (free, in all).
    pub fn memory(&self) -> Result<(u64, u64), Error> {
        self.driver.memory()
    }

    /// How many blocks of threads it is worth having.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.driver.multiprocessors()
    }

    /// What was asked of the device so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// New memory of unknown content, at least one byte.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer, Error> {
        Buffer::new(&self.driver, bytes)
    }

    /// New memory filled with zeros.
    pub fn zeros(&self, bytes: usize) -> Result<Buffer, Error> {
        let buffer = self.alloc(bytes)?;
        self.zero(&buffer.all())?;
        Ok(buffer)
    }

    /// New memory holding `bytes`, which are copied before this returns.
    pub fn uploaded(&self, bytes: &[u8]) -> Result<Buffer, Error> {
        let buffer = self.alloc(bytes.len())?;
        self.upload(bytes, &buffer.all())?;
        Ok(buffer)
    }

    /// New memory holding `values`, f32.
    pub fn uploaded_floats(&self, values: &[f32]) -> Result<Buffer, Error> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.uploaded(&bytes)
    }

    /// Page-locked memory of the processor, holding any bytes: copies from and to it are
    /// asynchronous.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned, Error> {
        Pinned::new(&self.driver, bytes)
    }

    /// Fills with zero bytes.
    pub fn zero(&self, slice: &Slice) -> Result<(), Error> {
        self.keep(slice);
        // SAFETY: a slice lies inside its buffer, which lives until the device has passed its end.
        unsafe { self.driver.zero(self.stream, slice.address(), slice.len()) }
    }

    /// Copies `bytes` to the beginning of `to`; they may be changed when this returns.
    pub fn upload(&self, bytes: &[u8], to: &Slice) -> Result<(), Error> {
        let to = to.part("upload", 0, bytes.len())?;
        self.refuse_in_capture("upload")?;
        self.counters.count_upload();
        // SAFETY: as many bytes lie behind both; the driver is done with `bytes` when it returns.
        unsafe { self.driver.upload(self.stream, bytes.as_ptr(), to.address(), bytes.len()) }
    }

    /// Copies the beginning of `from` to `bytes`, behind all work of this stream, and waits.
    pub fn download(&self, from: &Slice, bytes: &mut [u8]) -> Result<(), Error> {
        let from = from.part("download", 0, bytes.len())?;
        self.refuse_in_capture("download")?;
        // SAFETY: as many bytes lie behind both; the stream is waited for before `bytes` is free.
        unsafe {
            self.driver.download(self.stream, from.address(), bytes.as_mut_ptr(), bytes.len())?;
        }
        self.synchronize()
    }

    /// Queues a copy of `pinned[start..start + len]` to the beginning of `to`. Until it is done
    /// the pinned memory can be read; who wants to write to it waits.
    pub fn upload_pinned(
        &self,
        pinned: &Pinned,
        (start, len): (usize, usize),
        to: &Slice,
    ) -> Result<(), Error> {
        let to = to.part("upload", 0, len)?;
        let from = pinned.address_of("upload", start, len)?;
        self.refuse_in_capture("upload")?;
        self.counters.count_upload();
        // SAFETY: as many bytes lie behind both; `pinned` waits for the event before it is
        // written to or freed.
        unsafe { self.driver.upload(self.stream, from, to.address(), len)? };
        pinned.read_until(self.record()?);
        Ok(())
    }

    /// Queues a copy of `from` to `pinned[start..]`. Who reads the pinned memory waits for it.
    pub fn download_pinned(
        &self,
        from: &Slice,
        pinned: &mut Pinned,
        start: usize,
    ) -> Result<(), Error> {
        let to = pinned.address_of("download", start, from.len())?;
        self.refuse_in_capture("download")?;
        // SAFETY: as many bytes lie behind both; `pinned` waits for the event before it is read,
        // written to or freed.
        unsafe { self.driver.download(self.stream, from.address(), to.cast_mut(), from.len())? };
        pinned.written_until(self.record()?);
        Ok(())
    }

    /// Copies `from` to the beginning of `to`; the two don't overlap.
    pub fn copy(&self, from: &Slice, to: &Slice) -> Result<(), Error> {
        let to = to.part("copy", 0, from.len())?;
        self.keep(from);
        self.keep(&to);
        // SAFETY: as many bytes lie behind both, and buffers outlive what is queued.
        unsafe { self.driver.copy(self.stream, from.address(), to.address(), from.len()) }
    }

    /// Marks the place this stream has reached.
    pub fn record(&self) -> Result<Event, Error> {
        Event::record(&self.driver, self.stream)
    }

    /// What this stream gets from now on starts behind `event`.
    pub fn wait(&self, event: &Event) -> Result<(), Error> {
        self.driver.wait(self.stream, event.id())
    }

    /// Returns when all work of this stream is done.
    ///
    /// # Errors
    /// Also those of kernels that ran since the last call.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.counters.count_synchronize();
        self.driver.synchronize(self.stream)
    }

    /// Records what `work` launches instead of running it. One capture at a time, on the compute
    /// stream; neither uploads, downloads nor allocations are allowed meanwhile.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        const WHAT: &str = "recording a graph";
        if self.stream == Stream::Copy {
            return Err(Error::device(WHAT, "graphs are recorded on the compute stream"));
        }
        {
            let mut captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
            if captured.is_some() {
                return Err(Error::device(WHAT, "another recording has not ended"));
            }
            self.driver.begin_capture()?;
            *captured = Some(Vec::new());
        }
        let recording = Recording(self);
        let worked = work();
        let graph = recording.end();
        worked?;
        self.counters.count_capture();
        graph
    }

    /// Queues the recorded work.
    pub fn replay(&self, graph: &Graph) -> Result<(), Error> {
        self.counters.count_replay();
        self.driver.replay(graph.id())
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// `args` are the kernel's, in number, order and type, each in the low bytes of its word, and
    /// all it will touch lies in `slices`.
    pub(crate) unsafe fn launch(&self, launch: &Launch, slices: &[&Slice]) -> Result<(), Error> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        for slice in slices {
            self.keep(slice);
        }
        self.counters.count_launch();
        // SAFETY: the caller's promise; buffers outlive what is queued.
        unsafe { self.driver.launch(self.stream, launch) }
    }

    /// As [`Gpu::launch`], for the device's own matrix product.
    ///
    /// # Safety
    /// The product stays inside `slices`.
    pub(crate) unsafe fn product(
        &self,
        product: &driver::MatrixProduct,
        slices: &[&Slice],
    ) -> Result<(), Error> {
        for slice in slices {
            self.keep(slice);
        }
        // SAFETY: the caller's promise; buffers outlive what is queued.
        unsafe { self.driver.product(self.stream, product) }
    }

    fn keep(&self, slice: &Slice) {
        let mut captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = &mut *captured
            && self.stream == Stream::Compute
            && !kept.iter().any(|buffer| buffer.same(slice.buffer()))
        {
            kept.push(slice.buffer().clone());
        }
    }

    fn refuse_in_capture(&self, what: &'static str) -> Result<(), Error> {
        let captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        if captured.is_some() && self.stream == Stream::Compute {
            return Err(Error::device(what, "not while a graph is recorded"));
        }
        Ok(())
    }
}

/// Ends on drop, so that neither an error nor a panic leaves the stream recording.
struct Recording<'a>(&'a Gpu);

impl Recording<'_> {
    fn end(&self) -> Result<Graph, Error> {
        let kept = self.0.captured.lock().unwrap_or_else(PoisonError::into_inner).take();
        let kept = kept.ok_or_else(|| Error::device("recording a graph", "it has ended"))?;
        Ok(Graph::new(&self.0.driver, self.0.driver.end_capture()?, kept))
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        self.end().ok();
    }
}
