//! What can be done to a chunk's KV besides using it: ask where it is, save, unload, erase.
//!
//! A verb speaks of the last segment of a prompt, as a context would place the chunk now, under a
//! salt.

use std::sync::Arc;

use super::{Engine, Outcome};
use crate::batch::Runner;
use crate::cache::{ChunkId, DiskFile, KvOf, KvSegment, KvVariant, TiersOf};
use crate::error::Error;
use crate::request::{Request, Segment};
use crate::scheduler::{Placement, slots};
use crate::segment_kv::SegmentKv;
use crate::sequence::{Roots, Rules, Sequence, SequenceId};
use crate::store::Codec;
use crate::tiering::{IoDone, IoJob, Speeds, Ticket};

/// What an unloaded chunk took with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unloaded {
    /// Device blocks that are free now, or when their last user has left.
    pub blocks: usize,
    pub bytes: u64,
}

/// What an erased chunk held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erased {
    pub blocks: usize,
}

impl<R: Runner> Engine<R> {
    /// Where each segment of a prompt has its KV. Lossy KV counts where `accepted` is lossy and
    /// there is no other.
    pub fn residency(
        &self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
    ) -> Result<Vec<TiersOf>, Error> {
        let count = prompt.len();
        let mut sequence = self.probe(prompt, salt, accepted)?;
        let mut tiers = self.scheduler.residency(&mut sequence);
        tiers.truncate(count);
        Ok(tiers)
    }

    /// Starts to write the KV of a prompt's last segment to the disk.
    pub fn save(
        &mut self,
        prompt: Vec<Segment>,
        salt: &str,
        codec: Codec,
    ) -> Result<Ticket, Error> {
        if !self.tiering.has_disk() {
            return Err(Error::NoStore { reason: "there is no data folder".into() });
        }
        let segment = self.last_chunk(prompt, salt, KvVariant::Lossless)?;
        let data = match self.tiering.get(segment.kv) {
            Some(data) => data.clone(),
            None => Arc::new(self.gather(&segment)?),
        };
        let ticket = self.ticket();
        self.tiering.save(ticket, segment, data, codec);
        Ok(ticket)
    }

    /// Moves the KV of a prompt's last segment from the pool to the host.
    pub fn unload(
        &mut self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
    ) -> Result<Unloaded, Error> {
        let segment = self.last_chunk(prompt, salt, accepted)?;
        let bytes = segment.tokens.len() as u64 * self.plan.token_bytes();
        if !self.scheduler.tiers().in_host(segment.kv) {
            if !self.scheduler.tiers().has_room(bytes) {
                let (chunk, budget) = (segment.chunk.short(), self.scheduler.tiers().host_budget());
                return Err(Error::HostTooSmall { chunk, bytes, budget });
            }
            let data = self.gather(&segment)?;
            self.put_host(&segment, data);
            self.trim_host();
        }
        Ok(Unloaded { blocks: self.scheduler.unload(&segment), bytes })
    }

    /// Makes a chunk's KV unfindable in the pool and the host at once, and starts to erase it
    /// from the disk, with its text: a tenant's, whose salt this is, or everybody's. Requests that
    /// use it now go on.
    pub fn erase(&mut self, chunk: ChunkId, salt: Option<&str>) -> (Erased, Option<Ticket>) {
        let erased = self.forget(chunk, salt);
        let ticket = self.tiering.has_disk().then(|| self.ticket());
        if let Some(ticket) = ticket {
            let kv = KvOf::new(chunk, salt);
            let files = self.scheduler.tiers_mut().forget_files(&kv);
            for (kv, waiting) in self.tiering.erase(ticket, kv, files) {
                waiting.into_iter().for_each(|id| self.scheduler.loaded(id, kv));
            }
        }
        (erased, ticket)
    }

    /// Makes a chunk's KV unfindable in the pool and the host; files stay.
    pub fn forget(&mut self, chunk: ChunkId, salt: Option<&str>) -> Erased {
        let (blocks, in_host) = self.scheduler.forget(&KvOf::new(chunk, salt));
        in_host.into_iter().for_each(|kv| self.tiering.remove(kv));
        Erased { blocks }
    }

    /// What the disk is to do, in order.
    pub fn take_jobs(&mut self) -> Vec<IoJob> {
        self.tiering.take_jobs()
    }

