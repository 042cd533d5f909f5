//! The bytes of KV outside the pool: what the host holds, and what the disk is asked.
//!
//! Decides nothing about time and touches no file: what the disk must do is handed out as
//! [`IoJob`]s and comes back as [`IoDone`].

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use crate::batch::{BlockMove, Runner};
use crate::cache::{DiskFile, KvId, KvOf, KvSegment, KvVariant};
use crate::error::Error;
use crate::segment_kv::SegmentKv;
use crate::sequence::SequenceId;
use crate::store::{Codec, SavedFile};

/// Names a command whose answer comes later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Work for the threads that own the files. Saves and erasures keep their order.
#[derive(Debug, Clone)]
pub enum IoJob {
    Load {
        segment: Arc<KvSegment>,
    },
    /// Without a ticket nobody asked: the host was full.
    Save {
        ticket: Option<Ticket>,
        segment: Arc<KvSegment>,
        data: Arc<SegmentKv>,
        codec: Codec,
    },
    Erase {
        ticket: Ticket,
        kv: KvOf,
    },
}

/// What became of a job.
#[derive(Debug)]
pub enum IoDone {
    Loaded {
        segment: Arc<KvSegment>,
        /// `None`: absent, or damaged and set aside.
        data: Option<SegmentKv>,
        seconds: f64,
    },
    Saved {
        ticket: Option<Ticket>,
        segment: Arc<KvSegment>,
        result: Result<SavedFile, Error>,
        /// What the disk gave up to stay within its budget.
        removed: Vec<KvId>,
    },
    Erased {
        ticket: Ticket,
        result: Result<(), Error>,
    },
}

/// What is known of how fast KV comes back, against how fast it is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Speeds {
    pub encoded_tokens_per_second: Option<f64>,
    pub loaded_bytes_per_second: Option<f64>,
}

impl Speeds {
    /// True where loading is expected to be the faster way; what was never measured is tried.
    pub fn prefer_loading(self, tokens: usize, bytes: u64) -> bool {
        let known = self.encoded_tokens_per_second.zip(self.loaded_bytes_per_second);
        known.is_none_or(|(encoded, loaded)| bytes as f64 / loaded < tokens as f64 / encoded)
    }
}

/// Share of the last load in the measured speed.
const NEWS: f64 = 0.5;

/// Loads of fewer bytes tell how long it takes to open a file, and nothing of a disk's speed.
const LEAST_MEASURED: u64 = 256 << 10;

/// The host's copies, and who waits for what.
#[derive(Debug, Default)]
pub(crate) struct Tiering {
    host: HashMap<KvId, Arc<SegmentKv>>,
    /// Loads on their way, and the sequences that wait for them.
    loads: HashMap<KvId, (Arc<KvSegment>, Vec<SequenceId>)>,
    /// Saves on their way that have not been erased since.
    saving: HashMap<KvId, Arc<KvSegment>>,
    /// Files that are being erased, and are there again where that fails.
    erasing: HashMap<Ticket, Vec<DiskFile>>,
    jobs: Vec<IoJob>,
    /// `None` without a disk.
    codec: Option<Codec>,
    pub speeds: Speeds,
}

impl Tiering {
    pub fn new(codec: Option<Codec>) -> Self {
        Self { codec, ..Self::default() }
    }

    /// Carries moves out, in order. Panics where one fails: the books have it that all moved, and
    /// what didn't would be taken for somebody else's rows.
    pub fn carry_out<R: Runner>(&mut self, moves: &[BlockMove], runner: &mut R) {
        let failed = |error: Error| -> ! { panic!("rows of KV cannot be moved: {error}") };
        for one in moves {
            match one {
                BlockMove::Offload { segment, slots } => {
                    let data = runner.gather(slots).unwrap_or_else(|error| failed(error));
                    self.host.insert(segment.kv, Arc::new(data));
                }
                BlockMove::Onboard { kv, first_row, slots } => {
                    let data = self.host.get(kv).expect("booked in the host, so it is there");
                    runner.scatter(data, *first_row, slots).unwrap_or_else(|error| failed(error));
                }
                BlockMove::Discard { segment, on_disk } => self.demote(segment, *on_disk),
            }
        }
    }

    /// KV leaves the host; a disk that lacks it gets it. Rows that are approximate came from there,
    /// and are never encoded again.
    pub fn demote(&mut self, segment: &Arc<KvSegment>, on_disk: bool) {
        let data = self.host.remove(&segment.kv).expect("booked in the host, so it is there");
        let is_wanted = !on_disk && segment.variant == KvVariant::Lossless;
        let Some(codec) = self.codec.filter(|_| is_wanted) else { return };
        let segment = as_written(segment.clone(), codec);
        if let Entry::Vacant(saving) = self.saving.entry(segment.kv) {
            saving.insert(segment.clone());
            self.jobs.push(IoJob::Save { ticket: None, segment, data, codec });
        }
    }

    pub fn has_disk(&self) -> bool {
        self.codec.is_some()
    }

    pub fn get(&self, kv: KvId) -> Option<&Arc<SegmentKv>> {
        self.host.get(&kv)
    }

    pub fn put(&mut self, kv: KvId, data: SegmentKv) {
        self.host.insert(kv, Arc::new(data));
    }

    pub fn remove(&mut self, kv: KvId) {
        self.host.remove(&kv);
    }

    /// Asks for KV on behalf of a sequence; one load serves all that wait.
    pub fn load(&mut self, segment: &Arc<KvSegment>, waiting: SequenceId) {
        let load = self.loads.entry(segment.kv).or_insert_with(|| {
            self.jobs.push(IoJob::Load { segment: segment.clone() });
            (segment.clone(), Vec::new())
        });
        load.1.push(waiting);
    }

