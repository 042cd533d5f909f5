//! What may be generated, as masks over the vocabulary: JSON, schemas, regular expressions,
//! grammars.
//!
//! Compiling is bounded in time, memory and depth, whatever it is given; so is every mask. What a
//! grammar can't hold to is refused by name and never ignored. The arithmetic is llguidance's.

mod guide;
mod lark;
mod schema;
mod vocabulary;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory};
use serde_json::json;
use strand_models::Tokenizer;
use toktrie::InferenceCapabilities;

use crate::error::Error;
pub use guide::PendingMask;
use guide::look_ahead;
pub(crate) use guide::{Guide, MaskWorkers};

/// Longest text of a schema, an expression or a grammar.
const MAX_TEXT: usize = 256 << 10;
/// How deep brackets nest in expressions and grammars.
const MAX_NESTING: usize = 200;
/// Rules that name each other in a row are compiled one inside the other.
const STACK_BYTES: usize = 256 << 20;
/// How long whoever asks waits, for those before it too.
const LONGEST_COMPILE: Duration = Duration::from_secs(10);
/// Grammars that may wait to be compiled.
const COMPILE_QUEUE: usize = 256;
/// Longest reason that an error gives.
const MAX_REASON: usize = 400;

/// What a text must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema, given as JSON text, holds for.
    JsonSchema(String),
    /// The whole text matches.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark. `%json {...}` in it is a schema.
    Lark(String),
}

/// Compiles grammars for one vocabulary. Clones share it.
#[derive(Debug, Clone)]
pub struct Grammars {
    jobs: SyncSender<Job>,
    vocab_size: usize,
}

/// A compiled grammar. Clones share it; two are equal where they do.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    matcher: Matcher,
    first_mask: PendingMask,
    vocab_size: usize,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Grammar(over {} tokens)", self.0.vocab_size)
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Grammar {
    /// Tokens that its masks speak of.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    fn first_mask(&self) -> &PendingMask {
        &self.0.first_mask
    }

    /// At the start. Shares nothing that grows with use, so that no choice depends on another.
    fn matcher(&self) -> Matcher {
        self.0.matcher.deep_clone()
    }
}

/// A grammar to compile, who waits for it, and until when.
struct Job {
    grammar: TopLevelGrammar,
    answer: SyncSender<Result<Grammar, Error>>,
    deadline: Instant,
}

impl Grammars {
    /// `vocab_size` is the model's, which may have room for more than the tokenizer has; `eos` are
    /// the tokens that end a text, which a grammar allows where it is complete.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, eos: &[u32]) -> Result<Self, Error> {
        let vocabulary = vocabulary::vocabulary(tokenizer, vocab_size, eos)?;
        let slices = SlicedBiasComputer::general_slices();
        let capabilities = InferenceCapabilities::default();
        let factory = ParserFactory::new(&vocabulary, capabilities, &slices);
        let mut factory = factory.map_err(refused)?;
        factory.quiet();
        *factory.limits_mut() = limits();
        let (jobs, receiver) = sync_channel(COMPILE_QUEUE);
        std::thread::Builder::new()
            .name("strand-grammars".into())
            .stack_size(STACK_BYTES)
            .spawn(move || compile_all(&factory, &receiver, vocab_size))
            .expect("the system can start a thread");
        Ok(Self { jobs, vocab_size })
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Waits for the grammar, or for why there is none, but never for long.
    ///
    /// # Errors
    /// [`Error::Grammar`] with the reason: what is not supported, too large, or contradicts
    /// itself.
    pub fn compile(&self, spec: &GrammarSpec) -> Result<Grammar, Error> {
        let grammar = top_level(spec)?;
        let (answer, receiver) = sync_channel(1);
        let deadline = Instant::now() + LONGEST_COMPILE;
        self.jobs.try_send(Job { grammar, answer, deadline }).map_err(|error| match error {
            TrySendError::Full(_) => refused("too many grammars are being compiled; try again"),
            TrySendError::Disconnected(_) => refused("the compiler has ended"),
        })?;
        receiver.recv_timeout(LONGEST_COMPILE).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => refused(format_args!(
                    "it isn't compiled after {} seconds; simplify it",
                    LONGEST_COMPILE.as_secs()
                )),
                RecvTimeoutError::Disconnected => refused("the compiler has ended"),
            })
        })
    }
}

/// One by one, so that never more than one is built in memory; until all who may ask are gone.
fn compile_all(factory: &ParserFactory, jobs: &Receiver<Job>, vocab_size: usize) {
    for job in jobs {
        if Instant::now() < job.deadline {
            // who gave up waiting wants no answer
            drop(job.answer.send(compile(factory, job.grammar, vocab_size)));
        }
    }
}

fn compile(
    factory: &ParserFactory,
    grammar: TopLevelGrammar,
    vocab_size: usize,
) -> Result<Grammar, Error> {
    let parser = factory.create_parser(grammar).map_err(refused)?;
    let mut matcher = Matcher::new(Ok(parser));
    let first_mask = PendingMask::default();
    first_mask.set(Ok(look_ahead(&mut matcher)?));
    Ok(Grammar(Arc::new(Compiled { matcher, first_mask, vocab_size })))
}

/// What one grammar and one mask may cost.
fn limits() -> ParserLimits {
    ParserLimits {
        max_grammar_size: 200_000,
        max_lexer_states: 20_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// The grammar as llguidance takes it, once its text is within bounds.
fn top_level(spec: &GrammarSpec) -> Result<TopLevelGrammar, Error> {
    Ok(match spec {
        GrammarSpec::JsonObject => {
            TopLevelGrammar::from_json_schema(schema::bounded(json!({"type": "object"}))?)
        }
        GrammarSpec::JsonSchema(text) => {
            within_bounds(text)?;
            TopLevelGrammar::from_json_schema(schema::checked(text)?)
        }
        GrammarSpec::Regex(text) => {
            within_bounds(text)?;
            nested_within_bounds(text)?;
            TopLevelGrammar::from_regex(text)
        }
        GrammarSpec::Lark(text) => {
            within_bounds(text)?;
            TopLevelGrammar::from_lark(lark::checked(text)?)
        }
    })
}

fn within_bounds(text: &str) -> Result<(), Error> {
    if text.len() > MAX_TEXT {
        let len = text.len();
        return Err(refused(format_args!("it has {len} bytes, it must have at most {MAX_TEXT}")));
    }
    Ok(())
}

/// Brackets are read one inside the other.
fn nested_within_bounds(text: &str) -> Result<(), Error> {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            // one too many is for the parser to refuse
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING {
        return Err(refused(format_args!(
            "its brackets nest {deepest} deep, at most {MAX_NESTING}"
        )));
    }
    Ok(())
}

/// An error of the library without the marks it puts around its reasons.
fn refused(reason: impl fmt::Display) -> Error {
    let reason = reason.to_string();
    let reason = reason.split("<non-verbose/>").next().unwrap_or_default().trim();
    let reason = reason.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    Error::Grammar { reason: reason.chars().take(MAX_REASON).collect() }
}
