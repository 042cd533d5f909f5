//! What one key may ask for at a time and in a minute, and how often an address may be wrong.
//!
//! Counted by tenant, so that two spellings of a key are one, and by address where nobody needs a
//! key. Nobody is slowed down: whoever asks too much is told when to come again.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::auth::{Peer, Tenant};
use super::balance::Balances;
use super::error::ApiError;

/// The quotas of all.
#[derive(Default)]
pub struct Quotas {
    /// Requests in a minute.
    rate: Option<DefaultKeyedRateLimiter<Tenant>>,
    concurrent: Option<Concurrent>,
    /// Of prompts and answers, in a minute.
    tokens: Option<Arc<Balances<Tenant>>>,
    /// Requests without a key that is known, in a minute.
    strangers: Option<Balances<Peer>>,
}

/// What is asked of everybody; `None`: no limit.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuotaLimits {
    pub per_minute: Option<usize>,
    pub concurrent: Option<usize>,
    pub tokens_per_minute: Option<usize>,
    pub wrong_per_minute: Option<usize>,
}

/// Counts a payer's tokens.
#[derive(Default)]
pub struct Meter(Option<(Arc<Balances<Tenant>>, Tenant)>);

struct Concurrent {
    limit: usize,
    tenants: Mutex<HashMap<Tenant, Arc<Semaphore>>>,
}

/// Held while a request is answered.
pub struct Turn(Option<OwnedSemaphorePermit>);

/// Idle tenants are forgotten when there are so many.
const TENANTS: usize = 10_000;

impl Quotas {
    pub fn new(limits: QuotaLimits) -> Self {
        let per_minute = limits.per_minute.and_then(|count| u32::try_from(count).ok());
        let per_minute = per_minute.and_then(NonZeroU32::new);
        let tenants = Mutex::new(HashMap::new());
        Self {
            rate: per_minute.map(|count| RateLimiter::keyed(Quota::per_minute(count))),
            concurrent: limits.concurrent.map(|limit| Concurrent { limit, tenants }),
            tokens: limits.tokens_per_minute.map(|count| Arc::new(Balances::new(count))),
            strangers: limits.wrong_per_minute.map(Balances::new),
        }
    }

    /// Refuses an address that has been wrong too often, whatever it brings now: else it could go
    /// on guessing.
    pub fn check_address(&self, peer: Peer) -> Result<(), ApiError> {
        let wait = self.strangers.as_ref().and_then(|all| all.wait(&peer, Instant::now()));
        wait.map_or(Ok(()), |wait| {
            Err(come_again("too many requests of this address had no key that is known", wait))
        })
    }

    /// A request had no key, or one that is not known.
    pub fn was_wrong(&self, peer: Peer) {
        if let Some(strangers) = &self.strangers {
            strangers.spend(peer, 1, Instant::now());
        }
    }

    /// What counts a payer's tokens, or when to come again.
    pub fn meter(&self, payer: &Tenant) -> Result<Meter, ApiError> {
        let Some(tokens) = &self.tokens else { return Ok(Meter(None)) };
        match tokens.wait(payer, Instant::now()) {
            None => Ok(Meter(Some((tokens.clone(), payer.clone())))),
            Some(wait) => Err(come_again("too many tokens in a minute", wait)),
        }
    }

    /// A payer's turn, or when to come again.
    pub fn enter(&self, tenant: &Tenant) -> Result<Turn, ApiError> {
        if let Some(rate) = &self.rate {
            if rate.len() > TENANTS {
                rate.retain_recent();
            }
            rate.check_key(tenant).map_err(|early| {
                let wait = early.wait_time_from(DefaultClock::default().now());
                come_again("too many requests in a minute", wait)
            })?;
        }
        self.concurrent.as_ref().map_or(Ok(Turn(None)), |concurrent| concurrent.enter(tenant))
    }
}

/// Clients do not come again by themselves after more than two minutes.
const LONGEST_WAIT: u64 = 120;

fn come_again(message: &str, wait: Duration) -> ApiError {
    let seconds = (wait.as_secs() + 1).min(LONGEST_WAIT);
    ApiError::rate_limited(message, seconds as u32)
}

impl Meter {
    pub fn count(&self, tokens: usize) {
        if let Some((balances, payer)) = &self.0 {
            balances.spend(payer.clone(), tokens, Instant::now());
        }
    }
}

impl Concurrent {
    fn enter(&self, tenant: &Tenant) -> Result<Turn, ApiError> {
        let mut tenants = self.tenants.lock().expect("nobody panics with it");
        if tenants.len() > TENANTS {
            tenants.retain(|_, turns| turns.available_permits() < self.limit);
        }
        let turns = tenants.entry(tenant.clone());
        let turns = turns.or_insert_with(|| Arc::new(Semaphore::new(self.limit)));
        match turns.clone().try_acquire_owned() {
            Ok(permit) => Ok(Turn(Some(permit))),
            Err(_) => {
                let message = format!("{} requests of this key are being answered", self.limit);
                Err(ApiError::rate_limited(&message, 1))
            }
        }
    }
}

impl Turn {
    /// The turn lasts until the answer's body has been sent, or its client has left.
    pub fn last_for(self, response: Response) -> Response {
        if self.0.is_none() {
            return response;
        }
        response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _held = &self;
                frame
            }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        Tenant(name.to_owned())
    }

    #[test]
    fn a_turn_is_given_back_when_the_answer_is_gone() {
        let quotas = Quotas::new(QuotaLimits { concurrent: Some(1), ..QuotaLimits::default() });
        let turn = quotas.enter(&tenant("a")).expect("nobody is there");
        let answer = turn.last_for(Response::new(Body::from("x")));
        let refused = quotas.enter(&tenant("a")).err().expect("one is enough");
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(1)));
        assert!(quotas.enter(&tenant("b")).is_ok(), "others are not concerned");
        drop(answer);
        assert!(quotas.enter(&tenant("a")).is_ok());
    }

    #[test]
    fn who_asks_too_often_is_told_when_to_come_again() {
        let quotas = Quotas::new(QuotaLimits { per_minute: Some(2), ..QuotaLimits::default() });
        for _ in 0..2 {
            assert!(quotas.enter(&tenant("a")).is_ok());
        }
        let refused = quotas.enter(&tenant("a")).err().expect("two are enough");
        assert_eq!(refused.status.as_u16(), 429);
        assert!(refused.retry_after.is_some_and(|seconds| (1..=60).contains(&seconds)));
        assert!(quotas.enter(&tenant("b")).is_ok());
    }
}
