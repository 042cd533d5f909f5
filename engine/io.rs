//! The threads that own the files: the engine's thread never waits for a disk.
//!
//! One thread reads, one writes. Saves and erasures so keep the order they were asked in, and
//! nobody who waits to read waits for a write.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cache::{KvId, KvSegment, KvVariant};
use crate::error::Error;
use crate::segment_kv::SegmentKv;
use crate::store::{Coding, Expected, KvRecord, KvShape, Loaded, Quarantined, Store};
use crate::tiering::{IoDone, IoJob};

/// Bytes a minute that are written unasked; what is asked for is always written.
const WRITE_BUDGET: u64 = 1 << 30;
const MINUTE: Duration = Duration::from_mins(1);

/// A door to the data folder, and what it takes to read and write a model's KV.
pub struct IoWorker {
    pub store: Store,
    /// Bytes that KV files may take in all; the least valuable go.
    pub disk_space: u64,
    pub shape: KvShape,
    pub coding: Coding,
}

impl IoWorker {
    /// Does a job, in its own time.
    pub fn carry_out(&self, job: IoJob) -> IoDone {
        match job {
            IoJob::Load { segment } => {
                let started = Instant::now();
                let data = self.load(&segment);
                IoDone::Loaded { segment, data, seconds: started.elapsed().as_secs_f64() }
            }
            IoJob::Save { ticket: None, segment, .. } if !self.is_kept(&segment) => {
                let result = Err(Error::NotKept { chunk: segment.chunk.short() });
                IoDone::Saved { ticket: None, segment, result, removed: Vec::new() }
            }
            IoJob::Save { ticket, segment, data, codec } => {
                let record = self.record(&segment);
                let saved = self.store.save(&record, &data, codec, &self.coding);
                let removed = if saved.is_ok() { self.collect(segment.kv) } else { Vec::new() };
                IoDone::Saved { ticket, segment, result: saved.map_err(Error::from), removed }
            }
            IoJob::Erase { ticket, kv } => {
                let erased = match &kv.tenant {
                    Some(tenant) => {
                        self.store.of_tenant(tenant).and_then(|store| store.erase(kv.chunk))
                    }
                    None => self.store.erase_everybodys(kv.chunk),
                };
                IoDone::Erased { ticket, result: erased.map(drop).map_err(Error::from) }
            }
        }
    }

    /// Nothing is written unasked of a chunk whose text was never to be kept.
    fn is_kept(&self, segment: &KvSegment) -> bool {
        // an index that can't answer won't take a row either
        self.store.keeps(&segment.tenant(), segment.chunk).unwrap_or(false)
    }

    /// What can't be read is as good as absent: it is encoded again.
    fn load(&self, segment: &KvSegment) -> Option<SegmentKv> {
        let expected = Expected { identity: &segment.identity, shape: self.shape };
        match self.store.load(segment.kv, &expected, &self.coding) {
            Ok(Loaded::Found { kv, .. }) => Some(kv),
            Ok(Loaded::Absent) => None,
            Ok(Loaded::Quarantined(found)) => {
                let Quarantined { name, path, damage } = found;
                self.warn(format_args!("{name}: {damage}; put aside as {}", path.display()));
                None
            }
            Err(error) => {
                self.warn(format_args!("{error}"));
                None
            }
        }
    }

    /// Makes room for what was just saved; returns what had to go.
    fn collect(&self, saved: KvId) -> Vec<KvId> {
        // files that can't be removed stay, and are tried again after the next save
        let collected = self.store.make_room(self.disk_space, saved).unwrap_or_default();
        collected.into_iter().map(|file| file.kv_id).collect()
    }

    fn warn(&self, what: std::fmt::Arguments) {
        // nobody to tell is no reason to fail
        drop(writeln!(std::io::stderr(), "strand: {what}; the chunk is encoded again"));
    }

    /// As computed: a lossy codec is told such rows too.
    fn record(&self, segment: &KvSegment) -> KvRecord {
        KvRecord {
            identity: (*segment.identity).clone(),
            variant: KvVariant::Lossless,
            chunk: segment.chunk,
            first_position: segment.first_position as u32,
            seen: segment.seen.to_vec(),
            tokens: segment.tokens.to_vec(),
            shape: self.shape,
        }
    }
}

/// One that reads and one that writes.
pub struct IoFiles {
    pub reader: IoWorker,
    pub writer: IoWorker,
}

/// Hands jobs to the threads. Dropping it waits for what was asked to be written.
pub(crate) struct IoThreads {
    reads: Option<Sender<IoJob>>,
    writes: Option<Sender<IoJob>>,
    threads: Vec<JoinHandle<()>>,
    budget: WriteBudget,
}

