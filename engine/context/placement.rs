//! Chunks and turns as the segments of a prompt: what each sees, and which rows are hidden.
//!
//! ```text
//! exact        anchor  A  B  C  header  turns      each sees all before it
//! independent  anchor  A  B  C  header  turns      A, B, C see the anchor
//! blend        anchor  A  b B'  c C'  header ...   b: the first k rows of B, seeing all before
//!                                                  them; B': B as under independent, its first
//!                                                  k rows hidden
//! mask         anchor  A  B  C  header  turns      each sees those it saw at first; what is off
//!                                                  is there, and hidden
//! ```

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use strand_models::{SegmentKind, TemplateSegment};

use super::chunk::Chunk;
use super::context::{Context, Entry};
use super::conversation::{Rendered, into_segment};
use super::policy::ReusePolicy;
use crate::request::{Request, Segment};
use crate::{ChunkId, Sees};

impl Context {
    /// The anchor and the chunks as the next prompt has them.
    pub fn chunk_segments(&self) -> Vec<Segment> {
        let mut segments = self.anchor_segment();
        let active = self.entries().iter().filter(|entry| entry.active);
        let active = active.map(|entry| &*entry.chunk);
        match self.policy() {
            ReusePolicy::Exact => segments.extend(active.map(whole)),
            ReusePolicy::Independent => segments.extend(active.map(independent)),
            ReusePolicy::Blend => {
                for (place, chunk) in active.enumerate() {
                    let again = if place == 0 { 0 } else { self.blend_tokens };
                    segments.extend(blended(chunk, again));
                }
            }
            ReusePolicy::Mask => {
                let index = Index::new(self);
                let place = |entry| index.place(entry, entry.active);
                segments.extend(self.entries().iter().map(place));
            }
        }
        segments
    }

    /// The anchor and all chunks in order, whether active or not, each as it is encoded alone:
    /// one prompt to ask where all of them have their KV.
    pub fn all_chunks(&self) -> Vec<Segment> {
        let mut segments = self.anchor_segment();
        let index = Index::new(self);
        segments.extend(self.entries().iter().map(|entry| {
            let mut segment = match self.policy() {
                ReusePolicy::Exact => whole(&entry.chunk),
                ReusePolicy::Independent | ReusePolicy::Blend => independent(&entry.chunk),
                ReusePolicy::Mask => return index.place(entry, entry.active),
            };
            segment.hidden = if entry.active { 0 } else { segment.tokens.len() };
            segment
        }));
        segments
    }

    /// What stands before a chunk's end in a prompt that encodes it alone: the anchor, what it
    /// sees, the chunk.
    pub fn segments_to(&self, index: usize) -> Vec<Segment> {
        let mut segments = self.anchor_segment();
        let chunk = &self.entries()[index].chunk;
        match self.policy() {
            ReusePolicy::Exact => {
                let before = self.entries()[..index].iter().filter(|entry| entry.active);
                segments.extend(before.map(|entry| whole(&entry.chunk)));
                segments.push(whole(chunk));
            }
            ReusePolicy::Independent | ReusePolicy::Blend => segments.push(independent(chunk)),
            ReusePolicy::Mask => {
                let behind = self.behind(index);
                let names = Index::of(self, &behind);
                segments.extend(behind.iter().map(|entry| names.place(entry, false)));
                segments.last_mut().expect("the chunk itself").hidden = 0;
            }
        }
        segments
    }

    /// Under `mask`, the chunks that one saw, and those that they saw, in order; itself the last.
    /// What none of them saw changes nothing, and may be thousands.
    fn behind(&self, index: usize) -> Vec<&Entry> {
        let now = self.active_ids();
        let mut seen = HashSet::from([self.entries()[index].chunk.id]);
        let mut behind = Vec::new();
        for entry in self.entries()[..=index].iter().rev() {
            if seen.contains(&entry.chunk.id) {
                seen.extend(entry.seen.as_ref().unwrap_or(&now));
                behind.push(entry);
            }
        }
        behind.reverse();
        behind
    }

    /// A request that leaves a chunk's KV in the pool. One row is computed behind the chunk, so
    /// that its last block is complete too.
    pub fn encode(&self, index: usize) -> Request {
        let mut segments = self.segments_to(index);
        let last = *segments.last().and_then(|chunk| chunk.tokens.last()).expect("not empty");
        segments.push(Segment::new(vec![last]));
        let mut request = Request::new(Vec::new());
        request.prompt = segments;
        request.limits.max_tokens = Some(1);
        request
    }

