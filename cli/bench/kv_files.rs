//! KV files read past the engine, so that reading and decoding are timed alone.

use std::time::Instant;

use anyhow::{Result, bail};
use strand_engine::cache::{KvId, KvIdentity};
use strand_engine::load::Loaded;
use strand_engine::store::{self, Coding, Expected, KvShape, Store};

/// A door of its own to an engine's files.
pub struct KvFiles {
    store: Store,
    identity: KvIdentity,
    shape: KvShape,
    coding: Coding,
}

impl KvFiles {
    /// For an engine that has a store.
    pub fn new(loaded: &Loaded) -> Result<Self> {
        let Some(files) = &loaded.files else { bail!("the engine was started without a store") };
        let (shape, coding) = (files.reader.shape, files.reader.coding.clone());
        let identity = loaded.engine.identity().clone();
        Ok(Self { store: files.reader.store.another()?, identity, shape, coding })
    }

    /// For segments that see this first.
    pub fn behind(mut self, anchor: Vec<u32>) -> Self {
        self.identity.anchor = anchor;
        self
    }

    /// Seconds from a file to its rows, every byte checked, on as many threads as the engine
    /// reads with.
    pub fn time_to_load(&self, id: KvId) -> Result<f64> {
        self.time(id, &self.coding)
    }

    /// The same on one thread.
    pub fn time_to_load_on_one_thread(&self, id: KvId) -> Result<f64> {
        self.time(id, &Coding { threads: 1, ..self.coding.clone() })
    }

    fn time(&self, id: KvId, coding: &Coding) -> Result<f64> {
        let expected = Expected { identity: &self.identity, shape: self.shape };
        let started = Instant::now();
        let loaded = self.store.load(id, &expected, coding)?;
        let seconds = started.elapsed().as_secs_f64();
        match loaded {
            store::Loaded::Found { .. } => Ok(seconds),
            store::Loaded::Absent => bail!("{id}.kv was written and is not there"),
            store::Loaded::Quarantined(found) => bail!("{}: {}", found.name, found.damage),
        }
    }
}
