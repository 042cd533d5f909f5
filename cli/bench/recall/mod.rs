//! What a model reads out of its chunks: exact answers and refusals, by reuse policy.
//!
//! All items are sent at once, greedily, so that batches form and prefixes are shared; neither
//! changes an answer. Prompts are those that chat makes: [`Context`] builds every one. Ways are
//! measured one after the other.
//!
//! Under `mask` a context is not asked as it was loaded: a chunk of another question stands first
//! and is then switched off, as is the chunk with the answer where that is to be inactive.

pub mod items;
mod report;
mod score;
mod way;

use std::collections::HashSet;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use strand_engine::context::{Chunk, Context, Conversation, ReusePolicy};
use strand_engine::store::Codec;
use strand_engine::{Error, Event, EventStream, Exactness, Limits, Request, Restore, Segment};
use strand_models::{ChatTemplate, Tokenizer};

use super::Bench;
use super::disk::Folder;
use crate::Outcome;
use crate::args::{CommonArgs, RecallArgs};
use items::Item;
use report::Report;
use score::{Arrangement, Tally, judge};
pub use way::Way;

/// Longest answer in tokens: twice what the longest right one takes.
const MAX_ANSWER: usize = 200;

pub fn run(args: &RecallArgs, common: &CommonArgs) -> Result<Outcome> {
    let items = items::read(&args.file, args.limit)?;
    let requests = items.iter().map(|item| Arrangement::of(item).len()).sum();
    // dropped last: the engine's files lie in it
    let folder = args.policy.contains(&Way::Int8).then(|| Folder::new(common)).transpose()?;
    let bench = match &folder {
        Some(folder) => Bench::start_in(folder, &args.model, common, requests)?.0,
        None => Bench::start(&args.model, common, requests)?,
    };
    if folder.is_some() {
        bench.check_int8_files("--policy")?;
    }
    let asker = Asker::new(&bench)?;
    let questions: Vec<Question> =
        items.iter().map(|item| asker.question(item)).collect::<Result<_>>()?;
    let started = Instant::now();
    let mut tallies = Vec::new();
    for &way in &args.policy {
        if way == Way::Int8 {
            asker.pass_through_int8(&questions)?;
        }
        tallies.push((way, asker.measure(&questions, way, common.verbose)?));
    }
    let report = Report {
        file: &args.file,
        items: items.len(),
        requests: requests * args.policy.len(),
        seconds: started.elapsed().as_secs_f64(),
        tallies: &tallies,
    };
    report.print(&bench)?;
    Ok(Outcome::Done)
}

/// An item whose chunks are tokenized.
struct Question<'a> {
    item: &'a Item,
    chunks: Vec<Chunk>,
    conversation: Conversation,
}

struct Asker<'a> {
    bench: &'a Bench,
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    anchor: Vec<u32>,
}

impl<'a> Asker<'a> {
    fn new(bench: &'a Bench) -> Result<Self> {
        let Some(tokenizer) = bench.engine.tokenizer() else {
            bail!("{} has no tokenizer, which this bench needs", bench.model);
        };
        let Some(template) = bench.engine.chat_template() else {
            bail!("{} has no chat template, which this bench needs", bench.model);
        };
        let anchor = Context::anchor_of(template, tokenizer)?;
        Ok(Self { bench, template, tokenizer, anchor })
    }

