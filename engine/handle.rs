//! The engine's thread and the way to speak to it.
//!
//! One thread owns the engine; commands reach it through a bounded channel, events leave
//! through one channel a request. Dropping the receiver cancels the request; dropping the last
//! handle ends the thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strand_models::{ChatTemplate, GenerationDefaults, Tokenizer, Training};
use tokio::sync::mpsc::{self, error::TryRecvError, error::TrySendError};
use tokio::sync::oneshot;

use crate::batch::Runner;
use crate::cache::{ChunkId, KvIdentity, KvVariant, TiersOf};
use crate::config::EnginePlan;
use crate::engine::pins::PinOutcome;
use crate::engine::verbs::{Erased, Unloaded};
use crate::engine::{Engine, Outcome, Stats};
use crate::error::Error;
use crate::grammar::Grammars;
use crate::io::{IoFiles, IoThreads};
use crate::queue_times::QueueTimes;
use crate::request::{Event, Request, Segment};
use crate::sequence::RequestId;
use crate::store::{Codec, SavedFile};
use crate::tiering::{IoDone, Ticket};

/// Commands that may wait at the engine's door.
const COMMAND_QUEUE: usize = 1024;

enum Command {
    Submit { request: Box<Request>, events: mpsc::Sender<Event> },
    Residency { place: Place, accepted: KvVariant, answer: Answer<Vec<TiersOf>> },
    Save { place: Place, codec: Codec, answer: Answer<SavedFile> },
    Unload { place: Place, accepted: KvVariant, answer: Answer<Unloaded> },
    Pin { place: Place, accepted: KvVariant, time: Duration, answer: Answer<PinOutcome> },
    Erase { chunk: ChunkId, salt: Option<String>, answer: Answer<Erased> },
    Forget { chunk: ChunkId, salt: Option<String>, answer: oneshot::Sender<Erased> },
    Stats(oneshot::Sender<Stats>),
    Io(IoDone),
}

/// What a verb speaks of.
struct Place {
    prompt: Vec<Segment>,
    salt: String,
}

impl Place {
    fn new(prompt: Vec<Segment>, salt: &str) -> Self {
        Self { prompt, salt: salt.into() }
    }
}

/// The way back of an answer.
type Answer<T> = oneshot::Sender<Result<T, Error>>;

/// Who waits for the disk.
enum Pending {
    Save(Answer<SavedFile>),
    Erase(Erased, Answer<Erased>),
}

/// Speaks to a running engine. Clones share it.
#[derive(Clone)]
pub struct EngineHandle {
    // Declared before the thread: dropped first, so that the thread sees the channel close.
    commands: mpsc::Sender<Command>,
    _thread: Arc<EngineThread>,
    plan: Arc<EnginePlan>,
    identity: Arc<KvIdentity>,
    facts: Arc<ModelFacts>,
}

/// What front ends ask about the model that an engine runs.
#[derive(Default)]
pub struct ModelFacts {
    pub name: String,
    pub tokenizer: Option<Tokenizer>,
    pub chat_template: Option<ChatTemplate>,
    pub generation: GenerationDefaults,
    pub training: Training,
}

/// What a request reports, in order. Dropping it cancels the request.
pub struct EventStream {
    events: mpsc::Receiver<Event>,
}

impl EventStream {
    /// Waits for the next event; `None` after the last one.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// As [`EventStream::next_blocking`], for async callers.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

impl EngineHandle {
    /// Moves an engine to a thread of its own, and its files to others.
    pub fn spawn<R: Runner + Send + 'static>(
        engine: Engine<R>,
        facts: ModelFacts,
        files: Option<IoFiles>,
    ) -> Self {
        let plan = Arc::new(engine.plan().clone());
        let identity = Arc::new(engine.identity().clone());
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        // Weak: what comes back from the disk must not keep the engine alive.
        let door = commands.downgrade();
        let io = files.map(|files| {
            IoThreads::spawn(files, move |done| {
                // An engine that is gone wants no answer.
                let door = door.upgrade();
                door.map_or(Ok(()), |door| door.blocking_send(Command::Io(done))).ok();
            })
        });
        let thread = std::thread::Builder::new()
            .name("strand-engine".into())
            .spawn(move || EngineLoop::new(engine, receiver, io).run())
            .expect("the system can start a thread");
        let thread = Arc::new(EngineThread(Some(thread)));
        Self { commands, _thread: thread, plan, identity, facts: Arc::new(facts) }
    }

    pub fn plan(&self) -> &EnginePlan {
        &self.plan
    }

    /// What the names of all its KV start from, but for a request's anchor and salt.
    pub fn identity(&self) -> &KvIdentity {
        &self.identity
    }

