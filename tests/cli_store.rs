//! `strand chunks` with the real binary, on a store that the library has filled.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use strand_engine::cache::{KvIdentity, KvVariant};
use strand_engine::context::ChunkKind;
use strand_engine::store::{Codec, Coding, KvRecord, KvShape, Store, StoredChunk};
use strand_engine::{ChunkId, SegmentKv};
use strand_kernels::KvDtype;

use crate::binary::{Run, scratch, strand};
use crate::random::Random;

const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

/// An empty folder.
fn folder(name: &str) -> PathBuf {
    let folder = scratch("store").join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).expect("it can be emptied");
    }
    folder
}

/// A store with two chunks, the first with KV.
fn filled(name: &str) -> PathBuf {
    let folder = folder(name);
    let store = Store::open(&folder).expect("it can be made");
    let abc = StoredChunk::new("abc.txt", ChunkKind::File, "abc", Some(3));
    store.put_chunk(&abc).expect("kept");
    store.add_tag(abc.info.id, "letters").expect("tagged");
    let note = StoredChunk::new("größe", ChunkKind::Note, "Anna lives in Lisbon.\n", None);
    store.put_chunk(&note).expect("kept");
    let (record, kv) = segment();
    store.save(&record, &kv, Codec::Planes, &Coding::default()).expect("saved");
    folder
}

/// Three rows of noise for the chunk `abc`.
fn segment() -> (KvRecord, SegmentKv) {
    let mut random = Random::new(1);
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 8, dtype: KvDtype::Bf16 };
    let record = KvRecord {
        identity: KvIdentity::default(),
        variant: KvVariant::Lossless,
        chunk: ChunkId::of(b"abc"),
        first_position: 0,
        seen: Vec::new(),
        tokens: vec![1, 2, 3],
        shape,
    };
    let frame = |_| (0..48).map(|_| random.next() as u8).collect();
    (record, SegmentKv::of_frames(&(0..4).map(frame).collect::<Vec<_>>()))
}

fn chunks(folder: &Path, arguments: &[&str]) -> Run {
    let folder = folder.to_str().expect("UTF-8");
    strand(&[&["chunks", "--data-dir", folder], arguments].concat())
}

fn answer(folder: &Path, arguments: &[&str]) -> Value {
    let run = chunks(folder, &[arguments, &["--json"]].concat());
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    run.json().into_iter().next().expect("there is an answer")
}

fn kv_file(folder: &Path) -> PathBuf {
    folder.join("kv").join(format!("{}.kv", segment().0.kv_id()))
}

#[test]
fn the_list_has_a_line_for_each_chunk() {
    let folder = filled("list");
    let run = chunks(&folder, &["list"]);
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    let lines: Vec<&str> = run.out.lines().collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0].split_whitespace().next(), Some("Hash"));
    let cells: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!(
        cells,
        ["ba7816bf8f01cfea", "abc.txt", "file", "3", "3", "B", "planes", "20.0", "KiB"]
    );
    assert!(lines[2].contains("größe") && lines[2].ends_with(" -"), "{}", lines[2]);

    let run = chunks(&folder, &["list", "--json"]);
    let rows = run.json();
    assert_eq!(
        (rows.len(), &rows[0]["id"], &rows[0]["tags"]),
        (2, &json!(ABC), &json!(["letters"]))
    );
    assert_eq!((&rows[0]["files"][0]["codec"], &rows[0]["tokens"]), (&json!("planes"), &json!(3)));
    assert_eq!((&rows[1]["files"], &rows[1]["tokens"]), (&json!([]), &Value::Null));

    let none = chunks(&self::folder("list-none"), &["list"]);
    assert_eq!((none.status, none.out.as_str(), none.err.as_str()), (0, "", ""));
}

#[test]
fn a_chunk_is_shown_with_its_text() {
    let folder = filled("show");
    let run = chunks(&folder, &["show", "BA78"]);
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    assert!(run.out.starts_with(&format!("Hash: {ABC}\nName: abc.txt (file)\nSize: 3 tokens\n")));
    assert!(run.out.contains("Tags: letters\n") && run.out.ends_with("\n\nabc\n"), "{}", run.out);
    let shown = answer(&folder, &["show", ABC]);
    assert_eq!((&shown["text"], &shown["kind"]), (&json!("abc"), &json!("file")));
}

