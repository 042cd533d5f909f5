//! What an answer is worth, and counts of it. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

use super::items::{Item, REFUSAL, Task, object};

/// How an item's chunks are put before its question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    Given,
    Reversed,
    /// All are loaded, the one with the answer is inactive: the prompt of an absent chunk.
    Inactive,
}

impl Arrangement {
    /// Those in which an item is asked.
    pub fn of(item: &Item) -> &'static [Self] {
        match item.task {
            Task::Recall if item.needs_its_chunk() => {
                &[Self::Given, Self::Reversed, Self::Inactive]
            }
            Task::Recall => &[Self::Given, Self::Reversed],
            _ => &[Self::Given],
        }
    }

    /// The right answer.
    pub fn expected(self, item: &Item) -> &str {
        match self {
            Self::Given | Self::Reversed => &item.answer,
            Self::Inactive => REFUSAL,
        }
    }
}

/// A yes or no about one answer; its share over many is a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    RecallGiven,
    RecallReversed,
    /// The answer stands in a chunk, but was refused.
    Refused,
    /// Refused, as it should be: without the chunk, without the attribute, without the chunk of
    /// an earlier answer.
    Inactive,
    Missing,
    Stale,
    Conversation,
    Summary,
    JsonParses,
    JsonFields,
    JsonExact,
}

impl Measure {
    pub fn name(self) -> &'static str {
        match self {
            Self::RecallGiven => "recall_given",
            Self::RecallReversed => "recall_reversed",
            Self::Refused => "refused",
            Self::Inactive => "inactive",
            Self::Missing => "missing",
            Self::Stale => "stale",
            Self::Conversation => "conversation",
            Self::Summary => "summary",
            Self::JsonExact => "json_exact",
            Self::JsonParses => "json_parses",
            Self::JsonFields => "json_fields",
        }
    }
}

/// What is found in the answer to an item. The first is whether it is the one expected.
pub fn judge(item: &Item, arrangement: Arrangement, text: &str) -> Vec<(Measure, bool)> {
    let is_right = text == arrangement.expected(item);
    match (item.task, arrangement) {
        (Task::Recall, Arrangement::Given) => {
            vec![(Measure::RecallGiven, is_right), (Measure::Refused, text == REFUSAL)]
        }
        (Task::Recall, Arrangement::Reversed) => vec![(Measure::RecallReversed, is_right)],
        (Task::Recall, Arrangement::Inactive) => vec![(Measure::Inactive, is_right)],
        (Task::Missing, _) => vec![(Measure::Missing, is_right)],
        (Task::Stale, _) => vec![(Measure::Stale, is_right)],
        (Task::Conversation, _) => vec![(Measure::Conversation, is_right)],
        (Task::Summary, _) => vec![(Measure::Summary, is_right)],
        (Task::Json, _) => vec![
            (Measure::JsonExact, is_right),
            (Measure::JsonParses, object(text).is_some()),
            (Measure::JsonFields, has_fields_of(text, &item.answer)),
        ],
    }
}

/// True for an object with the names of the expected one, each with a value of its type.
fn has_fields_of(text: &str, expected: &str) -> bool {
    let (Some(found), Some(expected)) = (object(text), object(expected)) else { return false };
    let is_like = |(name, value): (&String, &Value)| {
        found.get(name).is_some_and(|found| type_of(found) == type_of(value))
    };
    found.len() == expected.len() && expected.iter().all(is_like)
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "real",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Items that are counted together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    All,
    /// So many chunks loaded.
    Chunks(usize),
    /// The kind of the chunk that was asked about.
    Kind(String),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub items: usize,
    pub found: usize,
}

impl Count {
    pub fn percent(self) -> f64 {
        100.0 * self.found as f64 / self.items as f64
    }
}

/// Counts by measure and group.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<(Measure, Group), Count>);

impl Tally {
    pub fn add(&mut self, item: &Item, verdicts: &[(Measure, bool)]) {
        let mut groups = vec![Group::All];
        if matches!(item.task, Task::Recall | Task::Missing) {
            groups.push(Group::Chunks(item.chunks.len()));
            groups.push(Group::Kind(item.chunk_kind().to_owned()));
        }
        for &(measure, is_found) in verdicts {
            for group in &groups {
                let count = self.0.entry((measure, group.clone())).or_default();
                count.items += 1;
                count.found += usize::from(is_found);
            }
        }
    }

    /// `None` where nothing was asked.
    pub fn count(&self, measure: Measure, group: &Group) -> Option<Count> {
        self.0.get(&(measure, group.clone())).copied()
    }

    /// All counts, in the order of their measures and groups.
    pub fn iter(&self) -> impl Iterator<Item = (Measure, &Group, Count)> {
        self.0.iter().map(|((measure, group), count)| (*measure, group, *count))
    }
}

