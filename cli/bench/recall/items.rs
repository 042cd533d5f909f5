//! The questions: one JSON object a line, one prompt and its one right answer each.
//!
//! The format is that of models/demo/eval.jsonl. A line with a field too many, too few or of the
//! wrong type is refused with its number, so that nothing is measured that was not understood.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};
use strand_engine::context::ChunkKind;

/// What a model says when it is not told.
pub const REFUSAL: &str = "I don't know.";

/// A question with everything that stands before it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    pub id: String,
    pub task: Task,
    /// Where the answer stands, `file/capital`: the chunk's kind and the attribute.
    pub kind: String,
    pub chunks: Vec<ChunkText>,
    #[serde(deserialize_with = "nullable")]
    pub system: Option<String>,
    pub turns: Vec<Exchange>,
    pub question: String,
    pub answer: String,
    /// The chunk that holds the answer, counted from 0; of a recall item alone.
    #[serde(deserialize_with = "nullable")]
    pub answer_chunk: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// The answer stands in one of the chunks.
    Recall,
    /// The chunks speak of the thing asked for, but don't say what was asked.
    Missing,
    /// The conversation holds the answer, the chunk that held it is gone.
    Stale,
    /// The answer was said in the conversation.
    Conversation,
    /// A sentence about the conversation.
    Summary,
    /// A JSON object about the conversation.
    Json,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkText {
    #[serde(deserialize_with = "chunk_kind")]
    pub kind: ChunkKind,
    pub name: String,
    pub content: String,
}

/// What was said before the question.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    pub user: String,
    pub assistant: String,
}

impl Item {
    /// The kind without the attribute.
    pub fn chunk_kind(&self) -> &str {
        self.kind.split('/').next().expect("split gives at least one part")
    }

    /// True when the answer is unknown without its chunk. A persona's name is not: who is asked
    /// without a persona has another answer.
    pub fn needs_its_chunk(&self) -> bool {
        self.answer_chunk.is_some() && self.kind != "persona/name"
    }

    fn check(&self) -> Result<()> {
        match (self.task, self.answer_chunk) {
            (Task::Recall, None) => bail!("a recall item needs its answer_chunk"),
            (Task::Recall, Some(chunk)) if chunk >= self.chunks.len() => {
                bail!("answer_chunk is {chunk}, there are {} chunks", self.chunks.len())
            }
            (Task::Recall, Some(_)) | (_, None) => {}
            (_, Some(_)) => bail!("answer_chunk is for recall items alone"),
        }
        let is_untold = matches!(self.task, Task::Missing | Task::Stale);
        if is_untold && self.answer != REFUSAL {
            bail!("the answer to a missing or stale item is {REFUSAL}");
        }
        if self.task == Task::Recall && self.answer == REFUSAL {
            bail!("the answer to a recall item stands in its chunk");
        }
        if self.task == Task::Json && object(&self.answer).is_none() {
            bail!("the answer to a json item is no JSON object");
        }
        Ok(())
    }
}

/// The JSON object that a text is, whitespace around it aside.
pub fn object(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text).ok()
}

/// Reads the items, `limit` of them spread evenly over the file.
pub fn read(path: &Path, limit: Option<usize>) -> Result<Vec<Item>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let items = parse(&text).with_context(|| format!("cannot use {}", path.display()))?;
    Ok(spread(items, limit.unwrap_or(usize::MAX)))
}

fn parse(text: &str) -> Result<Vec<Item>> {
    let items = text.lines().enumerate().map(|(index, line)| {
        parse_line(line).map_err(|error| anyhow!("line {}: {error}", index + 1))
    });
    let items: Vec<Item> = items.collect::<Result<_>>()?;
    if items.is_empty() {
        bail!("it has no items");
    }
    Ok(items)
}

fn parse_line(line: &str) -> Result<Item> {
    let item: Item = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        // serde_json counts lines too, within the one that it was given.
        let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |parts| parts.0);
        anyhow!("{reason}, at column {}", error.column())
    })?;
    item.check()?;
    Ok(item)
}

