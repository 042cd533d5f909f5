//! What a model reads out of its chunks: exact answers and refusals, by reuse policy.
//!
//! All items are sent at once, greedily, so that batches form and prefixes are shared; neither
//! changes an answer. Prompts are those that chat makes: [`Context`] builds every one. Policies
//! are measured one after the other.

pub mod items;
mod report;
mod score;

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use strand_engine::context::{Chunk, Context, Conversation, ReusePolicy};
use strand_engine::{Error, Event, EventStream, Limits, Request, Segment};
use strand_models::{ChatTemplate, Tokenizer};

use super::Bench;
use crate::Outcome;
use crate::args::{CommonArgs, RecallArgs};
use items::Item;
use report::Report;
use score::{Arrangement, Tally, judge};

/// Longest answer in tokens: twice what the longest right one takes.
const MAX_ANSWER: usize = 200;

pub fn run(args: &RecallArgs, common: &CommonArgs) -> Result<Outcome> {
    let items = items::read(&args.file, args.limit)?;
    let requests = items.iter().map(|item| Arrangement::of(item).len()).sum();
    let bench = Bench::start(&args.model, common, requests)?;
    let asker = Asker::new(&bench)?;
    let questions: Vec<Question> =
        items.iter().map(|item| asker.question(item)).collect::<Result<_>>()?;
    let started = Instant::now();
    let mut tallies = Vec::new();
    for &policy in &args.policy {
        tallies.push((policy, asker.measure(&questions, policy, common.verbose)?));
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
    fn measure(&self, questions: &[Question], policy: ReusePolicy, tells: bool) -> Result<Tally> {
        let mut asked = Vec::new();
        for question in questions {
            for &arrangement in Arrangement::of(question.item) {
                let stream = self
                    .request(question, arrangement, policy)
                    .and_then(|request| self.bench.submit(request))
                    .with_context(|| about(question.item))?;
                asked.push((question.item, arrangement, stream));
            }
        }
        let mut tally = Tally::default();
        for (item, arrangement, stream) in asked {
            let text = read(stream).with_context(|| about(item))?;
            let verdicts = judge(item, arrangement, &text);
            if tells && !verdicts[0].1 {
                let policy = policy.as_str();
                eprintln!(
                    "{} {arrangement:?} {policy}: {:?} gets {text:?}, not {:?}",
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
        arrangement: Arrangement,
        policy: ReusePolicy,
    ) -> Result<Request, Error> {
        let mut context = Context::new(policy, question.conversation.clone(), self.anchor.clone());
        let mut chunks: Vec<(usize, &Chunk)> = question.chunks.iter().enumerate().collect();
        if arrangement == Arrangement::Reversed {
            chunks.reverse();
        }
        for (index, chunk) in chunks {
            let is_holder = question.item.answer_chunk == Some(index);
            context.load(chunk.clone(), !(is_holder && arrangement == Arrangement::Inactive));
        }
        // The whole length: a turn left out would make another question of it.
        let prompt: Vec<Segment> =
            context.prompt(self.template, self.tokenizer, usize::MAX)?.segments;
        let limits = Limits { max_tokens: Some(MAX_ANSWER), ..Limits::default() };
        Ok(Request { prompt, limits, ..Request::new(Vec::new()) })
    }
}

fn about(item: &Item) -> String {
    format!("cannot ask {}", item.id)
}

fn read(mut stream: EventStream) -> Result<String, Error> {
    let mut answer = String::new();
    while let Some(event) = stream.next_blocking() {
        match event {
            Event::Token { text, .. } => answer.push_str(&text),
            Event::Finished { text, .. } => return Ok(answer + &text),
            Event::Failed(error) => return Err(error),
            Event::Prompt { .. } => {}
        }
    }
    Err(Error::Stopped)
}
