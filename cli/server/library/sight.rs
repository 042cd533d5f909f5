//! What one request sees of the library: chunks for itself alone, or a context.
//!
//! A context's conversation goes on when the answer is complete, before its end is told: with
//! what was said, and the very tokens that were generated. A sight that is dropped before has
//! changed nothing.

use std::sync::Arc;

use serde_json::{Value, json};
use strand_engine::context::{Context, Dropped, Role};
use strand_engine::store::StoredContext;
use strand_engine::{KvVariant, Restore, Reuse, Segment, Tier};

use super::misses::{Miss, Wanted, wanted};
use super::shelf::{Claim, Shelf, failed};
use super::{Wish, contexts, language, names};
use crate::placing;
use crate::server::error::ApiError;
use crate::server::generation::Piece;
use crate::server::prompt::{self, Chat, Ending};
use crate::server::state::{Server, now};
use crate::server::tools::{self, Style};
use crate::server::wire::chunks::SeenChunk;
use crate::server::wire::messages::ChatMessage;

pub struct Sight {
    shelf: Arc<Shelf>,
    context: Context,
    salt: String,
    max_tokens: Option<usize>,
    /// `None`: the chunks are for this request alone.
    talk: Option<Talk>,
    wanted: Vec<Wanted>,
    told: Told,
}

/// A context whose conversation goes on.
struct Talk {
    id: String,
    _claim: Claim,
    /// What opens the answer, and what was generated since.
    opening: Vec<u32>,
    ids: Vec<u32>,
    text: String,
    calls: Calls,
}

/// How calls in an answer are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Calls {
    /// As they were said.
    AsSaid,
    /// A grammar made the answer an object; one that calls one of these is kept as the model says
    /// it where it is free.
    As(Style, Vec<String>),
}

impl Talk {
    /// The answer's text, and its tokens where they are what stands for it, as the conversation
    /// goes on with them.
    fn answer(&mut self) -> (Vec<u32>, String) {
        let text = std::mem::take(&mut self.text);
        let generated = [&self.opening[..], &self.ids[..]].concat();
        let Calls::As(style, names) = &self.calls else { return (generated, text) };
        let is_call = |answer: &Value| names.iter().any(|name| answer["name"] == **name);
        match serde_json::from_str(&text).ok().filter(is_call) {
            Some(call) => (Vec::new(), tools::spelt(&json!([{"function": call}]), *style)),
            None => (generated, text),
        }
    }
}

/// What an answer says of what it saw.
#[derive(Debug, Clone, Default)]
pub struct Told {
    chunks: Vec<SeenChunk>,
    pub dropped: Dropped,
}

impl Told {
    /// The chunks, once it is known where their KV came from.
    pub fn chunks(&self, reuse: &Reuse) -> Vec<SeenChunk> {
        let mut chunks = self.chunks.clone();
        if reuse.disk == 0 {
            // computing was the faster way
            let computed = chunks.iter_mut().filter(|chunk| chunk.source == Tier::Disk.as_str());
            computed.for_each(SeenChunk::was_computed);
        }
        chunks
    }
}

/// The prompt of a chat, over what it sees of the library if it asks for anything. `style`: how
/// calls in the answer will look.
pub fn chat(
    server: &Server,
    sight: Option<&mut Sight>,
    chat: Chat,
    style: Style,
) -> Result<Vec<Segment>, ApiError> {
    match sight {
        Some(sight) => sight.chat(server, chat, style),
        None => prompt::of_chat(server, chat),
    }
}

impl Sight {
    /// An active set for one request.
    pub fn of_chunks(
        server: &Server,
        shelf: Arc<Shelf>,
        wish: &Wish,
        ids: &[String],
    ) -> Result<Self, ApiError> {
        let policy = super::policy(wish.selection.reuse.as_deref(), "reuse")?;
        let mut context = server.library.empty(policy);
        for (index, id) in ids.iter().enumerate() {
            let id = names::chunk(&shelf, id, &format!("chunks[{index}]"))?;
            context.load(shelf.chunk(server, id)?, true);
        }
        Ok(Self::new(shelf, context, wish, None))
    }

