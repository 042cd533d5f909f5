//! Where KV goes that comes from the disk: to the pool where blocks are free, to the host where
//! that has room, nowhere else.

use std::collections::HashMap;
use std::sync::Arc;

use strand_engine::cache::{ChunkId, KvId, KvVariant};
use strand_engine::store::{Codec, SavedFile};
use strand_engine::{
    DiskSetup, Engine, EnginePlan, Error, Event, IoDone, IoJob, Request, Restore, Reuse, Segment,
    SegmentKv, TierSetup,
};

use crate::random::Random;
use crate::simulation::{FakeRunner, ROW_BYTES, plan};

/// Tokens of a chunk: two blocks.
const LEN: usize = 8;

struct Setting {
    engine: Engine<FakeRunner>,
    files: HashMap<KvId, Arc<SegmentKv>>,
}

impl Setting {
    /// Two chunks on the disk alone, and a pool of so many blocks of four rows.
    fn new(num_blocks: usize, host_rows: u64) -> Self {
        let plan = EnginePlan {
            block_size: 4,
            num_blocks,
            block_bytes: 4 * ROW_BYTES as u64,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            max_model_len: 24,
            max_queue: 8,
            ..plan(&mut Random::new(1))
        };
        let disk = Some(DiskSetup::default());
        let host_memory = host_rows * plan.token_bytes();
        let tiers = TierSetup { host_memory, disk, ..TierSetup::default() };
        let engine = Engine::new(plan.clone(), FakeRunner::new(&plan, None), None, vec![], tiers);
        let mut setting = Self { engine, files: HashMap::new() };
        for chunk in 0..2 {
            setting.submit(&[chunk]);
            setting.finish();
            let saved = setting.engine.save(vec![segment(chunk)], "", Codec::Raw);
            saved.expect("it is in the pool");
            setting.work();
            setting.engine.forget(id(chunk), None);
        }
        setting
    }

    /// A question over chunks; the disk's jobs are kept for [`Self::work`].
    fn submit(&mut self, chunks: &[u32]) {
        let mut request = Request::new(vec![9; 3]);
        request.prompt.splice(0..0, chunks.iter().map(|&chunk| segment(chunk)));
        request.limits.max_tokens = Some(1);
        request.restore = Restore::Always;
        self.engine.submit(&request).expect("it fits");
    }

    /// Lets the disk do all it was asked to.
    fn work(&mut self) {
        for job in self.engine.take_jobs() {
            let done = match job {
                IoJob::Load { segment } => {
                    let data = self.files.get(&segment.kv).map(|data| (**data).clone());
                    IoDone::Loaded { segment, data, seconds: 0.01 }
                }
                IoJob::Save { ticket, segment, data, .. } => {
                    let (kv_id, bytes) = (segment.kv, data.num_bytes());
                    self.files.insert(kv_id, data);
                    let result = Ok(SavedFile {
                        kv_id,
                        file_bytes: bytes,
                        payload_bytes: bytes,
                        raw_bytes: bytes,
                    });
                    IoDone::Saved { ticket, segment, result, removed: Vec::new() }
                }
                IoJob::Erase { .. } => unreachable!("nothing is erased here"),
            };
            self.engine.io_done(done);
            self.engine.check_invariants();
        }
    }

    /// What the requests come to, in the order of their ends.
    fn finish(&mut self) -> Vec<Reuse> {
        let mut found = Vec::new();
        while !self.engine.is_idle() {
            let events = self.engine.step().events;
            self.engine.check_invariants();
            found.extend(events.into_iter().filter_map(|(_, event)| match event {
                Event::Finished { reuse, .. } => Some(reuse),
                _ => None,
            }));
        }
        found
    }

    /// Has every block hold what nobody uses.
    fn fill(&mut self) {
        for token in 30..32 {
            let mut request = Request::new(vec![token; 17]);
            request.limits.max_tokens = Some(1);
            self.engine.submit(&request).expect("it fits");
            self.finish();
        }
        assert_eq!(self.engine.stats().blocks_free, self.engine.plan().num_blocks);
        assert!(self.engine.free_blocks().len() < 2, "the pool is full");
    }

    fn host_rows(&self) -> u64 {
        self.engine.stats().host_bytes / self.engine.plan().token_bytes()
    }
}

fn id(chunk: u32) -> ChunkId {
    ChunkId::of(&chunk.to_le_bytes())
}

fn segment(chunk: u32) -> Segment {
    let segment = Segment::independent(vec![20 + chunk; LEN]);
    Segment { chunk: Some(id(chunk)), ..segment }
}

#[test]
fn where_blocks_are_free_the_pool_has_it_before_the_request_runs() {
    let mut setting = Setting::new(12, 64);
    setting.submit(&[0, 1]);
    setting.work();
    assert_eq!((setting.host_rows(), setting.engine.stats().blocks_idle), (0, 4));
    let there = setting.engine.residency(vec![segment(1)], "", KvVariant::Lossless);
    assert!(there.expect("it can be asked")[0].device);
    assert_eq!(setting.finish(), [Reuse { disk: 2 * LEN, encoded: 3, ..Reuse::default() }]);
    assert_eq!(setting.engine.stats().restored.from_disk, 2);
}

#[test]
fn a_full_pool_leaves_it_in_the_host_until_there_is_room() {
    let mut setting = Setting::new(8, 64);
    setting.fill();
    setting.submit(&[0, 1]);
    setting.work();
    assert_eq!(setting.host_rows(), 2 * LEN as u64);
    assert_eq!(setting.finish(), [Reuse { disk: 2 * LEN, encoded: 3, ..Reuse::default() }]);
}

#[test]
fn without_room_in_the_host_idle_blocks_give_way_at_once() {
    let mut setting = Setting::new(8, 0);
    setting.fill();
    setting.submit(&[0, 1]);
    setting.work();
    assert_eq!(setting.host_rows(), 0);
    assert_eq!(setting.finish(), [Reuse { disk: 2 * LEN, encoded: 3, ..Reuse::default() }]);
}

#[test]
fn without_room_anywhere_it_is_computed() {
    let mut setting = Setting::new(8, 0);
    let mut running = Request::new(vec![3; 20]);
    running.limits.max_tokens = Some(4);
    setting.engine.submit(&running).expect("it fits");
    setting.engine.step();
    setting.submit(&[0, 1]);
    setting.work();
    assert_eq!(setting.host_rows(), 0);
    let found = setting.finish();
    assert_eq!(found[1], Reuse { disk: LEN, encoded: LEN + 3, ..Reuse::default() }, "{found:?}");
}

#[test]
fn files_that_could_not_be_erased_are_used_again() {
    let mut setting = Setting::new(12, 64);
    for result in [Err(Error::FilesFailed), Ok(())] {
        let is_kept = result.is_err();
        let (_, ticket) = setting.engine.erase(id(0), None);
        let ticket = ticket.expect("there is a disk");
        assert!(matches!(setting.engine.take_jobs()[..], [IoJob::Erase { .. }]));
        let tiers = |setting: &Setting| {
            setting.engine.residency(vec![segment(0)], "", KvVariant::Lossless).unwrap()[0]
        };
        assert!(!tiers(&setting).disk, "nobody reads what is being erased");
        setting.engine.io_done(IoDone::Erased { ticket, result });
        assert_eq!(tiers(&setting).disk, is_kept);
    }
}
