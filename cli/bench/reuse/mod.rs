//! Time to the first token of a question over chunks, by where their KV is and by policy.
//!
//! Each scene is a history that ends in a question: nothing cached, everything on the device, on
//! the host, on the disk, one chunk switched off and on again, the order reversed. The question is
//! new each time, so its own tokens are always computed; what the engine counted as reused and
//! encoded is printed beside the time.

mod cold;
mod contexts;
mod report;

use std::time::Instant;

use anyhow::{Result, bail};
use strand_engine::cache::KvId;
use strand_engine::context::{Chunk, ChunkKind, Context, Conversation, ReusePolicy};
use strand_engine::{ChunkId, KvVariant, Request, Restore, Reuse, Segment};

use super::disk::{self, Folder};
use super::kv_files::KvFiles;
use super::statistics::quantile;
use super::workload::Random;
use super::{Answer, Bench};
use crate::Outcome;
use crate::args::{CommonArgs, ReuseBenchArgs};
use cold::DiskHit;
use contexts::Switches;

/// What happened before the question; played in this order, each goes on from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scene {
    Cold,
    Device,
    Host,
    Disk,
    SwitchedOff,
    SwitchedOn,
    Reversed,
}

impl Scene {
    const ALL: [Self; 7] = [
        Self::Cold,
        Self::Device,
        Self::Host,
        Self::Disk,
        Self::SwitchedOff,
        Self::SwitchedOn,
        Self::Reversed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Cold => "nothing cached",
            Self::Device => "all on the device",
            Self::Host => "all on the host",
            Self::Disk => "all on the disk",
            Self::SwitchedOff => "first chunk switched off",
            Self::SwitchedOn => "and on again",
            Self::Reversed => "order reversed",
        }
    }

    /// How often it can be played without encoding the chunks anew.
    fn times(self, policy: ReusePolicy, args: &ReuseBenchArgs) -> usize {
        let is_movable = matches!(policy, ReusePolicy::Independent | ReusePolicy::Blend);
        match self {
            Self::Device | Self::Host | Self::Disk => args.repeats,
            // the chunks turned by one more each time: first rows that no time before has left
            Self::Reversed if is_movable => args.repeats.min(args.num_chunks),
            _ => 1,
        }
    }

    /// Where all is on the device and the same is computed as when all is on the disk: the first
    /// rows that blend computes again are never on the disk, and are kept on the device until the
    /// order changes.
    fn like_a_disk_hit(policy: ReusePolicy) -> Self {
        if policy == ReusePolicy::Blend { Self::Reversed } else { Self::Device }
    }
}

/// One policy in one scene.
struct Row {
    policy: ReusePolicy,
    scene: Scene,
    seconds: Vec<f64>,
    /// Of the last question.
    reuse: Reuse,
}

/// All that is printed.
#[derive(Default)]
struct Results {
    rows: Vec<Row>,
    disk_hits: Vec<DiskHit>,
    /// Of each switch of a chunk.
    toggle_seconds: Vec<f64>,
    switches: Vec<Switches>,
}

pub fn run(args: &ReuseBenchArgs, common: &CommonArgs) -> Result<Outcome> {
    let folder = Folder::new(common)?;
    let (bench, files) = Bench::start_in(&folder, &args.model, common, 0)?;
    check_room(&bench, args)?;
    let mut random = Random::new(args.model.seed);
    let vocab_size = bench.engine.plan().vocab_size;
    let chunks: Vec<Chunk> =
        (0..args.num_chunks).map(|_| chunk(random.prompt(args.chunk_len, vocab_size))).collect();
    let mut results = Results::default();
    for &policy in &args.policy {
        let mut player = Player {
            bench: &bench,
            folder: &folder,
            files: &files,
            args,
            random: &mut random,
            context: context(policy, &chunks),
            chunks: &chunks,
            saved: Vec::new(),
        };
        player.play(&mut results)?;
        if args.contexts > 0 {
            results.switches.push(contexts::measure(&bench, args, policy, &mut random)?);
        }
    }
    for chunk in &chunks {
        bench.engine.erase(chunk.id, None)?;
    }
    report::print(&bench, args, &folder, &results)?;
    Ok(Outcome::Done)
}

fn check_room(bench: &Bench, args: &ReuseBenchArgs) -> Result<()> {
    let room = bench.engine.plan().max_model_len;
    let of_contexts = args.context_chunks * args.context_chunk_len;
    let of_contexts = if args.contexts > 0 { of_contexts } else { 0 };
    let tokens = of_contexts.max(args.num_chunks * args.chunk_len) + args.question_len + 1;
    if tokens > room {
        bail!(
            "the longest request has {tokens} tokens, the model takes {room}; \
             lower --num-chunks or --chunk-len"
        );
    }
    Ok(())
}

/// A chunk of random tokens, named by them.
fn chunk(ids: Vec<u32>) -> Chunk {
    let bytes: Vec<u8> = ids.iter().flat_map(|token| token.to_le_bytes()).collect();
    let (name, text, kind) = (String::new(), String::new(), ChunkKind::File);
    Chunk { id: ChunkId::of(&bytes), name, kind, text, ids }
}

fn context<'a>(policy: ReusePolicy, chunks: impl IntoIterator<Item = &'a Chunk>) -> Context {
    let mut context = Context::new(policy, Conversation::default(), Vec::new());
    for chunk in chunks {
        context.load(chunk.clone(), true);
    }
    context
}

/// Asks a question over a context's active chunks.
fn ask(bench: &Bench, context: &Context, question: Vec<u32>) -> Result<Answer> {
    let mut request = Request::new(Vec::new());
    request.prompt = context.chunk_segments();
    request.prompt.push(Segment::new(question));
    request.limits.max_tokens = Some(1);
    request.limits.ignore_eos = true;
    request.restore = Restore::Always;
    request.allow_lossy = accepted(bench) == KvVariant::Int8;
    bench.ask(request)
}

