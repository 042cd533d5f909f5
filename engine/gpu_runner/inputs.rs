//! A batch as one run of bytes for the device, and what of it lies where.
//!
//! All but the pages lies where the sizes say, so that a captured step finds everything in the same
//! places again. Rows of one token come first: they are what decode attention takes.

use strand_kernels::gpu::{PAGE_BYTES, SampleRow, Slice, page_bytes};
use strand_layers::gpu_attention::GpuStep;

use crate::batch::{Batch, BatchRow, SampleRequest};

/// Sections start at multiples of this many bytes, as kernels read them.
const ALIGNMENT: usize = 16;
const WORD: usize = 4;
/// The slot of a row that is stored nowhere.
const NOWHERE: u32 = u32::MAX;

/// A row of logits that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Output {
    /// Index into the batch's rows.
    pub row: usize,
    /// Index into the step's tokens.
    pub token: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// For the log-probability of the prompt's token of this number.
    Prompt(usize),
    /// Left to the device.
    Draw,
    /// For the host's sampler.
    Choose,
}

/// What a step computes, in its order.
pub(super) struct StepPlan<'a> {
    batch: &'a Batch,
    /// Indices into the batch's rows, those of one token first.
    order: Vec<usize>,
    pub outputs: Vec<Output>,
    /// Rows of hidden states: index into the batch's rows, and into the step's tokens.
    pub hidden: Vec<(usize, u32)>,
    sizes: Sizes,
    /// Rows of one token.
    singles: usize,
    longest: usize,
    /// The most keys that a row of one token sees, and that any row sees.
    max_keys: (usize, usize),
}

/// Numbers of things, padding included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sizes {
    tokens: usize,
    sequences: usize,
    outputs: usize,
    hidden: usize,
    pages: usize,
}

impl<'a> StepPlan<'a> {
    pub fn of(batch: &'a Batch) -> Self {
        let rows = || batch.rows.iter().enumerate();
        let is_single = |row: &BatchRow| row.tokens.len() == 1;
        let singles = rows().filter(|(_, row)| is_single(row)).map(|(index, _)| index);
        let mut order: Vec<usize> = singles.collect();
        let singles = order.len();
        order.extend(rows().filter(|(_, row)| !is_single(row)).map(|(index, _)| index));
        let (mut outputs, mut hidden, mut first) = (Vec::new(), Vec::new(), 0);
        for &index in &order {
            let row = &batch.rows[index];
            outputs.extend(outputs_of(row).map(|(token, kind)| Output {
                row: index,
                token: first + token,
                kind,
            }));
            hidden.extend(row.hidden.clone().map(|token| (index, first + token as u32)));
            first += row.tokens.len() as u32;
        }
        let sizes = Sizes {
            tokens: first as usize,
            sequences: order.len(),
            outputs: outputs.len(),
            hidden: hidden.len(),
            pages: batch.rows.iter().map(|row| row.view.len()).sum(),
        };
        let keys = |row: &BatchRow| row.start as usize + row.tokens.len();
        let most = |order: &[usize]| order.iter().map(|&i| keys(&batch.rows[i])).max().unwrap_or(0);
        let max_keys = (most(&order[..singles]), most(&order));
        let longest = batch.rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        Self { batch, order, outputs, hidden, sizes, singles, longest, max_keys }
    }

    /// True where each row has one token and at most one row of logits: what is captured.
    pub fn is_decode(&self) -> bool {
        self.singles == self.order.len() && self.hidden.is_empty()
    }

    pub fn num_rows(&self) -> usize {
        self.order.len()
    }

    /// A bound on the keys that any row sees.
    pub fn max_keys(&self) -> usize {
        self.max_keys.1
    }

    /// Pads a step that [decodes](Self::is_decode) to `rows` rows, each with its row of logits.
    /// Nothing but the pages depends on the batch then.
    pub fn pad(&mut self, rows: usize, max_keys: usize) {
        assert!(self.is_decode() && rows >= self.order.len());
        let sizes = Sizes { tokens: rows, sequences: rows, outputs: rows, ..self.sizes };
        (self.sizes, self.singles, self.max_keys) = (sizes, rows, (max_keys, max_keys));
    }

