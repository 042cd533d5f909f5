//! E1 and E3 over histories: whatever was loaded, switched, moved, saved, evicted, erased, forked
//! and restarted before, logits are those of a fresh engine that is given the final context alone.
//! Bit for bit, over the whole vocabulary, on the bundled model; what is free is full of NaN.
//!
//! `STRAND_HISTORIES=2000` runs more of them (tests/slow.sh).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strand_engine::cache::KvSegment;
use strand_engine::context::{Chunk, ChunkKind, Context, Conversation, ReusePolicy};
use strand_engine::io::IoFiles;
use strand_engine::model_runner::ModelRunner;
use strand_engine::store::{Codec, Store, StoredChunk};
use strand_engine::{
    Device, Engine, EngineConfig, Event, IoJob, KvVariant, Outcome, Request, Restore, Reuse,
    Segment, SegmentKv,
};
use strand_kernels::KvDtype;
use strand_models::{ModelFiles, ModelSource};

use crate::binary::scratch;
use crate::http::until;
use crate::random::Random;

/// What histories are computed on, and with which network.
#[derive(Clone, Copy)]
pub struct Place {
    pub device: Device,
    /// The bundled model's network, or a smaller one under its tokenizer.
    pub model: fn() -> ModelFiles,
    /// That of the weights where there is none.
    pub kv_dtype: Option<KvDtype>,
}

const HERE: Place = Place { device: Device::Cpu, model: bundled, kv_dtype: None };

pub fn bundled() -> ModelFiles {
    ModelFiles::open(&ModelSource::Demo).expect("it is part of the program")
}

/// Tokens of the model's length here; a prompt takes all but the answer.
const LENGTH: usize = 700;
const ANSWER: usize = 3;

/// Tokens, each with the bits of its whole distribution.
type Bits = Vec<(u32, Vec<(u32, u32)>)>;

/// An engine that is stepped here, and its files.
struct Stepped {
    engine: Engine<ModelRunner>,
    files: Option<IoFiles>,
}

/// A store that may have been left just now: a process that another test starts holds its lock,
/// too, until it has become its program.
fn opened(folder: &Path) -> Store {
    let mut store = None;
    until(|| {
        store = Store::open(folder).ok();
        store.is_some()
    });
    store.expect("it was opened")
}

impl Stepped {
    fn start(place: Place, config: EngineConfig, folder: Option<&Path>) -> Self {
        let store = folder.map(opened);
        let config = EngineConfig { device: place.device, deterministic: true, ..config };
        let model = (place.model)();
        let loaded = strand_engine::load(model, &config, store, &mut |_, _| {}).expect("it fits");
        let mut engine = loaded.engine;
        let blocks: Vec<u32> = (0..engine.plan().num_blocks as u32).collect();
        engine.runner_mut().poison(&blocks).expect("the pool can be written");
        Self { engine, files: loaded.files }
    }

    /// Does what the disk was asked, and poisons what is free.
    fn settle(&mut self) -> Option<Outcome> {
        let mut outcome = None;
        for job in self.engine.take_jobs() {
            let files = self.files.as_ref().expect("only an engine with files asks for them");
            let done = files.writer.carry_out(job);
            outcome = self.engine.io_done(done).map(|(_, outcome)| outcome).or(outcome);
        }
        let free = self.engine.free_blocks();
        self.engine.runner_mut().poison(&free).expect("the pool can be written");
        self.engine.check_invariants();
        outcome
    }

    fn ask(&mut self, prompt: Vec<Segment>, max_tokens: usize) -> (Bits, Reuse) {
        let vocabulary = self.engine.plan().vocab_size as u32;
        let mut request = Request::new(Vec::new());
        request.prompt = prompt;
        request.restore = Restore::Always;
        request.limits.max_tokens = Some(max_tokens);
        request.limits.ignore_eos = true;
        request.limits.logprobs = Some(vocabulary);
        self.engine.submit(&request).expect("it fits");
        let (mut bits, mut used) = (Vec::new(), Reuse::default());
        while !self.engine.is_idle() {
            self.settle();
            for (_, event) in self.engine.step().events {
                match event {
                    Event::Token { token, logprobs, .. } => {
                        let top = logprobs.expect("they were asked for").top;
                        let row = top.iter().map(|&(id, value)| (id, value.to_bits())).collect();
                        bits.push((token, row));
                    }
                    Event::Finished { reuse, .. } => used = reuse,
                    Event::Failed(error) => panic!("{error}"),
                    Event::Prompt { .. } | Event::Embedding { .. } => {}
                }
            }
        }
        self.settle();
        (bits, used)
    }
}

