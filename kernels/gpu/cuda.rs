//! NVIDIA's driver: the kernels of `cuda/` as machine code, cuBLAS for products.
//!
//! Both libraries are opened by name when the first device is: a program built with CUDA starts
//! without them. Two streams, neither of which waits for the null stream.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{result, sys};

use super::driver::{Driver, Float, Launch, MatrixProduct, Stream};
use crate::error::Error;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// cuBLAS's own room, so that it allocates nothing while a graph is recorded: what it recommends
/// for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Page-locked memory that is kept though nobody uses it.
const MAX_IDLE: usize = 4 << 30;
/// Compute capability of the oldest devices the kernels run on.
const OLDEST: (i32, i32) = (8, 0);

pub(super) struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    compute: sys::CUstream,
    copy: sys::CUstream,
    /// In use by one thread at a time.
    blas: Mutex<blas_sys::cublasHandle_t>,
    workspace: sys::CUdeviceptr,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, Function>>,
    pinned: Mutex<PinnedPool>,
    name: String,
    capability: (i32, i32),
    multiprocessors: u32,
    /// Bytes of shared memory a block may have.
    max_shared: i32,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

/// Page-locked memory by address. To lock pages takes longer than to copy them, so freed memory
/// is kept for the next one of its size.
#[derive(Default)]
struct PinnedPool {
    /// Bytes of all that was allocated.
    sizes: HashMap<usize, usize>,
    /// (bytes, address) of what nobody uses.
    free: Vec<(usize, usize)>,
    /// Bytes that nobody uses.
    idle: usize,
}

/// Sizes go in eighths of powers of two, so that memory fits others of about its size.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.max(1).next_power_of_two() / 16).max(4096);
    bytes.max(1).next_multiple_of(step)
}

// SAFETY: the driver's handles may be used from any thread in which the context is current, and
// every method makes it so; the handle of cuBLAS and the functions are behind mutexes.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}
// SAFETY: a function is a handle of the driver.
unsafe impl Send for Function {}

/// The driver's refusals as ours.
trait Refusal<T> {
    fn because(self, what: &str) -> Result<T, Error>;
}

impl<T> Refusal<T> for Result<T, result::DriverError> {
    fn because(self, what: &str) -> Result<T, Error> {
        self.map_err(|error| Error::device(what, error.to_string()))
    }
}

impl<T> Refusal<T> for Result<T, blas::CublasError> {
    fn because(self, what: &str) -> Result<T, Error> {
        self.map_err(|error| Error::device(what, format!("{error:?}")))
    }
}

impl Cuda {
    pub(super) fn open(ordinal: usize) -> Result<Self, Error> {
        let what = format!("opening CUDA device {ordinal}");
        require_libraries(&what)?;
        result::init().because(&what)?;
        let count = result::device::get_count().because(&what)?;
        let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if ordinal >= count {
            let reason = format!("this machine has {count}, numbered from 0 on");
            return Err(Error::device(what, reason));
        }
        let device = result::device::get(ordinal).because(&what)?;
        let name = result::device::get_name(device).because(&what)?;
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST {
            let reason = format!(
                "{name} has compute capability {}.{}, the kernels need {}.{} or later",
                capability.0, capability.1, OLDEST.0, OLDEST.1
            );
            return Err(Error::device(what, reason));
        }
        let multiprocessors = attribute(device, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let max_shared =
            attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        // SAFETY: the device was found above; the context is released on drop.
        let context = unsafe { result::primary_ctx::retain(device) }.because(&what)?;
        // SAFETY: the context was retained above.
        unsafe { result::ctx::set_current(context) }.because(&what)?;
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking);
        let (compute, copy) = (stream().because(&what)?, stream().because(&what)?);
        let modules = FATBINS.iter().map(|image| load(image, &what)).collect::<Result<_, _>>()?;
        let (blas, workspace) = open_blas(compute, &what)?;
        let multiprocessors = u32::try_from(multiprocessors).unwrap_or(1);
        Ok(Self {
            device,
            context,
            compute,
            copy,
            blas: Mutex::new(blas),
            workspace,
            modules,
            functions: Mutex::default(),
            pinned: Mutex::default(),
            name,
            capability,
            multiprocessors,
            max_shared,
        })
    }

