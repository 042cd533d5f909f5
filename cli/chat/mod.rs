//! `strand chat`: a conversation with slash commands.
//!
//! [`Chat`] is the conversation and what can be done to it; the two loops (`terminal`, `piped`)
//! only read lines, and `screen` only shows what came of them. A line that fails changes nothing.

mod commands;
mod keeper;
mod piped;
mod screen;
mod terminal;
mod thinking;

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use strand_engine::context::{Chunk, Context, Conversation, Prompt};
use strand_engine::store::{Codec, Store};
use strand_engine::{EngineHandle, Request, Restore, Reuse, Segment, TiersOf};
use strand_models::{ChatTemplate, Tokenizer};

use crate::answer::{self, Answer};
use crate::args::{ChatArgs, CommonArgs, SamplingArgs};
use crate::interrupt::Interrupt;
use crate::{Outcome, UsageError, data_dir, date, load, placing, sampling};
use commands::Command;
use keeper::Keeper;
use screen::{Mode, Screen};

pub fn run(args: ChatArgs, common: &CommonArgs, interrupt: &Interrupt) -> Result<Outcome> {
    sampling::check(&args.sampling)?;
    let source = load::source(args.model.as_deref())?;
    let store = open_store(&args, common)?;
    // the engine's threads have doors of their own
    let engines = store.as_ref().ok().map(Store::another).transpose()?;
    let engine = load::start(&source, &load::config(&args.engine), engines, common)?;
    let mut chat = Chat::new(engine, store, args, interrupt.clone())?;
    let in_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    match (common.json, in_terminal) {
        (true, _) => piped::run(&mut chat, Mode::Json),
        (false, false) => piped::run(&mut chat, Mode::Piped),
        (false, true) => terminal::run(&mut chat, common),
    }
}

/// Where chunks and contexts are kept, or why they are not. A context that is to be kept needs it.
fn open_store(args: &ChatArgs, common: &CommonArgs) -> Result<Result<Store, String>> {
    match &args.context {
        Some(name) => data_dir::open_store(common)
            .map(Ok)
            .map_err(|reason| anyhow!("cannot keep the context {name}: {reason}")),
        None => Ok(data_dir::open_store_or_tell(common)),
    }
}

/// A conversation with a running model.
struct Chat {
    engine: EngineHandle,
    context: Context,
    keeper: Keeper,
    sampling: SamplingArgs,
    restore: Restore,
    codec: Codec,
    /// Of the first answer; every further one adds one.
    seed: u64,
    interrupt: Interrupt,
    totals: Totals,
}

/// What all answers so far have in sum.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    answers: u64,
    reuse: Reuse,
    generated_tokens: usize,
    /// Tokens after the first of each answer, and the time they took.
    decoded_tokens: usize,
    decode_time: Duration,
    /// Tokens of the last prompt and its answer.
    context_tokens: usize,
}

impl Chat {
    fn new(
        engine: EngineHandle,
        store: Result<Store, String>,
        args: ChatArgs,
        interrupt: Interrupt,
    ) -> Result<Self> {
        let name = engine.model_name();
        if engine.tokenizer().is_none() {
            bail!("{name} has no tokenizer, which chat needs; try generate --prompt-ids");
        }
        if engine.chat_template().is_none() {
            bail!("{name} has no chat template, which chat needs; try generate");
        }
        let (template, tokenizer) = language(&engine);
        let anchor = Context::anchor_of(template, tokenizer)?;
        let (policy, today) = (args.reuse.policy(engine.training()), date::today());
        let mut context = Context::new(policy, Conversation::new(today), anchor);
        let mut keeper = Keeper::new(store, args.context);
        if let Some((kept, chunks)) = keeper.kept_context()? {
            let chunk = |stored| Chunk::from_stored(stored, template, tokenizer).map(Arc::new);
            context.resume(kept, chunks.into_iter().map(chunk).collect::<Result<_, _>>()?)?;
            // what is asked for now wins over what was kept
            if let Some(policy) = args.reuse.reuse.filter(|policy| *policy != context.policy()) {
                context.set_policy(policy);
            }
        }
        if let Some(rows) = args.reuse.blend_tokens {
            context.blend_tokens = rows;
        }
        if args.system.is_some() {
            context.conversation.set_system(args.system);
        }
        let seed = args.sampling.seed.unwrap_or_else(sampling::any_seed);
        let (sampling, restore, codec) = (args.sampling, args.reuse.restore, args.engine.kv_codec);
        let totals = Totals::default();
        Ok(Self { engine, context, keeper, sampling, restore, codec, seed, interrupt, totals })
    }

