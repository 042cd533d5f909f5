//! A context as the store keeps it, and back.

use std::sync::Arc;

use super::chunk::Chunk;
use super::context::{Context, Entry};
use super::conversation::{Role, Turn};
use super::policy::ReusePolicy;
use crate::ChunkId;
use crate::error::Error;
use crate::store::{StoredContext, StoredEntry, StoredTurn};

impl Context {
    pub fn to_stored(&self) -> StoredContext {
        let entry = |entry: &Entry| StoredEntry {
            chunk: entry.chunk.id,
            active: entry.active,
            seen: entry.seen.clone().unwrap_or_default(),
        };
        let turn = |turn: &Turn| StoredTurn {
            role: turn.role.as_str().to_owned(),
            text: turn.text.clone(),
            ids: turn.ids.clone(),
            seen: turn.seen.clone().unwrap_or_default(),
        };
        StoredContext {
            policy: self.policy().as_str().to_owned(),
            system: self.conversation.system().map(str::to_owned),
            label: None,
            blend_tokens: u32::try_from(self.blend_tokens).ok(),
            entries: self.entries().iter().map(entry).collect(),
            turns: self.conversation.turns().iter().map(turn).collect(),
        }
    }

    /// Takes policy and conversation from what was kept; its chunks are given in its order.
    pub fn resume(&mut self, context: StoredContext, chunks: Vec<Arc<Chunk>>) -> Result<(), Error> {
        let unknown = |what, value| Error::NotAContext { what, value };
        let policy = ReusePolicy::parse(&context.policy);
        let policy = policy.ok_or_else(|| unknown("reuse policy", context.policy.clone()))?;
        let remembers = policy == ReusePolicy::Mask;
        let seen = |seen: Vec<ChunkId>| remembers.then_some(seen);
        self.clear();
        self.set_policy(policy);
        if let Some(rows) = context.blend_tokens {
            self.blend_tokens = rows as usize;
        }
        for (entry, chunk) in context.entries.into_iter().zip(chunks) {
            self.push(Entry { chunk, active: entry.active, seen: seen(entry.seen) });
        }
        self.conversation.clear();
        self.conversation.set_system(context.system);
        for turn in context.turns {
            let role = Role::parse(&turn.role);
            let role = role.ok_or_else(|| unknown("role", turn.role.clone()))?;
            let (text, ids, seen) = (turn.text, turn.ids, seen(turn.seen));
            self.conversation.push(Turn { role, text, ids, seen });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use strand_models::{ModelFiles, ModelSource};

    use super::super::chunk::ChunkKind;
    use super::super::conversation::Conversation;
    use super::*;
    use crate::store::StoredChunk;

    #[test]
    fn what_was_kept_comes_back_as_it_was() {
        let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
        let (template, tokenizer) = (files.chat_template, files.tokenizer);
        let (template, tokenizer) = (template.expect("a template"), tokenizer.expect("one"));
        let chunk = |name: &str, text: &str| {
            let content = text.as_bytes().to_vec();
            Chunk::new(name, ChunkKind::Note, content, &template, &tokenizer).expect("it is text")
        };
        for policy in ReusePolicy::ALL {
            let mut context = Context::new(policy, Conversation::default(), Vec::new());
            context.blend_tokens = 7;
            context.load(chunk("größe 🙂", "Anna lives in Lisbon."), true);
            context.load(chunk("b", "The door is green.\n"), true);
            context.say("Where?");
            context.conversation.push_answer(&[1, 2], &[3, 4], "Lisbon.");
            context.conversation.set_system(Some("Be brief.".into()));
            context.set_active(0, false);
            context.say("Why?");
            let stored = context.to_stored();
            let chunks = context.entries().iter().map(|entry| {
                let Chunk { name, kind, text, .. } = &*entry.chunk;
                let stored = StoredChunk::new(name, *kind, text, None);
                Arc::new(Chunk::from_stored(stored, &template, &tokenizer).expect("it was text"))
            });
            let mut again = Context::new(ReusePolicy::Exact, Conversation::default(), Vec::new());
            let resumed = again.resume(stored.clone(), chunks.collect());
            resumed.expect("it was kept by this program");
            assert_eq!(again.to_stored(), stored);
            assert_eq!(again.entries(), context.entries());
            assert_eq!(again.conversation, context.conversation);
            assert_eq!((again.policy(), again.blend_tokens), (policy, 7));
        }
    }
}
