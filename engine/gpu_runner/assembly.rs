//! What a step says of each row, put together as it comes off the device.

use strand_layers::sampler;

use super::inputs::Kind;
use crate::batch::{Batch, RowOutput, Sampled};
use crate::error::Error;
use crate::row_output::choose;

/// One result for each of the batch's rows.
pub(super) struct Assembly<'a> {
    batch: &'a Batch,
    rows: Vec<Result<RowOutput, Error>>,
    /// Rows with a number that is not one.
    broken: Vec<bool>,
}

impl<'a> Assembly<'a> {
    pub fn new(batch: &'a Batch) -> Self {
        let nothing = |id| {
            let (prompt_logprobs, hidden) = (Vec::new(), Vec::new());
            Ok(RowOutput { id, sampled: None, prompt_logprobs, hidden })
        };
        let rows = batch.rows.iter().map(|row| nothing(row.id)).collect();
        Self { batch, rows, broken: vec![false; batch.rows.len()] }
    }

    /// A token that the device has chosen.
    pub fn drawn(&mut self, row: usize, token: u32, is_finite: bool) {
        self.broken[row] |= !is_finite;
        if let Ok(output) = &mut self.rows[row] {
            output.sampled = Some(Sampled { token, logprobs: None });
        }
    }

    /// A row of logits that the host is to look at.
    pub fn logits(&mut self, row: usize, kind: Kind, logits: Vec<f32>, is_finite: bool) {
        self.broken[row] |= !is_finite;
        let Ok(output) = &mut self.rows[row] else { return };
        let asked = &self.batch.rows[row];
        if let (Kind::Prompt(number), Some(wanted)) = (kind, &asked.prompt_logprobs) {
            let logprobs = sampler::logprobs(&logits, wanted.next[number], wanted.top);
            output.prompt_logprobs.push(logprobs);
        }
        if let (Kind::Choose, Some(wanted)) = (kind, &asked.sample)
            && is_finite
        {
            match choose(&logits, wanted) {
                Ok(sampled) => output.sampled = Some(sampled),
                Err(error) => self.rows[row] = Err(error),
            }
        }
    }

    /// A row of hidden states, in order.
    pub fn hidden(&mut self, row: usize, values: Vec<f32>) {
        self.broken[row] |= values.iter().any(|value| !value.is_finite());
        if let Ok(output) = &mut self.rows[row] {
            output.hidden.push(values);
        }
    }

    pub fn is_sound(&self) -> bool {
        !self.broken.contains(&true)
    }

    /// Fails the rows that are broken, by the part of the network where it began.
    pub fn fail(&mut self, layer: &str) {
        for (row, _) in self.rows.iter_mut().zip(&self.broken).filter(|(_, broken)| **broken) {
            *row = Err(Error::NotANumber { layer: layer.to_owned() });
        }
    }

    pub fn finish(self) -> Vec<Result<RowOutput, Error>> {
        self.rows
    }
}
