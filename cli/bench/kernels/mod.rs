//! Every op at the shapes of a small model, beside the ceilings that the same run measures: how
//! fast this machine reads memory and multiplies.

mod cases;
mod gpu;

use std::io::{self, Write};
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use strand_kernels::{Threads, ceilings};

use crate::Outcome;
use crate::args::{CommonArgs, KernelsArgs};

/// What an op's operations are measured against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peak {
    F32,
    Bf16,
    Int8,
}

/// What an op at one size takes.
struct Figures {
    /// Of one call: the median.
    seconds: f64,
    /// That must be read and written, weights and KV included.
    bytes: f64,
    /// Additions and multiplications.
    operations: f64,
    peak: Peak,
}

/// What this machine can do at most, a second.
struct Ceilings {
    read_bytes: f64,
    f32_operations: f64,
    /// As many as of f32 where the processor has none in pairs.
    bf16_operations: f64,
    int8_operations: f64,
}

/// A clock: how often a call is repeated, and on which threads.
struct Clock {
    threads: Threads,
    repeats: usize,
}

pub fn run(args: &KernelsArgs, common: &CommonArgs) -> Result<Outcome> {
    if let Some(gpu) = args.device.open()? {
        return gpu::run(&gpu, args, common.json);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = Threads::new(args.threads.unwrap_or(cores));
    let clock = Clock { threads, repeats: args.repeats };
    let ceilings = clock.ceilings();
    let mut out = io::stdout().lock();
    if !common.json {
        writeln!(out, "{:?}, medians of {}", clock.threads, clock.repeats)?;
        ceilings.print(&mut out)?;
    }
    let mut rows = Vec::new();
    let is_asked = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only));
    for case in cases::all().into_iter().filter(|case| is_asked(&case.name)) {
        let figures = (case.measure)(&clock)?;
        if !common.json {
            figures.print(&case.name, &ceilings, &mut out)?;
        }
        rows.push(figures.to_json(&case.name, &ceilings));
    }
    let line = json!({
        "bench": "kernels",
        "threads": clock.threads.count(),
        "isa": clock.threads.isa().name(),
        "bf16_pairs": clock.threads.isa().has_bf16_pairs(),
        "repeats": clock.repeats,
        "read_bytes_per_second": ceilings.read_bytes,
        "f32_operations_per_second": ceilings.f32_operations,
        "bf16_operations_per_second": ceilings.bf16_operations,
        "int8_operations_per_second": ceilings.int8_operations,
        "rows": rows,
    });
    writeln!(out, "{line}")?;
    Ok(Outcome::Done)
}

/// The median of what was measured; of two in the middle the longer one.
fn middle(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

impl Clock {
    /// Seconds of one call: the median, after one that is not counted.
    fn median<T>(&self, mut call: impl FnMut() -> Result<T>) -> Result<f64> {
        call()?;
        let mut seconds = Vec::with_capacity(self.repeats);
        for _ in 0..self.repeats {
            let start = Instant::now();
            call()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(middle(seconds))
    }

    fn ceilings(&self) -> Ceilings {
        let rate = |products: fn(&Threads) -> u64| {
            let mut operations = 0;
            let seconds = self.median(|| {
                operations = products(&self.threads);
                Ok(())
            });
            operations as f64 / seconds.expect("counting can't fail")
        };
        Ceilings {
            f32_operations: rate(ceilings::f32_products),
            bf16_operations: rate(ceilings::bf16_products),
            int8_operations: rate(ceilings::int8_products),
            read_bytes: self.read_bandwidth(),
        }
    }

    /// Bytes a second of reading an array that fits no cache.
    fn read_bandwidth(&self) -> f64 {
        let data = vec![1f32; 128 << 20];
        let seconds = self.median(|| {
            ceilings::read(&self.threads, &data);
            Ok(())
        });
        size_of_val(&data[..]) as f64 / seconds.expect("reading can't fail")
    }
}

impl Ceilings {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "reading memory {:.1} GB/s", self.read_bytes / 1e9)?;
        writeln!(out, "products of f32 {:.0} GOP/s", self.f32_operations / 1e9)?;
        writeln!(out, "products of bf16 {:.0} GOP/s", self.bf16_operations / 1e9)?;
        writeln!(out, "products of 8-bit integers {:.0} GOP/s", self.int8_operations / 1e9)?;
        let names = ("op", "ms", "GB/s", "of read", "GOP/s", "of peak");
        let (op, ms, gb, read, gop, peak) = names;
        writeln!(out, "{op:<42}{ms:>10}{gb:>8}{read:>9}{gop:>8}{peak:>9}")
    }

    fn operations(&self, peak: Peak) -> f64 {
        match peak {
            Peak::F32 => self.f32_operations,
            Peak::Bf16 => self.bf16_operations,
            Peak::Int8 => self.int8_operations,
        }
    }
}

impl Figures {
    fn print(&self, name: &str, ceilings: &Ceilings, out: &mut impl Write) -> io::Result<()> {
        let (bytes, operations) = (self.bytes / self.seconds, self.operations / self.seconds);
        writeln!(
            out,
            "{:<42}{:>10.3}{:>8.1}{:>7.0} %{:>8.0}{:>7.0} %",
            name,
            1e3 * self.seconds,
            bytes / 1e9,
            100.0 * bytes / ceilings.read_bytes,
            operations / 1e9,
            100.0 * operations / ceilings.operations(self.peak),
        )
    }

    fn to_json(&self, name: &str, ceilings: &Ceilings) -> Value {
        let (bytes, operations) = (self.bytes / self.seconds, self.operations / self.seconds);
        json!({
            "name": name,
            "seconds": self.seconds,
            "bytes_per_second": bytes,
            "share_of_read": bytes / ceilings.read_bytes,
            "operations_per_second": operations,
            "share_of_peak": operations / ceilings.operations(self.peak),
        })
    }
}
