//! One persistent pool of worker threads, made once and handed around.
//!
//! A run costs no thread start: workers wait spinning for a few microseconds, then asleep. Parts
//! are claimed one by one, so a thread that is late (or not scheduled at all) delays nothing but
//! the part it holds. Which thread runs a part decides no result: kernels split work so that an
//! output element belongs to one part.

use crate::isa::Isa;
use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Polls before a waiting thread goes to sleep: tens of microseconds, the gap between two ops.
const SPINS: usize = 1000;

/// A handle on the pool; clones share it. The last one dropped ends the workers.
#[derive(Clone)]
pub struct Threads {
    pool: Arc<Pool>,
    isa: Isa,
}

impl Threads {
    /// A pool of `count` threads (at least one), the caller's included.
    pub fn new(count: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let workers = (1..count)
            .map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("kernels-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system refuses another thread; ask for fewer")
            })
            .collect();
        let turn = Mutex::new(());
        Self { pool: Arc::new(Pool { shared, workers, turn }), isa: Isa::detect() }
    }

    /// The same pool, running its loops on another instruction set (for comparisons).
    pub fn with_isa(&self, isa: Isa) -> Self {
        Self { pool: Arc::clone(&self.pool), isa }
    }

    pub fn count(&self) -> usize {
        self.pool.workers.len() + 1
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `f(part)` once for every part in `0..parts` on all threads, the caller's included,
    /// and returns when all are done. The first panic of `f` continues here, after that. A run
    /// inside a run, or while another thread has one going, is done by its caller alone.
    pub fn run<F: Fn(usize) + Sync>(&self, parts: usize, f: F) {
        let alone = parts <= 1 || self.count() == 1;
        let turn = if alone { None } else { self.pool.turn.try_lock().ok() };
        let Some(turn) = turn else {
            return (0..parts).for_each(f);
        };
        let job = Arc::new(Job {
            data: (&raw const f).cast(),
            call: call::<F>,
            parts,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            caller: std::thread::current(),
        });
        self.pool.shared.publish(&job);
        job.take_parts();
        job.wait();
        drop(turn);
        let panic = lock(&job.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `data` into pieces of `size` (the last may be shorter) and runs `f(index, piece)`
    /// over all of them.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        if data.is_empty() {
            return;
        }
        let len = data.len();
        let pieces = Disjoint::new(data);
        self.run(len.div_ceil(size), |i| {
            // SAFETY: piece i is [i * size, (i + 1) * size), and `run` calls each i once: no two
            // live slices overlap.
            let piece = unsafe { pieces.slice(i * size..((i + 1) * size).min(len)) };
            f(i, piece);
        });
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Threads({}, {})", self.count(), self.isa.name())
    }
}

struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held during a run.
    turn: Mutex<()>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.slot).stop = true;
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            worker.join().expect("a worker catches every panic of its jobs");
        }
    }
}

/// Where jobs are handed over. `epoch` counts them, for those who spin.
#[derive(Default)]
struct Shared {
    slot: Mutex<Slot>,
    wake: Condvar,
    epoch: AtomicUsize,
}

#[derive(Default)]
struct Slot {
    job: Option<Arc<Job>>,
    epoch: usize,
    sleepers: usize,
    stop: bool,
}

impl Shared {
    fn publish(&self, job: &Arc<Job>) {
        let mut slot = lock(&self.slot);
        slot.job = Some(Arc::clone(job));
        slot.epoch += 1;
        self.epoch.store(slot.epoch, Ordering::Release);
        if slot.sleepers > 0 {
            self.wake.notify_all();
        }
    }

    fn work(&self) {
        let mut seen = 0;
        while let Some((epoch, job)) = self.next_job(seen) {
            seen = epoch;
            job.take_parts();
        }
    }

    /// The newest job, if it is not the one `seen`; waits for it. `None`: the pool ends.
    fn next_job(&self, seen: usize) -> Option<(usize, Arc<Job>)> {
        for _ in 0..SPINS {
            if self.epoch.load(Ordering::Acquire) != seen {
                break;
            }
            std::hint::spin_loop();
        }
        let mut slot = lock(&self.slot);
        loop {
            if slot.stop {
                return None;
            }
            if let Some(job) = slot.job.as_ref().filter(|_| slot.epoch != seen) {
                return Some((slot.epoch, Arc::clone(job)));
            }
            slot.sleepers += 1;
            slot = self.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
            slot.sleepers -= 1;
        }
    }
}

/// One run. Outlives it in the hands of late workers, who then find no part left and touch
/// neither `data` nor what it borrows.
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
    parts: usize,
    next: AtomicUsize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

// SAFETY: `data` points to an `F: Sync`, used through `&F` only; the rest is `Send`.
unsafe impl Send for Job {}
// SAFETY: as for `Send`; all other fields are `Sync`.
unsafe impl Sync for Job {}

impl Job {
    fn take_parts(&self) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= self.parts {
                return;
            }
            // SAFETY: `data` is the `F` that `call` was made for. It lives: `run` returns only
            // after `done` has counted all parts, and this one is not counted yet.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (self.call)(self.data, part) }));
            if let Err(panic) = result {
                lock(&self.panic).get_or_insert(panic);
            }
            if self.done.fetch_add(1, Ordering::AcqRel) + 1 == self.parts {
                self.caller.unpark();
            }
        }
    }

    fn wait(&self) {
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < self.parts {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::park();
            }
        }
    }
}

/// # Safety
/// `data` points to a live `F`.
unsafe fn call<F: Fn(usize) + Sync>(data: *const (), part: usize) {
    // SAFETY: the caller's promise.
    let f = unsafe { &*data.cast::<F>() };
    f(part);
}

/// No lock here guards anything a panic could leave half-done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice whose parts are written by different threads.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: stands for a `&mut [T]`; sharing it only lets threads take disjoint `&mut` parts of it
// (the promise of `slice`), which is sending them.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// # Safety
    /// While the result lives, no other slice that overlaps `range` does.
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part out of bounds");
        // SAFETY: start <= len, so the pointer stays inside (or one past) the borrowed slice.
        let start = unsafe { self.start.add(range.start) };
        // SAFETY: start..end lies inside the slice borrowed mutably for 'a (asserted above), and
        // the caller promises that nobody else holds a part of it.
        unsafe { std::slice::from_raw_parts_mut(start, range.end - range.start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once() {
        for count in [1, 2, 5] {
            let threads = Threads::new(count);
            assert_eq!(threads.count(), count);
            for parts in [0, 1, 2, 3, 100] {
                for _ in 0..50 {
                    let ran: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                    threads.run(parts, |i| {
                        ran[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let threads = Threads::new(2);
        for part in [0, 7] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                threads.run(8, |i| assert!(i != part, "part {part} fails"));
            }));
            let message = result.expect_err("it panicked");
            let message = message.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(message, &format!("part {part} fails"));
        }
        let sum = AtomicUsize::new(0);
        threads.run(10, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn runs_nest_and_come_from_several_threads() {
        let threads = Threads::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    threads.run(10, |_| {
                        threads.run(10, |_| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert_eq!(sum.into_inner(), 300);
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let threads = Threads::new(3);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let mut data = vec![0usize; 1003];
        threads.for_each_chunk(&mut data, 10, |i, piece| piece.fill(i));
        assert!(data.iter().enumerate().all(|(i, &x)| x == i / 10));
    }
}
