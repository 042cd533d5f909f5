use std::path::Path;

use super::*;
use crate::context::ChunkKind;
use crate::store::testing::Scratch;

fn open(scratch: &Scratch) -> Index {
    Index::open(&scratch.path().join("index.sqlite"), "").unwrap()
}

fn chunk(text: &str) -> StoredChunk {
    StoredChunk::new(&format!("{text}.txt"), ChunkKind::File, text, Some(7))
}

fn names(chunks: &[ChunkInfo]) -> Vec<&str> {
    chunks.iter().map(|chunk| chunk.name.as_str()).collect()
}

#[test]
fn a_chunk_keeps_its_first_name_and_its_text() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let abc = chunk("abc");
    assert_eq!(index.put_chunk(&abc).unwrap(), PutChunk::New);
    let renamed = StoredChunk::new("other", ChunkKind::Note, "abc", None);
    assert_eq!(index.put_chunk(&renamed).unwrap(), PutChunk::Already(abc.info.clone()));
    let recounted = StoredChunk::new("other", ChunkKind::Note, "abc", Some(9));
    index.put_chunk(&recounted).unwrap();
    drop(index);

    let index = open(&scratch);
    let found = index.chunk(abc.info.id).unwrap().unwrap();
    assert_eq!((found.text.as_str(), found.info.tokens), ("abc", Some(9)));
    assert_eq!((found.info.name.as_str(), found.info.kind), ("abc.txt", ChunkKind::File));
    assert_eq!(index.chunk(ChunkId::of(b"none")).unwrap(), None);
}

#[test]
fn tags_are_sorted_and_kept_once() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let id = chunk("größe").info.id;
    index.put_chunk(&chunk("größe")).unwrap();
    for tag in ["b", "a", "b"] {
        assert!(index.add_tag(id, tag).unwrap());
    }
    let info = index.chunk_info(id).unwrap().unwrap();
    assert_eq!((info.tags, info.text_bytes), (vec!["a".to_owned(), "b".to_owned()], 7));
    assert!(!index.add_tag(ChunkId::of(b"none"), "a").unwrap());
    let about = || {
        let info = index.chunk_info(id).unwrap().unwrap();
        (info.tags, info.metadata)
    };
    assert!(index.set_about(id, Some(&["c".to_owned()]), None).unwrap());
    assert_eq!(about(), (vec!["c".to_owned()], None));
    assert!(index.set_about(id, None, Some("{}")).unwrap());
    assert_eq!(about(), (vec!["c".to_owned()], Some("{}".to_owned())));
    assert!(!index.set_about(ChunkId::of(b"none"), Some(&[]), None).unwrap());
}

#[test]
fn a_chunk_is_found_by_a_unique_prefix_of_four_digits() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let id = chunk("abc").info.id;
    index.put_chunk(&chunk("abc")).unwrap();
    for prefix in ["ba78", "BA7816", &id.to_string()] {
        assert_eq!(index.find_chunk(prefix).unwrap(), id);
    }
    let too_long = format!("{id}0");
    for text in ["ba7", "", "ba79", "%%%%", "abc.txt", "ba78 ", &too_long] {
        let refusal = index.find_chunk(text).unwrap_err().to_string();
        assert_eq!(refusal, format!("No chunk found matching: {text}"));
    }
    // a row whose id begins alike
    let mut alike = *id.as_bytes();
    alike[31] ^= 1;
    let mut other = chunk("other");
    other.info.id = ChunkId::from_bytes(alike);
    index.put_chunk(&other).unwrap();
    let refusal = index.find_chunk("ba7816").unwrap_err().to_string();
    let both = "ba7816bf8f01cfea..., ba7816bf8f01cfea...";
    assert_eq!(refusal, format!("Ambiguous chunk prefix: ba7816. Matches: {both}"));
}

#[test]
fn a_chunk_is_looked_for_among_the_tenants_own_rows() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let query = format!("EXPLAIN QUERY PLAN {}", chunks::BY_PREFIX);
    let none = [[0u8; 32]; 2];
    let parameters = rusqlite::params!["", none[0], none[1]];
    let plan: String =
        index.connection.query_row(&query, parameters, |row| row.get("detail")).unwrap();
    assert!(plan.contains("(tenant=? AND id>? AND id<?)"), "{plan}");
}

fn context(chunks: &[ChunkId]) -> StoredContext {
    let entries = chunks.iter().enumerate().map(|(n, &chunk)| StoredEntry {
        chunk,
        active: n % 2 == 0,
        seen: chunks[..n].to_vec(),
    });
    StoredContext {
        policy: "blend".to_owned(),
        system: Some("be brief".to_owned()),
        label: Some("größe".to_owned()),
        blend_tokens: Some(0),
        entries: entries.collect(),
        turns: vec![StoredTurn {
            role: "user".to_owned(),
            text: "hello".to_owned(),
            ids: vec![1, u32::MAX],
            seen: chunks.to_vec(),
        }],
    }
}