/// One context's life, and the engine it lives in.
struct History {
    place: Place,
    random: Random,
    folder: PathBuf,
    stepped: Stepped,
    context: Context,
    /// A fork of it, to switch to and back.
    other: Context,
    texts: Vec<Chunk>,
    seen: Seen,
}

/// What histories reached, in sum.
#[derive(Debug, Default)]
pub struct Seen {
    pub reuse: Reuse,
    pub saved: usize,
    pub unloaded: usize,
    pub restarts: usize,
    pub checks: usize,
}

fn config(random: &mut Random, model: &ModelFiles, kv_dtype: Option<KvDtype>) -> EngineConfig {
    let vector = kv_dtype.unwrap_or(KvDtype::F16).vector_bytes(model.config.head_dim);
    let vectors = 2 * model.config.num_key_value_heads * model.config.num_hidden_layers;
    let row = vectors * vector;
    EngineConfig {
        block_size: [8, 16, 32][random.between(0, 3)],
        max_num_batched_tokens: [7, 64, 1024][random.between(0, 3)],
        // room for one long prompt and little else: idle blocks must go
        kv_memory: Some((row * (1024 + 205 * random.between(0, 3))) as u64),
        host_memory: Some([0, 1 << 18, 64 << 20][random.between(0, 3)]),
        max_model_len: Some(LENGTH),
        threads: Some(2),
        kv_codec: [Codec::Raw, Codec::Planes][random.between(0, 2)],
        kv_dtype,
        ..EngineConfig::default()
    }
}

fn chunks(random: &mut Random, model: &ModelFiles) -> Vec<Chunk> {
    let (template, tokenizer) = language(model);
    let text = |length: usize, random: &mut Random| {
        let words = ["red", "gate", "7", "Mira", "harbour", "=", "stone", "\n", "key", "42"];
        let words = (0..length).map(|_| words[random.between(0, words.len())]);
        words.collect::<Vec<_>>().join(" ")
    };
    let lengths = [3, 10, 20, 35, 50];
    let chunk = |(number, length): (usize, &usize)| {
        let content = text(*length, random).into_bytes();
        let name = format!("{number}.txt");
        Chunk::new(&name, ChunkKind::File, content, template, tokenizer).expect("it is text")
    };
    lengths.iter().enumerate().map(chunk).collect()
}

pub fn language(model: &ModelFiles) -> (&strand_models::ChatTemplate, &strand_models::Tokenizer) {
    let template = model.chat_template.as_ref().expect("it has one");
    (template, model.tokenizer.as_ref().expect("it has one"))
}

impl History {
    fn start(place: Place, seed: u64, policy: ReusePolicy, model: &ModelFiles) -> Self {
        let mut random = Random::new(seed);
        let kv = place.kv_dtype.map_or("", KvDtype::name);
        let name = format!("{}{kv}-{}-{seed}", place.device, policy.as_str());
        let folder = scratch("histories").join(name);
        drop(fs::remove_dir_all(&folder));
        let stepped =
            Stepped::start(place, config(&mut random, model, place.kv_dtype), Some(&folder));
        let mut context = Context::new(policy, Conversation::default(), Vec::new());
        context.blend_tokens = [0, 5, 16, 1000][random.between(0, 4)];
        let texts = chunks(&mut random, model);
        let other = context.clone();
        let seen = Seen::default();
        Self { place, random, folder, stepped, context, other, texts, seen }
    }

