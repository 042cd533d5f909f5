//! A choice's place in its grammar, and the threads that look ahead for it.
//!
//! A token is taken in at once. What may follow it is computed by a thread of its own while the
//! engine schedules and runs the forward; sampling waits only where that takes longer.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use llguidance::Matcher;
use toktrie::SimpleVob;

use super::{Grammar, refused};
use crate::error::Error;

/// The tokens that may come next, which may still be on their way. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct PendingMask(Arc<OnceLock<Result<SimpleVob, Error>>>);

impl PendingMask {
    /// Waits for it: one bit a token, the lowest first. At least one is set.
    pub fn wait(&self) -> Result<&[u32], Error> {
        self.0.wait().as_ref().map(SimpleVob::as_slice).map_err(Error::clone)
    }

    /// The first word holds.
    pub(super) fn set(&self, mask: Result<SimpleVob, Error>) {
        drop(self.0.set(mask));
    }
}

/// What a matcher allows now: at least one token.
pub(super) fn look_ahead(matcher: &mut Matcher) -> Result<SimpleVob, Error> {
    let mask = matcher.compute_mask_or_eos().map_err(|error| match error.to_string() {
        reason if reason.starts_with(NO_TEXT) => refused("no text can come next"),
        reason => refused(reason),
    })?;
    if mask.is_zero() {
        return Err(refused("no token of the vocabulary can come next"));
    }
    Ok(mask)
}

/// How llguidance says that there is no way on.
const NO_TEXT: &str = "NoExtensionBias";

/// Where one choice is in its grammar.
pub(crate) struct Guide {
    grammar: Grammar,
    /// Brings the matcher back once it has looked ahead; `None` before the first token.
    matcher: Option<Receiver<Matcher>>,
    mask: PendingMask,
}

impl Guide {
    pub fn new(grammar: Grammar) -> Self {
        let mask = grammar.first_mask().clone();
        Self { grammar, matcher: None, mask }
    }

    pub fn mask(&self) -> &PendingMask {
        &self.mask
    }

    /// Moves on by a token that the mask allowed. True when nothing may follow it.
    pub fn accept(&mut self, token: u32, workers: &mut MaskWorkers) -> Result<bool, Error> {
        let mut matcher = match self.matcher.take() {
            None => self.grammar.matcher(),
            // it was sent before the mask that the token was chosen by
            Some(back) => back.recv().map_err(|_| refused(GONE))?,
        };
        matcher.consume_token(token).map_err(refused)?;
        if matcher.is_stopped() {
            return Ok(true);
        }
        let (back, receiver) = channel();
        self.matcher = Some(receiver);
        self.mask = PendingMask::default();
        workers.send(Job { matcher: Some(matcher), back, mask: self.mask.clone() });
        Ok(false)
    }
}

const GONE: &str = "the thread that looks ahead in it has ended";

/// A look ahead.
struct Job {
    matcher: Option<Matcher>,
    back: Sender<Matcher>,
    mask: PendingMask,
}

impl Job {
    fn carry_out(mut self) {
        let mut matcher = self.matcher.take().expect("a job is carried out once");
        let mask = look_ahead(&mut matcher);
        // Before the mask, so that it is there for whoever has waited for that. A choice that has
        // ended wants nothing back.
        drop(self.back.send(matcher));
        self.mask.set(mask);
    }
}

impl Drop for Job {
    /// Nobody waits for a mask that will never come.
    fn drop(&mut self) {
        self.mask.set(Err(refused(GONE)));
    }
}

/// Threads that compute masks; started by the first that is asked for.
pub(crate) struct MaskWorkers {
    count: usize,
    workers: Vec<(Sender<Job>, JoinHandle<()>)>,
    next: usize,
}

impl MaskWorkers {
    pub fn new(count: usize) -> Self {
        Self { count, workers: Vec::new(), next: 0 }
    }

    fn send(&mut self, job: Job) {
        if self.workers.is_empty() {
            self.workers = (0..self.count).map(|_| spawn()).collect();
        }
        self.next = (self.next + 1) % self.count;
        // a job that can't be sent says so to whoever waits for it
        drop(self.workers[self.next].0.send(job));
    }
}

fn spawn() -> (Sender<Job>, JoinHandle<()>) {
    let (sender, jobs) = channel::<Job>();
    let work = move || jobs.into_iter().for_each(Job::carry_out);
    let thread = std::thread::Builder::new().name("strand-masks".into()).spawn(work);
    (sender, thread.expect("the system can start a thread"))
}

impl Drop for MaskWorkers {
    fn drop(&mut self) {
        for (door, thread) in self.workers.drain(..) {
            drop(door);
            drop(thread.join()); // a panic has said so itself
        }
    }
}
