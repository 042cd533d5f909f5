//! Tidiness is a test: the arrows between crates, the length of functions and files, the map.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Crates from the bottom up: each may name those before it.
const ARROWS: [(&str, &[&str]); 5] = [
    ("kernels", &[]),
    ("layers", &["kernels"]),
    ("models", &["kernels", "layers"]),
    ("engine", &["kernels", "layers", "models"]),
    ("cli", &["kernels", "layers", "models", "engine"]),
];

/// Parts of the engine that must not know certain others: (file or folder, forbidden words).
const INNER_ARROWS: [(&str, &[&str]); 6] = [
    ("engine/cache", &["candle_core", "strand_layers", "strand_models", "crate::scheduler"]),
    ("engine/scheduler.rs", &["candle_core", "model_runner", "strand_models"]),
    ("engine/sequence.rs", &["candle_core", "model_runner", "strand_models"]),
    ("engine/store", &["candle_core", "strand_layers", "crate::scheduler", "crate::engine"]),
    ("engine/tiering.rs", &["candle_core", "strand_layers", "std::fs", "std::time"]),
    ("engine/context", &["crate::scheduler", "crate::cache", "crate::model_runner"]),
];

const MAX_FUNCTION: usize = 70;
const MAX_FILE: usize = 600;
const MAX_LINE: usize = 100;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Rust files of the repository, as (path from the root, text).
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["kernels", "layers", "models", "engine", "cli", "tests", "benches"] {
        collect(&root().join(folder), &mut found);
    }
    assert!(found.len() > 20, "the sources were not found");
    found
}

fn collect(folder: &Path, found: &mut Vec<(String, String)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("the folder can be listed").path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("sources are readable");
            let name = path.strip_prefix(root()).expect("below the root").to_string_lossy();
            found.push((name.replace('\\', "/"), text));
        }
    }
}

/// The file without its tests, which may name what they like.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().expect("split gives at least one part")
}

#[test]
fn dependencies_point_one_way() {
    for (name, text) in sources() {
        for (folder, allowed) in ARROWS {
            if !name.starts_with(&format!("{folder}/")) {
                continue;
            }
            for (other, _) in ARROWS.iter().filter(|(other, _)| *other != "cli") {
                let names_it = text.contains(&format!("strand_{other}"));
                assert!(
                    !names_it || allowed.contains(other) || folder == *other,
                    "{name} names strand_{other}: {folder} may use only {allowed:?}"
                );
            }
        }
        for (place, forbidden) in INNER_ARROWS.iter().filter(|(p, _)| name.starts_with(p)) {
            for word in *forbidden {
                assert!(
                    !without_tests(&text).contains(word),
                    "{name} names {word}, which {place} must not know"
                );
            }
        }
    }
}

#[test]
fn only_kernels_has_unsafe_code() {
    for crate_root in ["layers/lib.rs", "models/lib.rs", "engine/lib.rs", "cli/lib.rs"] {
        let text = fs::read_to_string(root().join(crate_root)).expect("every crate has a root");
        assert!(text.contains("#![forbid(unsafe_code)]"), "{crate_root} allows unsafe code");
    }
}

#[test]
fn only_the_rim_uses_anyhow() {
    for (name, text) in sources() {
        let is_rim = name.starts_with("cli/") || name.starts_with("tests/");
        assert!(is_rim || !text.contains("anyhow"), "{name} uses anyhow");
    }
}

#[test]
fn functions_files_and_lines_keep_their_limits() {
    for (name, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() <= MAX_FILE, "{name} has {} lines", lines.len());
        for (number, line) in lines.iter().enumerate() {
            let width = line.chars().count();
            assert!(width <= MAX_LINE, "{name}:{} is {width} wide", number + 1);
        }
        for (start, length) in functions(&lines) {
            assert!(length <= MAX_FUNCTION, "{name}:{} is a function of {length} lines", start + 1);
        }
    }
}

/// First line and length of every function, by indentation: rustfmt closes a body in the
/// column where its signature starts.
fn functions(lines: &[&str]) -> Vec<(usize, usize)> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let words: Vec<&str> = line.split_whitespace().take_while(|word| *word != "fn").collect();
        let is_function = words.len() < line.split_whitespace().count()
            && words.iter().all(|word| {
                ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""]
                    .contains(word)
            });
        if !is_function || line.trim_end().ends_with(['}', ';']) {
            continue;
        }
        let close = format!("{}}}", " ".repeat(indent(line)));
        let end = lines[start..].iter().position(|line| *line == close);
        found.extend(end.map(|length| (start, length + 1)));
    }
    found
}

#[test]
fn the_readme_map_is_true() {
    let readme = fs::read_to_string(root().join("README.md")).expect("there is a README");
    let map = readme.split("## Map").nth(1).expect("the README has a map");
    let map = map.split("```").nth(1).expect("the map is a code block");
    let listed: BTreeSet<String> = map
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|path| path.ends_with(".rs"))
        .map(ToString::to_string)
        .collect();
    let there: BTreeSet<String> = sources()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !name.starts_with("tests/fixtures/"))
        .collect();
    let missing: Vec<_> = there.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&there).collect();
    assert!(missing.is_empty(), "not in the README's map: {missing:#?}");
    assert!(gone.is_empty(), "in the README's map, but gone: {gone:#?}");
}

#[test]
fn the_repository_speaks_of_itself_alone() {
    for (name, text) in sources() {
        for word in ["/work/", "/root/", "/home/"] {
            assert!(name == "tests/tidy.rs" || !text.contains(word), "{name} names {word}");
        }
    }
}

#[test]
fn functions_are_measured_from_signature_to_brace() {
    let text = ["pub fn a() {", "    x();", "}", "", "    fn b(", "    ) {", "    }"];
    assert_eq!(functions(&text), [(0, 3), (4, 3)]);
}
