//! Chunks of a length: text where the model can read it, else random tokens.

use anyhow::{Result, bail};
use strand_engine::context::{Chunk, ChunkKind, Context, Conversation, ReusePolicy};
use strand_engine::{ChunkId, Segment};
use strand_models::{ChatTemplate, Tokenizer};

use super::super::Bench;
use super::super::recall::items::{self, Item, Task};
use super::super::workload::Random;
use crate::args::TiersArgs;

/// Tokens in a question that is random.
const RANDOM_QUESTION: usize = 16;

/// A chunk and questions about it.
pub struct Sample {
    /// The chunk alone.
    pub context: Context,
    /// Whole prompts, the chunk first.
    pub questions: Vec<Vec<Segment>>,
    /// Random questions have no answer that ends.
    pub ignore_eos: bool,
}

pub struct Samples<'a> {
    args: &'a TiersArgs,
    vocab_size: usize,
    random: Random,
    text: Option<Text<'a>>,
    number: usize,
}

/// Items, taken one after the other.
struct Text<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    anchor: Vec<u32>,
    items: std::vec::IntoIter<Item>,
}

impl<'a> Samples<'a> {
    pub fn new(bench: &'a Bench, args: &'a TiersArgs) -> Result<Self> {
        let (template, tokenizer) = (bench.engine.chat_template(), bench.engine.tokenizer());
        let text = match template.zip(tokenizer) {
            Some((template, tokenizer)) => {
                let anchor = Context::anchor_of(template, tokenizer)?;
                let items = items::read(&args.file, None)?.into_iter();
                Some(Text { template, tokenizer, anchor, items })
            }
            None => None,
        };
        let vocab_size = bench.engine.plan().vocab_size;
        Ok(Self { args, vocab_size, random: Random::new(args.model.seed), text, number: 0 })
    }

    /// What stands before every chunk.
    pub fn anchor(&self) -> &[u32] {
        self.text.as_ref().map_or(&[], |text| &text.anchor)
    }

    /// Another chunk of so many tokens; of text: or as many more as its last item has.
    pub fn next(&mut self, len: usize) -> Result<Sample> {
        self.number += 1;
        match &mut self.text {
            Some(text) => text.next(len, self.number, self.args),
            None => Ok(self.next_random(len)),
        }
    }

    fn next_random(&mut self, len: usize) -> Sample {
        let ids = self.random.prompt(len, self.vocab_size);
        let name = format!("{} of seed {}", self.number, self.args.model.seed);
        let (id, kind, text) = (ChunkId::of(name.as_bytes()), ChunkKind::File, String::new());
        let context = alone(Chunk { id, name, kind, text, ids }, Vec::new());
        let questions = (0..self.args.questions).map(|_| {
            let question = self.random.prompt(RANDOM_QUESTION, self.vocab_size);
            let mut prompt = context.chunk_segments();
            prompt.push(Segment::new(question));
            prompt
        });
        let questions = questions.collect();
        Sample { context, questions, ignore_eos: true }
    }
}

impl Text<'_> {
    fn next(&mut self, len: usize, number: usize, args: &TiersArgs) -> Result<Sample> {
        let mut content = String::new();
        let mut asked = Vec::new();
        let chunk = loop {
            let Some(item) = self.items.next() else {
                bail!(
                    "{} has not enough text for all chunks; lower --num-chunks or --chunk-lens",
                    args.file.display()
                );
            };
            for chunk in &item.chunks {
                content.push_str(chunk.content.trim_end());
                content.push('\n');
            }
            if item.task == Task::Recall {
                asked.push(item.question);
            }
            if content.is_empty() {
                continue; // an item without chunks
            }
            let (name, bytes) = (format!("{number}.md"), content.clone().into_bytes());
            let kind = ChunkKind::File;
            let chunk = Chunk::new(&name, kind, bytes, self.template, self.tokenizer)?;
            if chunk.ids.len() >= len {
                break chunk;
            }
        };
        let context = alone(chunk, self.anchor.clone());
        let questions = asked.into_iter().take(args.questions).map(|question| {
            let mut context = context.clone();
            context.say(question);
            Ok(context.prompt(self.template, self.tokenizer, usize::MAX)?.segments)
        });
        let questions = questions.collect::<Result<_>>()?;
        Ok(Sample { context, questions, ignore_eos: false })
    }
}

fn alone(chunk: Chunk, anchor: Vec<u32>) -> Context {
    let mut context = Context::new(ReusePolicy::Independent, Conversation::default(), anchor);
    context.load(chunk, true);
    context
}