    fn stream(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Compute => self.compute,
            Stream::Copy => self.copy,
        }
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.because("entering the CUDA context")
    }

    fn function(&self, name: &str) -> Result<Function, Error> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let what = format!("kernel {name}");
        let found = self.modules.iter().find_map(|module| {
            let name = CString::new(name).ok()?;
            // SAFETY: the module lives as long as `self`.
            unsafe { result::module::get_function(*module, name) }.ok()
        });
        let function = found.ok_or_else(|| Error::device(&what, "there is none of this name"))?;
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX;
        // SAFETY: the function was found above.
        let allowed =
            unsafe { result::function::set_function_attribute(function, MAX, self.max_shared) };
        allowed.because(&what)?;
        functions.insert(name.to_string(), Function(function));
        Ok(Function(function))
    }
}

/// Either library may be missing: the bindings panic then, so ask first.
fn require_libraries(what: &str) -> Result<(), Error> {
    // SAFETY: opens and closes a library that runs no code of its own then.
    if !unsafe { sys::is_culib_present() } {
        let reason = "the driver's library (libcuda.so.1) was not found; install NVIDIA's driver, \
                      or use the cpu";
        return Err(Error::device(what, reason));
    }
    // SAFETY: as above.
    if !unsafe { blas_sys::is_culib_present() } {
        let reason = "cuBLAS (libcublas.so.13) was not found; install CUDA 13's libraries or name \
                      their folder in LD_LIBRARY_PATH, or use the cpu";
        return Err(Error::device(what, reason));
    }
    Ok(())
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, Error> {
    // SAFETY: the device was found by the driver.
    unsafe { result::device::get_attribute(device, which) }.because("asking for an attribute")
}

fn load(image: &[u8], what: &str) -> Result<sys::CUmodule, Error> {
    // The driver reads words of its header.
    let mut aligned = vec![0u64; image.len().div_ceil(8)];
    for (word, bytes) in aligned.iter_mut().zip(image.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_le_bytes(padded);
    }
    // SAFETY: a fat binary says its own length, and the driver copies it.
    unsafe { result::module::load_data(aligned.as_ptr().cast()) }.because(what)
}

fn open_blas(
    stream: sys::CUstream,
    what: &str,
) -> Result<(blas_sys::cublasHandle_t, sys::CUdeviceptr), Error> {
    let handle = blas::create_handle().because(what)?;
    // SAFETY: both handles are new; the two libraries mean the same stream by it.
    unsafe { blas::set_stream(handle, stream.cast()) }.because(what)?;
    // SAFETY: memory for cuBLAS alone, freed with the handle.
    let workspace = unsafe { result::malloc_sync(WORKSPACE) }.because(what)?;
    // SAFETY: the memory is as long; set behind the stream, which would reset it.
    let set = unsafe {
        blas_sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE).result()
    };
    set.because(what)?;
    Ok((handle, workspace))
}

