//! The figures as a table for people and as a line of JSON.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::super::{Bench, merge};
use super::score::{Count, Group, Measure, Tally};
use super::way::Way;

/// Everything measured.
pub struct Report<'a> {
    pub file: &'a Path,
    pub items: usize,
    pub requests: usize,
    pub seconds: f64,
    pub tallies: &'a [(Way, Tally)],
}

/// What a line of the table shows: its title, the orders it was asked in, how it is divided.
struct Section {
    title: &'static str,
    given: Measure,
    reversed: Option<Measure>,
    divided: Division,
}

/// Which lines stand below a section's first.
enum Division {
    Whole,
    ByChunks,
    ByChunksAndKind,
}

const SECTIONS: [Section; 10] = {
    use Division::{ByChunks, ByChunksAndKind, Whole};
    use Measure::{
        Conversation, Inactive, JsonExact, JsonFields, JsonParses, Missing, RecallGiven,
        RecallReversed, Refused, Stale, Summary,
    };
    const fn given(title: &'static str, given: Measure, divided: Division) -> Section {
        Section { title, given, reversed: None, divided }
    }
    [
        Section {
            title: "exact answers from a chunk",
            given: RecallGiven,
            reversed: Some(RecallReversed),
            divided: ByChunksAndKind,
        },
        given("refused, though in a chunk", Refused, ByChunks),
        given("refused, chunk absent or inactive", Inactive, ByChunks),
        given("refused, attribute missing", Missing, ByChunks),
        given("refused, chunk of an earlier answer gone", Stale, Whole),
        given("exact answers from the conversation", Conversation, Whole),
        given("exact summaries", Summary, Whole),
        given("JSON that parses", JsonParses, Whole),
        given("JSON with the right fields", JsonFields, Whole),
        given("exact JSON", JsonExact, Whole),
    ]
};

const NOTES: &str = "\
Per cent of the items. Mask: behind a chunk that is switched off again. Int8: independent, through
a lossy file. Reversed: the same chunks, last first. Absent or inactive: one prompt,
counted once; the chunk with the answer is loaded and inactive. A persona's name is not asked
without its chunk. Right fields: the names and types of the expected object.";

impl Report<'_> {
    pub fn print(&self, bench: &Bench) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !bench.json {
            self.print_table(bench, &mut out)?;
        }
        let mut line = bench.describe();
        let own = json!({
            "bench": "recall",
            "file": self.file.display().to_string(),
            "items": self.items,
            "requests": self.requests,
            "seconds": self.seconds,
            "rows": self.tallies.iter().flat_map(rows_json).collect::<Vec<_>>(),
        });
        merge(&mut line, own);
        writeln!(out, "{line}")
    }

    fn print_table(&self, bench: &Bench, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "model {}, {} items of {}", bench.model, self.items, self.file.display())?;
        writeln!(out, "{} greedy answers in {:.1} s", self.requests, self.seconds)?;
        let lines: Vec<_> = SECTIONS.iter().flat_map(|section| self.lines(section)).collect();
        let width = lines.iter().map(|(title, _)| title.len()).max().unwrap_or(0);
        let ways = self.tallies.iter().map(|(way, _)| format!(" {:>19}", way.as_str()));
        writeln!(out, "{:<width$} {:>6}{}", "", "", ways.collect::<String>())?;
        let orders = format!(" {:>9} {:>9}", "given", "reversed").repeat(self.tallies.len());
        writeln!(out, "{:<width$} {:>6}{orders}", "", "items")?;
        for (title, cells) in lines {
            writeln!(out, "{}", format!("{title:<width$} {cells}").trim_end())?;
        }
        writeln!(out, "{NOTES}")?;
        bench.vs.iter().try_for_each(|note| writeln!(out, "vs {note}"))
    }

    /// Titles and cells of a section, where any of its items was asked.
    fn lines(&self, section: &Section) -> Vec<(String, String)> {
        let Some((_, first)) = self.tallies.first() else { return Vec::new() };
        let counts = first.iter().filter(|(measure, ..)| *measure == section.given);
        counts
            .filter(|(_, group, _)| section.divided.shows(group))
            .map(|(_, group, count)| {
                let cells = self.tallies.iter().map(|(_, tally)| section.cells(tally, group));
                let cells = format!("{:>6}{}", count.items, cells.collect::<String>());
                (section.title_of(group), cells)
            })
            .collect()
    }
}

impl Division {
    fn shows(&self, group: &Group) -> bool {
        match group {
            Group::All => true,
            Group::Chunks(_) => !matches!(self, Self::Whole),
            Group::Kind(_) => matches!(self, Self::ByChunksAndKind),
        }
    }
}

impl Section {
    fn title_of(&self, group: &Group) -> String {
        match group {
            Group::All => self.title.to_owned(),
            Group::Chunks(1) => "  1 chunk".to_owned(),
            Group::Chunks(count) => format!("  {count} chunks"),
            Group::Kind(kind) => format!("  {kind}"),
        }
    }

    /// The shares of one way, in both orders where both were asked.
    fn cells(&self, tally: &Tally, group: &Group) -> String {
        let share = |measure: Option<Measure>| {
            let count = measure.and_then(|measure| tally.count(measure, group));
            count.map_or(String::new(), |count| format!("{:.1}", count.percent()))
        };
        format!(" {:>9} {:>9}", share(Some(self.given)), share(self.reversed))
    }
}

fn rows_json((way, tally): &(Way, Tally)) -> Vec<Value> {
    tally.iter().map(|(measure, group, count)| row_json(*way, measure, group, count)).collect()
}

fn row_json(way: Way, measure: Measure, group: &Group, count: Count) -> Value {
    let (chunks, kind) = match group {
        Group::All => (None, None),
        Group::Chunks(chunks) => (Some(chunks), None),
        Group::Kind(kind) => (None, Some(kind)),
    };
    json!({
        "policy": way.as_str(),
        "measure": measure.name(),
        "chunks": chunks,
        "kind": kind,
        "items": count.items,
        "found": count.found,
        "percent": count.percent(),
    })
}
