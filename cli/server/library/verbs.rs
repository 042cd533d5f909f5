//! What can be done to a chunk's KV over HTTP: computed, saved, moved and pinned. Blocking.
//!
//! Speaks of the KV that the chunk has alone, behind the anchor, without a `cache_salt`. What
//! was done is told as an outcome: a refusal changes nothing and says why.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strand_engine::context::{Chunk, Context};
use strand_engine::{
    ChunkId, Error, Event, KvVariant, PinOutcome, Request, Restore, Tier, TiersOf,
};

use super::chunks::{alone, show};
use super::misses::wanted;
use super::shelf::Shelf;
use crate::placing;
use crate::server::error::ApiError;
use crate::server::state::Server;
use crate::server::wire::chunks::ChunkOutcome;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// To the device, whatever it takes.
    Populate,
    /// To the disk.
    Save,
    /// From the device to the host.
    Unload,
    /// From the host or the disk to the device.
    Restore,
    /// To leave the device last, for so long.
    Pin(Duration),
}

/// What came of it.
#[derive(Debug, Default)]
struct Done {
    outcome: Outcome,
    reason: Option<&'static str>,
    /// Of KV.
    bytes: u64,
    seconds: Option<u64>,
    encoded: usize,
}

#[derive(Debug, Clone, Copy, Default)]
enum Outcome {
    #[default]
    Accepted,
    Clipped,
    Refused,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Clipped => "clipped",
            Self::Refused => "refused",
        }
    }
}

impl Done {
    fn refused(reason: &'static str) -> Self {
        Self { outcome: Outcome::Refused, reason: Some(reason), ..Self::default() }
    }
}

/// Computes a chunk's KV, or brings it back; what is there is left. How many tokens were computed.
pub fn encode(server: &Server, shelf: &Shelf, chunk: &Arc<Chunk>) -> Result<usize, ApiError> {
    One::new(server, shelf, chunk.clone()).encode()
}

pub fn carry_out(
    server: &Server,
    shelf: &Shelf,
    id: ChunkId,
    verb: Verb,
) -> Result<ChunkOutcome, ApiError> {
    let one = One::new(server, shelf, shelf.chunk(server, id)?);
    let started = Instant::now();
    let done = match verb {
        Verb::Populate => one.populate(),
        Verb::Save => one.save(),
        Verb::Unload => one.unload(),
        Verb::Restore => one.restore(),
        Verb::Pin(time) => one.pin(time),
    }?;
    let millis = started.elapsed().as_secs_f64() * 1e3;
    Ok(ChunkOutcome {
        chunk: show(server, shelf, id)?,
        outcome: done.outcome.as_str(),
        reason: done.reason,
        millis,
        bytes: done.bytes,
        seconds: done.seconds,
        encoded: done.encoded,
    })
}

/// A chunk alone, and whose it is.
struct One<'a> {
    server: &'a Server,
    shelf: &'a Shelf,
    context: Context,
    salt: String,
    tokens: usize,
}

impl<'a> One<'a> {
    fn new(server: &'a Server, shelf: &'a Shelf, chunk: Arc<Chunk>) -> Self {
        let tokens = chunk.ids.len();
        let (context, salt) = (alone(server, chunk), server.salt(&shelf.tenant, None));
        Self { server, shelf, context, salt, tokens }
    }

    /// Of the KV as the engine holds it.
    fn bytes(&self) -> u64 {
        self.tokens as u64 * self.server.engine.plan().token_bytes()
    }

    fn tiers(&self) -> Result<TiersOf, ApiError> {
        let engine = &self.server.engine;
        let tiers = placing::tiers(engine, &self.context, &self.salt, KvVariant::Lossless)?;
        Ok(tiers[0])
    }

    /// Brings the KV to the device; how many tokens of it were computed.
    fn encode(&self) -> Result<usize, ApiError> {
        let (salt, restore) = (self.salt.clone(), Restore::Always);
        let request = Request { salt, restore, ..self.context.encode(0) };
        let mut events = self.server.engine.submit(request)?;
        while let Some(event) = events.next_blocking() {
            match event {
                Event::Finished { reuse, .. } => {
                    self.remember();
                    // one of them is the row behind the chunk
                    return Ok(reuse.encoded - 1);
                }
                Event::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
        Err(Error::Stopped.into())
    }

    fn remember(&self) {
        let wanted = wanted(&self.context, self.server.engine.identity(), &self.salt);
        wanted.iter().flatten().for_each(|wanted| self.shelf.memory().remember(wanted));
    }

    fn populate(&self) -> Result<Done, ApiError> {
        if self.tiers()?.device {
            return Ok(Done { reason: Some("already_populated"), ..Done::default() });
        }
        let encoded = self.encode()?;
        Ok(Done { bytes: self.bytes(), encoded, ..Done::default() })
    }

    fn save(&self) -> Result<Done, ApiError> {
        if self.shelf.rows().store().is_none() {
            return Ok(Done::refused("no_store"));
        }
        let (engine, codec) = (&self.server.engine, self.server.library.codec);
        let prompt = || self.context.segments_to(0);
        let (saved, encoded) = match engine.save(prompt(), &self.salt, codec) {
            Err(Error::NoKv { .. }) => {
                let encoded = self.encode()?;
                (engine.save(prompt(), &self.salt, codec)?, encoded)
            }
            saved => (saved?, 0),
        };
        Ok(Done { bytes: saved.file_bytes, encoded, ..Done::default() })
    }

    fn unload(&self) -> Result<Done, ApiError> {
        let tiers = self.tiers()?;
        if !tiers.device {
            return Ok(match tiers.host {
                true => Done { reason: Some("already_unloaded"), ..Done::default() },
                false => Done::refused("not_on_device"),
            });
        }
        let prompt = self.context.segments_to(0);
        match self.server.engine.unload(prompt, &self.salt, KvVariant::Lossless) {
            Ok(unloaded) => Ok(Done { bytes: unloaded.bytes, ..Done::default() }),
            Err(Error::HostTooSmall { .. }) => Ok(Done::refused("host_budget")),
            Err(error) => Err(error.into()),
        }
    }

    fn restore(&self) -> Result<Done, ApiError> {
        match self.tiers()?.list().first() {
            None => Ok(Done::refused("no_kv")),
            Some(Tier::Device) => Ok(Done { reason: Some("already_populated"), ..Done::default() }),
            Some(Tier::Host | Tier::Disk) => {
                let encoded = self.encode()?;
                // a file that turned out to be damaged was computed again
                let reason = (encoded == self.tokens).then_some("file_damaged");
                Ok(Done { bytes: self.bytes(), encoded, reason, ..Done::default() })
            }
        }
    }

    fn pin(&self, time: Duration) -> Result<Done, ApiError> {
        let (prompt, engine) = (self.context.segments_to(0), &self.server.engine);
        let bytes = self.bytes();
        Ok(match engine.pin(prompt, &self.salt, KvVariant::Lossless, time)? {
            PinOutcome::Accepted => {
                Done { bytes, seconds: Some(time.as_secs()), ..Done::default() }
            }
            PinOutcome::Clipped(time) => Done {
                outcome: Outcome::Clipped,
                reason: Some("longest_pin"),
                bytes,
                seconds: Some(time.as_secs()),
                ..Done::default()
            },
            PinOutcome::Absent => Done::refused("not_on_device"),
            PinOutcome::OverBudget { .. } => Done::refused("pin_budget"),
        })
    }
}