#[cfg(test)]
mod tests {
    use strand_engine::context::ChunkKind;

    use super::super::items::ChunkText;
    use super::*;

    fn item(task: Task, answer: &str) -> Item {
        let chunk =
            ChunkText { kind: ChunkKind::File, name: "a".to_owned(), content: "b".to_owned() };
        Item {
            id: "x".to_owned(),
            task,
            kind: "file/capital".to_owned(),
            chunks: vec![chunk],
            system: None,
            turns: Vec::new(),
            question: "?".to_owned(),
            answer: answer.to_owned(),
            answer_chunk: (task == Task::Recall).then_some(0),
        }
    }

    #[test]
    fn an_answer_is_right_letter_by_letter() {
        let item = item(Task::Recall, "It is Bonn.");
        let judged = |arrangement, text| judge(&item, arrangement, text);
        let given =
            |exact, refused| vec![(Measure::RecallGiven, exact), (Measure::Refused, refused)];
        assert_eq!(judged(Arrangement::Given, "It is Bonn."), given(true, false));
        assert_eq!(judged(Arrangement::Given, "It is Bonn"), given(false, false));
        assert_eq!(judged(Arrangement::Given, REFUSAL), given(false, true));
        let reversed = judged(Arrangement::Reversed, "It is Bonn.");
        assert_eq!(reversed, [(Measure::RecallReversed, true)]);
    }

    #[test]
    fn what_is_not_told_is_to_be_refused() {
        let recall = item(Task::Recall, "It is Bonn.");
        assert_eq!(judge(&recall, Arrangement::Inactive, REFUSAL), [(Measure::Inactive, true)]);
        let leak = judge(&recall, Arrangement::Inactive, "It is Bonn.");
        assert_eq!(leak, [(Measure::Inactive, false)]);
        for (task, measure) in [(Task::Missing, Measure::Missing), (Task::Stale, Measure::Stale)] {
            let item = item(task, REFUSAL);
            assert_eq!(judge(&item, Arrangement::Given, REFUSAL), [(measure, true)]);
        }
    }

    #[test]
    fn json_counts_by_form_and_by_letter() {
        let item = item(Task::Json, r#"{"mood": "calm", "facts": [], "relationship": 0}"#);
        let judged = |text: &str| {
            let verdicts = judge(&item, Arrangement::Given, text);
            [verdicts[0].1, verdicts[1].1, verdicts[2].1]
        };
        assert_eq!(judged(&item.answer), [true, true, true]);
        let other = r#" {"facts": ["x"], "mood": "sad", "relationship": -1}"#;
        assert_eq!(judged(other), [false, true, true]);
        for text in [
            r#"{"mood": "calm", "facts": []}"#,
            r#"{"mood": "calm", "facts": [], "relationship": 0.5}"#,
            r#"{"mood": "calm", "facts": "", "relationship": 0}"#,
            r#"{"mood": "calm", "facts": [], "relationship": 0, "age": 3}"#,
        ] {
            assert_eq!(judged(text), [false, true, false], "{text}");
        }
        for text in [r#"{"mood": "calm""#, "[]", "calm", r#"{"a": 1} {"b": 2}"#] {
            assert_eq!(judged(text), [false, false, false], "{text}");
        }
    }

    #[test]
    fn counts_are_kept_by_chunks_and_kind_of_chunk() {
        let recall = item(Task::Recall, "It is Bonn.");
        let mut tally = Tally::default();
        tally.add(&recall, &[(Measure::RecallGiven, true)]);
        tally.add(&recall, &[(Measure::RecallGiven, false)]);
        tally.add(&item(Task::Json, "{}"), &[(Measure::JsonExact, true)]);
        let half = Some(Count { items: 2, found: 1 });
        for group in [Group::All, Group::Chunks(1), Group::Kind("file".to_owned())] {
            assert_eq!(tally.count(Measure::RecallGiven, &group), half);
        }
        assert_eq!(tally.count(Measure::RecallGiven, &Group::Chunks(2)), None);
        assert_eq!(tally.iter().count(), 4);
        assert_eq!(half.map(Count::percent), Some(50.0));
    }

    #[test]
    fn a_name_is_not_asked_without_its_persona() {
        let mut item = item(Task::Recall, "I am Zounbax.");
        assert_eq!(Arrangement::of(&item).len(), 3);
        item.kind = "persona/name".to_owned();
        assert_eq!(Arrangement::of(&item), [Arrangement::Given, Arrangement::Reversed]);
        item.task = Task::Summary;
        assert_eq!(Arrangement::of(&item), [Arrangement::Given]);
    }
}