// SAFETY: memory comes from the driver's allocators; copies and kernels are queued as asked.
unsafe impl Driver for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn family(&self) -> String {
        format!("cuda-sm{}{}", self.capability.0, self.capability.1)
    }

    fn memory(&self) -> Result<(u64, u64), Error> {
        self.enter()?;
        let (free, total) = result::mem_get_info().because("asking for the free memory")?;
        Ok((free as u64, total as u64))
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.enter()?;
        // SAFETY: the caller frees it.
        unsafe { result::malloc_sync(bytes) }
            .because(&format!("allocating {bytes} bytes on {}", self.name))
    }

    fn free(&self, address: u64) {
        // A device that failed has no memory to give back.
        // SAFETY: from `alloc`; the driver waits for what uses it.
        self.enter().map(|()| unsafe { result::free_sync(address) }.ok()).ok();
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, Error> {
        let class = size_class(bytes);
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = pinned.free.iter().position(|&(size, _)| size == class) {
            let (size, address) = pinned.free.swap_remove(place);
            pinned.idle -= size;
            return Ok(address as *mut u8);
        }
        drop(pinned); // to lock pages takes long, and others may have some to give back
        self.enter()?;
        let what = format!("allocating {class} bytes of page-locked memory");
        // SAFETY: the caller frees it. The system hands its pages out zeroed.
        let address = unsafe { result::malloc_host(class, 0) }.because(&what)?.cast::<u8>();
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.sizes.insert(address as usize, class);
        Ok(address)
    }

    fn free_pinned(&self, address: *mut u8) {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let size = pinned.sizes.get(&(address as usize)).copied().unwrap_or(MAX_IDLE);
        if pinned.idle + size <= MAX_IDLE {
            pinned.idle += size;
            pinned.free.push((size, address as usize));
            return;
        }
        pinned.sizes.remove(&(address as usize));
        drop(pinned);
        // SAFETY: from `alloc_pinned`; the owner has waited for the copies.
        self.enter().map(|()| unsafe { result::free_host(address.cast()) }.ok()).ok();
    }

    unsafe fn upload(
        &self,
        stream: Stream,
        from: *const u8,
        to: u64,
        bytes: usize,
    ) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the caller's promise.
        let source = unsafe { std::slice::from_raw_parts(from, bytes) };
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(to, source, self.stream(stream)) }.because("an upload")
    }

    unsafe fn download(
        &self,
        stream: Stream,
        from: u64,
        to: *mut u8,
        bytes: usize,
    ) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the caller's promise.
        let target = unsafe { std::slice::from_raw_parts_mut(to, bytes) };
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(target, from, self.stream(stream)) }
            .because("a download")
    }

    unsafe fn copy(&self, stream: Stream, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream(stream)) }.because("a copy")
    }

    unsafe fn zero(&self, stream: Stream, address: u64, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream(stream)) }
            .because("filling with zeros")
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<(), Error> {
        self.enter()?;
        let function = self.function(launch.kernel)?;
        let address = |arg: &u64| std::ptr::from_ref(arg).cast_mut().cast::<c_void>();
        let mut args: Vec<*mut c_void> = launch.args.iter().map(address).collect();
        let [x, y, z] = launch.grid;
        let (block, shared, stream) = ((launch.block, 1, 1), launch.shared, self.stream(stream));
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        unsafe { result::launch_kernel(function.0, (x, y, z), block, shared, stream, &mut args) }
            .because(&format!("kernel {}", launch.kernel))
    }

    unsafe fn product(&self, stream: Stream, product: &MatrixProduct) -> Result<(), Error> {
        if stream != Stream::Compute {
            return Err(Error::device("a product", "products belong on the compute stream"));
        }
        self.enter()?;
        let handle = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let narrow = match product.float {
            Float::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
            Float::F16 => blas_sys::cudaDataType::CUDA_R_16F,
        };
        let result_type = if product.wide { blas_sys::cudaDataType::CUDA_R_32F } else { narrow };
        let size = |x: usize| {
            i32::try_from(x)
                .map_err(|_| Error::value("product", "a dimension", x, "below 2^31".to_string()))
        };
        let (m, n, k) = (size(product.m)?, size(product.n)?, size(product.k)?);
        let (alpha, beta) = (1f32, f32::from(u8::from(product.accumulate)));
        // cuBLAS's matrices are column-major: it is asked for y transposed, w times x transposed.
        // SAFETY: the caller's promise; alpha and beta are read before it returns.
        unsafe {
            blas::gemm_ex(
                *handle,
                blas_sys::cublasOperation_t::CUBLAS_OP_T,
                blas_sys::cublasOperation_t::CUBLAS_OP_N,
                n,
                m,
                k,
                std::ptr::from_ref(&alpha).cast(),
                product.w as *const c_void,
                narrow,
                k,
                product.x as *const c_void,
                narrow,
                k,
                std::ptr::from_ref(&beta).cast(),
                product.y as *mut c_void,
                result_type,
                n,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .because("a product")
    }

    fn record(&self, stream: Stream) -> Result<u64, Error> {
        self.enter()?;
        let what = "recording an event";
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let event = event.because(what)?;
        // SAFETY: the event is new, the stream lives as long as `self`.
        unsafe { result::event::record(event, self.stream(stream)) }.because(what)?;
        Ok(event as u64)
    }

    fn wait(&self, stream: Stream, event: u64) -> Result<(), Error> {
        self.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event is one of `record`'s, not yet freed.
        unsafe { result::stream::wait_event(self.stream(stream), event as sys::CUevent, flags) }
            .because("waiting for an event")
    }

    fn await_event(&self, event: u64) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the event is one of `record`'s, not yet freed.
        unsafe { result::event::synchronize(event as sys::CUevent) }.because("waiting for an event")
    }

    fn free_event(&self, event: u64) {
        // SAFETY: the event is one of `record`'s, and nobody has it any more.
        self.enter().map(|()| unsafe { result::event::destroy(event as sys::CUevent) }.ok()).ok();
    }

    fn synchronize(&self, stream: Stream) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream(stream)) }
            .because("waiting for the device")
    }

    fn begin_capture(&self) -> Result<(), Error> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::begin_capture(self.compute, mode) }.because("recording a graph")
    }

    fn end_capture(&self) -> Result<u64, Error> {
        self.enter()?;
        let what = "recording a graph";
        // SAFETY: the stream lives as long as `self`.
        let graph = unsafe { result::stream::end_capture(self.compute) }.because(what)?;
        if graph.is_null() {
            return Err(Error::device(what, "the recording was cut off"));
        }
        // SAFETY: the graph is new.
        let ready = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: what was made of it does not need it.
        unsafe { result::graph::destroy(graph) }.because(what)?;
        Ok(ready.because(what)? as u64)
    }

    fn replay(&self, graph: u64) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the graph is one of `end_capture`'s, not yet freed.
        unsafe { result::graph::launch(graph as sys::CUgraphExec, self.compute) }
            .because("replaying a graph")
    }

    fn free_graph(&self, graph: u64) {
        self.synchronize(Stream::Compute).ok();
        // SAFETY: the graph is one of `end_capture`'s, and nobody has it any more.
        self.enter().map(|()| unsafe { result::graph::exec_destroy(graph as _) }.ok()).ok();
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // A device that failed takes nothing back; the process goes on without it.
        self.enter().ok();
        for (_, address) in &self.pinned.get_mut().unwrap_or_else(PoisonError::into_inner).free {
            // SAFETY: from `alloc_pinned`, and nobody uses it.
            unsafe { result::free_host(*address as *mut c_void) }.ok();
        }
        let handle = *self.blas.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody uses cuBLAS any more.
        unsafe { blas::destroy_handle(handle) }.ok();
        // SAFETY: cuBLAS was the only user.
        unsafe { result::free_sync(self.workspace) }.ok();
        for module in &self.modules {
            // SAFETY: no kernel runs: memory is freed before, which waits.
            unsafe { result::module::unload(*module) }.ok();
        }
        for stream in [self.compute, self.copy] {
            // SAFETY: the stream is our own.
            unsafe { result::stream::destroy(stream) }.ok();
        }
        // SAFETY: retained in `open`.
        unsafe { result::primary_ctx::release(self.device) }.ok();
    }
}