    fn question<'i>(&self, item: &'i Item) -> Result<Question<'i>> {
        let chunks = item.chunks.iter().map(|chunk| {
            let content = chunk.content.clone().into_bytes();
            Chunk::new(&chunk.name, chunk.kind, content, self.template, self.tokenizer)
        });
        let chunks = chunks.collect::<Result<_, _>>().with_context(|| about(item))?;
        let mut conversation = Conversation::default();
        conversation.set_system(item.system.clone());
        for turn in &item.turns {
            conversation.push_user(turn.user.as_str());
            conversation.push_answer(&[], &[], turn.assistant.as_str());
        }
        conversation.push_user(item.question.as_str());
        Ok(Question { item, chunks, conversation })
    }

    /// Sends every question in every arrangement, then reads the answers. With `tells`, those
    /// that are not the expected ones go to standard error.
    fn measure(&self, questions: &[Question], way: Way, tells: bool) -> Result<Tally> {
        let mut asked = Vec::new();
        for (question, other) in questions.iter().zip(questions.iter().cycle().skip(1)) {
            for &arrangement in Arrangement::of(question.item) {
                let stream = self
                    .request(question, other, arrangement, way)
                    .and_then(|request| self.bench.submit(request))
                    .with_context(|| about(question.item))?;
                asked.push((question.item, arrangement, stream));
            }
        }
        let mut tally = Tally::default();
        for (item, arrangement, stream) in asked {
            let (text, exactness) = read(stream).with_context(|| about(item))?;
            let has_chunks = item.chunks.len() > usize::from(arrangement == Arrangement::Inactive);
            if way == Way::Int8 && has_chunks && exactness != Exactness::Approximate {
                bail!("{}: lossless KV was found where int8 was to be measured", about(item));
            }
            let verdicts = judge(item, arrangement, &text);
            if tells && !verdicts[0].1 {
                let way = way.as_str();
                eprintln!(
                    "{} {arrangement:?} {way}: {:?} gets {text:?}, not {:?}",
                    item.id,
                    item.question,
                    arrangement.expected(item)
                );
            }
            tally.add(item, &verdicts);
        }
        Ok(tally)
    }

    fn request(
        &self,
        question: &Question,
        other: &Question,
        arrangement: Arrangement,
        way: Way,
    ) -> Result<Request, Error> {
        let (policy, talk) = (way.policy(), question.conversation.clone());
        let mut context = Context::new(policy, talk, self.anchor.clone());
        let mut hidden = Vec::new();
        if policy == ReusePolicy::Mask
            && let Some(stranger) = other.chunks.first()
        {
            context.load(stranger.clone(), true);
            hidden.push(stranger.id);
        }
        let mut chunks: Vec<(usize, &Chunk)> = question.chunks.iter().enumerate().collect();
        if arrangement == Arrangement::Reversed {
            chunks.reverse();
        }
        for (index, chunk) in chunks {
            context.load(chunk.clone(), true);
            let is_holder = question.item.answer_chunk == Some(index);
            if is_holder && arrangement == Arrangement::Inactive {
                hidden.push(chunk.id);
            }
        }
        for index in 0..context.entries().len() {
            let is_hidden = hidden.contains(&context.entries()[index].chunk.id);
            context.set_active(index, !is_hidden);
        }
        // The whole length: a turn left out would make another question of it.
        let prompt: Vec<Segment> =
            context.prompt(self.template, self.tokenizer, usize::MAX)?.segments;
        let limits = Limits { max_tokens: Some(MAX_ANSWER), ..Limits::default() };
        let (restore, allow_lossy) = (Restore::Always, way == Way::Int8);
        Ok(Request { prompt, limits, restore, allow_lossy, ..Request::new(Vec::new()) })
    }

    /// Leaves every chunk's KV as an int8 file, and nowhere else.
    fn pass_through_int8(&self, questions: &[Question]) -> Result<()> {
        let engine = &self.bench.engine;
        let mut done = HashSet::new();
        for chunk in questions.iter().flat_map(|question| &question.chunks) {
            if !done.insert(chunk.id) {
                continue;
            }
            let talk = Conversation::default();
            let mut alone = Context::new(ReusePolicy::Independent, talk, self.anchor.clone());
            alone.load(chunk.clone(), true);
            read(self.bench.submit(alone.encode(0))?)?;
            engine.save(alone.segments_to(0), "", Codec::Int8)?;
            engine.forget(chunk.id, None)?;
        }
        Ok(())
    }
}

fn about(item: &Item) -> String {
    format!("cannot ask {}", item.id)
}

fn read(mut stream: EventStream) -> Result<(String, Exactness), Error> {
    let mut answer = String::new();
    while let Some(event) = stream.next_blocking() {
        match event {
            Event::Token { text, .. } => answer.push_str(&text),
            Event::Finished { text, exactness, .. } => return Ok((answer + &text, exactness)),
            Event::Failed(error) => return Err(error),
            Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
    Err(Error::Stopped)
}