    pub fn model_name(&self) -> &str {
        &self.facts.name
    }

    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.facts.tokenizer.as_ref()
    }

    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.facts.chat_template.as_ref()
    }

    /// How the model was trained, as far as chunks are concerned.
    pub fn training(&self) -> Training {
        self.facts.training
    }

    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.facts.generation
    }

    /// What compiles grammars for this model. Takes a while; one serves all.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], or a vocabulary that grammars can't walk.
    pub fn make_grammars(&self) -> Result<Grammars, Error> {
        let tokenizer = self.tokenizer().ok_or(Error::NoTokenizer)?;
        let eos = &self.facts.generation.stop_token_ids;
        Grammars::new(tokenizer, self.plan.vocab_size, eos)
    }

    /// Sends a request. What is wrong with it arrives as [`Event::Failed`].
    pub fn submit(&self, request: Request) -> Result<EventStream, Error> {
        // Room for every event there can be: the engine never waits for a slow reader.
        let most = self.plan.max_model_len;
        let tokens = request.limits.max_tokens.unwrap_or(most).min(most);
        let choices = request.limits.n.clamp(1, 128) as usize;
        let room = choices * (tokens + 1) + request.prompt_tokens() + 1;
        let (sender, events) = mpsc::channel(room);
        let command = Command::Submit { request: Box::new(request), events: sender };
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => Error::QueueFull { limit: COMMAND_QUEUE },
            TrySendError::Closed(_) => Error::Stopped,
        })?;
        Ok(EventStream { events })
    }

    /// Where each segment of a prompt has its KV under a salt. Lossy KV counts where `accepted` is
    /// lossy and there is no other. Waits as [`EngineHandle::stats`] does.
    pub fn residency(
        &self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
    ) -> Result<Vec<TiersOf>, Error> {
        let place = Place::new(prompt, salt);
        self.ask(|answer| Command::Residency { place, accepted, answer })?
    }

    /// Writes the KV of a prompt's last segment, a chunk, to the disk, and waits until it is
    /// safe there. [`Error::NoKv`] where it has to be encoded first.
    pub fn save(&self, prompt: Vec<Segment>, salt: &str, codec: Codec) -> Result<SavedFile, Error> {
        let place = Place::new(prompt, salt);
        self.ask(|answer| Command::Save { place, codec, answer })?
    }

    /// Moves the KV of a prompt's last segment, a chunk, from the pool to the host.
    pub fn unload(
        &self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
    ) -> Result<Unloaded, Error> {
        let place = Place::new(prompt, salt);
        self.ask(|answer| Command::Unload { place, accepted, answer })?
    }

    /// Lets the KV of a prompt's last segment, a chunk, leave the pool last, for a time.
    pub fn pin(
        &self,
        prompt: Vec<Segment>,
        salt: &str,
        accepted: KvVariant,
        time: Duration,
    ) -> Result<PinOutcome, Error> {
        let place = Place::new(prompt, salt);
        self.ask(|answer| Command::Pin { place, accepted, time, answer })?
    }

    /// Removes a chunk's KV from every tier and its text from the disk, and waits until that has
    /// been done: a tenant's, whose salt this is, or without one everybody's.
    pub fn erase(&self, chunk: ChunkId, salt: Option<&str>) -> Result<Erased, Error> {
        let salt = salt.map(String::from);
        self.ask(|answer| Command::Erase { chunk, salt, answer })?
    }

    /// Removes a chunk's KV from device and host; what is on disk stays there.
    pub fn forget(&self, chunk: ChunkId, salt: Option<&str>) -> Result<Erased, Error> {
        let salt = salt.map(String::from);
        self.ask(|answer| Command::Forget { chunk, salt, answer })
    }

    /// What the engine is doing. Waits for the step in progress.
    pub fn stats(&self) -> Result<Stats, Error> {
        self.ask(Command::Stats)
    }

    /// Sends a command that carries the way back for its answer, and waits for that.
    fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Error> {
        let (sender, answer) = oneshot::channel();
        self.commands.blocking_send(command(sender)).map_err(|_| Error::Stopped)?;
        answer.blocking_recv().map_err(|_| Error::Stopped)
    }
}

/// Joins the thread when the last handle is gone.
struct EngineThread(Option<JoinHandle<()>>);

impl Drop for EngineThread {
    fn drop(&mut self) {
        let thread = self.0.take().expect("taken once");
        // A panic has said so itself, and every caller got `Error::Stopped`.
        drop(thread.join());
    }
}

/// Whoever waits for a request.
struct Listener {
    events: mpsc::Sender<Event>,
    /// When the request came, until it first runs.
    arrived: Option<Instant>,
}

struct EngineLoop<R> {
    engine: Engine<R>,
    commands: mpsc::Receiver<Command>,
    io: Option<IoThreads>,
    listeners: HashMap<RequestId, Listener>,
    queue_times: QueueTimes,
    pending: HashMap<Ticket, Pending>,
    started: Instant,
    prefill_seconds: f64,
    decode_seconds: f64,
    prefill_tokens: u64,
    decode_tokens: u64,
}

impl<R: Runner> EngineLoop<R> {
    fn new(engine: Engine<R>, commands: mpsc::Receiver<Command>, io: Option<IoThreads>) -> Self {
        Self {
            engine,
            commands,
            io,
            listeners: HashMap::new(),
            queue_times: QueueTimes::default(),
            pending: HashMap::new(),
            started: Instant::now(),
            prefill_seconds: 0.0,
            decode_seconds: 0.0,
            prefill_tokens: 0,
            decode_tokens: 0,
        }
    }

