//! What is printed of the reuse bench.

use std::io::{self, Write};

use serde_json::{Value, json};
use strand_engine::Reuse;

use super::super::disk::{Folder, READS_ARE_COLD};
use super::super::statistics::quantile;
use super::super::{Bench, merge, peak_memory};
use super::cold::DiskHit;
use super::contexts::{Switches, Visits};
use super::{Results, Row, Scene, find};
use crate::args::ReuseBenchArgs;

pub fn print(
    bench: &Bench,
    args: &ReuseBenchArgs,
    folder: &Folder,
    results: &Results,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !bench.json {
        print_scenes(&mut out, bench, args, results)?;
        print_disk(&mut out, bench, folder, results)?;
        print_switches(&mut out, args, &results.switches)?;
    }
    let threads = bench.engine.plan().threads;
    let mut line = bench.describe();
    let own = json!({
        "bench": "reuse",
        "num_chunks": args.num_chunks,
        "chunk_len": args.chunk_len,
        "question_len": args.question_len,
        "repeats": args.repeats,
        "cold_repeats": args.cold_repeats,
        "kv_codec": bench.engine.plan().kv_codec.as_str(),
        "data_dir": folder.path(),
        "reads_are_cold": READS_ARE_COLD,
        "peak_memory_bytes": peak_memory(),
        "toggle_seconds": quantile(&results.toggle_seconds, 0.5),
        "rows": results.rows.iter().map(|row| row.to_json(&results.rows)).collect::<Vec<_>>(),
        "disk_hits": results.disk_hits.iter().map(|hit| {
            hit.to_json(threads, resident(results, hit))
        }).collect::<Vec<_>>(),
        "contexts": args.contexts,
        "context_chunks": args.context_chunks,
        "context_chunk_len": args.context_chunk_len,
        "switches": results.switches.iter().map(Switches::to_json).collect::<Vec<_>>(),
    });
    merge(&mut line, own);
    writeln!(out, "{line}")
}

fn print_scenes(
    out: &mut impl Write,
    bench: &Bench,
    args: &ReuseBenchArgs,
    results: &Results,
) -> io::Result<()> {
    writeln!(
        out,
        "model {}, {} chunks of {} tokens, a question of {}",
        bench.model, args.num_chunks, args.chunk_len, args.question_len
    )?;
    writeln!(
        out,
        "{:<12} {:<25} {:>12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "policy",
        "before the question",
        "first token",
        "device",
        "host",
        "disk",
        "encoded",
        "again",
        "x cold"
    )?;
    for row in &results.rows {
        writeln!(out, "{}", row.to_text(&results.rows))?;
    }
    writeln!(out, "first token: median in milliseconds; device, host, disk: tokens whose KV was")?;
    writeln!(
        out,
        "there; encoded: tokens computed; again: first rows of chunks that blend computes"
    )?;
    writeln!(out, "for what stands before them; x cold: times sooner than with nothing cached")?;
    let toggle = quantile(&results.toggle_seconds, 0.5).unwrap_or_default();
    writeln!(out, "switching a chunk: {:.0} ns, 0 tokens; the rows show what follows", toggle * 1e9)
}

fn print_disk(
    out: &mut impl Write,
    bench: &Bench,
    folder: &Folder,
    results: &Results,
) -> io::Result<()> {
    let plan = bench.engine.plan();
    writeln!(
        out,
        "\nall on the disk, codec {}, {} threads, in {}",
        plan.kv_codec.as_str(),
        plan.threads,
        folder.path().display()
    )?;
    writeln!(
        out,
        "{:<12} {:>10} {:>10} {:>12} {:>14} {:>10} {:>12} {:>10}",
        "policy",
        "file MB",
        "KV MB",
        "read MB/s",
        "decode GB/s",
        "resident",
        "first token",
        "bound"
    )?;
    for hit in &results.disk_hits {
        writeln!(out, "{}", hit.to_text(plan.threads, resident(results, hit)))?;
    }
    if !READS_ARE_COLD {
        writeln!(out, "this system can't be told to forget a file: reads may be from memory")?;
    }
    writeln!(out, "read: the same files by themselves, as cold; decode: of KV on one core, from")?;
    writeln!(
        out,
        "pages in memory, all checks included; resident: with all on the device and the"
    )?;
    writeln!(
        out,
        "same to compute (under blend the chunks in another order: first rows are not on"
    )?;
    writeln!(out, "the disk); bound: 1.3 x reading + decoding at 1 GB/s a core + resident;")?;
    writeln!(out, "resident, first token, bound: milliseconds")
}

