//! Rows of a packed weight as f32, so that tied embeddings are kept once.

use crate::error::Error;
use crate::linear::PackedWeight;
use crate::memory::by_pieces;
use crate::threads::Threads;
use candle_core::{Device, Tensor};

/// Rows a thread gathers at a time.
const ROWS: usize = 8;

/// Gathers row `ids[i]` of `weight` into row i of the result (ids.len(), in_features).
pub fn embedding(
    weight: &PackedWeight,
    ids: &[u32],
    threads: &Threads,
) -> candle_core::Result<Tensor> {
    let (count, width) = (weight.out_features(), weight.in_features());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= count) {
        let expected = format!("below the vocabulary's {count}");
        return Err(Error::value("embedding", "a token id", *id, expected).into());
    }
    let out = by_pieces(threads, ids.len() * width, (ROWS * width).max(1), |i, rows| {
        for (id, row) in ids[i * ROWS..].iter().zip(rows.chunks_exact_mut(width)) {
            for (k, value) in row.iter_mut().enumerate() {
                *value = weight.value(*id as usize, k);
            }
        }
    });
    Tensor::from_vec(out, (ids.len(), width), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::WeightDtype;

    #[test]
    fn gathers_rows_and_refuses_ids_past_the_end() {
        let threads = Threads::new(2);
        let weight = PackedWeight::pack(70, 3, WeightDtype::Bf16, &threads, |range, out| {
            for (row, out) in range.zip(out.chunks_exact_mut(3)) {
                out.copy_from_slice(&[row as f32, 1.0, 0.5]);
            }
            Ok::<_, std::convert::Infallible>(())
        })
        .unwrap();
        let ids: Vec<u32> = (0..30).map(|i| (i * 37) % 70).collect();
        let rows: Vec<Vec<f32>> = embedding(&weight, &ids, &threads).unwrap().to_vec2().unwrap();
        for (id, row) in ids.iter().zip(rows) {
            assert_eq!(row, [*id as f32, 1.0, 0.5]);
        }
        assert_eq!(embedding(&weight, &[], &threads).unwrap().dims(), [0, 3]);
        let refusal = embedding(&weight, &[70], &threads).unwrap_err().to_string();
        assert!(refusal.contains("a token id is 70, must be below the vocabulary's 70"));
    }
}
