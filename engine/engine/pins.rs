//! Soft leases: what is pinned leaves the pool last, for a time.
//!
//! A pin never keeps a block from work that needs it. Knows no clock: who has one says what time
//! it is.

use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use crate::batch::Runner;
use crate::cache::{KvSegment, KvVariant};
use crate::error::Error;
use crate::request::Segment;

/// Longest time that a pin lasts.
const LONGEST: Duration = Duration::from_hours(1);
/// Share of the pool, or of a tenant's share, one in so many blocks, that pins may take together.
const SHARE: usize = 2;

/// What came of the wish to pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinOutcome {
    Accepted,
    /// For so long, which is less than was asked.
    Clipped(Duration),
    /// It is not in the pool.
    Absent,
    /// Pins would take more than their share of the pool.
    OverBudget {
        blocks: usize,
        left: usize,
    },
}

/// A segment, and when its pin ends.
#[derive(Debug)]
pub(super) struct Pin {
    segment: Arc<KvSegment>,
    until: Duration,
}

impl<R: Runner> Engine<R> {
    /// Pins the KV of a prompt's last segment, a chunk; a pin that is there is set anew. `now`
    /// counts from any fixed moment.
    pub fn pin(
        &mut self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
        time: Duration,
        now: Duration,
    ) -> Result<PinOutcome, Error> {
        self.expire_pins(now);
        let segment = self.last_chunk(prompt, salt, accepted)?;
        if self.scheduler.blocks().blocks_of(&segment).is_none() {
            return Ok(PinOutcome::Absent);
        }
        self.pins.retain(|pin| pin.segment.kv != segment.kv);
        let pinned = |counts: &dyn Fn(&&Pin) -> bool| -> usize {
            self.pins.iter().filter(counts).map(|pin| pin.segment.hashes.len()).sum()
        };
        let mut left = (self.plan.num_blocks / SHARE).saturating_sub(pinned(&|_| true));
        if let Some(limits) = self.plan.tenant {
            let tenant = segment.tenant();
            let own = pinned(&|pin| pin.segment.tenant() == tenant);
            left = left.min((limits.blocks / SHARE).saturating_sub(own));
        }
        let blocks = segment.hashes.len();
        if blocks > left {
            self.scheduler.set_pinned(&segment, false);
            return Ok(PinOutcome::OverBudget { blocks, left });
        }
        self.scheduler.set_pinned(&segment, true);
        let until = now + time.min(LONGEST);
        self.pins.push(Pin { segment, until });
        Ok(if time > LONGEST { PinOutcome::Clipped(LONGEST) } else { PinOutcome::Accepted })
    }

    /// Ends the pins whose time is over.
    pub fn expire_pins(&mut self, now: Duration) {
        for over in self.pins.extract_if(.., |pin| pin.until <= now) {
            self.scheduler.set_pinned(&over.segment, false);
        }
    }
}