    /// Does one thing that may happen to a context.
    fn step(&mut self, model: &ModelFiles) {
        let chosen = self.random.between(0, 14);
        let count = self.context.entries().len();
        let index = if count > 0 { self.random.between(0, count) } else { 0 };
        match chosen {
            0..=2 => self.load(),
            3 if self.random.chance(30) => std::mem::swap(&mut self.context, &mut self.other),
            3 if self.random.chance(30) => self.other = self.context.clone(),
            4 if self.random.chance(30) => self.restart(model),
            5 => self.evict(),
            6 | 7 => self.check(model, 1),
            _ if count == 0 => self.load(),
            8 | 9 => {
                let active = self.context.entries()[index].active;
                self.context.set_active(index, !active);
            }
            10 => {
                // to the end of the order
                let entry = self.context.entries()[index].clone();
                self.context.remove(index);
                self.context.push(entry);
            }
            11 => {
                (0..count).for_each(|index| self.save(index));
                if self.random.chance(40) {
                    self.restart(model);
                }
            }
            12 => {
                let place = self.context.segments_to(index);
                let unloaded = self.stepped.engine.unload(place, "", KvVariant::Lossless);
                self.seen.unloaded += usize::from(unloaded.is_ok());
            }
            _ => {
                let id = self.context.entries()[index].chunk.id;
                self.stepped.engine.erase(id, None);
                self.context.remove(index);
            }
        }
        self.stepped.settle();
    }

    fn save(&mut self, index: usize) {
        let place = self.context.segments_to(index);
        let codec = [Codec::Raw, Codec::Planes][self.random.between(0, 2)];
        if self.stepped.engine.save(place, "", codec).is_ok() {
            let outcome = self.stepped.settle();
            assert!(matches!(outcome, Some(Outcome::Saved(Ok(_)))), "{outcome:?}");
            self.seen.saved += 1;
        }
    }

    fn load(&mut self) {
        let chunk = self.texts[self.random.between(0, self.texts.len())].clone();
        if self.random.chance(70) {
            // kept, so that its KV may be written unasked too
            let kept = StoredChunk::new(&chunk.name, chunk.kind, &chunk.text, None);
            let files = self.stepped.files.as_ref().expect("histories have files");
            files.writer.store.put_chunk(&kept).expect("the store takes it");
        }
        self.context.load(chunk, self.random.chance(80));
        let index = self.context.entries().len() - 1;
        let encode = self.context.encode(index).prompt;
        self.stepped.ask(encode, 1);
    }

    /// Somebody else needs the pool.
    fn evict(&mut self) {
        let length = self.random.between(LENGTH / 2, LENGTH - ANSWER);
        let tokens = self.random.tokens(length, 2000);
        self.stepped.ask(vec![Segment::new(tokens)], 1);
    }

    /// Another process on the same folder, with other settings.
    fn restart(&mut self, model: &ModelFiles) {
        self.stepped.files = None; // gives the lock back
        let config = config(&mut self.random, model, self.place.kv_dtype);
        self.stepped = Stepped::start(self.place, config, Some(&self.folder));
        self.seen.restarts += 1;
    }

    /// Says something, and compares the answer's logits with those of a fresh engine.
    fn check(&mut self, model: &ModelFiles, max_tokens: usize) {
        let (template, tokenizer) = language(model);
        self.context.say(["What is red?", "Who is Mira?", "Hi."][self.random.between(0, 3)]);
        let room = LENGTH - ANSWER;
        let Ok(prompt) = self.context.prompt(template, tokenizer, room) else {
            self.context.conversation.pop();
            return;
        };
        let (found, reuse) = self.stepped.ask(prompt.segments.clone(), max_tokens);
        let roomy = EngineConfig {
            kv_memory: Some(16 << 20),
            max_model_len: Some(LENGTH),
            threads: Some(1),
            kv_dtype: self.place.kv_dtype,
            ..EngineConfig::default()
        };
        let (expected, fresh) =
            Stepped::start(self.place, roomy, None).ask(prompt.segments.clone(), max_tokens);
        assert!(found == expected, "{:?}, reused {reuse:?}", self.context.policy());
        assert_eq!(fresh.cached(), 0);
        let ids: Vec<u32> = found.iter().map(|(token, _)| *token).collect();
        self.context.conversation.push_answer(&prompt.opening, &ids, tokenizer.decode(&ids));
        self.seen.checks += 1;
        self.seen.reuse.device += reuse.device;
        self.seen.reuse.host += reuse.host;
        self.seen.reuse.disk += reuse.disk;
        self.seen.reuse.recomputed += reuse.recomputed;
    }
}