/// What a job comes to. One at which the code itself fails has failed too, and those who wait for
/// it hear of it; the panic has said where.
fn answered(job: IoJob, carry_out: impl FnOnce(IoJob) -> IoDone) -> IoDone {
    // whatever the panic leaves is the store's, which is as safe from it as from a power cut
    let done = catch_unwind(AssertUnwindSafe(|| carry_out(job.clone())));
    done.unwrap_or_else(|_| match job {
        IoJob::Load { segment } => IoDone::Loaded { segment, data: None, seconds: 0.0 },
        IoJob::Save { ticket, segment, .. } => {
            let result = Err(Error::FilesFailed);
            IoDone::Saved { ticket, segment, result, removed: Vec::new() }
        }
        IoJob::Erase { ticket, .. } => IoDone::Erased { ticket, result: Err(Error::FilesFailed) },
    })
}

/// Bytes left of the current minute's.
struct WriteBudget {
    since: Instant,
    left: u64,
}

impl WriteBudget {
    fn take(&mut self, bytes: u64) -> bool {
        if self.since.elapsed() >= MINUTE {
            *self = Self { since: Instant::now(), left: WRITE_BUDGET };
        }
        let fits = bytes <= self.left;
        self.left -= if fits { bytes } else { 0 };
        fits
    }
}

impl IoThreads {
    /// `deliver` is called on the threads with every result.
    pub fn spawn(files: IoFiles, deliver: impl Fn(IoDone) + Send + Sync + 'static) -> Self {
        let deliver: Arc<dyn Fn(IoDone) + Send + Sync> = Arc::new(deliver);
        let mut threads = Vec::new();
        let mut start = |name: &str, worker: IoWorker| {
            let (sender, jobs): (Sender<IoJob>, Receiver<IoJob>) = channel();
            let deliver = deliver.clone();
            let work = move || {
                jobs.iter().for_each(|job| deliver(answered(job, |job| worker.carry_out(job))));
            };
            let thread = std::thread::Builder::new().name(name.into()).spawn(work);
            threads.push(thread.expect("the system can start a thread"));
            Some(sender)
        };
        let reads = start("strand-read", files.reader);
        let writes = start("strand-write", files.writer);
        let budget = WriteBudget { since: Instant::now(), left: WRITE_BUDGET };
        Self { reads, writes, threads, budget }
    }

    /// Hands a job on. What is refused comes back at once: writes that nobody asked for have a
    /// budget.
    pub fn send(&mut self, job: IoJob) -> Option<IoDone> {
        if let IoJob::Save { ticket: None, segment, data, .. } = &job
            && !self.budget.take(data.num_bytes())
        {
            let result = Err(Error::WriteBudget { budget: WRITE_BUDGET });
            let segment = segment.clone();
            return Some(IoDone::Saved { ticket: None, segment, result, removed: Vec::new() });
        }
        let door = match &job {
            IoJob::Load { .. } => &self.reads,
            IoJob::Save { .. } | IoJob::Erase { .. } => &self.writes,
        };
        let door = door.as_ref().expect("open until dropped");
        door.send(job).expect("the threads outlive the doors");
        None
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.reads = None;
        self.writes = None;
        // A panic has said so itself.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChunkId;
    use crate::cache::KvOf;
    use crate::store::Codec;
    use crate::tiering::Ticket;

    #[test]
    fn who_waits_for_a_job_at_which_the_code_fails_hears_of_it() {
        let segment = KvSegment::of_token(1, 1, 0);
        let panics = |job| answered(job, |_| panic!("as a fault in the code does"));
        let loaded = panics(IoJob::Load { segment: segment.clone() });
        assert!(matches!(loaded, IoDone::Loaded { data: None, .. }), "{loaded:?}");
        let (ticket, data) = (Ticket(7), Arc::new(SegmentKv::of_frames(&[vec![0; 4]])));
        let job = IoJob::Save { ticket: Some(ticket), segment, data, codec: Codec::Raw };
        let saved = panics(job);
        let IoDone::Saved { ticket: Some(Ticket(7)), result: Err(error), .. } = saved else {
            panic!("{saved:?}")
        };
        assert!(matches!(error, Error::FilesFailed), "{error}");
        let erased = panics(IoJob::Erase { ticket, kv: KvOf::new(ChunkId::of(b"a"), None) });
        assert!(matches!(erased, IoDone::Erased { ticket: Ticket(7), result: Err(_) }));
    }
}
