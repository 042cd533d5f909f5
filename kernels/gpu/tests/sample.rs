//! The sampler, against the steps of the one on the processor.

use super::*;
use crate::gpu::*;
use crate::testing::Random;

const GREEDY: SampleRow = SampleRow {
    temperature: 0.0,
    top_p: 1.0,
    min_p: 0.0,
    top_k: 0,
    seed: 7,
    choice: 0,
    position: 0,
};

fn uniform(row: &SampleRow) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let bits = mix(mix(mix(row.seed) ^ u64::from(row.choice)) ^ (u64::from(row.position) << 32));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Temperature, top-k, min-p, top-p and the draw over sorted weights in f64.
fn reference(logits: &[f32], row: &SampleRow) -> u32 {
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    if row.temperature == 0.0 {
        return best as u32;
    }
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    if row.top_k > 0 || row.top_p < 1.0 {
        ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    }
    if row.top_k > 0 {
        ids.truncate(row.top_k as usize);
    }
    let weight =
        |id: usize| (f64::from(logits[id] - logits[best]) / f64::from(row.temperature)).exp();
    let mut kept: Vec<(usize, f64)> = ids.into_iter().map(|id| (id, weight(id))).collect();
    kept.retain(|&(_, w)| w > 0.0 && w >= f64::from(row.min_p));
    if row.top_p < 1.0 {
        let goal = kept.iter().map(|c| c.1).sum::<f64>() * f64::from(row.top_p);
        let mut sum = 0.0;
        let last = kept.iter().position(|c| {
            sum += c.1;
            sum >= goal
        });
        kept.truncate(last.map_or(kept.len(), |last| last + 1));
    }
    let mut left = uniform(row) * kept.iter().map(|c| c.1).sum::<f64>();
    for &(id, weight) in &kept {
        left -= weight;
        if left < 0.0 {
            return id as u32;
        }
    }
    kept.last().unwrap().0 as u32
}

fn sampled(gpu: &Gpu, logits: &[f32], rows: &[SampleRow]) -> Vec<u32> {
    let vocab = logits.len() / rows.len();
    let params: Vec<u8> = rows.iter().flat_map(SampleRow::to_bytes).collect();
    let tokens = gpu.alloc(rows.len() * 4).unwrap();
    SampleRows {
        logits: &upload_f32(gpu, logits).all(),
        params: &gpu.uploaded(&params).unwrap().all(),
        tokens: &tokens.all(),
        rows: rows.len(),
        vocab,
    }
    .launch(gpu)
    .unwrap();
    download_u32(gpu, &tokens)
}

#[test]
fn tokens_are_those_of_the_reference() {
    let mut random = Random::new(31);
    let mut rows = vec![GREEDY];
    for (temperature, top_k, top_p, min_p) in [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.05),
        (1.0, 1, 1.0, 0.0),
        (1.3, 20, 1.0, 0.0),
        (0.6, 0, 0.9, 0.0),
        (1.0, 50, 0.8, 0.01),
        (5.0, 0, 0.99, 0.0),
        (0.05, 300, 0.5, 0.2),
        (100.0, 5000, 0.001, 0.0),
    ] {
        for position in 0..6 {
            let (seed, choice) = (random.next(), position % 2);
            rows.push(SampleRow { temperature, top_p, min_p, top_k, seed, choice, position });
        }
    }
    for vocab in [1, 31, 96, 1000, 2048, 5003] {
        let logits: Vec<f32> =
            random.normals(rows.len() * vocab).into_iter().map(|x| x * 3.0).collect();
        let expected: Vec<u32> =
            logits.chunks(vocab).zip(&rows).map(|(row, params)| reference(row, params)).collect();
        for gpu in gpus() {
            assert_eq!(sampled(&gpu, &logits, &rows), expected, "vocabulary of {vocab}");
        }
    }
}

#[test]
fn equal_logits_are_told_apart_by_number() {
    let mut random = Random::new(32);
    let logits: Vec<f32> = (0..40 * 700).map(|_| random.below(4) as f32 - 1.5).collect();
    let rows: Vec<SampleRow> = (0..40)
        .map(|position| SampleRow {
            temperature: 2.0,
            top_k: [0, 13, 400][position as usize % 3],
            top_p: [1.0, 0.7][position as usize % 2],
            position,
            ..GREEDY
        })
        .collect();
    let expected: Vec<u32> =
        logits.chunks(700).zip(&rows).map(|(row, params)| reference(row, params)).collect();
    for gpu in gpus() {
        assert_eq!(sampled(&gpu, &logits, &rows), expected);
        let flat = [1.0, 1.0, 1.0, 1.0];
        assert_eq!(sampled(&gpu, &flat, &[GREEDY]), [0]);
        assert_eq!(sampled(&gpu, &[f32::NEG_INFINITY; 4], &[rows[1]]), [0]);
    }
}

#[test]
fn rows_that_are_not_finite_are_flagged() {
    let mut x = Random::new(33).normals(5 * 700);
    x[700] = f32::NAN;
    x[2099] = f32::INFINITY;
    x[4 * 700 + 300] = f32::NEG_INFINITY;
    for gpu in gpus() {
        let flags = gpu.alloc(20).unwrap();
        let (x, flags_on) = (&upload_f32(&gpu, &x).all(), &flags.all());
        CheckFinite { x, flags: flags_on, rows: 5, width: 700 }.launch(&gpu).unwrap();
        assert_eq!(download_u32(&gpu, &flags), [0, 1, 1, 0, 1]);
    }
}
