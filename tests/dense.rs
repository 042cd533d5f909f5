//! Independent chunks against a dense reference: a plain f64 transformer over the whole prompt
//! with a mask that lets a chunk see the anchor and itself. A chunk's own rows count positions
//! right behind the anchor, all others by their place in the prompt; keys are rotated for each
//! view anew. It shares no code with the engine.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device};
use strand_engine::model_runner::ModelRunner;
use strand_engine::{Engine, EngineConfig, Event, Request, Sees, Segment};
use strand_kernels::{KvDtype, WeightDtype};
use strand_models::{ModelFiles, ModelSource};

use crate::random::Random;

/// The fixture `qwen3`: its numbers as config.json has them.
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 24;
const EPS: f64 = 1e-6;
const THETA: f64 = 1e6;
const VOCAB: usize = 144;

type Rows = Vec<Vec<f64>>;

/// Weight matrices as rows, vectors as one row.
struct Dense(HashMap<String, Rows>);

impl Dense {
    fn read(file: &Path) -> Self {
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).expect("the fixture");
        let rows = |tensor: &candle_core::Tensor| {
            let tensor = tensor.to_dtype(DType::F64).expect("any type becomes f64");
            match tensor.rank() {
                1 => vec![tensor.to_vec1().expect("a vector")],
                _ => tensor.to_vec2().expect("a matrix"),
            }
        };
        Self(tensors.iter().map(|(name, tensor)| (name.clone(), rows(tensor))).collect())
    }

    fn product(&self, name: &str, x: &Rows) -> Rows {
        let weight = &self.0[&format!("{name}.weight")];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
        x.iter().map(|row| weight.iter().map(|w| dot(row, w)).collect()).collect()
    }

    /// Norms groups of the weight's length.
    fn norm(&self, name: &str, x: &Rows) -> Rows {
        let weight = &self.0[&format!("{name}.weight")][0];
        let group = |values: &[f64]| -> Vec<f64> {
            let mean = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
            let scale = 1.0 / (mean + EPS).sqrt();
            values.iter().zip(weight).map(|(v, w)| v * scale * w).collect()
        };
        x.iter().map(|row| row.chunks(weight.len()).flat_map(group).collect()).collect()
    }

    /// Log-probabilities after the last token.
    fn forward(&self, ids: &[u32], mask: &Mask) -> Vec<f64> {
        let hidden = self.hidden(ids, mask);
        log_softmax(&self.product("model.embed_tokens", &hidden[hidden.len() - 1..].to_vec())[0])
    }

    /// Behind the last norm.
    fn hidden(&self, ids: &[u32], mask: &Mask) -> Rows {
        let embed = &self.0["model.embed_tokens.weight"];
        let mut x: Rows = ids.iter().map(|&id| embed[id as usize].clone()).collect();
        for layer in 0..LAYERS {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = self.norm(&name("input_layernorm"), &x);
            let project = |part: &str| self.product(&name(&format!("self_attn.{part}")), &normed);
            let q = self.norm(&name("self_attn.q_norm"), &project("q_proj"));
            let k = self.norm(&name("self_attn.k_norm"), &project("k_proj"));
            let attended = attend(&q, &k, &project("v_proj"), mask);
            add(&mut x, &self.product(&name("self_attn.o_proj"), &attended));
            let normed = self.norm(&name("post_attention_layernorm"), &x);
            let gate = self.product(&name("mlp.gate_proj"), &normed);
            let up = self.product(&name("mlp.up_proj"), &normed);
            let silu = |g: &f64, u: &f64| g / (1.0 + (-g).exp()) * u;
            let inner: Rows = gate
                .iter()
                .zip(&up)
                .map(|(g, u)| g.iter().zip(u).map(|(g, u)| silu(g, u)).collect())
                .collect();
            add(&mut x, &self.product(&name("mlp.down_proj"), &inner));
        }
        self.norm("model.norm", &x)
    }
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

/// Who sees whom, and from where.
struct Mask {
    /// The segment of each token.
    owner: Vec<usize>,
    /// Tokens that everybody sees.
    anchor: usize,
    /// Whether a segment sees the anchor and itself alone.
    is_chunk: Vec<bool>,
    /// Tokens that only their own segment sees.
    hidden: Vec<bool>,
}

