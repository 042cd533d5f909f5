//! The processor in the part of a device, for tests: the same launches, run at once.
//!
//! The copy stream's work waits until somebody waits for it, so that a missing event shows. Memory
//! is all ones (NaN) when it is handed out, and ends at a page that can't be touched.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use super::driver::{Driver, Float, Launch, MatrixProduct, Stream};
use crate::error::Error;

unsafe extern "C" {
    fn strand_emulator_alloc(bytes: usize) -> *mut c_void;
    fn strand_emulator_free(address: *mut c_void, bytes: usize);
    fn strand_emulator_launch(
        name: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared: c_uint,
        args: *mut *mut c_void,
        backwards: c_int,
    ) -> c_int;
}

pub(super) struct Emulated {
    total: u64,
    backwards: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Length of each allocation.
    allocations: HashMap<u64, usize>,
    pinned: HashMap<u64, Vec<u128>>,
    used: u64,
    /// Work of the copy stream that nobody has waited for.
    queue: VecDeque<Work>,
    /// How much of the copy stream's work was ever queued, and done.
    queued: u64,
    done: u64,
    /// Event -> how much of the copy stream's work comes before it.
    events: HashMap<u64, u64>,
    graphs: HashMap<u64, Vec<Work>>,
    recording: Option<Vec<Work>>,
    last_id: u64,
}

#[derive(Clone)]
enum Work {
    Copy { from: u64, to: u64, bytes: usize },
    Zero { address: u64, bytes: usize },
    Launch { kernel: String, grid: [u32; 3], block: u32, shared: u32, args: Vec<u64> },
    Product(MatrixProduct),
}

