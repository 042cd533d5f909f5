//! What may be spent in a minute, where the price is known only afterwards.
//!
//! Whoever has anything left may go on, and is charged for all of it, below zero if need be; what
//! a minute allows comes back evenly. Knows no clock: who has one says what time it is.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What each of many has left.
pub struct Balances<K> {
    a_minute: f64,
    left: Mutex<HashMap<K, Balance>>,
}

#[derive(Debug, Clone, Copy)]
struct Balance {
    left: f64,
    at: Instant,
}

/// Those who have all of it are forgotten when there are so many.
const ENTRIES: usize = 10_000;

impl<K: Hash + Eq> Balances<K> {
    pub fn new(a_minute: usize) -> Self {
        Self { a_minute: a_minute as f64, left: Mutex::default() }
    }

    /// How long to wait until there is something left; `None`: there is.
    pub fn wait(&self, who: &K, now: Instant) -> Option<Duration> {
        let left = self.lock().get(who).map_or(self.a_minute, |balance| self.left(balance, now));
        // one is the least that anything costs
        let missing = (1.0 - left).min(f64::from(u32::MAX));
        (missing > 0.0).then(|| Duration::from_secs_f64(missing * 60.0 / self.a_minute))
    }

    pub fn spend(&self, who: K, count: usize, now: Instant) {
        let mut all = self.lock();
        if all.len() >= ENTRIES {
            all.retain(|_, balance| self.left(balance, now) < self.a_minute);
        }
        let balance = all.entry(who).or_insert(Balance { left: self.a_minute, at: now });
        *balance = Balance { left: self.left(balance, now) - count as f64, at: now };
    }

    fn left(&self, balance: &Balance, now: Instant) -> f64 {
        let since = now.saturating_duration_since(balance.at).as_secs_f64();
        (balance.left + since * self.a_minute / 60.0).min(self.a_minute)
    }

    /// Whole after every statement, also where a thread panicked.
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Balance>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_comes_back_evenly_and_is_owed_before() {
        let (balances, start) = (Balances::new(60), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let wait = |who, seconds| balances.wait(&who, at(seconds)).map(|wait| wait.as_secs());
        assert_eq!(wait("a", 0), None);
        balances.spend("a", 59, at(0));
        assert_eq!(wait("a", 0), None, "one is left");
        balances.spend("a", 41, at(0));
        assert_eq!((wait("a", 0), wait("b", 0)), (Some(41), None));
        assert_eq!((wait("a", 40), wait("a", 41)), (Some(1), None));
        // no more than a minute's is ever saved up
        balances.spend("a", 60, at(10_000));
        assert_eq!(wait("a", 10_000), Some(1));
    }

    #[test]
    fn who_owes_nothing_is_forgotten_and_nobody_else() {
        let (balances, start) = (Balances::new(60), Instant::now());
        for who in 0..ENTRIES {
            balances.spend(who, if who == 7 { 600 } else { 1 }, start);
        }
        let later = start + Duration::from_secs(60);
        balances.spend(ENTRIES, 1, later);
        assert_eq!(balances.lock().len(), 2);
        assert!(balances.wait(&7, later).is_some());
    }
}