impl Mask {
    fn of(prompt: &[Segment], anchor: usize) -> Self {
        let mut mask = Self { owner: Vec::new(), anchor, is_chunk: Vec::new(), hidden: Vec::new() };
        for (index, segment) in prompt.iter().enumerate() {
            mask.owner.extend(segment.tokens.iter().map(|_| index));
            mask.is_chunk.push(segment.sees == Sees::Anchor);
            mask.hidden.extend((0..segment.tokens.len()).map(|row| row < segment.hidden));
        }
        mask
    }

    fn sees(&self, row: usize, key: usize) -> bool {
        let own = self.owner[row] == self.owner[key];
        let other = !self.hidden[key] && !self.is_chunk[self.owner[row]];
        key <= row && (own || key < self.anchor || other)
    }

    /// Positions in the prompt, which hidden tokens have no place in.
    fn global(&self) -> Vec<usize> {
        let mut next = 0;
        let place = |&hidden: &bool| {
            let own = next;
            next += usize::from(!hidden);
            own
        };
        self.hidden.iter().map(place).collect()
    }

    /// Positions as a chunk counts them.
    fn local(&self) -> Vec<usize> {
        let start = |token: usize| self.owner.partition_point(|&o| o < self.owner[token]);
        let place = |token: usize| match token < self.anchor {
            true => token,
            false => self.anchor + token - start(token),
        };
        (0..self.owner.len()).map(place).collect()
    }
}

/// Each head's pairs (i, i + d/2) turn by position x theta^(-2i/d).
fn rotate(x: &Rows, positions: &[usize]) -> Rows {
    let half = HEAD_DIM / 2;
    let turn = |position: usize, head: &[f64]| -> Vec<f64> {
        let mut out = head.to_vec();
        for i in 0..half {
            let angle = position as f64 * THETA.powf(-2.0 * i as f64 / HEAD_DIM as f64);
            let (sin, cos) = angle.sin_cos();
            out[i] = head[i] * cos - head[i + half] * sin;
            out[i + half] = head[i + half] * cos + head[i] * sin;
        }
        out
    };
    x.iter()
        .zip(positions)
        .map(|(row, &position)| row.chunks(HEAD_DIM).flat_map(|h| turn(position, h)).collect())
        .collect()
}

fn attend(q: &Rows, k: &Rows, v: &Rows, mask: &Mask) -> Rows {
    let (local, global) = (mask.local(), mask.global());
    let as_chunk = (rotate(q, &local), rotate(k, &local));
    let as_turn = (rotate(q, &global), rotate(k, &global));
    let mut out = vec![vec![0.0; HEADS * HEAD_DIM]; q.len()];
    for (row, out) in out.iter_mut().enumerate() {
        let keys: Vec<usize> = (0..k.len()).filter(|&key| mask.sees(row, key)).collect();
        let (q, k) = if mask.is_chunk[mask.owner[row]] { &as_chunk } else { &as_turn };
        for head in 0..HEADS {
            let at = |heads: usize| heads * HEAD_DIM..(heads + 1) * HEAD_DIM;
            let (own, shared) = (at(head), at(head / (HEADS / KV_HEADS)));
            let score = |key: &usize| -> f64 {
                let products = q[row][own.clone()].iter().zip(&k[*key][shared.clone()]);
                products.map(|(a, b)| a * b).sum::<f64>() / (HEAD_DIM as f64).sqrt()
            };
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let weights = log_softmax(&scores);
            for (key, weight) in keys.iter().zip(weights) {
                let values = v[*key][shared.clone()].iter();
                out[own.clone()].iter_mut().zip(values).for_each(|(o, v)| *o += weight.exp() * v);
            }
        }
    }
    out
}

fn log_softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| x - max - sum.ln()).collect()
}

fn engine(folder: &Path) -> Engine<ModelRunner> {
    let source = ModelSource::Folder(folder.to_path_buf());
    let files = ModelFiles::open(&source).expect("the fixture is sound");
    let config = EngineConfig {
        dtype: Some(WeightDtype::F32),
        kv_dtype: Some(KvDtype::F32),
        kv_memory: Some(4 << 20),
        max_model_len: Some(512),
        ..EngineConfig::default()
    };
    strand_engine::load(files, &config, None, &mut |_, _| {}).expect("it fits").engine
}

