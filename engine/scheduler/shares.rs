//! What a tenant has of the pool and of the running sequences, and whether it may have more.
//!
//! One sequence of a tenant always runs, whatever it needs: others find the room it leaves. Counts
//! are made anew from the tables, and only where shares are limited.

use super::admission::missing_blocks;
use super::{Rank, Scheduler};
use crate::sequence::Sequence;

/// What the running sequences of a tenant have.
#[derive(Debug, Default)]
struct Held {
    seqs: usize,
    /// Those that several of them use count for each.
    blocks: usize,
    last: Option<Rank>,
}

impl Scheduler {
    fn held(&self, tenant: &str) -> Held {
        let mut held = Held::default();
        for rank in &self.running {
            let sequence = &self.sequences[&rank.1];
            if sequence.tenant() == tenant {
                held.seqs += 1;
                held.blocks += sequence.table.iter().flatten().count();
                held.last = Some(*rank);
            }
        }
        held
    }

    /// True where others of its tenant must end before a sequence may run.
    pub(super) fn waits_for_its_tenants(&self, sequence: &Sequence) -> bool {
        let Some(limits) = self.limits.tenant else { return false };
        let held = self.held(sequence.tenant());
        let needed = held.blocks + sequence.layout.num_blocks();
        held.seqs > 0 && (held.seqs >= limits.seqs || needed > limits.blocks)
    }

    /// The last in rank of a running sequence's tenant, perhaps itself, where its next `count`
    /// tokens are more than the tenant's share and it is not the only one.
    pub(super) fn last_where_full(&self, rank: Rank, count: usize) -> Option<Rank> {
        let limits = self.limits.tenant?;
        let sequence = &self.sequences[&rank.1];
        let missing = missing_blocks(sequence, count).len();
        if missing == 0 {
            return None;
        }
        let held = self.held(sequence.tenant());
        held.last.filter(|_| held.seqs > 1 && held.blocks + missing > limits.blocks)
    }

    pub(super) fn check_shares(&self) {
        let Some(limits) = self.limits.tenant else { return };
        for rank in &self.running {
            let held = self.held(self.sequences[&rank.1].tenant());
            let is_within = held.seqs <= limits.seqs && held.blocks <= limits.blocks;
            assert!(held.seqs == 1 || is_within, "{held:?} of {limits:?}");
        }
    }
}