    /// Until nobody can speak to the engine any more. Work whose owner is gone is dropped.
    fn run(mut self) {
        loop {
            if !self.engine.has_work() {
                let Some(command) = self.commands.blocking_recv() else { return };
                self.obey(command);
            }
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) if self.listeners.is_empty() => return,
                    Err(TryRecvError::Disconnected) => break,
                }
            }
            self.cancel_abandoned();
            self.engine.expire_pins(self.started.elapsed());
            self.step();
            self.dispatch();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { request, events } => match self.engine.submit(&request) {
                Ok(id) => {
                    let listener = Listener { events, arrived: Some(Instant::now()) };
                    self.listeners.insert(id, listener);
                }
                // A receiver that is gone already wants no answer.
                Err(error) => drop(events.try_send(Event::Failed(error))),
            },
            Command::Residency { place: Place { prompt, salt }, accepted, answer } => {
                drop(answer.send(self.engine.residency(prompt, &salt, accepted)));
            }
            Command::Save { place: Place { prompt, salt }, codec, answer } => {
                match self.engine.save(prompt, &salt, codec) {
                    Ok(ticket) => drop(self.pending.insert(ticket, Pending::Save(answer))),
                    Err(error) => drop(answer.send(Err(error))),
                }
            }
            Command::Unload { place: Place { prompt, salt }, accepted, answer } => {
                drop(answer.send(self.engine.unload(prompt, &salt, accepted)));
            }
            Command::Pin { place: Place { prompt, salt }, accepted, time, answer } => {
                let now = self.started.elapsed();
                drop(answer.send(self.engine.pin(prompt, &salt, accepted, time, now)));
            }
            Command::Erase { chunk, salt, answer } => {
                match self.engine.erase(chunk, salt.as_deref()) {
                    (erased, Some(ticket)) => {
                        self.pending.insert(ticket, Pending::Erase(erased, answer));
                    }
                    (erased, None) => drop(answer.send(Ok(erased))),
                }
            }
            Command::Forget { chunk, salt, answer } => {
                answer.send(self.engine.forget(chunk, salt.as_deref())).ok();
            }
            Command::Stats(answer) => drop(answer.send(self.stats())),
            Command::Io(done) => {
                if let Some((ticket, outcome)) = self.engine.io_done(done) {
                    self.answer(ticket, outcome);
                }
            }
        }
        self.dispatch();
    }

    fn answer(&mut self, ticket: Ticket, outcome: Outcome) {
        match (self.pending.remove(&ticket), outcome) {
            (Some(Pending::Save(answer)), Outcome::Saved(result)) => drop(answer.send(result)),
            (Some(Pending::Erase(erased, answer)), Outcome::Erased(result)) => {
                drop(answer.send(result.map(|()| erased)));
            }
            _ => unreachable!("a ticket is given for one command and answered once"),
        }
    }

    /// Hands the disk its work.
    fn dispatch(&mut self) {
        for job in self.engine.take_jobs() {
            let io = self.io.as_mut().expect("an engine without files asks nothing of them");
            if let Some(refused) = io.send(job) {
                self.engine.io_done(refused);
            }
        }
    }

    fn cancel_abandoned(&mut self) {
        let engine = &mut self.engine;
        self.listeners.retain(|&id, listener| {
            let listens = !listener.events.is_closed();
            if !listens {
                engine.cancel(id);
            }
            listens
        });
    }

    fn step(&mut self) {
        let start = Instant::now();
        let step = self.engine.step();
        let seconds = start.elapsed().as_secs_f64();
        let tokens = step.prefill_tokens + step.decode_tokens;
        if tokens > 0 {
            let share = step.prefill_tokens as f64 / tokens as f64;
            self.prefill_seconds += seconds * share;
            self.decode_seconds += seconds * (1.0 - share);
        }
        self.prefill_tokens += step.prefill_tokens as u64;
        if self.prefill_seconds > 0.0 {
            self.engine.set_encode_speed(self.prefill_tokens as f64 / self.prefill_seconds);
        }
        self.decode_tokens += step.decode_tokens as u64;
        for id in &step.begun {
            let listener = self.listeners.get_mut(id);
            if let Some(arrived) = listener.and_then(|listener| listener.arrived.take()) {
                self.queue_times.observe(start - arrived);
            }
        }
        for (id, event) in step.events {
            let Some(listener) = self.listeners.get(&id) else { continue };
            match listener.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Closed(_)) => {} // cancelled before the next step
                Err(TrySendError::Full(_)) => unreachable!("the channel holds every event"),
            }
        }
        let engine = &self.engine;
        self.listeners.retain(|&id, _| engine.is_alive(id));
    }

    fn stats(&self) -> Stats {
        Stats {
            prefill_seconds: self.prefill_seconds,
            decode_seconds: self.decode_seconds,
            prefill_tokens: self.prefill_tokens,
            decode_tokens: self.decode_tokens,
            queue_times: self.queue_times,
            ..self.engine.stats()
        }
    }
}