    /// Takes in what became of a job; the outcome of the command that asked for it, if one did.
    pub fn io_done(&mut self, done: IoDone) -> Option<(Ticket, Outcome)> {
        match done {
            IoDone::Loaded { segment, data, seconds } => {
                self.loaded(&segment, data, seconds);
                None
            }
            IoDone::Saved { ticket, segment, result, removed } => {
                removed.into_iter().for_each(|kv| self.scheduler.tiers_mut().forget_disk(kv));
                if let (true, Ok(saved)) = (self.tiering.saved(segment.kv), &result) {
                    self.scheduler.tiers_mut().put_disk(DiskFile {
                        kv: segment.kv,
                        chunk: segment.chunk,
                        tenant: segment.tenant(),
                        bytes: saved.file_bytes,
                    });
                }
                ticket.map(|ticket| (ticket, Outcome::Saved(result)))
            }
            IoDone::Erased { ticket, result } => {
                let files = self.tiering.erased(ticket);
                if result.is_err() {
                    let tiers = self.scheduler.tiers_mut();
                    files.into_iter().for_each(|file| tiers.put_disk(file));
                }
                Some((ticket, Outcome::Erased(result)))
            }
        }
    }

    /// How fast prompts are encoded, as measured by whoever has a clock.
    pub fn set_encode_speed(&mut self, tokens_per_second: f64) {
        let loaded_bytes_per_second = self.tiering.speeds.loaded_bytes_per_second;
        let encoded_tokens_per_second = Some(tokens_per_second);
        self.tiering.speeds = Speeds { encoded_tokens_per_second, loaded_bytes_per_second };
    }

    fn loaded(&mut self, segment: &Arc<KvSegment>, data: Option<SegmentKv>, seconds: f64) {
        let bytes = data.as_ref().map_or(0, SegmentKv::num_bytes);
        let waiting = self.tiering.loaded(segment.kv, bytes, seconds);
        match data {
            Some(data) if !waiting.is_empty() => self.place(segment, data),
            Some(_) => {}
            None => self.scheduler.tiers_mut().forget_disk(segment.kv),
        }
        waiting.into_iter().for_each(|id| self.scheduler.loaded(id, segment.kv));
        self.trim_host();
    }

    fn place(&mut self, segment: &Arc<KvSegment>, data: SegmentKv) {
        if self.scheduler.tiers().in_host(segment.kv) {
            return;
        }
        match self.scheduler.place(segment) {
            Placement::Pool(moves) => {
                self.tiering.put(segment.kv, data);
                self.tiering.carry_out(&moves, &mut self.runner);
                self.tiering.remove(segment.kv);
            }
            // leased before anything gives way, so that it is not what goes
            Placement::Host => self.put_host(segment, data),
            Placement::Nowhere => {}
        }
    }

    fn put_host(&mut self, segment: &Arc<KvSegment>, data: SegmentKv) {
        self.scheduler.tiers_mut().put_host(segment.clone(), data.num_bytes());
        self.tiering.put(segment.kv, data);
    }

    pub(super) fn trim_host(&mut self) {
        for segment in self.scheduler.tiers_mut().trim() {
            let on_disk = self.scheduler.tiers().on_disk(segment.kv);
            self.tiering.demote(&segment, on_disk);
        }
    }

    /// The rows of a segment that is in the pool.
    fn gather(&mut self, segment: &KvSegment) -> Result<SegmentKv, Error> {
        let blocks = self.scheduler.blocks().blocks_of(segment);
        let blocks = blocks.ok_or_else(|| Error::NoKv { chunk: segment.chunk.short() })?;
        self.runner.gather(&slots(&blocks, segment.tokens.len(), self.plan.block_size))
    }

    /// The KV that a prompt's last segment, a chunk, has or would have.
    pub(super) fn last_chunk(
        &self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
    ) -> Result<Arc<KvSegment>, Error> {
        let last = prompt.len().checked_sub(1).ok_or(Error::EmptyPrompt)?;
        let sequence = self.probe(prompt, salt, accepted)?;
        let named = sequence.kv(last as u16).cloned();
        named.ok_or_else(|| Error::NoKv { chunk: "of no name".into() })
    }

    /// A sequence that is never run. A token behind the prompt ends its last segment.
    fn probe(
        &self,
        mut prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
    ) -> Result<Sequence, Error> {
        if prompt.iter().any(|segment| segment.tokens.is_empty()) {
            return Err(Error::EmptyPrompt);
        }
        crate::error::at_most("segments", prompt.len(), usize::from(u16::MAX) - 1)?;
        prompt.push(Segment::new(vec![0]));
        let mut request = Request::new(Vec::new());
        request.prompt = prompt;
        request.salt = salt.into();
        let roots = Roots::new(&self.identity, &request);
        let id = SequenceId(u64::MAX); // named nowhere
        let rules = Arc::new(Rules::default());
        if accepted == KvVariant::Int8 {
            request = self.with_lossy(&request, &rules, &roots);
        }
        Ok(Sequence::new(id, 0, &request, &rules, &roots, self.plan.block_size))
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }
}
