//! The law that lets keys stay as they were stored: `<R(p) q, R(d + j) k> = <R(p - d) q, R(j) k>`,
//! for every kind of rotation that is known; and that checkpoints with another kind are refused.

use std::collections::BTreeSet;
use std::path::Path;

use strand_kernels::{RotaryTable, rope_reference};
use strand_models::{ModelFiles, ModelSource, RopeConfig, RopeScaling, YarnScaling};

use crate::random::Random;

const HEAD_DIM: usize = 64;
const POSITIONS: usize = 40_000;

fn scalings() -> Vec<RopeScaling> {
    let yarn = YarnScaling {
        factor: 4.0,
        original_max_position_embeddings: 8192,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: YarnScaling::recommended_attention_factor(4.0, 1.0),
    };
    vec![
        RopeScaling::Unscaled,
        RopeScaling::Linear { factor: 4.0 },
        RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        },
        RopeScaling::Yarn(YarnScaling { truncate: false, ..yarn.clone() }),
        RopeScaling::Yarn(yarn),
        RopeScaling::Factors((0..HEAD_DIM / 2).map(|pair| 1.0 + pair as f32 * 0.37).collect()),
    ]
}

/// One more kind of rotation: one more number here, and one more of the above.
const KINDS: usize = 5;

fn kind(scaling: &RopeScaling) -> usize {
    match scaling {
        RopeScaling::Unscaled => 0,
        RopeScaling::Linear { .. } => 1,
        RopeScaling::Llama3 { .. } => 2,
        RopeScaling::Yarn(_) => 3,
        RopeScaling::Factors(_) => 4,
    }
}

/// Half-split pairs, in f64.
fn rotated(x: &[f64], (frequencies, factor): &(Vec<f64>, f64), position: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (position * frequency).sin_cos();
        out[i] = factor * (x[i] * cos - x[i + half] * sin);
        out[i + half] = factor * (x[i + half] * cos + x[i] * sin);
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// A head of length one.
fn head(random: &mut Random) -> Vec<f32> {
    let x: Vec<f32> = (0..HEAD_DIM).map(|_| random.between(0, 2001) as f32 - 1000.0).collect();
    let length = x.iter().map(|x| x * x).sum::<f32>().sqrt();
    x.iter().map(|x| x / length).collect()
}

/// (p, delta, j): a key stored at j is seen at delta + j, not after the query at p.
fn places(random: &mut Random) -> (usize, i64, usize) {
    let p = random.between(1, POSITIONS);
    let seen_at = random.between(0, p + 1);
    // The query turns to p - delta = stored + (p - seen_at), which must be in the table.
    let stored = random.between(0, POSITIONS - (p - seen_at));
    (p, seen_at as i64 - stored as i64, stored)
}

#[test]
fn turning_the_query_equals_moving_the_key_for_every_rotation() {
    let scalings = scalings();
    let kinds: BTreeSet<usize> = scalings.iter().map(kind).collect();
    assert!(kinds.into_iter().eq(0..KINDS), "every kind is here");
    let mut random = Random::new(9);
    for scaling in scalings {
        for theta in [10_000.0, 1e6] {
            let rope = RopeConfig { theta, scaling: scaling.clone() };
            let law = rope.inverse_frequencies(HEAD_DIM);
            let table = RotaryTable::new(&law.0, law.1, POSITIONS);
            let (mut group, mut f32s, mut negative) = (0f64, 0f64, 0);
            for _ in 0..2_000 {
                let (q, k) = (head(&mut random), head(&mut random));
                let (p, delta, j) = places(&mut random);
                let (p, delta, j) = (p as f64, delta as f64, j as f64);
                negative += usize::from(delta < 0.0);
                let (wide_q, wide_k) = (widen(&q), widen(&k));
                let turn = |x: &[f64], position| rotated(x, &law, position);
                let moved = dot(&turn(&wide_q, p), &turn(&wide_k, delta + j));
                let turned = dot(&turn(&wide_q, p - delta), &turn(&wide_k, j));
                group = group.max((moved - turned).abs());
                let stored = rope_reference(&k, &table, j as usize);
                let query = rope_reference(&q, &table, (p - delta) as usize);
                let score = dot(&widen(&query), &widen(&stored));
                f32s = f32s.max((score - moved).abs());
            }
            // Scores are of heads of length one, which a rotation by `factor` leaves that long.
            let length = law.1 * law.1;
            println!("{rope:?}: {group:.1e}, by the table {f32s:.1e}");
            assert!(group < 1e-9 * length, "{rope:?}: {group}");
            assert!(f32s < 1e-5 * length, "{rope:?}: {f32s}");
            assert!(negative > 500, "segments moved forward too");
        }
    }
}

/// A copy of a fixture with another rotation in its config.
fn opened(scaling: &str) -> String {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/smollm2");
    let name = format!("strand-rope-{}-{}", scaling.len(), std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(fixture.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(fixture.join("config.json")).unwrap();
    let changed =
        config.replace(r#""rope_scaling": null"#, &format!(r#""rope_scaling": {scaling}"#));
    assert_ne!(config, changed);
    std::fs::write(folder.join("config.json"), changed).unwrap();
    let result = ModelFiles::open(&ModelSource::Folder(folder.clone()));
    std::fs::remove_dir_all(folder).unwrap();
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn checkpoints_whose_positions_cannot_move_are_refused_by_name() {
    assert_eq!(opened(r#"{"type": "linear", "factor": 2.0}"#), "");
    for (scaling, name) in [
        (r#"{"type": "dynamic", "factor": 2.0}"#, "dynamic"),
        (r#"{"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0]}"#, "longrope"),
        (r#"{"type": "su", "short_factor": [1.0]}"#, "su"),
        (r#"{"type": "mrope", "mrope_section": [4, 4, 4]}"#, "mrope"),
    ] {
        let text = opened(scaling);
        assert!(text.contains(&format!("{name:?}")) && text.contains("supported are"), "{text}");
    }
}