    /// Where an output's row of logits lies among those computed.
    pub fn output_row(&self, index: usize) -> usize {
        if self.is_padded() { self.outputs[index].token as usize } else { index }
    }

    fn is_padded(&self) -> bool {
        self.is_decode() && self.sizes.outputs == self.sizes.tokens
    }

    /// Bytes of the step's inputs.
    pub fn bytes(&self) -> usize {
        self.layout().end
    }

    /// How many page entries there are.
    pub fn num_pages(&self) -> usize {
        self.sizes.pages
    }

    fn layout(&self) -> Layout {
        Layout::of(self.sizes)
    }

    /// The step over inputs that begin at `inputs`.
    pub fn step(&self, inputs: &Slice) -> GpuStep {
        let layout = self.layout();
        GpuStep {
            ids: inputs.at(layout.ids),
            positions: inputs.at(layout.positions),
            slot_mapping: inputs.at(layout.slots),
            row_sequence: inputs.at(layout.row_sequence),
            cu_seqlens_q: inputs.at(layout.cu_seqlens_q),
            cu_pages: inputs.at(layout.cu_pages),
            outputs: inputs.at(layout.outputs),
            hidden: inputs.at(layout.hidden),
            pages: inputs.at(layout.pages),
            rows: self.sizes.tokens,
            sequences: self.sizes.sequences,
            singles: self.singles,
            longest: self.longest,
            single_keys: self.max_keys.0,
            max_keys: self.max_keys.1,
        }
    }

    /// How the rows of logits are to be drawn from.
    pub fn sampling(&self, inputs: &Slice) -> Slice {
        inputs.at(self.layout().sampling)
    }

    /// How many rows of logits there are, padding included.
    pub fn num_outputs(&self) -> usize {
        self.sizes.outputs
    }

    /// Writes the inputs.
    pub fn write(&self, bytes: &mut [u8]) {
        let layout = self.layout();
        let mut at = Cursors::new(bytes, &layout);
        let (mut tokens, mut pages) = (0u32, 0u32);
        for (sequence, &index) in self.order.iter().enumerate() {
            let row = &self.batch.rows[index];
            at.cu_seqlens_q.word(tokens);
            at.cu_pages.word(pages);
            for (offset, (&id, &slot)) in row.tokens.iter().zip(&row.slot_mapping).enumerate() {
                at.ids.word(id);
                at.positions.word(row.start + offset as u32);
                at.slots.word(slot);
                at.row_sequence.word(sequence as u32);
            }
            for entry in &row.view {
                at.pages.put(&page_bytes(entry));
            }
            tokens += row.tokens.len() as u32;
            pages += row.view.len() as u32;
        }
        for padding in self.order.len()..self.sizes.sequences {
            at.cu_seqlens_q.word(padding as u32);
            at.cu_pages.word(pages);
            at.ids.word(0);
            at.positions.word(0);
            at.slots.word(NOWHERE);
            at.row_sequence.word(padding as u32);
        }
        at.cu_seqlens_q.word(self.sizes.tokens as u32);
        at.cu_pages.word(pages);
        self.hidden.iter().for_each(|&(_, token)| at.hidden.word(token));
        self.write_outputs(&mut at);
    }

    fn write_outputs(&self, at: &mut Cursors) {
        if !self.is_padded() {
            for output in &self.outputs {
                at.outputs.word(output.token);
                at.sampling.put(&self.draw(output).to_bytes());
            }
            return;
        }
        let mut outputs = self.outputs.iter().peekable();
        for row in 0..self.sizes.outputs as u32 {
            let output = outputs.next_if(|output| output.token == row);
            let draw = output.map_or_else(greedy, |output| self.draw(output));
            at.outputs.word(row);
            at.sampling.put(&draw.to_bytes());
        }
    }

    fn draw(&self, output: &Output) -> SampleRow {
        let sample = self.batch.rows[output.row].sample.as_ref();
        match sample.filter(|_| output.kind == Kind::Draw) {
            None => greedy(),
            Some(wanted) => SampleRow {
                temperature: wanted.params.temperature,
                top_k: wanted.params.top_k.unwrap_or(0),
                top_p: wanted.params.top_p,
                min_p: wanted.params.min_p,
                seed: wanted.params.seed,
                choice: wanted.choice,
                position: wanted.position,
            },
        }
    }
}