    /// A context, which nobody else changes until the sight is gone.
    pub fn of_context(
        server: &Server,
        shelf: Arc<Shelf>,
        wish: &Wish,
        id: &str,
    ) -> Result<Self, ApiError> {
        let claim = contexts::claim(&shelf, id)?;
        let (_, context) = contexts::load(server, &shelf, id)?;
        let talk = Talk {
            id: id.to_owned(),
            _claim: claim,
            opening: Vec::new(),
            ids: Vec::new(),
            text: String::new(),
            calls: Calls::AsSaid,
        };
        Ok(Self::new(shelf, context, wish, Some(talk)))
    }

    fn new(shelf: Arc<Shelf>, context: Context, wish: &Wish, talk: Option<Talk>) -> Self {
        Self {
            shelf,
            context,
            salt: wish.salt.clone(),
            max_tokens: wish.max_tokens,
            talk,
            wanted: Vec::new(),
            told: Told::default(),
        }
    }

    pub fn told(&self) -> Told {
        self.told.clone()
    }

    /// The prompt of a chat over what is seen.
    fn chat(
        &mut self,
        server: &Server,
        chat: Chat,
        style: Style,
    ) -> Result<Vec<Segment>, ApiError> {
        let Some(talk) = &mut self.talk else {
            let said = prompt::of_chat(server, chat)?;
            return self.behind_chunks(server, said);
        };
        if chat.ending != Ending::Opening {
            let message = "over a context the assistant's next message is asked for";
            return Err(ApiError::invalid("context", message));
        }
        say(server, &mut self.context, chat.messages)?;
        if let Some(tools) = chat.tools {
            if style != server.model.style {
                talk.calls = Calls::As(server.model.style, names_of(&tools));
            }
            offer(server, &mut self.context, tools);
        }
        let length = server.engine.plan().max_model_len;
        let kept = self.max_tokens.unwrap_or_else(|| placing::answer_room(length));
        let prompt = placing::prompt(&server.engine, &self.context, language(server)?, kept)?;
        talk.opening = prompt.opening;
        self.told.dropped = prompt.dropped;
        self.look(server)?;
        Ok(prompt.segments)
    }

    /// The prompt of what a client has put together itself.
    pub fn text(&mut self, server: &Server, ids: &[u32]) -> Result<Vec<Segment>, ApiError> {
        // the anchor stands before the chunks already
        let ids = ids.strip_prefix(self.context.anchor()).unwrap_or(ids);
        self.behind_chunks(server, vec![Segment::new(ids.to_vec())])
    }

    /// What is said behind the active chunks; the anchor stands before them already.
    fn behind_chunks(
        &mut self,
        server: &Server,
        said: Vec<Segment>,
    ) -> Result<Vec<Segment>, ApiError> {
        let mut segments = self.context.chunk_segments();
        segments.extend(said.into_iter().filter(|segment| !segment.is_anchor));
        self.look(server)?;
        Ok(segments)
    }

    /// Finds out where the chunks have their KV, and why not.
    fn look(&mut self, server: &Server) -> Result<(), ApiError> {
        let (engine, context) = (&server.engine, &self.context);
        let tiers = placing::tiers(engine, context, &self.salt, KvVariant::Lossless)?;
        let wanted = wanted(context, engine.identity(), &self.salt);
        let chunks = context.entries().iter().zip(tiers).zip(wanted);
        let (mut told, mut all) = (Vec::new(), Vec::new());
        for ((entry, tiers), wanted) in chunks {
            let Some(wanted) = wanted else { continue };
            let source = tiers.list().first().copied();
            let miss = match source {
                Some(Tier::Disk) if server.restore == Restore::Never => Some(Miss::Policy),
                Some(_) => None,
                None => Some(self.why(&wanted)?),
            };
            let source = source.filter(|_| miss.is_none()).map_or("encoded", Tier::as_str);
            told.push(SeenChunk::new(&entry.chunk, source, miss));
            all.push(wanted);
        }
        self.told.chunks = told;
        self.wanted = all;
        Ok(())
    }

