//! Which chunks' KV the host and the disk hold, and what leaves the host when it is full.
//!
//! Under pressure the least valuable goes: cost to compute it again times uses, by bytes, counted
//! from the value of the last one that went (GDSF). What somebody waits for is leased and stays.

use std::collections::HashMap;
use std::sync::Arc;

use super::{ChunkId, KvId, KvOf, KvSegment};

/// Where KV lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// The pool that attention reads.
    Device,
    /// Memory beside the pool.
    Host,
    Disk,
}

impl Tier {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}

/// The tiers that hold the whole KV of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TiersOf {
    pub device: bool,
    pub host: bool,
    pub disk: bool,
}

impl TiersOf {
    /// The tiers, the fastest first.
    pub fn list(self) -> Vec<Tier> {
        let all = [(self.device, Tier::Device), (self.host, Tier::Host), (self.disk, Tier::Disk)];
        all.into_iter().filter_map(|(there, tier)| there.then_some(tier)).collect()
    }
}

/// A file of KV, as far as it matters whether it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    pub kv: KvId,
    pub chunk: ChunkId,
    pub tenant: String,
    pub bytes: u64,
}

#[derive(Debug)]
struct HostEntry {
    segment: Arc<KvSegment>,
    bytes: u64,
    uses: u64,
    /// Value of the last one that had gone when this was last used.
    since: f64,
}

/// What host and disk hold, by name.
#[derive(Debug)]
pub struct Tiers {
    host_budget: u64,
    host_bytes: u64,
    /// So many keys cost attention as much as all products of a token cost.
    attention_scale: f64,
    host: HashMap<KvId, HostEntry>,
    /// How often each is leased. What is erased meanwhile may be gone from the host, and back.
    leases: HashMap<KvId, u32>,
    disk: HashMap<KvId, DiskFile>,
    clock: f64,
    /// Segments that left the host for lack of room, so far.
    evictions: u64,
}

impl Tiers {
    pub fn new(host_budget: u64, attention_scale: f64) -> Self {
        Self {
            host_budget,
            host_bytes: 0,
            attention_scale,
            host: HashMap::new(),
            leases: HashMap::new(),
            disk: HashMap::new(),
            clock: 0.0,
            evictions: 0,
        }
    }

    pub fn host_budget(&self) -> u64 {
        self.host_budget
    }

    pub fn host_bytes(&self) -> u64 {
        self.host_bytes
    }

    pub fn disk_bytes(&self) -> u64 {
        self.disk.values().map(|file| file.bytes).sum()
    }

    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    pub fn in_host(&self, kv: KvId) -> bool {
        self.host.contains_key(&kv)
    }

    pub fn on_disk(&self, kv: KvId) -> bool {
        self.disk.contains_key(&kv)
    }

    pub fn put_disk(&mut self, file: DiskFile) {
        self.disk.insert(file.kv, file);
    }

    pub fn forget_disk(&mut self, kv: KvId) {
        self.disk.remove(&kv);
    }

    /// True when the host would hold so many bytes more if others gave way.
    pub fn has_room(&self, bytes: u64) -> bool {
        let leased = self.host.values().filter(|entry| self.is_leased(entry));
        bytes + leased.map(|entry| entry.bytes).sum::<u64>() <= self.host_budget
    }

    /// Books KV into the host. What must leave for it is named by [`Tiers::trim`].
    pub fn put_host(&mut self, segment: Arc<KvSegment>, bytes: u64) {
        let since = self.clock;
        let entry = HostEntry { segment, bytes, uses: 1, since };
        self.host_bytes += bytes;
        let before = self.host.insert(entry.segment.kv, entry);
        assert!(before.is_none(), "a segment is in the host once");
    }

    /// Books KV out of the host; false where it was not there.
    pub fn remove_host(&mut self, kv: KvId) -> bool {
        let Some(entry) = self.host.remove(&kv) else { return false };
        self.host_bytes -= entry.bytes;
        true
    }

    /// Keeps KV in the host until [`Tiers::release`], unless it is erased.
    pub fn lease(&mut self, kv: KvId) {
        *self.leases.entry(kv).or_default() += 1;
    }

    pub fn release(&mut self, kv: KvId) {
        let leases = self.leases.get_mut(&kv).expect("what is released was leased");
        *leases -= 1;
        if *leases == 0 {
            self.leases.remove(&kv);
        }
    }

    /// Of all KV together.
    pub fn num_leases(&self) -> usize {
        self.leases.values().map(|&count| count as usize).sum()
    }

    fn is_leased(&self, entry: &HostEntry) -> bool {
        self.leases.contains_key(&entry.segment.kv)
    }

    pub fn used(&mut self, kv: KvId) {
        if let Some(entry) = self.host.get_mut(&kv) {
            entry.uses += 1;
            entry.since = self.clock;
        }
    }

