//! What one key may ask for at a time and in a minute.
//!
//! Counted by tenant, so that two spellings of a key are one. Nobody is slowed down: whoever asks
//! too much is told when to come again.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::auth::Tenant;
use super::error::ApiError;

/// The quotas of all tenants.
#[derive(Default)]
pub struct Quotas {
    /// Requests in a minute.
    rate: Option<DefaultKeyedRateLimiter<Tenant>>,
    concurrent: Option<Concurrent>,
}

struct Concurrent {
    limit: usize,
    tenants: Mutex<HashMap<Tenant, Arc<Semaphore>>>,
}

/// Held while a request is answered.
pub struct Turn(Option<OwnedSemaphorePermit>);

/// Idle tenants are forgotten when there are so many.
const TENANTS: usize = 10_000;

impl Quotas {
    /// `None`: no limit.
    pub fn new(per_minute: Option<u32>, concurrent: Option<usize>) -> Self {
        let per_minute = per_minute.and_then(NonZeroU32::new);
        let tenants = Mutex::new(HashMap::new());
        Self {
            rate: per_minute.map(|count| RateLimiter::keyed(Quota::per_minute(count))),
            concurrent: concurrent.map(|limit| Concurrent { limit, tenants }),
        }
    }

    /// A tenant's turn, or when to come again.
    pub fn enter(&self, tenant: &Tenant) -> Result<Turn, ApiError> {
        if let Some(rate) = &self.rate {
            if rate.len() > TENANTS {
                rate.retain_recent();
            }
            rate.check_key(tenant).map_err(|early| {
                let wait = early.wait_time_from(DefaultClock::default().now());
                let seconds = u32::try_from(wait.as_secs() + 1).unwrap_or(u32::MAX);
                ApiError::rate_limited("too many requests in a minute", seconds)
            })?;
        }
        self.concurrent.as_ref().map_or(Ok(Turn(None)), |concurrent| concurrent.enter(tenant))
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
        let quotas = Quotas::new(None, Some(1));
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
        let quotas = Quotas::new(Some(2), None);
        for _ in 0..2 {
            assert!(quotas.enter(&tenant("a")).is_ok());
        }
        let refused = quotas.enter(&tenant("a")).err().expect("two are enough");
        assert_eq!(refused.status.as_u16(), 429);
        assert!(refused.retry_after.is_some_and(|seconds| (1..=60).contains(&seconds)));
        assert!(quotas.enter(&tenant("b")).is_ok());
    }
}