#[test]
fn a_context_is_replaced_whole_and_kept() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let ids = ["a", "b", "c"].map(|text| chunk(text).info.id);
    for text in ["a", "b", "c"] {
        index.put_chunk(&chunk(text)).unwrap();
    }
    index.put_context("x", &context(&ids), 10).unwrap();
    index.put_context("y", &context(&ids[..1]), 20).unwrap();
    index.put_context("x", &context(&ids[1..]), 30).unwrap();
    drop(index);

    let index = open(&scratch);
    assert_eq!(index.context("x").unwrap(), Some(context(&ids[1..])));
    assert_eq!(index.context("z").unwrap(), None);
    let listed = index.contexts().unwrap();
    let facts = |n: usize| (listed[n].name.as_str(), listed[n].chunks, listed[n].turns);
    assert_eq!((facts(0), facts(1)), (("x", 2, 1), ("y", 1, 1)));
    assert_eq!((listed[0].created, listed[0].updated), (10, 30));
    assert_eq!(index.context_info("y").unwrap().as_ref(), listed.get(1));
    assert_eq!(index.context_info("z").unwrap(), None);
    assert_eq!(index.num_contexts().unwrap(), 2);
    assert_eq!(index.active_chunks().unwrap(), [ids[0], ids[1]].into());
    assert_eq!(index.chunk_totals().unwrap(), (3, 3));
    assert!(index.remove_context("y").unwrap() && !index.remove_context("y").unwrap());
    assert_eq!(index.contexts().unwrap().len(), 1);
}

#[test]
fn a_context_names_kept_chunks_only_and_forgets_removed_ones() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let ids = ["a", "b"].map(|text| chunk(text).info.id);
    index.put_chunk(&chunk("a")).unwrap();
    let refusal = index.put_context("x", &context(&ids), 1).unwrap_err().to_string();
    assert_eq!(refusal, format!("No chunk found matching: {}", ids[1].short()));
    assert!(index.contexts().unwrap().is_empty(), "nothing is half made");
    index.put_chunk(&chunk("b")).unwrap();
    index.put_context("x", &context(&ids), 1).unwrap();
    assert!(index.remove_chunk(ids[0]).unwrap() && !index.remove_chunk(ids[0]).unwrap());
    let left = index.context("x").unwrap().unwrap();
    assert_eq!(left.entries.iter().map(|entry| entry.chunk).collect::<Vec<_>>(), ids[1..]);
    assert_eq!(names(&index.chunks().unwrap()), ["b.txt"]);
}

#[test]
fn an_index_in_memory_is_as_good() {
    let index = Index::in_memory("anna").unwrap();
    let stored = StoredChunk {
        info: ChunkInfo { metadata: Some("{}".into()), ..chunk("a").info },
        ..chunk("a")
    };
    index.put_chunk(&stored).unwrap();
    assert_eq!(index.chunk(stored.info.id).unwrap(), Some(stored.clone()));
    index.put_context("x", &context(&[stored.info.id]), 1).unwrap();
    assert!(index.remove_chunk(stored.info.id).unwrap());
    assert_eq!(index.context("x").unwrap().unwrap().entries, []);
}

#[test]
fn removed_text_is_not_left_in_the_files() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let secret = chunk("swordfish-81 opens the harbour gate");
    index.put_chunk(&secret).unwrap();
    index.remove_chunk(secret.info.id).unwrap();
    index.checkpoint().unwrap();
    for entry in std::fs::read_dir(scratch.path()).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(9).any(|part| part == b"swordfish"), "{}", path.display());
    }
}

#[test]
fn fingerprints_hold_for_one_stamp() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let (path, stamp) = (Path::new("model.gguf"), FileStamp { size: 5, modified: 9 });
    assert_eq!(index.fingerprint(path, stamp).unwrap(), None);
    index.put_fingerprint(path, stamp, [1; 32]).unwrap();
    index.put_fingerprint(path, FileStamp { size: 6, modified: 9 }, [2; 32]).unwrap();
    assert_eq!(index.fingerprint(path, stamp).unwrap(), None);
    let found = index.fingerprint(path, FileStamp { size: 6, modified: 9 }).unwrap();
    assert_eq!(found, Some([2; 32]));
}

#[test]
fn leases_end() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    let id = chunk("a").info.id;
    assert!(index.put_lease(id, 10).is_err(), "there is no such chunk");
    index.put_chunk(&chunk("a")).unwrap();
    index.put_lease(id, 10).unwrap();
    let leased = vec![(String::new(), id)];
    assert_eq!((index.leases(9).unwrap(), index.leases(10).unwrap()), (leased, vec![]));
    assert_eq!(index.leases(9).unwrap(), vec![], "an ended lease is gone");
}

#[test]
fn a_later_version_and_what_is_no_index_are_refused() {
    let scratch = Scratch::new();
    let path = scratch.path().join("index.sqlite");
    open(&scratch).connection.pragma_update(None, "user_version", 3).unwrap();
    let refusal = Index::open(&path, "").err().expect("refused").to_string();
    assert!(refusal.contains("has version 3, this program knows 2"), "{refusal}");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "x".repeat(5000)).unwrap();
    let refusal = Index::open(&path, "").err().expect("refused").to_string();
    assert!(refusal.contains("move it away"), "{refusal}");
}

#[test]
fn a_text_that_makes_no_sense_is_named() {
    let scratch = Scratch::new();
    let index = open(&scratch);
    index.put_chunk(&chunk("a")).unwrap();
    index.connection.execute("UPDATE chunks SET kind = 'poem'", []).unwrap();
    let refusal = index.chunks().unwrap_err().to_string();
    assert!(refusal.ends_with("holds a kind of chunk that makes no sense: poem"), "{refusal}");
}