    /// What leaves the host until it is within its budget, the least valuable first. All of it
    /// is booked out already.
    pub fn trim(&mut self) -> Vec<Arc<KvSegment>> {
        let mut gone = Vec::new();
        while self.host_bytes > self.host_budget {
            let idle = self.host.values().filter(|entry| !self.is_leased(entry));
            let value = |entry: &&HostEntry| (self.value(entry), entry.segment.kv);
            let least = idle.min_by(|a, b| value(a).partial_cmp(&value(b)).expect("finite"));
            let Some(least) = least else { break };
            self.clock = self.value(least);
            let segment = least.segment.clone();
            self.remove_host(segment.kv);
            self.evictions += 1;
            gone.push(segment);
        }
        gone
    }

    fn value(&self, entry: &HostEntry) -> f64 {
        let rows = entry.segment.tokens.len() as f64;
        let mean_keys = entry.segment.first_position as f64 + rows / 2.0;
        let cost = rows * (1.0 + mean_keys / self.attention_scale);
        entry.since + entry.uses as f64 * cost / entry.bytes.max(1) as f64
    }

    /// Forgets what the disk holds of a chunk, and returns it.
    pub fn forget_files(&mut self, kv: &KvOf) -> Vec<DiskFile> {
        let is_of = |file: &DiskFile| file.chunk == kv.chunk && kv.has_tenant(&file.tenant);
        self.disk.extract_if(|_, file| is_of(file)).map(|(_, file)| file).collect()
    }

    /// Forgets what the host holds of a chunk, and returns it.
    pub fn forget(&mut self, kv: &KvOf) -> Vec<KvId> {
        let in_host = self.host.values().filter(|entry| entry.segment.is_of(kv));
        let gone: Vec<KvId> = in_host.map(|entry| entry.segment.kv).collect();
        for &kv in &gone {
            self.remove_host(kv);
        }
        gone
    }

    /// Panics where the books don't balance.
    pub fn check_invariants(&self) {
        let bytes: u64 = self.host.values().map(|entry| entry.bytes).sum();
        assert_eq!(bytes, self.host_bytes);
        let idle = self.host.values().any(|entry| !self.is_leased(entry));
        assert!(self.host_bytes <= self.host_budget || !idle, "over budget with something to drop");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(tiers: &mut Tiers) -> Vec<KvId> {
        tiers.trim().iter().map(|segment| segment.kv).collect()
    }

    #[test]
    fn the_least_used_leaves_first_and_the_leased_stays() {
        let mut tiers = Tiers::new(200, 1000.0);
        let [a, b, c] = [1, 2, 3].map(|token| KvSegment::of_token(token, 10, 0));
        tiers.put_host(a.clone(), 100);
        tiers.put_host(b.clone(), 100);
        tiers.used(a.kv);
        tiers.put_host(c.clone(), 100);
        tiers.lease(c.kv);
        assert_eq!(gone(&mut tiers), [b.kv]);
        assert_eq!((tiers.in_host(a.kv), tiers.in_host(b.kv)), (true, false));
        assert!(tiers.has_room(100) && !tiers.has_room(101));
        tiers.check_invariants();
    }

    #[test]
    fn a_lease_outlives_what_it_was_for() {
        let mut tiers = Tiers::new(100, 1000.0);
        let a = KvSegment::of_token(1, 10, 0);
        tiers.put_host(a.clone(), 100);
        tiers.lease(a.kv);
        tiers.forget(&KvOf::new(a.chunk, None));
        tiers.put_host(a.clone(), 150);
        tiers.lease(a.kv);
        tiers.release(a.kv);
        assert!(gone(&mut tiers).is_empty(), "one of two is left");
        tiers.release(a.kv);
        assert_eq!(gone(&mut tiers), [a.kv]);
    }

    #[test]
    #[should_panic(expected = "what is released was leased")]
    fn what_was_not_leased_is_not_released() {
        Tiers::new(100, 1000.0).release(KvSegment::of_token(1, 10, 0).kv);
    }

    #[test]
    fn what_costs_more_to_compute_again_stays_longer() {
        let mut tiers = Tiers::new(100, 100.0);
        let (near, far) = (KvSegment::of_token(1, 10, 0), KvSegment::of_token(2, 10, 900));
        tiers.put_host(far.clone(), 100);
        tiers.put_host(near.clone(), 100);
        assert_eq!(gone(&mut tiers), [near.kv]);
    }

    #[test]
    fn a_chunk_is_forgotten_for_whom_it_was_asked() {
        let mut tiers = Tiers::new(200, 1000.0);
        let a = KvSegment::of_token(1, 10, 0);
        tiers.put_host(a.clone(), 100);
        tiers.put_disk(DiskFile { kv: a.kv, chunk: a.chunk, tenant: String::new(), bytes: 70 });
        let anothers = KvOf::new(a.chunk, Some("another\0"));
        assert!(tiers.forget(&anothers).is_empty() && tiers.forget_files(&anothers).is_empty());
        assert_eq!((tiers.disk_bytes(), tiers.in_host(a.kv)), (70, true));
        let everybodys = KvOf::new(a.chunk, None);
        assert_eq!(tiers.forget(&everybodys), [a.kv]);
        assert_eq!(tiers.forget_files(&everybodys).len(), 1);
        assert!(!tiers.in_host(a.kv) && !tiers.on_disk(a.kv));
        assert_eq!(tiers.host_bytes(), 0);
    }
}