    /// All segments of a prompt, in order.
    pub(super) fn place(&self, rendered: Rendered) -> Vec<Segment> {
        let mut segments = self.chunk_segments();
        let turns: Vec<usize> = rendered.turns_of(&self.conversation).collect();
        let said = rendered.segments.into_iter().zip(turns);
        // the anchor stands before the chunks already
        let said = said.filter(|(segment, _)| segment.kind != SegmentKind::Anchor);
        if self.policy() == ReusePolicy::Mask {
            self.place_masked(said, &mut segments);
        } else {
            segments.extend(said.map(|(segment, _)| into_segment(segment)));
        }
        segments
    }

    /// Each sees the chunks that were active when it was said, and all that is said before it.
    fn place_masked(
        &self,
        said: impl Iterator<Item = (TemplateSegment, usize)>,
        segments: &mut Vec<Segment>,
    ) {
        let index = Index::new(self);
        let first = segments.len();
        let turns = self.conversation.turns();
        let now: Vec<ChunkId> = self.active_ids();
        for (segment, turn) in said {
            // what opens the answer sees what the last question sees
            let turn = turns.get(turn).or(turns.last());
            let seen = turn.and_then(|turn| turn.seen.as_ref()).unwrap_or(&now);
            let before = first..segments.len();
            let list = index.list(seen).into_iter().chain(before.map(segment_number));
            let sees = Sees::Listed(list.collect());
            segments.push(Segment { sees, ..into_segment(segment) });
        }
    }

    fn anchor_segment(&self) -> Vec<Segment> {
        let anchor = Some(self.anchor()).filter(|anchor| !anchor.is_empty());
        anchor.map(|anchor| Segment::anchor(anchor.to_vec())).into_iter().collect()
    }
}

fn whole(chunk: &Chunk) -> Segment {
    Segment { chunk: Some(chunk.id), ..Segment::new(chunk.ids.clone()) }
}

fn independent(chunk: &Chunk) -> Segment {
    Segment { chunk: Some(chunk.id), ..Segment::independent(chunk.ids.clone()) }
}

/// A chunk whose first rows, so many, are computed again.
fn blended(chunk: &Chunk, again: usize) -> Vec<Segment> {
    if again == 0 {
        return vec![independent(chunk)];
    }
    if again >= chunk.ids.len() {
        return vec![whole(chunk)];
    }
    let tokens = chunk.ids[..again].to_vec();
    let head = Segment { chunk: Some(chunk.id), recomputed: true, ..Segment::new(tokens) };
    vec![head, Segment { hidden: again, ..independent(chunk) }]
}

/// Under `mask`: the number of each chunk's segment.
struct Index {
    numbers: HashMap<ChunkId, u16>,
    has_anchor: bool,
    now: Vec<ChunkId>,
}

impl Index {
    fn new(context: &Context) -> Self {
        Self::of(context, context.entries())
    }

    /// For a prompt of these chunks alone.
    fn of(context: &Context, entries: &[impl Borrow<Entry>]) -> Self {
        let has_anchor = !context.anchor().is_empty();
        let entries = entries.iter().map(Borrow::borrow);
        let numbers = entries.zip(usize::from(has_anchor)..);
        let numbers = numbers.map(|(entry, number)| (entry.chunk.id, segment_number(number)));
        Self { numbers: numbers.collect(), has_anchor, now: context.active_ids() }
    }

    /// The anchor and these chunks, in the order of the prompt.
    fn list(&self, seen: &[ChunkId]) -> Vec<u16> {
        let anchor = self.has_anchor.then_some(0);
        let chunks = seen.iter().filter_map(|id| self.numbers.get(id).copied());
        let mut list: Vec<u16> = anchor.into_iter().chain(chunks).collect();
        list.sort_unstable();
        list
    }

    fn place(&self, entry: &Entry, shown: bool) -> Segment {
        let own = self.numbers[&entry.chunk.id];
        let mut list = self.list(entry.seen.as_ref().unwrap_or(&self.now));
        list.retain(|&other| other < own);
        let mut segment = whole(&entry.chunk);
        segment.sees = Sees::Listed(Arc::from(list));
        segment.hidden = if shown { 0 } else { segment.tokens.len() };
        segment
    }
}

