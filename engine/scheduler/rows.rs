//! What a sequence computes next, as rows of a batch.

use std::ops::Range;

use strand_kernels::PageEntry;

use crate::batch::{BatchRow, PromptLogprobs, SampleRequest};
use crate::cache::BlockId;
use crate::sequence::Sequence;

/// The next `count` tokens of a sequence, as runs in the order they are computed.
pub fn rows(sequence: &Sequence, count: usize, block_size: usize) -> Vec<BatchRow> {
    let runs = sequence.next_runs(count);
    let last = runs.len() - 1;
    let reaches_the_end = count == sequence.num_todo();
    let mut rows: Vec<BatchRow> =
        runs.into_iter().map(|run| row(sequence, run, block_size)).collect();
    let samples = reaches_the_end && !sequence.rules.embed;
    rows[last].sample = samples.then(|| sample_request(sequence));
    rows
}

fn row(sequence: &Sequence, run: Range<usize>, block_size: usize) -> BatchRow {
    let layout = &sequence.layout;
    let (first, last) = (layout.block_of(run.start), layout.block_of(run.end - 1));
    let segment = layout.segment(first);
    let mut slot_mapping = Vec::with_capacity(run.len());
    for block in first..=last {
        let BlockId(id) = sequence.table[block].expect("scheduled rows have a block");
        let tokens = layout.tokens(block);
        let start = id as usize * block_size;
        for token in tokens.start.max(run.start)..tokens.end.min(run.end) {
            slot_mapping.push((start + token - tokens.start) as u32);
        }
    }
    let view = (0..=last).filter_map(|block| page_entry(sequence, segment, block, run.end));
    BatchRow {
        id: sequence.id,
        tokens: sequence.tokens[run.clone()].to_vec(),
        start: layout.stored_position(run.start) as u32,
        slot_mapping,
        view: view.collect(),
        sample: None,
        prompt_logprobs: prompt_logprobs(sequence, &run),
        hidden: if sequence.rules.embed { unreported(sequence, &run) } else { 0..0 },
    }
}

/// A block as the rows of a run that starts in `segment` and ends before token `end` see it: not
/// at all, if it isn't in the pool or lies behind them. Blocks of the sequence that they don't see
/// are listed as inactive. Segments behind the first of the run are of the run.
fn page_entry(sequence: &Sequence, segment: u16, block: usize, end: usize) -> Option<PageEntry> {
    let BlockId(id) = sequence.table[block]?;
    let (tokens, owner) = (sequence.layout.tokens(block), sequence.layout.segment(block));
    let seen = match owner > segment {
        true => sequence.layout.tokens_of(owner),
        false => sequence.layout.seen_rows(segment, owner),
    };
    let (start, end) = (tokens.start.max(seen.start), tokens.end.min(seen.end).min(end));
    let active = start < end;
    let (start, end) = if active { (start, end) } else { (tokens.start, tokens.end) };
    Some(PageEntry {
        block: id,
        first_row: (start - tokens.start) as u16,
        stored_position: sequence.layout.stored_position(start) as u32,
        num_valid: (end - start) as u16,
        active,
        segment: owner,
    })
}

fn sample_request(sequence: &Sequence) -> SampleRequest {
    let position = sequence.output().len();
    let needs_history = sequence.sampling.needs_history();
    let history = if needs_history { sequence.shown_tokens() } else { Vec::new() };
    let suppressed = position < sequence.rules.min_tokens;
    SampleRequest {
        params: sequence.sampling.clone(),
        choice: sequence.choice,
        position: position as u32,
        prompt_len: if needs_history { history.len() - position } else { 0 },
        history,
        suppressed: if suppressed { sequence.rules.stop_token_ids.clone() } else { Vec::new() },
        allowed: None,
        logprobs: sequence.rules.logprobs,
    }
}

/// Rows of a run that are followed by a prompt token.
fn prompt_logprobs(sequence: &Sequence, run: &Range<usize>) -> Option<PromptLogprobs> {
    let top = sequence.rules.prompt_logprobs.filter(|_| !sequence.rules.embed)?;
    let rows = unreported(sequence, run);
    if rows.is_empty() {
        return None;
    }
    let next = sequence.tokens[run.start + rows.start + 1..=run.start + rows.end].to_vec();
    Some(PromptLogprobs { rows, next, top })
}

/// Rows of a run that are to be reported on, once: not when they are computed again.
fn unreported(sequence: &Sequence, run: &Range<usize>) -> Range<usize> {
    let start = run.start.max(sequence.reported);
    let end = run.end.min(sequence.num_reported());
    if start >= end || !sequence.owes_rows() {
        return 0..0;
    }
    start - run.start..end - run.start
}