/// What is drawn where nobody looks at it.
fn greedy() -> SampleRow {
    SampleRow {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        choice: 0,
        position: 0,
    }
}

/// The rows of logits a run of tokens has, by token.
fn outputs_of(row: &BatchRow) -> impl Iterator<Item = (u32, Kind)> {
    let prompt = row.prompt_logprobs.as_ref().map_or(0..0, |wanted| wanted.rows.clone());
    let prompt = prompt.enumerate().map(|(number, token)| (token as u32, Kind::Prompt(number)));
    let last = row.tokens.len() as u32 - 1;
    let kind = |wanted: &SampleRequest| if can_draw(wanted) { Kind::Draw } else { Kind::Choose };
    prompt.chain(row.sample.as_ref().map(|wanted| (last, kind(wanted))))
}

/// True where temperature, top-k, top-p and min-p are all that is asked for.
fn can_draw(wanted: &SampleRequest) -> bool {
    let params = &wanted.params;
    !params.needs_history()
        && params.logit_bias.is_empty()
        && wanted.suppressed.is_empty()
        && wanted.allowed.is_none()
        && wanted.logprobs.is_none()
}

/// Where each section begins, in bytes.
struct Layout {
    ids: usize,
    positions: usize,
    slots: usize,
    row_sequence: usize,
    cu_seqlens_q: usize,
    cu_pages: usize,
    outputs: usize,
    hidden: usize,
    sampling: usize,
    /// Last: of any length.
    pages: usize,
    end: usize,
}

impl Layout {
    fn of(sizes: Sizes) -> Self {
        let mut end = 0;
        let mut section = |bytes: usize| {
            let start = end;
            end = (end + bytes).next_multiple_of(ALIGNMENT);
            start
        };
        let (tokens, ends) = (WORD * sizes.tokens, WORD * (sizes.sequences + 1));
        Self {
            ids: section(tokens),
            positions: section(tokens),
            slots: section(tokens),
            row_sequence: section(tokens),
            cu_seqlens_q: section(ends),
            cu_pages: section(ends),
            outputs: section(WORD * sizes.outputs),
            hidden: section(WORD * sizes.hidden),
            sampling: section(SampleRow::BYTES * sizes.outputs),
            pages: section(PAGE_BYTES * sizes.pages),
            end,
        }
    }
}

/// One place to write at for each section.
struct Cursors<'a> {
    ids: Cursor<'a>,
    positions: Cursor<'a>,
    slots: Cursor<'a>,
    row_sequence: Cursor<'a>,
    cu_seqlens_q: Cursor<'a>,
    cu_pages: Cursor<'a>,
    outputs: Cursor<'a>,
    hidden: Cursor<'a>,
    sampling: Cursor<'a>,
    pages: Cursor<'a>,
}

impl<'a> Cursors<'a> {
    fn new(bytes: &'a mut [u8], layout: &Layout) -> Self {
        let mut rest = bytes;
        let mut start = 0;
        let mut until = |end: usize| {
            let (section, others) = std::mem::take(&mut rest).split_at_mut(end - start);
            (rest, start) = (others, end);
            Cursor(section)
        };
        Self {
            ids: until(layout.positions),
            positions: until(layout.slots),
            slots: until(layout.row_sequence),
            row_sequence: until(layout.cu_seqlens_q),
            cu_seqlens_q: until(layout.cu_pages),
            cu_pages: until(layout.outputs),
            outputs: until(layout.hidden),
            hidden: until(layout.sampling),
            sampling: until(layout.pages),
            pages: until(layout.end),
        }
    }
}

/// What is left of a section.
struct Cursor<'a>(&'a mut [u8]);

impl Cursor<'_> {
    fn word(&mut self, word: u32) {
        self.put(&word.to_le_bytes());
    }

    fn put(&mut self, bytes: &[u8]) {
        let (place, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        place.copy_from_slice(bytes);
        self.0 = rest;
    }
}