    fn why(&self, wanted: &Wanted) -> Result<Miss, ApiError> {
        let files = match self.shelf.rows().store() {
            Some(store) => store.kv_records(wanted.chunk).map_err(failed)?,
            None => Vec::new(),
        };
        Ok(self.shelf.memory().why(wanted, &files))
    }

    /// Takes in a piece of the answer.
    pub fn hear(&mut self, piece: &Piece) {
        let Some(talk) = &mut self.talk else { return };
        match piece {
            Piece::Prompt { .. } => {}
            Piece::Token { token, text, .. } => {
                talk.ids.push(*token);
                talk.text.push_str(text);
            }
            Piece::End { text, .. } => talk.text.push_str(text),
        }
    }

    /// The answer is complete: the conversation goes on, and is kept.
    pub async fn complete(self) -> Result<(), ApiError> {
        let kept = tokio::task::spawn_blocking(move || {
            let Self { shelf, mut context, talk, wanted, .. } = self;
            wanted.iter().for_each(|wanted| shelf.memory().remember(wanted));
            let Some(mut talk) = talk else { return Ok(()) };
            let (ids, text) = talk.answer();
            context.conversation.push_answer(&ids, &[], text);
            let rows = shelf.rows();
            let kept = rows.index().context(&talk.id).map_err(failed)?;
            // a chunk that was erased meanwhile is not in there any more
            let kept = kept.ok_or_else(contexts::no_context)?;
            let stored = StoredContext { turns: context.to_stored().turns, ..kept };
            rows.index().put_context(&talk.id, &stored, now()).map_err(failed)
        });
        kept.await.unwrap_or_else(|_| Err(ApiError::internal()))
    }
}

/// Messages of one context, and the bytes of their texts.
const MESSAGES: usize = 4096;
const MESSAGE_BYTES: usize = 16 << 20;

fn names_of(tools: &Value) -> Vec<String> {
    let names = tools.as_array().into_iter().flatten().filter_map(|tool| {
        let name = tool["function"]["name"].as_str();
        name.map(str::to_owned)
    });
    names.collect()
}

/// Tells the model what it may call in this answer. None of it is kept.
fn offer(server: &Server, context: &mut Context, tools: Value) {
    let conversation = &mut context.conversation;
    if server.model.needs_telling {
        conversation.set_system(Some(tools::told(conversation.system(), &tools)));
    } else {
        conversation.tools = Some(tools);
    }
}

/// Adds what is newly said to a context's conversation.
fn say(server: &Server, context: &mut Context, messages: Vec<ChatMessage>) -> Result<(), ApiError> {
    for (index, message) in messages.into_iter().enumerate() {
        match message.into_words(server.model.style) {
            ("user", text) => context.say(text),
            ("tool", text) => context.say_as(Role::Tool, text),
            ("assistant", text) => context.conversation.push_answer(&[], &[], text),
            _ => {
                let path = format!("messages[{index}]");
                let message = format!(
                    "{path} must be the user's words, the assistant's or a tool's: a context has \
                     its own system text, which PATCH sets"
                );
                return Err(ApiError::invalid(path, message));
            }
        }
    }
    if let Some(last) = context.conversation.turns().last() {
        prompt::check_message(server, last.role.as_str(), &last.text)?;
    }
    let turns = context.conversation.turns();
    let (messages, bytes) = (turns.len(), turns.iter().map(|turn| turn.text.len()).sum::<usize>());
    if messages >= MESSAGES || bytes >= MESSAGE_BYTES {
        let message = format!(
            "the context would have {messages} messages of {bytes} bytes, more than {MESSAGES} or \
             {MESSAGE_BYTES}; PATCH it with messages: [] to begin anew"
        );
        return Err(ApiError::invalid("messages", message));
    }
    Ok(())
}