/// The engine refuses prompts with more segments than numbers.
fn segment_number(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use strand_models::{ModelFiles, ModelSource};

    use super::super::chunk::ChunkKind;
    use super::super::conversation::{Conversation, Dropped};
    use super::*;

    /// A chunk of so many tokens, named by a digit.
    fn chunk(name: u32, tokens: usize) -> Chunk {
        let text = name.to_string();
        let id = ChunkId::of(text.as_bytes());
        Chunk { id, name: text.clone(), kind: ChunkKind::File, text, ids: vec![name; tokens] }
    }

    /// An anchor and chunks of 30, 20 and 10 tokens.
    fn context(policy: ReusePolicy) -> Context {
        let mut context = Context::new(policy, Conversation::default(), vec![9]);
        for (name, tokens) in [(1, 30), (2, 20), (3, 10)] {
            context.load(chunk(name, tokens), true);
        }
        context
    }

    /// Token and length of each segment, what it sees, how much of it is hidden.
    fn told(segments: &[Segment]) -> Vec<String> {
        let tell = |segment: &Segment| {
            let sees = match &segment.sees {
                Sees::Everything if segment.is_anchor => "anchor".to_owned(),
                Sees::Everything => "all".to_owned(),
                Sees::Anchor => "anchor".to_owned(),
                Sees::Listed(list) => format!("{list:?}"),
            };
            let again = if segment.recomputed { " again" } else { "" };
            let hidden = match segment.hidden {
                0 => String::new(),
                hidden => format!(" hides {hidden}"),
            };
            format!("{}x{} sees {sees}{again}{hidden}", segment.tokens[0], segment.tokens.len())
        };
        segments.iter().map(tell).collect()
    }

    #[test]
    fn under_exact_a_chunk_sees_all_before_it() {
        let mut context = context(ReusePolicy::Exact);
        let all = ["9x1 sees anchor", "1x30 sees all", "2x20 sees all", "3x10 sees all"];
        assert_eq!(told(&context.chunk_segments()), all);
        context.set_active(0, false);
        assert_eq!(told(&context.chunk_segments()), [all[0], all[2], all[3]]);
        let asked = [all[0], "1x30 sees all hides 30", all[2], all[3]];
        assert_eq!(told(&context.all_chunks()), asked);
        assert_eq!(told(&context.segments_to(2)), [all[0], all[2], all[3]]);
        assert_eq!(told(&context.segments_to(0)), all[..2], "also while it is off");
    }

    #[test]
    fn an_independent_chunk_is_the_same_wherever_it_stands() {
        let mut context = context(ReusePolicy::Independent);
        let all = ["9x1 sees anchor", "1x30 sees anchor", "2x20 sees anchor", "3x10 sees anchor"];
        assert_eq!(told(&context.chunk_segments()), all);
        context.set_active(0, false);
        assert_eq!(told(&context.chunk_segments()), [all[0], all[2], all[3]]);
        assert_eq!(told(&context.segments_to(2)), [all[0], all[3]]);
    }

    #[test]
    fn blend_computes_the_first_rows_of_later_chunks_again() {
        let mut context = context(ReusePolicy::Blend);
        let expected = [
            "9x1 sees anchor",
            "1x30 sees anchor",
            "2x16 sees all again",
            "2x20 sees anchor hides 16",
            "3x10 sees all",
        ];
        assert_eq!(told(&context.chunk_segments()), expected);
        context.set_active(0, false);
        let expected = ["9x1 sees anchor", "2x20 sees anchor", "3x10 sees all"];
        assert_eq!(told(&context.chunk_segments()), expected, "the first is as it is stored");
        assert!(context.chunk_segments()[1..].iter().all(|segment| segment.chunk.is_some()));
        let stored = ["9x1 sees anchor", "3x10 sees anchor"];
        assert_eq!(told(&context.segments_to(2)), stored);
    }

    #[test]
    fn blend_lies_between_independent_and_exact() {
        let of = |policy, blend_tokens| {
            let mut context = context(policy);
            context.blend_tokens = blend_tokens;
            context.chunk_segments()
        };
        assert_eq!(of(ReusePolicy::Blend, 0), of(ReusePolicy::Independent, 16));
        for blend_tokens in [20, usize::MAX] {
            let (blend, exact) = (of(ReusePolicy::Blend, blend_tokens), of(ReusePolicy::Exact, 16));
            assert_eq!(blend[2..], exact[2..]);
            // nothing stands before the first: what it sees is the anchor either way
            assert_eq!((&blend[0], &blend[1].tokens), (&exact[0], &exact[1].tokens));
        }
    }

    #[test]
    fn under_mask_a_chunk_keeps_what_it_saw_when_it_was_loaded() {
        let mut context = context(ReusePolicy::Mask);
        let all = ["9x1 sees anchor", "1x30 sees [0]", "2x20 sees [0, 1]", "3x10 sees [0, 1, 2]"];
        assert_eq!(told(&context.chunk_segments()), all);
        context.set_active(1, false);
        context.load(chunk(4, 5), true);
        let off = "2x20 sees [0, 1] hides 20";
        let expected = [all[0], all[1], off, all[3], "4x5 sees [0, 1, 3]"];
        assert_eq!(told(&context.chunk_segments()), expected);
        assert_eq!(context.all_chunks(), context.chunk_segments());
        let alone = [all[0], "1x30 sees [0] hides 30", all[2]];
        assert_eq!(told(&context.segments_to(1)), alone);
        let mut other = context.clone();
        (0..4).for_each(|index| other.set_active(index, false));
        other.load(chunk(5, 7), true);
        other.load(chunk(6, 8), true);
        let alone = [all[0], "5x7 sees [0] hides 7", "6x8 sees [0, 1]"];
        assert_eq!(told(&other.segments_to(5)), alone, "without what nobody saw");
        context.remove(1);
        let expected = [all[0], all[1], "3x10 sees [0, 1]", "4x5 sees [0, 1, 2]"];
        assert_eq!(told(&context.chunk_segments()), expected, "what is gone was never seen");
    }

    #[test]
    fn setting_mask_takes_what_is_active_then_for_what_was_seen() {
        let mut context = context(ReusePolicy::Exact);
        context.set_active(0, false);
        context.set_policy(ReusePolicy::Mask);
        context.set_active(0, true);
        let expected = ["9x1 sees anchor", "1x30 sees [0]", "2x20 sees [0]", "3x10 sees [0, 2]"];
        assert_eq!(told(&context.chunk_segments()), expected);
        context.set_policy(ReusePolicy::Exact);
        assert!(context.entries().iter().all(|entry| entry.seen.is_none()));
    }

    /// What the segments of what was said see, without their tokens.
    fn said(context: &Context) -> Vec<String> {
        let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
        let (template, tokenizer) = (files.chat_template, files.tokenizer);
        let (template, tokenizer) = (template.expect("a template"), tokenizer.expect("one"));
        let prompt = context.prompt(&template, &tokenizer, usize::MAX).expect("it fits");
        let said = prompt.segments.iter().filter(|segment| segment.chunk.is_none());
        let sees = told(&said.cloned().collect::<Vec<_>>());
        sees.iter().map(|text| text.split_once(" sees ").expect("told so").1.to_owned()).collect()
    }

    #[test]
    fn under_mask_a_turn_keeps_what_was_active_when_it_was_said() {
        // the bundled model has no anchor
        let mut context = Context::new(ReusePolicy::Mask, Conversation::default(), Vec::new());
        context.load(chunk(1, 30), true);
        context.load(chunk(2, 20), true);
        context.conversation.set_system(Some("Be brief.".into()));
        context.say("One?");
        // header, question, what opens the answer
        assert_eq!(said(&context), ["[0, 1]", "[0, 1, 2]", "[0, 1, 2, 3]"]);
        context.conversation.push_answer(&[], &[], "Yes.");
        context.set_active(0, false);
        context.say("Two?");
        let expected = ["[0, 1]", "[0, 1, 2]", "[0, 1, 2, 3]", "[1, 2, 3, 4]", "[1, 2, 3, 4, 5]"];
        assert_eq!(said(&context), expected);
        context.set_active(0, true);
        assert_eq!(said(&context), expected, "switching changes nothing of what was said");
        context.conversation.pop();
        assert_eq!(said(&context)[..3], expected[..3]);
        context.clear();
        assert_eq!(said(&context)[..3], ["[]", "[0]", "[0, 1]"]);
    }

    #[test]
    fn an_anchor_stands_once_before_chunks_and_header() {
        let segment = |kind, messages, id| TemplateSegment { kind, messages, ids: vec![id] };
        let rendering = || Rendered {
            segments: vec![
                segment(SegmentKind::Anchor, 0..0, 9),
                segment(SegmentKind::Header, 0..1, 4),
                segment(SegmentKind::Turn, 1..2, 5),
                segment(SegmentKind::GenerationPrompt, 2..2, 6),
            ],
            dropped: Dropped::default(),
        };
        for policy in ReusePolicy::ALL {
            let mut context = context(policy);
            context.conversation.set_system(Some("Be brief.".into()));
            context.say("One?");
            let placed = told(&context.place(rendering()));
            assert_eq!(placed[0], "9x1 sees anchor");
            let said = &placed[placed.len() - 3..];
            let lists = ["[0, 1, 2, 3]", "[0, 1, 2, 3, 4]", "[0, 1, 2, 3, 4, 5]"];
            let sees = if policy == ReusePolicy::Mask { lists } else { ["all"; 3] };
            for ((told, id), sees) in said.iter().zip([4, 5, 6]).zip(sees) {
                assert_eq!(*told, format!("{id}x1 sees {sees}"), "{policy:?}");
            }
        }
    }

    #[test]
    fn other_policies_show_turns_all_that_is_active() {
        for policy in [ReusePolicy::Exact, ReusePolicy::Independent, ReusePolicy::Blend] {
            let mut context = context(policy);
            context.say("One?");
            assert!(said(&context).iter().skip(1).all(|sees| sees == "all"), "{policy:?}");
        }
    }
}