/// Seconds of a question with all on the device that computes what a disk hit computes.
fn resident(results: &Results, hit: &DiskHit) -> f64 {
    find(&results.rows, hit.policy, Scene::like_a_disk_hit(hit.policy)).median()
}

fn print_switches(
    out: &mut impl Write,
    args: &ReuseBenchArgs,
    switches: &[Switches],
) -> io::Result<()> {
    if switches.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n{} contexts of {} chunks of {} tokens, half of them shared by all",
        args.contexts, args.context_chunks, args.context_chunk_len
    )?;
    writeln!(
        out,
        "{:<12} {:<12} {:>12} {:>10} {:>10} {:>10}",
        "policy", "visit", "first token", "p90", "reused", "encoded"
    )?;
    for one in switches {
        for (name, visits) in [("first", &one.first), ("again", &one.again)] {
            writeln!(out, "{:<12} {name:<12} {}", one.policy.as_str(), visits.to_text())?;
        }
    }
    writeln!(out, "first token: median in milliseconds; reused, encoded: tokens over all visits")
}

impl Row {
    fn to_text(&self, rows: &[Row]) -> String {
        let Reuse { device, host, disk, encoded, recomputed } = self.reuse;
        format!(
            "{:<12} {:<25} {:>12.2} {device:>8} {host:>8} {disk:>8} {encoded:>8} {recomputed:>8} \
             {:>8.1}",
            self.policy.as_str(),
            self.scene.name(),
            self.median() * 1e3,
            self.speed_up(rows)
        )
    }

    fn to_json(&self, rows: &[Row]) -> Value {
        let mut line = json!({
            "policy": self.policy.as_str(),
            "scene": self.scene.name(),
            "first_token_seconds": self.seconds,
            "median_seconds": self.median(),
            "speed_up": self.speed_up(rows),
        });
        merge(&mut line, reuse_to_json(&self.reuse));
        line
    }
}

impl DiskHit {
    fn to_text(&self, threads: usize, resident: f64) -> String {
        format!(
            "{:<12} {:>10.1} {:>10.1} {:>12.0} {:>14.2} {:>10.2} {:>12.2} {:>10.2}",
            self.policy.as_str(),
            self.file_bytes as f64 / 1e6,
            self.raw_bytes as f64 / 1e6,
            self.read_bandwidth() / 1e6,
            self.decode_rate() / 1e9,
            resident * 1e3,
            self.median() * 1e3,
            self.bound(threads, resident) * 1e3,
        )
    }

    fn to_json(&self, threads: usize, resident: f64) -> Value {
        json!({
            "policy": self.policy.as_str(),
            "file_bytes": self.file_bytes,
            "raw_bytes": self.raw_bytes,
            "read_seconds": self.read_seconds,
            "read_bytes_per_second": self.read_bandwidth(),
            "decode_seconds_one_core": self.decode_seconds,
            "decode_bytes_per_second_one_core": self.decode_rate(),
            "resident_scene": Scene::like_a_disk_hit(self.policy).name(),
            "resident_seconds": resident,
            "first_token_seconds": self.median(),
            "bound_seconds": self.bound(threads, resident),
        })
    }
}

impl Switches {
    fn to_json(&self) -> Value {
        json!({
            "policy": self.policy.as_str(),
            "first": self.first.to_json(),
            "again": self.again.to_json(),
        })
    }
}

impl Visits {
    fn to_text(&self) -> String {
        let quantile = |share| quantile(&self.seconds, share).unwrap_or_default() * 1e3;
        format!(
            "{:>12.2} {:>10.2} {:>10} {:>10}",
            quantile(0.5),
            quantile(0.9),
            self.reuse.cached(),
            self.reuse.encoded
        )
    }

    fn to_json(&self) -> Value {
        let mut line = json!({
            "first_token_seconds": {
                "p50": quantile(&self.seconds, 0.5),
                "p90": quantile(&self.seconds, 0.9),
            },
        });
        merge(&mut line, reuse_to_json(&self.reuse));
        line
    }
}

fn reuse_to_json(reuse: &Reuse) -> Value {
    json!({
        "reused_tokens": reuse.cached(),
        "device_tokens": reuse.device,
        "host_tokens": reuse.host,
        "disk_tokens": reuse.disk,
        "encoded_tokens": reuse.encoded,
        "recomputed_tokens": reuse.recomputed,
    })
}