fn spread(items: Vec<Item>, limit: usize) -> Vec<Item> {
    let (len, count) = (items.len(), limit.min(items.len()));
    let is_taken = |index: usize| (index + 1) * count / len > index * count / len;
    let each = items.into_iter().enumerate();
    each.filter(|&(index, _)| is_taken(index)).map(|(_, item)| item).collect()
}

/// A field that may be null, but not left out: serde's own `Option` takes both.
fn nullable<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

fn chunk_kind<'de, D: Deserializer<'de>>(from: D) -> Result<ChunkKind, D::Error> {
    let text = String::deserialize(from)?;
    let known = ChunkKind::ALL.map(ChunkKind::as_str).join(", ");
    ChunkKind::parse(&text)
        .ok_or_else(|| de::Error::custom(format!("unknown chunk kind {text}, known are {known}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn recall() -> Value {
        json!({
            "id": "recall-1-0", "task": "recall", "kind": "file/capital",
            "chunks": [{"kind": "file", "name": "a.txt", "content": "The capital is Bonn."}],
            "system": null, "turns": [{"user": "Hi", "assistant": "Hello!"}],
            "question": "What is the capital?", "answer": "The capital is Bonn.",
            "answer_chunk": 0,
        })
    }

    fn with(field: &str, value: Value) -> String {
        let mut item = recall();
        item[field] = value;
        item.to_string()
    }

    #[test]
    fn a_line_is_an_item() {
        let items = parse(&format!("{}\n{}\n", recall(), recall())).unwrap();
        assert_eq!(items.len(), 2);
        let item = &items[0];
        assert_eq!(
            (item.task, item.chunk_kind(), item.answer_chunk),
            (Task::Recall, "file", Some(0))
        );
        assert_eq!((item.chunks[0].kind, item.turns[0].user.as_str()), (ChunkKind::File, "Hi"));
        assert!(item.needs_its_chunk());
        let name = parse_line(&with("kind", "persona/name".into())).unwrap();
        assert!(!name.needs_its_chunk());
    }

    #[test]
    fn a_bad_line_is_named_with_its_number() {
        let mut without = recall();
        without.as_object_mut().unwrap().remove("system");
        let chunk = json!([{"kind": "poem", "name": "a", "content": "b"}]);
        for (line, message) in [
            ("{".to_owned(), "EOF while parsing an object"),
            (String::new(), "EOF while parsing a value"),
            (with("colour", 1.into()), "unknown field `colour`"),
            (with("task", "sing".into()), "unknown variant `sing`"),
            (with("question", 5.into()), "invalid type: integer `5`"),
            (without.to_string(), "missing field `system`"),
            (with("chunks", chunk), "unknown chunk kind poem, known are file, persona"),
            (with("answer_chunk", 1.into()), "answer_chunk is 1, there are 1 chunks"),
            (with("answer_chunk", Value::Null), "needs its answer_chunk"),
            (with("task", "missing".into()), "answer_chunk is for recall items alone"),
            (with("answer", REFUSAL.into()), "stands in its chunk"),
        ] {
            let error = parse(&format!("{}\n{line}\n", recall())).unwrap_err().to_string();
            assert!(error.starts_with("line 2: ") && error.contains(message), "{error}");
            assert!(!error.contains("at line 1"), "{error}");
        }
        assert_eq!(parse("").unwrap_err().to_string(), "it has no items");
    }

    #[test]
    fn a_json_item_needs_an_object_for_an_answer() {
        let mut item = recall();
        (item["task"], item["answer_chunk"]) = ("json".into(), Value::Null);
        assert!(parse_line(&item.to_string()).unwrap_err().to_string().contains("no JSON object"));
        item["answer"] = "{\"mood\": \"calm\"}".into();
        assert!(parse_line(&item.to_string()).is_ok());
    }

    #[test]
    fn a_limit_takes_items_from_all_over_the_file() {
        let item =
            |n: usize| Item { id: n.to_string(), ..parse_line(&recall().to_string()).unwrap() };
        let ids = |limit: usize| -> Vec<String> {
            spread((0..10).map(item).collect(), limit).into_iter().map(|item| item.id).collect()
        };
        assert_eq!(ids(3), ["3", "6", "9"]);
        assert_eq!(ids(1), ["9"]);
        assert_eq!((ids(10).len(), ids(11).len()), (10, 10));
    }
}