impl Emulated {
    pub(super) fn new(total: u64, backwards: bool) -> Self {
        Self { total, backwards, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, stream: Stream, work: Work) -> Result<(), Error> {
        let mut state = self.state();
        match (stream, &mut state.recording) {
            (Stream::Copy, _) => {
                state.queue.push_back(work);
                state.queued += 1;
                Ok(())
            }
            (Stream::Compute, Some(recording)) => {
                recording.push(work);
                Ok(())
            }
            (Stream::Compute, None) => self.run(&work),
        }
    }

    /// Does the copy stream's work up to a place.
    fn drain(&self, state: &mut State, place: u64) -> Result<(), Error> {
        while state.done < place {
            let work = state.queue.pop_front().expect("what was queued and not done is there");
            state.done += 1;
            self.run(&work)?;
        }
        Ok(())
    }

    fn run(&self, work: &Work) -> Result<(), Error> {
        match work {
            &Work::Copy { from, to, bytes } => {
                // SAFETY: whoever queued it promised that as many bytes lie behind both.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            }
            &Work::Zero { address, bytes } => {
                // SAFETY: whoever queued it promised that as many bytes lie there.
                unsafe { (address as *mut u8).write_bytes(0, bytes) };
            }
            Work::Launch { kernel, grid, block, shared, args } => {
                let name = CString::new(kernel.as_str()).expect("kernels have plain names");
                let address = |arg: &u64| std::ptr::from_ref(arg).cast_mut().cast::<c_void>();
                let mut args: Vec<*mut c_void> = args.iter().map(address).collect();
                let backwards = c_int::from(self.backwards);
                // SAFETY: whoever queued it promised that the arguments are the kernel's.
                let status = unsafe {
                    strand_emulator_launch(
                        name.as_ptr(),
                        grid.as_ptr(),
                        *block,
                        *shared,
                        args.as_mut_ptr(),
                        backwards,
                    )
                };
                let reason = match status {
                    0 => return Ok(()),
                    1 => "there is none of this name",
                    _ => "no device takes so many threads, blocks or so much shared memory",
                };
                return Err(Error::device(format!("kernel {kernel}"), reason));
            }
            Work::Product(product) => multiply(product),
        }
        Ok(())
    }
}

impl State {
    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// The plain product, k ascending in f32.
fn multiply(product: &MatrixProduct) {
    let &MatrixProduct { x, w, y, m, n, k, float, wide, accumulate } = product;
    let widen = |address: u64, count: usize| -> Vec<f32> {
        // SAFETY: whoever queued it promised that as many numbers lie there.
        let bits = unsafe { std::slice::from_raw_parts(address as *const u16, count) };
        match float {
            Float::Bf16 => bits.iter().map(|&x| bf16::from_bits(x).to_f32()).collect(),
            Float::F16 => bits.iter().map(|&x| f16::from_bits(x).to_f32()).collect(),
        }
    };
    let (x, w) = (widen(x, m * k), widen(w, n * k));
    for (row, x) in x.chunks_exact(k).enumerate() {
        for (column, w) in w.chunks_exact(k).enumerate() {
            let place = row * n + column;
            let mut sums = [0f32; 8];
            for (x, w) in x.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
                for i in 0..8 {
                    sums[i] += x[i] * w[i];
                }
            }
            let sum: f32 = sums.iter().sum();
            if wide {
                let y = (y as *mut f32).wrapping_add(place);
                // SAFETY: promised as above.
                let before = if accumulate { unsafe { *y } } else { 0.0 };
                // SAFETY: promised as above.
                unsafe { *y = before + sum };
            } else {
                let y = (y as *mut u16).wrapping_add(place);
                // SAFETY: promised as above.
                let before = unsafe { *y };
                let bits = match (float, accumulate) {
                    (Float::Bf16, false) => bf16::from_f32(sum).to_bits(),
                    (Float::F16, false) => f16::from_f32(sum).to_bits(),
                    (Float::Bf16, true) => {
                        bf16::from_f32(bf16::from_bits(before).to_f32() + sum).to_bits()
                    }
                    (Float::F16, true) => {
                        f16::from_f32(f16::from_bits(before).to_f32() + sum).to_bits()
                    }
                };
                // SAFETY: promised as above.
                unsafe { *y = bits };
            }
        }
    }
}

// SAFETY: memory comes from the emulator's allocator; work touches what its caller promised.
unsafe impl Driver for Emulated {
    fn name(&self) -> String {
        "emulated device".to_string()
    }

    fn family(&self) -> String {
        "cuda-emulated".to_string()
    }

    fn memory(&self) -> Result<(u64, u64), Error> {
        Ok((self.total - self.state().used, self.total))
    }

    /// Few, so that blocks take more than one item.
    fn multiprocessors(&self) -> u32 {
        2
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let mut state = self.state();
        let free = self.total - state.used;
        let what = format!("allocating {bytes} bytes on the emulated device");
        if bytes as u64 > free {
            return Err(Error::device(what, format!("{free} are free")));
        }
        // SAFETY: freed by `free`, with the same length.
        let address = unsafe { strand_emulator_alloc(bytes) } as u64;
        if address == 0 {
            return Err(Error::device(what, "this machine has no more"));
        }
        state.used += bytes as u64;
        state.allocations.insert(address, bytes);
        Ok(address)
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        let queued = state.queued;
        self.drain(&mut state, queued).expect("work that was queued can be done");
        let bytes = state.allocations.remove(&address).expect("memory is freed once");
        state.used -= bytes as u64;
        // SAFETY: from `alloc`, with its length; no work is left that names it.
        unsafe { strand_emulator_free(address as *mut c_void, bytes) };
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, Error> {
        if bytes as u64 > self.total {
            let what = format!("allocating {bytes} bytes of page-locked memory");
            return Err(Error::device(what, "no more than a device has can be locked"));
        }
        let mut memory = vec![0u128; bytes.div_ceil(16)];
        let address = memory.as_mut_ptr().cast::<u8>();
        self.state().pinned.insert(address as u64, memory);
        Ok(address)
    }

    fn free_pinned(&self, address: *mut u8) {
        self.state().pinned.remove(&(address as u64)).expect("memory is freed once");
    }

    unsafe fn upload(
        &self,
        stream: Stream,
        from: *const u8,
        to: u64,
        bytes: usize,
    ) -> Result<(), Error> {
        let mut state = self.state();
        let is_pinned = state.pinned.iter().any(|(start, memory)| {
            (*start..start + 16 * memory.len() as u64).contains(&(from as u64))
        });
        if stream == Stream::Copy && !is_pinned {
            // Pageable memory may change when this returns.
            let queued = state.queued;
            self.drain(&mut state, queued)?;
            return self.run(&Work::Copy { from: from as u64, to, bytes });
        }
        drop(state);
        self.submit(stream, Work::Copy { from: from as u64, to, bytes })
    }

    unsafe fn download(
        &self,
        stream: Stream,
        from: u64,
        to: *mut u8,
        bytes: usize,
    ) -> Result<(), Error> {
        self.submit(stream, Work::Copy { from, to: to as u64, bytes })
    }

    unsafe fn copy(&self, stream: Stream, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        self.submit(stream, Work::Copy { from, to, bytes })
    }

    unsafe fn zero(&self, stream: Stream, address: u64, bytes: usize) -> Result<(), Error> {
        self.submit(stream, Work::Zero { address, bytes })
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch) -> Result<(), Error> {
        let &Launch { kernel, grid, block, shared, args } = launch;
        let (kernel, args) = (kernel.to_string(), args.to_vec());
        self.submit(stream, Work::Launch { kernel, grid, block, shared, args })
    }

    unsafe fn product(&self, stream: Stream, product: &MatrixProduct) -> Result<(), Error> {
        self.submit(stream, Work::Product(*product))
    }

    fn record(&self, stream: Stream) -> Result<u64, Error> {
        let mut state = self.state();
        let id = state.next_id();
        // Work of the compute stream is done when it is asked for.
        let place = if stream == Stream::Copy { state.queued } else { 0 };
        state.events.insert(id, place);
        Ok(id)
    }

    fn wait(&self, stream: Stream, event: u64) -> Result<(), Error> {
        match stream {
            Stream::Compute => self.await_event(event),
            Stream::Copy => Ok(()),
        }
    }

    fn await_event(&self, event: u64) -> Result<(), Error> {
        let mut state = self.state();
        let place = state.events[&event];
        self.drain(&mut state, place)
    }

    fn free_event(&self, event: u64) {
        self.state().events.remove(&event);
    }

    fn synchronize(&self, stream: Stream) -> Result<(), Error> {
        let mut state = self.state();
        let place = if stream == Stream::Copy { state.queued } else { 0 };
        self.drain(&mut state, place)
    }

    fn begin_capture(&self) -> Result<(), Error> {
        self.state().recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<u64, Error> {
        let mut state = self.state();
        let id = state.next_id();
        let recorded = state.recording.take().expect("a recording was begun");
        state.graphs.insert(id, recorded);
        Ok(id)
    }

    fn replay(&self, graph: u64) -> Result<(), Error> {
        let recorded = self.state().graphs[&graph].clone();
        recorded.iter().try_for_each(|work| self.run(work))
    }

    fn free_graph(&self, graph: u64) {
        self.state().graphs.remove(&graph);
    }
}