#[test]
fn chunks_that_are_not_there_are_named() {
    let folder = filled("unknown");
    for command in ["show", "verify"] {
        for text in ["ffff", "ba7", "abc.txt", "ba7816bf8f01cfeb"] {
            let expected = format!("error: No chunk found matching: {text}\n");
            chunks(&folder, &[command, text]).refused(1, &expected);
        }
    }
    chunks(&folder, &["export", "ffff", "x"]).refused(1, "No chunk found matching: ffff");
    for arguments in [vec!["show"], vec!["export", "ba78"], vec!["import"], vec!["burn"], vec![]] {
        assert_eq!(chunks(&folder, &arguments).status, 2, "{arguments:?}");
    }
    chunks(&folder, &["gc", "--budget", "much"]).refused(2, "'much' for '--budget <BYTES>'");
}

#[test]
fn damage_is_found_told_and_put_aside() {
    let folder = filled("verify");
    let whole = answer(&folder, &["verify"]);
    assert_eq!(
        (&whole["chunks"], &whole["files"], &whole["problems"]),
        (&json!(2), &json!(1), &json!([]))
    );
    let path = kv_file(&folder);
    let mut bytes = fs::read(&path).expect("it is there");
    bytes[9000] ^= 1;
    fs::write(&path, &bytes).expect("written");
    let run = chunks(&folder, &["verify", "ba78"]);
    assert_eq!((run.status, run.out.as_str()), (1, "1 chunk, 1 file (20.0 KiB), 1 problem\n"));
    assert!(run.err.contains("is altered") || run.err.contains("checksum"), "{}", run.err);
    assert!(!path.exists());
    let again = answer(&folder, &["verify"]);
    assert_eq!((&again["files"], &again["problems"]), (&json!(0), &json!([])));

    // found at the next start where it is another length
    let folder = filled("verify-short");
    fs::write(kv_file(&folder), "short").expect("written");
    let run = chunks(&folder, &["list"]);
    assert_eq!(run.status, 0);
    assert!(run.err.starts_with("note: ") && run.err.contains("cut short"), "{}", run.err);
    assert_eq!(fs::read_dir(folder.join("quarantine")).expect("a folder").count(), 1);
}

#[test]
fn collecting_keeps_within_the_budget() {
    let folder = filled("gc");
    let kept = answer(&folder, &["gc"]);
    assert_eq!((&kept["removed"], &kept["kept_bytes"]), (&json!([]), &json!(4096 * 5 + 32)));
    let run = chunks(&folder, &["gc", "--budget", "10KiB"]);
    assert_eq!(run.out, "1 file removed (20.0 KiB), 0 B kept\n");
    assert!(!kv_file(&folder).exists());
    assert_eq!(chunks(&folder, &["list", "--json"]).json().len(), 2, "texts stay");
}

#[test]
fn a_chunk_is_carried_to_another_store() {
    let (here, there) = (filled("export"), folder("import"));
    let file = scratch("store").join("abc.chunk");
    let path = file.to_str().expect("UTF-8");
    let run = chunks(&here, &["export", "ba78", path]);
    assert!(
        run.out.starts_with("✓ Chunk exported: ba7816bf8f01cfea... with 1 KV file, "),
        "{run:?}"
    );
    let run = chunks(&there, &["import", path]);
    let expected = "✓ Chunk imported: ba7816bf8f01cfea... abc.txt with 1 new KV file, 20.0 KiB\n";
    assert_eq!((run.status, run.out.as_str()), (0, expected));
    assert_eq!(fs::read(kv_file(&here)).expect("kept"), fs::read(kv_file(&there)).expect("came"));
    let again = answer(&there, &["import", path]);
    assert_eq!((&again["already"], &again["files"]), (&json!(true), &json!(0)));

    let mut bytes = fs::read(&file).expect("it is there");
    bytes[40] ^= 1;
    fs::write(&file, bytes).expect("written");
    let empty = folder("import-damaged");
    chunks(&empty, &["import", path]).refused(1, "its checksum does not match");
    assert_eq!(chunks(&empty, &["list"]).out, "");
    chunks(&empty, &["import", "/no/such/file"]).refused(1, "/no/such/file");
    chunks(&here, &["export", "ba78", "/no/such/folder/file"]).refused(1, "/no/such/folder/file");
}

#[test]
fn a_store_that_cannot_be_opened_is_named() {
    let folder = filled("in-use");
    let store = Store::open(&folder).expect("nobody has it");
    let owner = format!("is in use by process {}", std::process::id());
    chunks(&folder, &["list"]).refused(1, &owner);
    drop(store);
    assert_eq!(chunks(&folder, &["list"]).status, 0);

    let file = scratch("store").join("no-folder");
    fs::write(&file, "").expect("written");
    chunks(&file, &["list"]).refused(1, "cannot create");
    fs::write(folder.join("index.sqlite"), "x".repeat(4096)).expect("written");
    chunks(&folder, &["list"]).refused(1, "index.sqlite");
}
