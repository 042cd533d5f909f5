//! What is printed of the tiers bench.

use std::io::{self, Write};

use serde_json::{Value, json};
use strand_engine::store::Codec;

use super::super::disk::{Folder, READS_ARE_COLD};
use super::super::{Bench, merge, peak_memory};
use super::agreement::Agreement;
use super::break_even::{Point, break_even};
use super::{Length, Row, median};
use crate::args::TiersArgs;

pub fn print(
    bench: &Bench,
    args: &TiersArgs,
    folder: &Folder,
    lengths: &[Length],
    agreement: Option<&Agreement>,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let crossings: Vec<(Codec, Option<f64>)> = args
        .codec
        .iter()
        .enumerate()
        .map(|(index, &codec)| (codec, break_even(&points(lengths, index))))
        .collect();
    if !bench.json {
        print_table(&mut out, bench, args, folder, lengths)?;
        for &(codec, tokens) in &crossings {
            let from = tokens.map_or("at no length".to_owned(), |n| format!("from {n:.0} tokens"));
            writeln!(out, "{}: loading is faster than encoding {from}", codec.as_str())?;
        }
        if let Some(Agreement { questions, tokens, agreeing }) = agreement {
            writeln!(
                out,
                "int8: {agreeing} of {tokens} tokens of {questions} answers are the likeliest as \
                 on lossless KV"
            )?;
        }
    }
    let crossings =
        crossings.iter().map(|(codec, n)| json!({"codec": codec.as_str(), "tokens": n}));
    let mut line = bench.describe();
    let own = json!({
        "bench": "tiers",
        "num_chunks": args.num_chunks,
        "repeats": args.repeats,
        "data_dir": folder.path(),
        "reads_are_cold": READS_ARE_COLD,
        "peak_memory_bytes": peak_memory(),
        "rows": lengths.iter().flat_map(Length::to_json).collect::<Vec<_>>(),
        "break_even": crossings.collect::<Vec<_>>(),
        "int8_agreement": agreement.map(|one| json!({
            "questions": one.questions,
            "tokens": one.tokens,
            "agreeing": one.agreeing,
            "share": one.share(),
        })),
    });
    merge(&mut line, own);
    writeln!(out, "{line}")
}

/// The lengths in the codec of this place.
fn points(lengths: &[Length], index: usize) -> Vec<Point> {
    let point = |length: &Length| Point {
        tokens: length.mean_tokens(),
        encode: median(&length.encode_seconds),
        load: median(&length.rows[index].load_seconds),
    };
    lengths.iter().map(point).collect()
}

fn print_table(
    out: &mut impl Write,
    bench: &Bench,
    args: &TiersArgs,
    folder: &Folder,
    lengths: &[Length],
) -> io::Result<()> {
    let plan = bench.engine.plan();
    writeln!(
        out,
        "model {}, {} chunks of each length, {} runs, KV in {}: {} bytes a token; {} threads, \
         in {}",
        bench.model,
        args.num_chunks,
        args.repeats,
        plan.kv_dtype.name(),
        plan.token_bytes(),
        plan.threads,
        folder.path().display()
    )?;
    let heads = [
        "tokens",
        "codec",
        "payload x",
        "file x",
        "save ms",
        "MB/s",
        "disk MB/s",
        "load ms",
        "MB/s",
        "disk MB/s",
        "decode GB/s",
        "encode ms",
        "x load",
    ];
    let heads: Vec<String> = heads.iter().map(|head| format!("{head:>11}")).collect();
    writeln!(out, "{}", heads.join(" "))?;
    for length in lengths {
        for row in &length.rows {
            writeln!(out, "{}", row.to_text(length))?;
        }
    }
    if !READS_ARE_COLD {
        writeln!(out, "this system can't be told to forget a file: reads may be from memory")?;
    }
    writeln!(out, "medians of a chunk; payload x, file x: KV over the encoded frames, over the")?;
    writeln!(
        out,
        "file; MB/s: of the file; disk MB/s: a plain file of the same bytes, written and"
    )?;
    writeln!(out, "synced, read cold; load: cold, every byte checked; decode: of KV on one core,")?;
    writeln!(out, "from pages in memory, checks included; x load: encoding over loading")
}

impl Length {
    fn to_json(&self) -> Vec<Value> {
        let rows = self.rows.iter();
        rows.map(|row| {
            let mut line = json!({
                "chunks": self.chunks,
                "tokens": self.tokens,
                "encode_seconds": median(&self.encode_seconds),
            });
            merge(&mut line, row.to_json(self.chunks));
            line
        })
        .collect()
    }
}

impl Row {
    /// Bytes a second where one chunk's share of `bytes` takes so long.
    fn speed(bytes: u64, chunks: usize, seconds: &[f64]) -> f64 {
        bytes as f64 / chunks as f64 / median(seconds)
    }

    fn to_text(&self, length: &Length) -> String {
        let millis = |seconds: &[f64]| format!("{:.2}", median(seconds) * 1e3);
        let speed = |bytes, seconds: &[f64]| Self::speed(bytes, length.chunks, seconds);
        let megabytes = |seconds: &[f64]| format!("{:.0}", speed(self.file_bytes, seconds) / 1e6);
        let ratio = |bytes: u64| format!("{:.3}", self.raw_bytes as f64 / bytes as f64);
        let gain = median(&length.encode_seconds) / median(&self.load_seconds);
        let cells = [
            format!("{:.0}", length.mean_tokens()),
            self.codec.as_str().to_owned(),
            ratio(self.payload_bytes),
            ratio(self.file_bytes),
            millis(&self.save_seconds),
            megabytes(&self.save_seconds),
            megabytes(&self.write_seconds),
            millis(&self.load_seconds),
            megabytes(&self.load_seconds),
            megabytes(&self.read_seconds),
            format!("{:.2}", speed(self.raw_bytes, &self.decode_seconds) / 1e9),
            millis(&length.encode_seconds),
            format!("{gain:.1}"),
        ];
        cells.map(|cell| format!("{cell:>11}")).join(" ")
    }

    fn to_json(&self, chunks: usize) -> Value {
        let of_file = |seconds: &[f64]| Self::speed(self.file_bytes, chunks, seconds);
        let of_rows = |seconds: &[f64]| Self::speed(self.raw_bytes, chunks, seconds);
        json!({
            "codec": self.codec.as_str(),
            "raw_bytes": self.raw_bytes,
            "payload_bytes": self.payload_bytes,
            "file_bytes": self.file_bytes,
            "payload_ratio": self.raw_bytes as f64 / self.payload_bytes as f64,
            "file_ratio": self.raw_bytes as f64 / self.file_bytes as f64,
            "save_seconds": median(&self.save_seconds),
            "save_file_bytes_per_second": of_file(&self.save_seconds),
            "save_kv_bytes_per_second": of_rows(&self.save_seconds),
            "disk_write_bytes_per_second": of_file(&self.write_seconds),
            "load_seconds": median(&self.load_seconds),
            "load_file_bytes_per_second": of_file(&self.load_seconds),
            "load_kv_bytes_per_second": of_rows(&self.load_seconds),
            "disk_read_bytes_per_second": of_file(&self.read_seconds),
            "decode_kv_bytes_per_second_one_core": of_rows(&self.decode_seconds),
        })
    }
}
