//! What it costs to write a chunk's KV to the disk and to have it back, by codec and length.
//!
//! Beside each figure stands what the disk needs for a plain file of the same bytes, measured in
//! the same minute, and what encoding the chunk takes: from which length on loading is faster
//! follows. What int8 does to answers is counted token by token.

mod agreement;
mod break_even;
mod report;
mod samples;

use std::time::Instant;

use anyhow::Result;
use strand_engine::context::Context;
use strand_engine::store::Codec;

use super::Bench;
use super::disk::{self, Folder};
use super::kv_files::KvFiles;
use super::statistics::quantile;
use crate::Outcome;
use crate::args::{CommonArgs, TiersArgs};
use agreement::Agreement;
use samples::{Sample, Samples};

/// All chunks of one length.
struct Length {
    /// In all of them.
    tokens: usize,
    chunks: usize,
    /// To encode one.
    encode_seconds: Vec<f64>,
    rows: Vec<Row>,
}

/// The same chunks in one codec. Bytes are of all of them, seconds of one each.
struct Row {
    codec: Codec,
    raw_bytes: u64,
    payload_bytes: u64,
    file_bytes: u64,
    /// From asking the engine to its word that the file is safe.
    save_seconds: Vec<f64>,
    /// A plain file of the same bytes.
    write_seconds: Vec<f64>,
    /// From a file that memory knows nothing of to rows.
    load_seconds: Vec<f64>,
    /// A plain file of the same bytes, as cold.
    read_seconds: Vec<f64>,
    /// From pages in memory to rows, on one thread.
    decode_seconds: Vec<f64>,
}

pub fn run(args: &TiersArgs, common: &CommonArgs) -> Result<Outcome> {
    let folder = Folder::new(common)?;
    let (bench, files) = Bench::start_in(&folder, &args.model, common, 0)?;
    if args.codec.contains(&Codec::Int8) {
        bench.check_int8_files("--codec")?;
    }
    let mut samples = Samples::new(&bench, args)?;
    let files = files.behind(samples.anchor().to_vec());
    let tiers = Tiers { bench: &bench, folder: &folder, files: &files, args };
    let mut lengths = Vec::new();
    let mut agreement = None;
    let longest = args.chunk_lens.iter().max();
    for asked in &args.chunk_lens {
        let samples: Vec<Sample> =
            (0..args.num_chunks).map(|_| samples.next(*asked)).collect::<Result<_>>()?;
        lengths.push(tiers.measure(&samples)?);
        let wanted = args.questions > 0 && args.codec.contains(&Codec::Int8);
        if wanted && Some(asked) == longest {
            agreement = Some(Agreement::measure(&bench, args, &samples)?);
        }
    }
    report::print(&bench, args, &folder, &lengths, agreement.as_ref())?;
    Ok(Outcome::Done)
}

struct Tiers<'a> {
    bench: &'a Bench,
    folder: &'a Folder,
    files: &'a KvFiles,
    args: &'a TiersArgs,
}

impl Tiers<'_> {
    fn measure(&self, samples: &[Sample]) -> Result<Length> {
        let rows = self.args.codec.iter().map(|&codec| Row::new(codec)).collect();
        let (chunks, encode_seconds) = (samples.len(), Vec::new());
        let mut length = Length { tokens: 0, chunks, encode_seconds, rows };
        for sample in samples {
            let chunk = &sample.context.entries()[0].chunk;
            length.tokens += chunk.ids.len();
            for repeat in 0..self.args.repeats {
                self.bench.engine.erase(chunk.id, None)?;
                let encoded = self.bench.ask(sample.context.encode(0))?;
                length.encode_seconds.push(encoded.first_token_seconds);
                for row in &mut length.rows {
                    self.save_and_load(&sample.context, row, repeat == 0)?;
                }
            }
            self.bench.engine.erase(chunk.id, None)?;
        }
        Ok(length)
    }

    /// `counts`: its bytes are new to the row.
    fn save_and_load(&self, context: &Context, row: &mut Row, counts: bool) -> Result<()> {
        let prompt = context.segments_to(0);
        let started = Instant::now();
        let saved = self.bench.engine.save(prompt, "", row.codec)?;
        row.save_seconds.push(started.elapsed().as_secs_f64());
        let file = self.folder.kv_file(saved.kv_id);
        let plain = self.folder.time_plain_file(&file)?;
        row.write_seconds.push(plain.write_seconds);
        row.read_seconds.push(plain.read_seconds);
        disk::drop_pages(&file)?;
        row.load_seconds.push(self.files.time_to_load(saved.kv_id)?);
        row.decode_seconds.push(self.files.time_to_load_on_one_thread(saved.kv_id)?);
        if counts {
            row.raw_bytes += saved.raw_bytes;
            row.payload_bytes += saved.payload_bytes;
            row.file_bytes += saved.file_bytes;
        }
        Ok(())
    }
}

impl Length {
    fn mean_tokens(&self) -> f64 {
        self.tokens as f64 / self.chunks as f64
    }
}

impl Row {
    fn new(codec: Codec) -> Self {
        Self {
            codec,
            raw_bytes: 0,
            payload_bytes: 0,
            file_bytes: 0,
            save_seconds: Vec::new(),
            write_seconds: Vec::new(),
            load_seconds: Vec::new(),
            read_seconds: Vec::new(),
            decode_seconds: Vec::new(),
        }
    }
}

fn median(seconds: &[f64]) -> f64 {
    quantile(seconds, 0.5).expect("there is at least one chunk, measured at least once")
}
