//! What one request sees of the library: chunks for itself alone, or a context.
//!
//! A context's conversation goes on when the answer is complete, before its end is told: with
//! what was said, and the very tokens that were generated. A sight that is dropped before has
//! changed nothing.

use std::sync::Arc;

use strand_engine::context::{Context, Dropped, Role, Turn};
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

/// The prompt of a chat, over what it sees of the library if it asks for anything.
pub fn chat(
    server: &Server,
    sight: Option<&mut Sight>,
    chat: Chat,
) -> Result<Vec<Segment>, ApiError> {
    match sight {
        Some(sight) => sight.chat(server, chat),
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
    fn chat(&mut self, server: &Server, chat: Chat) -> Result<Vec<Segment>, ApiError> {
        let Some(talk) = &mut self.talk else {
            let said = prompt::of_chat(server, chat)?;
            return self.behind_chunks(server, said);
        };
        if chat.ending != Ending::Opening || chat.tools.is_some() {
            let message = "over a context the assistant's next message is asked for, without tools";
            return Err(ApiError::invalid("context", message));
        }
        say(&mut self.context, chat.messages)?;
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
            let Some(talk) = talk else { return Ok(()) };
            context.conversation.push_answer(&talk.opening, &talk.ids, talk.text);
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

/// Adds what is newly said to a context's conversation.
fn say(context: &mut Context, messages: Vec<ChatMessage>) -> Result<(), ApiError> {
    for (index, message) in messages.into_iter().enumerate() {
        match message.into_plain() {
            Some(("user", text)) => context.say(text),
            Some(("assistant", text)) => context.conversation.push(Turn {
                role: Role::Assistant,
                text,
                ids: Vec::new(),
                seen: context.conversation.turns().last().and_then(|turn| turn.seen.clone()),
            }),
            _ => {
                let path = format!("messages[{index}]");
                let message = format!(
                    "{path} must be the user's or the assistant's words: a context has its own \
                     system text, which PATCH sets, and knows no tools"
                );
                return Err(ApiError::invalid(path, message));
            }
        }
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
