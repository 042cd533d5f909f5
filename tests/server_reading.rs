//! The fuzzer's corpus, read as every route would read it, as it is and after thousands of blows.
//!
//! `STRAND_BLOWS` says how many; `fuzz/` does the same, guided by what it covers.

use std::env;
use std::fs;
use std::path::Path;

use strand::reading::{Body, Reading};

use crate::random::Random;

/// What breaks readers, to be put anywhere.
const WEDGES: [&[u8]; 18] = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"9223372036854775808",
    b"0.5",
    b"\"\"",
    b"\"\\ud800\"",
    b"[]",
    b"{}",
    b"[[[[[[[[[[[[[[[[",
    b"}]",
    b",",
    b"\xff",
    b"\0",
    b"\xf0\x9f\x8d\xb0",
    b"\"stream\":true,",
];

/// Bodies by the name of their file.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/requests");
    let files = fs::read_dir(folder).expect("the corpus is in the repository");
    let read = |file: fs::DirEntry| {
        let bytes = fs::read(file.path()).expect("it can be read");
        (file.file_name().to_string_lossy().into_owned(), bytes)
    };
    files.map(|file| read(file.expect("the folder can be listed"))).collect()
}

#[test]
fn whatever_is_in_a_body_it_is_read_or_refused() {
    let corpus = corpus();
    let mut taken = Vec::new();
    for (name, bytes) in &corpus {
        for body in Body::ALL {
            match body.read(bytes) {
                Reading::Taken { .. } => taken.push((name.as_str(), body)),
                Reading::Refused { status, message, .. } => {
                    assert_eq!(status, 400, "{name} as {body:?}: {message}");
                    assert!(!message.is_empty(), "{name} as {body:?}");
                }
            }
        }
    }
    // the corpus gets behind the first field
    for body in Body::ALL {
        assert!(taken.iter().any(|(_, found)| *found == body), "nothing is read as {body:?}");
    }
    for (name, body) in [
        ("chat.json", Body::Chat),
        ("tools.json", Body::Chat),
        ("text.json", Body::Text),
        ("tokens.json", Body::Text),
        ("response.json", Body::Response),
        ("chunk.json", Body::Chunk),
    ] {
        assert!(taken.contains(&(name, body)), "{name} is not read as {body:?}");
    }
}

/// A piece of some length, at some place.
fn piece(random: &mut Random, bytes: &[u8]) -> std::ops::Range<usize> {
    let start = random.between(0, bytes.len() + 1);
    let end = random.between(start, (start + 32).min(bytes.len()) + 1);
    start..end
}

/// Changes a body in one place.
fn strike(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let place = piece(random, bytes);
    match random.between(0, 6) {
        0 => drop(bytes.drain(place)),
        1 => {
            let again = bytes[place.clone()].to_vec();
            bytes.splice(place.start..place.start, again);
        }
        2 => {
            let from = piece(random, other);
            bytes.splice(place, other[from].iter().copied());
        }
        3 => {
            let wedge = WEDGES[random.between(0, WEDGES.len())];
            bytes.splice(place, wedge.iter().copied());
        }
        4 => bytes[place].iter_mut().for_each(|byte| *byte ^= 1 << random.between(0, 8)),
        _ => {
            // a value in the place of another, so that what comes out is often JSON still
            let start = bytes[place.start..].iter().position(|byte| *byte == b':');
            let Some(start) = start.map(|found| place.start + found + 1) else { return };
            let end = bytes[start..].iter().position(|byte| b",}]".contains(byte));
            let end = end.map_or(bytes.len(), |found| start + found);
            let wedge = WEDGES[random.between(0, WEDGES.len())];
            bytes.splice(start..end, wedge.iter().copied());
        }
    }
}

#[test]
fn whatever_is_done_to_a_body_it_is_read_or_refused() {
    let corpus = corpus();
    let blows = env::var("STRAND_BLOWS").ok().and_then(|text| text.parse().ok());
    let (mut taken, mut refused) = (0, 0);
    let mut random = Random::new(11);
    for _ in 0..blows.unwrap_or(5_000) {
        let mut bytes = corpus[random.between(0, corpus.len())].1.clone();
        for _ in 0..random.between(1, 6) {
            let other = random.between(0, corpus.len());
            strike(&mut random, &mut bytes, &corpus[other].1);
        }
        for body in Body::ALL {
            match body.read(&bytes) {
                Reading::Taken { .. } => taken += 1,
                Reading::Refused { status, message, .. } => {
                    let text = String::from_utf8_lossy(&bytes);
                    assert!(status == 400 && !message.is_empty(), "{text} as {body:?}");
                    refused += 1;
                }
            }
        }
    }
    println!("blows: {taken} bodies taken, {refused} refused");
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
}