/// Lossy KV is taken where it is what is written.
fn accepted(bench: &Bench) -> KvVariant {
    bench.engine.plan().kv_codec.variant()
}

/// Plays the scenes of one policy.
struct Player<'a> {
    bench: &'a Bench,
    folder: &'a Folder,
    files: &'a KvFiles,
    args: &'a ReuseBenchArgs,
    random: &'a mut Random,
    context: Context,
    chunks: &'a [Chunk],
    /// The chunks' files, once they are written.
    saved: Vec<KvId>,
}

impl Player<'_> {
    fn play(&mut self, results: &mut Results) -> Result<()> {
        let policy = self.context.policy();
        let mut rows = Scene::ALL.map(|scene| {
            let (seconds, reuse) = (Vec::new(), Reuse::default());
            Row { policy, scene, seconds, reuse }
        });
        let mut hit = DiskHit::new(policy);
        for _ in 0..self.args.cold_repeats {
            for row in &mut rows {
                for turn in 0..row.scene.times(policy, self.args) {
                    let answer = match row.scene {
                        Scene::Disk => self.ask_the_disk(&mut hit)?,
                        scene => {
                            self.prepare(scene, &mut results.toggle_seconds)?;
                            self.ask(scene, turn)?
                        }
                    };
                    row.seconds.push(answer.first_token_seconds);
                    row.reuse = answer.reuse;
                }
            }
        }
        results.rows.extend(rows);
        results.disk_hits.push(hit);
        Ok(())
    }

    /// Does what the scene is about.
    fn prepare(&mut self, scene: Scene, toggles: &mut Vec<f64>) -> Result<()> {
        match scene {
            Scene::Cold => self.erase()?,
            Scene::Host => self.unload()?,
            Scene::SwitchedOff | Scene::SwitchedOn => {
                let started = Instant::now();
                self.context.set_active(0, scene == Scene::SwitchedOn);
                toggles.push(started.elapsed().as_secs_f64());
            }
            Scene::Device | Scene::Disk | Scene::Reversed => {}
        }
        Ok(())
    }

    fn ask(&mut self, scene: Scene, turn: usize) -> Result<Answer> {
        let vocab_size = self.bench.engine.plan().vocab_size;
        let question = self.random.prompt(self.args.question_len, vocab_size);
        if scene != Scene::Reversed {
            return ask(self.bench, &self.context, question);
        }
        let mut chunks: Vec<&Chunk> = self.chunks.iter().rev().collect();
        chunks.rotate_left(turn);
        ask(self.bench, &context(self.context.policy(), chunks), question)
    }

    fn chunk_ids(&self) -> Vec<ChunkId> {
        self.context.entries().iter().map(|entry| entry.chunk.id).collect()
    }

    fn erase(&mut self) -> Result<()> {
        self.saved.clear();
        self.chunk_ids()
            .into_iter()
            .try_for_each(|id| Ok(self.bench.engine.erase(id, None).map(drop)?))
    }

    fn unload(&mut self) -> Result<()> {
        for index in 0..self.context.entries().len() {
            let prompt = self.context.segments_to(index);
            self.bench.engine.unload(prompt, "", accepted(self.bench))?;
        }
        Ok(())
    }

    /// Writes what is on the device.
    fn save(&mut self, hit: &mut DiskHit) -> Result<()> {
        let codec = self.bench.engine.plan().kv_codec;
        (hit.file_bytes, hit.raw_bytes) = (0, 0);
        for index in 0..self.context.entries().len() {
            let saved = self.bench.engine.save(self.context.segments_to(index), "", codec)?;
            hit.file_bytes += saved.file_bytes;
            hit.raw_bytes += saved.raw_bytes;
            self.saved.push(saved.kv_id);
        }
        Ok(())
    }

    /// Reads the files by themselves, asks with nothing in memory, and reads them again: the
    /// faster of both is what the disk can do.
    fn ask_the_disk(&mut self, hit: &mut DiskHit) -> Result<Answer> {
        if self.saved.is_empty() {
            self.save(hit)?;
        }
        for id in self.chunk_ids() {
            self.bench.engine.forget(id, None)?;
        }
        let before = self.time_to_read()?;
        for &id in &self.saved {
            disk::drop_pages(&self.folder.kv_file(id))?;
        }
        let answer = self.ask(Scene::Disk, 0)?;
        hit.seconds.push(answer.first_token_seconds);
        hit.read_seconds.push(before.min(self.time_to_read()?));
        let mut decode_seconds = 0.0;
        for &id in &self.saved {
            decode_seconds += self.files.time_to_load_on_one_thread(id)?;
        }
        hit.decode_seconds.push(decode_seconds);
        Ok(answer)
    }

    fn time_to_read(&self) -> Result<f64> {
        let files = self.saved.iter().map(|&id| self.folder.kv_file(id));
        let seconds = files.map(|file| disk::time_to_read(&file));
        Ok(seconds.sum::<Result<f64, _>>()?)
    }
}

impl Row {
    fn median(&self) -> f64 {
        quantile(&self.seconds, 0.5).expect("every row was measured")
    }

    /// How much sooner than with nothing cached under the same policy.
    fn speed_up(&self, rows: &[Row]) -> f64 {
        find(rows, self.policy, Scene::Cold).median() / self.median()
    }
}

fn find(rows: &[Row], policy: ReusePolicy, scene: Scene) -> &Row {
    let mut rows = rows.iter();
    let found = rows.find(|row| row.policy == policy && row.scene == scene);
    found.expect("every policy has a row for each scene")
}
