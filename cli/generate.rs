//! `strand generate`: one prompt, one answer.
//!
//! Text is printed as it becomes certain. Without a tokenizer the answer is its token ids,
//! separated by commas as `--prompt-ids` takes them. With `--json` it is one object at the end.
//! Files are read before the model is loaded: what is missing is told at once.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use strand_engine::context::{ChunkKind, Context, Conversation};
use strand_engine::store::{Codec, Store};
use strand_engine::{ChunkId, EngineHandle, Limits, Request, Segment};

use crate::answer::{self, Answer, Piece};
use crate::args::{CommonArgs, GenerateArgs, PromptArgs};
use crate::chunk_file::{self, ChunkFile};
use crate::interrupt::Interrupt;
use crate::{Outcome, data_dir, date, load, sampling};

pub fn run(args: &GenerateArgs, common: &CommonArgs, interrupt: &Interrupt) -> Result<Outcome> {
    sampling::check(&args.sampling)?;
    let prompt = Prompt {
        question: read(&args.prompt)?,
        chunks: args.chunk.iter().map(|path| chunk_file::read(path)).collect::<Result<_>>()?,
    };
    let source = load::source(args.model.as_deref())?;
    // without chunks there is nothing to look up
    let store = match args.chunk.is_empty() {
        true => None,
        false => data_dir::open_store_or_tell(common).ok(),
    };
    let engines = store.as_ref().map(Store::another).transpose()?;
    let engine = load::start(&source, &load::config(&args.engine), engines, common)?;
    let request = Request {
        prompt: segments(&engine, args, prompt, store.as_ref())?,
        sampling: sampling::params(
            &args.sampling,
            engine.generation_defaults(),
            sampling::any_seed(),
        ),
        limits: Limits {
            prompt_logprobs: args.prompt_logprobs,
            ..sampling::limits(&args.sampling)
        },
        restore: args.reuse.restore,
        allow_lossy: args.engine.kv_codec == Codec::Int8,
        ..Request::new(Vec::new())
    };
    let answer = print(&engine, request, common.json, interrupt)?;
    Ok(if answer.finish_reason.is_some() { Outcome::Done } else { Outcome::Interrupted })
}

struct Prompt {
    question: Question,
    /// In the order in which they stand before the question.
    chunks: Vec<ChunkFile>,
}

enum Question {
    Ids(Vec<u32>),
    Text(String),
}

fn read(args: &PromptArgs) -> Result<Question> {
    Ok(match args {
        PromptArgs { prompt_ids: Some(ids), .. } => Question::Ids(ids.clone()),
        PromptArgs { prompt: Some(text), .. } => Question::Text(text.clone()),
        PromptArgs { file: Some(path), .. } => Question::Text(read_text(path)?),
        _ => unreachable!("the group of prompt options is required"),
    })
}

fn read_text(path: &Path) -> Result<String> {
    let read = || {
        let mut bytes = Vec::new();
        match path.to_str() {
            Some("-") => io::stdin().read_to_end(&mut bytes).map(|_| bytes),
            _ => fs::read(path),
        }
    };
    let bytes = read().with_context(|| format!("cannot read the prompt {}", path.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("the prompt {} is not UTF-8, first at byte {at}", path.display())
    })
}

fn segments(
    engine: &EngineHandle,
    args: &GenerateArgs,
    prompt: Prompt,
    store: Option<&Store>,
) -> Result<Vec<Segment>> {
    let text = match prompt.question {
        Question::Ids(tokens) => return Ok(vec![Segment::new(tokens)]),
        Question::Text(text) => text,
    };
    let Some(tokenizer) = engine.tokenizer() else {
        bail!("{} has no tokenizer; give the prompt with --prompt-ids", engine.model_name());
    };
    if !args.chat {
        return Ok(vec![Segment::new(tokenizer.encode(&text)?)]);
    }
    let Some(template) = engine.chat_template() else {
        bail!("{} has no chat template; leave --chat out", engine.model_name());
    };
    let mut conversation = Conversation::new(date::today());
    conversation.set_system(args.system.clone());
    let anchor = Context::anchor_of(template, tokenizer)?;
    let policy = args.reuse.policy(engine.training());
    let mut context = Context::new(policy, conversation, anchor);
    if let Some(rows) = args.reuse.blend_tokens {
        context.blend_tokens = rows;
    }
    for ChunkFile { name, content } in prompt.chunks {
        // a chunk keeps the name and kind it was first saved with
        let stored = store.map(|store| store.chunk(ChunkId::of(&content))).transpose()?.flatten();
        let known = stored.map(|stored| (stored.info.name, stored.info.kind));
        let (name, kind) = known.unwrap_or((name, ChunkKind::File));
        context.load(chunk_file::chunk(engine, &name, kind, content)?, true);
    }
    context.say(text);
    // The whole length: the engine says better than the context what does not fit.
    Ok(context.prompt(template, tokenizer, usize::MAX)?.segments)
}

fn print(
    engine: &EngineHandle,
    request: Request,
    json: bool,
    interrupt: &Interrupt,
) -> Result<Answer> {
    let mut out = io::stdout();
    let (mut first, has_text) = (true, engine.tokenizer().is_some());
    let mut show = |piece: Piece| {
        if json {
            return Ok(());
        }
        match piece.token {
            _ if has_text => out.write_all(piece.text.as_bytes())?,
            Some(token) if first => write!(out, "{token}")?,
            Some(token) => write!(out, ",{token}")?,
            None => {}
        }
        first = false;
        out.flush()
    };
    let guard = interrupt.answering();
    let answer = answer::ask(engine, request, interrupt, &mut show)?;
    drop(guard);
    if json {
        writeln!(out, "{}", answer.to_json(engine.tokenizer()))?;
    } else {
        writeln!(out)?;
    }
    Ok(answer)
}