    /// The model's template and tokenizer.
    fn language(&self) -> (&ChatTemplate, &Tokenizer) {
        language(&self.engine)
    }

    /// Asks for lossy KV where it is written too.
    fn allows_lossy(&self) -> bool {
        self.codec == Codec::Int8
    }

    /// Brings a chunk's KV into the pool, from another tier or by computing it; what of it is
    /// there is left.
    fn encode(&self, index: usize, restore: Restore) -> Result<Reuse> {
        self.encode_with(index, restore, self.allows_lossy())
    }

    /// The same, never with loss.
    fn encode_exactly(&self, index: usize) -> Result<Reuse> {
        self.encode_with(index, Restore::Always, false)
    }

    fn encode_with(&self, index: usize, restore: Restore, allow_lossy: bool) -> Result<Reuse> {
        let request = Request { restore, allow_lossy, ..self.context.encode(index) };
        let answer = answer::ask(&self.engine, request, &self.interrupt, &mut |_| Ok(()))?;
        self.check_interrupt()?;
        Ok(answer.reuse.expect("only Ctrl-C ends it before it has said so"))
    }

    /// Ends a command at Ctrl-C.
    fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.pressed() {
            bail!("ended by Ctrl-C; the context is unchanged");
        }
        Ok(())
    }

    /// Where the last segment of a prompt has its KV.
    fn tiers(&self, prompt: Vec<Segment>) -> Result<TiersOf> {
        let tiers = self.engine.residency(prompt, "", self.codec.variant())?;
        Ok(*tiers.last().expect("a prompt has segments"))
    }

    /// Where all chunks have their KV, in one question.
    fn all_tiers(&self) -> Result<Vec<TiersOf>> {
        Ok(placing::tiers(&self.engine, &self.context, "", self.codec.variant())?)
    }

    /// Tokens of the anchor, the active chunks, the system text and the turns.
    fn used_tokens(&self) -> Result<usize> {
        let (template, tokenizer) = self.language();
        Ok(self.context.used_tokens(template, tokenizer)?)
    }

    /// Carries out one line of input, shows what came of it, and keeps the context.
    fn line(&mut self, line: &str, screen: &mut Screen) -> io::Result<Flow> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(Flow::On);
        }
        let flow = self.run(line, screen)?;
        match self.keeper.keep(&self.context) {
            Ok(()) => Ok(flow),
            Err(error) => {
                screen.error(None, &error.context("cannot keep the context"))?;
                Ok(if flow == Flow::Quit { flow } else { Flow::Failed })
            }
        }
    }

    fn run(&mut self, line: &str, screen: &mut Screen) -> io::Result<Flow> {
        let Some(command) = commands::parse(line) else {
            return match self.say(line, screen) {
                Ok(true) => Ok(Flow::On),
                Ok(false) => Ok(Flow::Failed),
                // a reader that went away is no failure of the line
                Err(error) => match error.downcast::<io::Error>() {
                    Ok(error) => Err(error),
                    Err(error) => screen.error(None, &error).map(|()| Flow::Failed),
                },
            };
        };
        let name = line.split_whitespace().next().unwrap_or(line);
        let interrupt = self.interrupt.clone();
        let guard = interrupt.answering();
        let obeyed = command.and_then(|command| Ok((command.obey(self)?, command)));
        drop(guard);
        match obeyed {
            Ok((report, command)) => {
                screen.report(&report)?;
                Ok(if matches!(command, Command::Quit) { Flow::Quit } else { Flow::On })
            }
            Err(error) => screen.error(Some(name), &error).map(|()| Flow::Failed),
        }
    }

    /// Asks and shows the answer; false if Ctrl-C ended it.
    fn say(&mut self, text: &str, screen: &mut Screen) -> Result<bool> {
        self.context.say(text);
        let answered = self.answer(screen);
        // An answer that was begun counts as said; a question without one was never asked.
        match &answered {
            Ok((prompt, answer)) if !answer.token_ids.is_empty() => {
                let (opening, ids) = (&prompt.opening, &answer.token_ids);
                self.context.conversation.push_answer(opening, ids, answer.text.as_str());
                self.totals.add(answer);
            }
            _ => drop(self.context.conversation.pop()),
        }
        Ok(answered?.1.finish_reason.is_some())
    }

    fn answer(&self, screen: &mut Screen) -> Result<(Prompt, Answer)> {
        let prompt = self.prompt()?;
        let dropped = prompt.dropped;
        if dropped.turns > 0 {
            let (turns, tokens) = (dropped.turns, dropped.tokens);
            screen.note(&format!("the oldest {turns} turns no longer fit ({tokens} tokens)"))?;
        }
        let seed = self.seed.wrapping_add(self.totals.answers);
        let sampling = SamplingArgs { seed: Some(seed), ..self.sampling.clone() };
        let request = Request {
            prompt: prompt.segments.clone(),
            sampling: sampling::params(&sampling, self.engine.generation_defaults(), seed),
            limits: sampling::limits(&sampling),
            restore: self.restore,
            allow_lossy: self.allows_lossy(),
            ..Request::new(Vec::new())
        };
        screen.begin(self.opens_thinking(&prompt));
        let guard = self.interrupt.answering();
        let answer = answer::ask(&self.engine, request, &self.interrupt, &mut |piece| {
            screen.piece(piece.text)
        });
        drop(guard);
        let answer = match answer {
            Ok(answer) => Answer { dropped, ..answer },
            Err(error) => {
                screen.cut()?;
                return Err(error);
            }
        };
        screen.end(&answer, self.engine.tokenizer())?;
        Ok((prompt, answer))
    }

    fn prompt(&self) -> Result<Prompt> {
        let length = self.engine.plan().max_model_len;
        let kept = self.sampling.max_tokens.unwrap_or_else(|| placing::answer_room(length));
        if kept >= length {
            let text = format!("--max-tokens {kept} leaves no room in the {length} of the model");
            return Err(UsageError(text).into());
        }
        Ok(placing::prompt(&self.engine, &self.context, self.language(), kept)?)
    }

    /// True for templates that write `<think>` themselves, before the answer begins.
    fn opens_thinking(&self, prompt: &Prompt) -> bool {
        let (_, tokenizer) = self.language();
        let opening = tokenizer.decode(&prompt.opening);
        opening.trim_end().ends_with(thinking::OPEN)
    }
}

fn language(engine: &EngineHandle) -> (&ChatTemplate, &Tokenizer) {
    let template = engine.chat_template().expect("checked at start");
    (template, engine.tokenizer().expect("checked at start"))
}

/// What a loop does after a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    /// Go on; the line failed and has said why.
    Failed,
    Quit,
}

impl Totals {
    fn add(&mut self, answer: &Answer) {
        self.answers += 1;
        if let Some(reuse) = answer.reuse {
            self.reuse = Reuse {
                device: self.reuse.device + reuse.device,
                host: self.reuse.host + reuse.host,
                disk: self.reuse.disk + reuse.disk,
                encoded: self.reuse.encoded + reuse.encoded,
                recomputed: self.reuse.recomputed + reuse.recomputed,
            };
        }
        self.generated_tokens += answer.token_ids.len();
        if !answer.timings.decode.is_zero() {
            self.decoded_tokens += answer.token_ids.len() - 1;
            self.decode_time += answer.timings.decode;
        }
        self.context_tokens = answer.prompt_tokens + answer.token_ids.len();
    }
}