/// So many histories, each compared with fresh engines.
pub fn run(place: Place, seeds: std::ops::Range<u64>) -> Seen {
    let model = (place.model)();
    let mut total = Seen::default();
    for seed in seeds {
        let policy = ReusePolicy::ALL[(seed % ReusePolicy::ALL.len() as u64) as usize];
        let run = std::panic::AssertUnwindSafe(|| {
            let mut history = History::start(place, seed, policy, &model);
            for _ in 0..history.random.between(8, 24) {
                history.step(&model);
            }
            history.check(&model, ANSWER);
            drop(fs::remove_dir_all(&history.folder));
            history.seen
        });
        let seen = std::panic::catch_unwind(run).unwrap_or_else(|_| panic!("history {seed}"));
        total.checks += seen.checks;
        total.saved += seen.saved;
        total.unloaded += seen.unloaded;
        total.restarts += seen.restarts;
        total.reuse.device += seen.reuse.device;
        total.reuse.host += seen.reuse.host;
        total.reuse.disk += seen.reuse.disk;
        total.reuse.recomputed += seen.reuse.recomputed;
    }
    total
}

#[test]
fn after_any_history_of_a_context_the_logits_are_those_of_a_fresh_engine() {
    let asked = std::env::var("STRAND_HISTORIES").ok().map(|count| count.parse());
    let count: u64 = asked.map_or(100, |count| count.expect("STRAND_HISTORIES is a number"));
    let total = run(HERE, 0..count);
    println!("{count} histories: {total:?}");
    assert!(total.checks >= count as usize && total.saved > 20 && total.unloaded > 20, "{total:?}");
    let Reuse { device, host, disk, recomputed, .. } = total.reuse;
    assert!(device > 0 && host > 0 && disk > 100 && recomputed > 0, "{total:?}");
    assert!(total.restarts > 5, "{total:?}");
}

#[test]
fn so_they_are_where_kv_is_held_as_int8() {
    let total = run(Place { kv_dtype: Some(KvDtype::Int8), ..HERE }, 0..25);
    let Reuse { device, host, disk, .. } = total.reuse;
    assert!(device > 0 && host > 0 && disk > 0, "{total:?}");
}

#[test]
fn nothing_is_written_unasked_of_a_chunk_that_is_not_kept() {
    let folder = scratch("histories").join("not-kept");
    drop(fs::remove_dir_all(&folder));
    let config = EngineConfig { max_model_len: Some(LENGTH), ..EngineConfig::default() };
    let stepped = Stepped::start(HERE, config, Some(&folder));
    let worker = &stepped.files.as_ref().expect("it has a folder").writer;
    let text = "The harbour gate is green.";
    let kept = StoredChunk::new("gate.txt", ChunkKind::File, text, None);
    let (tokens, identity) = (vec![7; 5], stepped.engine.identity().clone());
    let segment = Arc::new(KvSegment {
        kv: identity.root(KvVariant::Lossless).kv_id(&tokens, &[]),
        chunk: kept.info.id,
        variant: KvVariant::Lossless,
        identity: Arc::new(identity),
        tokens: tokens.into(),
        seen: [].into(),
        first_position: 0,
        hashes: [].into(),
    });
    let frame = vec![0; worker.shape.frame_bytes(segment.tokens.len()).expect("a small one")];
    let data = Arc::new(SegmentKv::of_frames(&vec![frame; 2 * worker.shape.layers]));
    let demote = || {
        let (segment, data) = (segment.clone(), data.clone());
        worker.carry_out(IoJob::Save { ticket: None, segment, data, codec: Codec::Planes });
        worker.store.kv_files().expect("it can be listed").len()
    };
    assert_eq!(demote(), 0);
    worker.store.put_chunk(&kept).expect("the store takes it");
    assert_eq!(demote(), 1);
}