/// The same through the engine.
fn through_the_engine(folder: &Path, prompt: Vec<Segment>) -> Vec<f64> {
    let mut engine = engine(folder);
    let mut request = Request::new(Vec::new());
    request.prompt = prompt;
    request.limits.max_tokens = Some(1);
    request.limits.logprobs = Some(VOCAB as u32);
    engine.submit(&request).expect("it fits");
    let mut found = vec![f64::NAN; VOCAB];
    while !engine.is_idle() {
        for (_, event) in engine.step().events {
            if let Event::Token { logprobs, .. } = event {
                for (id, value) in logprobs.expect("they were asked for").top {
                    found[id as usize] = f64::from(value);
                }
            }
        }
    }
    found
}

#[test]
fn independent_chunks_equal_a_dense_model_with_a_block_mask() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/qwen3");
    let dense = Dense::read(&folder.join("model.safetensors"));
    let mut random = Random::new(4);
    for (anchor, chunks) in [(0, vec![17, 40]), (1, vec![5, 33, 64]), (1, vec![]), (0, vec![3])] {
        let mut prompt = Vec::new();
        if anchor > 0 {
            prompt.push(Segment::anchor(random.tokens(anchor, VOCAB)));
        }
        prompt.extend(chunks.iter().map(|&n| Segment::independent(random.tokens(n, VOCAB))));
        prompt.push(Segment::new(random.tokens(19, VOCAB)));
        let mut mask = Mask::of(&prompt, anchor);
        let ids: Vec<u32> = prompt.iter().flat_map(|segment| segment.tokens.clone()).collect();
        let expected = dense.forward(&ids, &mask);
        let found = through_the_engine(&folder, prompt.clone());
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-3, "{anchor} {chunks:?}: {found} {expected}");
        }
        // the same prompt with nothing masked is `exact`
        mask.is_chunk.fill(false);
        let whole = dense.forward(&ids, &mask);
        prompt.iter_mut().for_each(|segment| segment.sees = Sees::Everything);
        let found = through_the_engine(&folder, prompt);
        assert!(found.iter().zip(&whole).all(|(found, whole)| (found - whole).abs() < 1e-3));
        if chunks.len() > 1 {
            let apart = expected.iter().zip(&whole).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f64::max) > 1e-2, "the mask was meant to matter");
        }
    }
}

#[test]
fn blended_chunks_equal_a_dense_model_whose_first_rows_see_what_is_before_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/qwen3");
    let dense = Dense::read(&folder.join("model.safetensors"));
    let mut random = Random::new(5);
    for (anchor, again) in [(0, 1), (1, 5), (0, 16), (1, 20)] {
        let mut prompt = Vec::new();
        if anchor > 0 {
            prompt.push(Segment::anchor(random.tokens(anchor, VOCAB)));
        }
        for (number, length) in [21, 40, 33].into_iter().enumerate() {
            let whole = Segment::independent(random.tokens(length, VOCAB));
            let head = Segment::new(whole.tokens[..again].to_vec());
            match number {
                0 => prompt.push(whole),
                _ => prompt.extend([head, Segment { hidden: again, ..whole }]),
            }
        }
        prompt.push(Segment::new(random.tokens(19, VOCAB)));
        let ids: Vec<u32> = prompt.iter().flat_map(|segment| segment.tokens.clone()).collect();
        let expected = dense.forward(&ids, &Mask::of(&prompt, anchor));
        let found = through_the_engine(&folder, prompt);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-3, "{anchor} {again}: {found} {expected}");
        }
    }
}

#[test]
fn an_embedding_is_the_mean_of_a_dense_models_hidden_states() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/qwen3");
    let dense = Dense::read(&folder.join("model.safetensors"));
    let ids = Random::new(6).tokens(75, VOCAB);
    let hidden = dense.hidden(&ids, &Mask::of(&[Segment::new(ids.clone())], 0));
    let mean = |column: usize| hidden.iter().map(|row| row[column]).sum::<f64>() / 75.0;
    let mut engine = engine(&folder);
    engine.submit(&Request::embedding(ids)).expect("it fits");
    let events = engine.step().events;
    let [(_, Event::Embedding { vector })] = &events[..] else { panic!("{events:?}") };
    assert!(engine.is_idle());
    assert_eq!(vector.len(), hidden[0].len());
    for (column, &found) in vector.iter().enumerate() {
        assert!((f64::from(found) - mean(column)).abs() < 1e-3, "{found} {}", mean(column));
    }
}