    /// Who waited for a load that has ended; nobody, if its chunk was erased meanwhile.
    pub fn loaded(&mut self, kv: KvId, bytes: u64, seconds: f64) -> Vec<SequenceId> {
        if bytes >= LEAST_MEASURED && seconds > 0.0 {
            let speed = bytes as f64 / seconds;
            let before = self.speeds.loaded_bytes_per_second.unwrap_or(speed);
            self.speeds.loaded_bytes_per_second = Some(before + NEWS * (speed - before));
        }
        self.loads.remove(&kv).map_or(Vec::new(), |(_, waiting)| waiting)
    }

    /// Has rows as computed written, whatever is on the disk.
    pub fn save(
        &mut self,
        ticket: Ticket,
        segment: Arc<KvSegment>,
        data: Arc<SegmentKv>,
        codec: Codec,
    ) {
        let segment = as_written(segment, codec);
        self.saving.insert(segment.kv, segment.clone());
        self.jobs.push(IoJob::Save { ticket: Some(ticket), segment, data, codec });
    }

    /// True when what was saved may be listed: its chunk has not been erased since.
    pub fn saved(&mut self, kv: KvId) -> bool {
        self.saving.remove(&kv).is_some()
    }

    /// Forgets what is on its way of a chunk, and has the disk erase it. Returns who waited for
    /// what.
    pub fn erase(
        &mut self,
        ticket: Ticket,
        kv: KvOf,
        files: Vec<DiskFile>,
    ) -> Vec<(KvId, Vec<SequenceId>)> {
        self.erasing.insert(ticket, files);
        self.saving.retain(|_, segment| !segment.is_of(&kv));
        let erased = self.loads.extract_if(|_, (segment, _)| segment.is_of(&kv));
        let erased = erased.map(|(kv, (_, waiting))| (kv, waiting)).collect();
        self.jobs.push(IoJob::Erase { ticket, kv });
        erased
    }

    /// The files that an erasure which has ended was of.
    pub fn erased(&mut self, ticket: Ticket) -> Vec<DiskFile> {
        self.erasing.remove(&ticket).unwrap_or_default()
    }

    /// What the disk is to do, in order.
    pub fn take_jobs(&mut self) -> Vec<IoJob> {
        std::mem::take(&mut self.jobs)
    }
}

/// Rows as computed under the name that a codec's file has.
fn as_written(segment: Arc<KvSegment>, codec: Codec) -> Arc<KvSegment> {
    match codec.variant() {
        KvVariant::Lossless => segment,
        KvVariant::Int8 => Arc::new(segment.approximated()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, RowOutput};

    /// A segment in the host's memory.
    fn put(tiering: &mut Tiering) -> Arc<KvSegment> {
        let segment = KvSegment::of_token(1, 1, 0);
        tiering.put(segment.kv, SegmentKv::of_frames(&[vec![0; 4]]));
        segment
    }

    #[test]
    fn what_is_written_with_loss_is_known_by_the_name_its_file_has() {
        let mut tiering = Tiering::new(Some(Codec::Int8));
        let segment = put(&mut tiering);
        let lossy = segment.approximated();
        tiering.demote(&segment, false);
        let jobs = tiering.take_jobs();
        let [IoJob::Save { ticket: None, segment: written, .. }] = &jobs[..] else {
            panic!("{jobs:?}")
        };
        assert_eq!(written.kv, lossy.kv);
        assert!(tiering.saved(lossy.kv) && !tiering.saved(segment.kv));
    }

    #[test]
    fn a_small_load_says_nothing_of_the_disks_speed() {
        let mut tiering = Tiering::new(Some(Codec::Planes));
        let kv = put(&mut tiering).kv;
        tiering.loaded(kv, 1000, 0.01);
        assert_eq!(tiering.speeds.loaded_bytes_per_second, None);
        tiering.loaded(kv, 1 << 20, 0.5);
        assert_eq!(tiering.speeds.loaded_bytes_per_second, Some(f64::from(2 << 20)));
    }

    #[test]
    fn approximate_rows_are_never_written_again() {
        for codec in [Codec::Planes, Codec::Int8] {
            let mut tiering = Tiering::new(Some(codec));
            let lossy = Arc::new(put(&mut tiering).approximated());
            tiering.put(lossy.kv, SegmentKv::of_frames(&[vec![0; 4]]));
            tiering.demote(&lossy, false);
            assert!(tiering.take_jobs().is_empty() && tiering.get(lossy.kv).is_none());
        }
    }

    /// Moves nothing into the pool.
    struct Stuck;

    impl Runner for Stuck {
        fn run(&mut self, _: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error> {
            unreachable!("nothing is computed here")
        }

        fn gather(&mut self, _: &[u32]) -> Result<SegmentKv, Error> {
            unreachable!("nothing leaves the pool here")
        }

        fn scatter(&mut self, _: &SegmentKv, _: usize, _: &[u32]) -> Result<(), Error> {
            Err(Error::Stopped)
        }
    }

    #[test]
    #[should_panic(expected = "rows of KV cannot be moved")]
    fn rows_that_did_not_move_are_never_taken_for_others() {
        let mut tiering = Tiering::new(None);
        let kv = put(&mut tiering).kv;
        let onboard = BlockMove::Onboard { kv, first_row: 0, slots: vec![0] };
        tiering.carry_out(&[onboard], &mut Stuck);
    }
}
