use super::*;
use crate::cache::KvIdentity;
use crate::store::testing::*;
use crate::store::{Codec, Loaded, OpenReport, StoredContext, StoredEntry};

#[test]
fn erasing_leaves_nothing() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, kv) = fill(&store, 1);
    let (other, _) = fill(&store, 2);
    store.save(&record, &kv, Codec::Int8, &coding(1)).unwrap();
    let context = StoredContext {
        entries: vec![StoredEntry { chunk: record.chunk, active: true, seen: vec![] }],
        ..StoredContext::default()
    };
    store.put_context("c", &context).unwrap();
    let bytes: u64 = store.kv_files().unwrap().iter().map(|file| file.bytes).sum();
    let erased = store.erase(record.chunk).unwrap();
    assert_eq!((erased.chunk, erased.files), (true, 2));
    let left = store.kv_files().unwrap();
    assert_eq!((left.len(), left[0].bytes + erased.bytes), (1, bytes));
    assert_eq!(store.chunk(record.chunk).unwrap(), None);
    assert_eq!(store.context("c").unwrap().unwrap().entries, []);
    assert_eq!(store.erase(record.chunk).unwrap(), Erased::default());
    drop(store);
    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(store.opened(), &OpenReport::default());
    assert_eq!(found(&store, &other), segment(2, BF16, 50).1);
}

#[test]
fn erasing_takes_what_was_put_aside_of_the_chunk() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let put_aside = |seed| {
        let (record, _) = fill(&store, seed);
        let path = path_of(&store, record.kv_id());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[4095] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(load(&store, &record), Loaded::Quarantined(_)));
        record
    };
    let (erased, other) = (put_aside(1), put_aside(2));
    let folder = scratch.path().join("quarantine");
    std::fs::write(folder.join("nobody knows"), "whose this is").unwrap();
    store.erase(erased.chunk).unwrap();
    let left = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), [format!("{}.kv", other.kv_id()).as_str()]);
}

#[test]
fn a_chunk_is_erased_for_one_tenant_or_for_all() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, kv) = fill(&store, 1);
    let other = store.of_tenant("anna").unwrap();
    let text = store.chunk(record.chunk).unwrap().unwrap();
    other.put_chunk(&text).unwrap();
    let salt = crate::tenant::salt("anna", Some("narrower")).into_bytes();
    let identity = KvIdentity { salt, ..record.identity.clone() };
    let own = KvRecord { identity, ..record.clone() };
    store.save(&own, &kv, Codec::Raw, &coding(1)).unwrap();
    let files = |store: &Store| store.kv_files().unwrap().len();
    assert_eq!((files(&store), files(&other)), (1, 1));
    other.erase(record.chunk).unwrap();
    assert_eq!((files(&store), files(&other)), (1, 0));
    store.save(&own, &kv, Codec::Raw, &coding(1)).unwrap();
    let erased = store.erase_everybodys(record.chunk).unwrap();
    assert_eq!((erased.chunk, erased.files), (true, 2));
    assert!(store.all_kv_files().unwrap().is_empty());
    assert_eq!(store.chunk(record.chunk).unwrap(), None);
    assert_eq!(store.erase_everybodys(record.chunk).unwrap(), Erased::default());
}

#[test]
fn an_erase_cut_off_can_be_done_again() {
    for at in 0..4 {
        let scratch = Scratch::new();
        let store = Store::open(scratch.path()).unwrap();
        let (record, kv) = fill(&store, 1);
        store.save(&record, &kv, Codec::Int8, &coding(1)).unwrap();
        fill(&store, 2);
        drop(store);
        let failing = Failing::new(at, Failure::Crash);
        let store = Store::open_with(scratch.path(), failing).unwrap();
        assert_eq!(store.erase(record.chunk).is_ok(), at == 3, "two files and the folder");
        drop(store);
        let store = Store::open(scratch.path()).unwrap();
        no_problems(&store);
        assert_eq!(store.chunk(record.chunk).unwrap().is_some(), at < 3);
        assert_eq!(store.erase(record.chunk).unwrap().files, 2usize.saturating_sub(at));
        drop(store);
        let store = Store::open(scratch.path()).unwrap();
        assert_eq!(store.opened(), &OpenReport::default());
        assert_eq!((store.chunks().unwrap().len(), store.kv_files().unwrap().len()), (1, 1));
    }
}

#[test]
fn verifying_finds_what_loading_would() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (damaged, _) = fill(&store, 1);
    let (missing, _) = fill(&store, 2);
    fill(&store, 3);
    let path = path_of(&store, damaged.kv_id());
    let mut bytes = fs::read(&path).unwrap();
    bytes[9000] ^= 1;
    fs::write(&path, bytes).unwrap();
    fs::remove_file(path_of(&store, missing.kv_id())).unwrap();

    let one = store.verify(Some(ChunkId::of(text(3).as_bytes()))).unwrap();
    assert_eq!((one.chunks, one.files, one.problems.len()), (1, 1, 0));
    let all = store.verify(None).unwrap();
    assert_eq!((all.chunks, all.files, all.problems.len()), (3, 3, 2));
    let missing = Problem::Missing { chunk: missing.chunk, kv_id: missing.kv_id() };
    assert!(all.problems.contains(&missing), "{all:?}");
    let of_damaged = |problem: &Problem| match problem {
        Problem::Damaged { chunk, .. } => *chunk == damaged.chunk,
        _ => false,
    };
    assert!(all.problems.iter().any(of_damaged), "{all:?}");
    no_problems(&store);
}

#[test]
fn collecting_removes_orphans_then_what_is_worth_least() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let [orphan, used, unused, leased] = [1, 2, 3, 4].map(|seed| fill(&store, seed).0);
    store.index.remove_chunk(orphan.chunk).unwrap();
    // its row went with it; saved again it has one without a chunk
    let (record, kv) = segment(1, BF16, 50);
    store.save(&record, &kv, Codec::Planes, &coding(1)).unwrap();
    found(&store, &used);
    store.lease(leased.chunk, 1000).unwrap();

    let ids =
        |collected: &Collected| collected.removed.iter().map(|file| file.kv_id).collect::<Vec<_>>();
    let collected = store.gc(None).unwrap();
    assert_eq!(ids(&collected), [orphan.kv_id()], "without a budget only orphans go");
    let collected = store.gc(Some(collected.kept_bytes - 1)).unwrap();
    assert_eq!(ids(&collected), [unused.kv_id()]);
    let collected = store.gc(Some(0)).unwrap();
    assert_eq!(ids(&collected), [used.kv_id()]);
    assert_eq!(load(&store, &used), Loaded::Absent);
    assert!(collected.kept_bytes > 0, "a lease holds");
    assert_eq!(store.chunks().unwrap().len(), 3, "texts stay");
    no_problems(&store);
}

#[test]
fn room_is_made_for_what_was_just_saved() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let [used, unused, leased, saved] = [1, 2, 3, 4].map(|seed| fill(&store, seed).0);
    found(&store, &used);
    store.lease(leased.chunk, 1000).unwrap();
    let all: u64 = store.kv_files().unwrap().iter().map(|file| file.bytes).sum();
    let room = |budget| {
        let removed = store.make_room(budget, saved.kv_id()).unwrap();
        removed.iter().map(|file| file.kv_id).collect::<Vec<_>>()
    };
    assert_eq!(room(all), [], "all fit");
    assert_eq!(room(all - 1), [unused.kv_id()]);
    assert_eq!(room(0), [used.kv_id()], "the new and the leased stay");
    assert_eq!(store.kv_files().unwrap().len(), 2);
    no_problems(&store);
}

#[test]
fn old_leftovers_are_collected() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, _) = fill(&store, 1);
    let day = std::time::Duration::from_secs(86_400);
    let aged = |path: &Path, days: u32| {
        fs::write(path, "x").unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(std::time::SystemTime::now() - day * days).unwrap();
    };
    aged(&scratch.path().join("quarantine/old"), 8);
    aged(&scratch.path().join("quarantine/new"), 6);
    aged(&scratch.path().join("kv").join(format!("{}.9.tmp", record.kv_id())), 1);
    aged(&scratch.path().join("kv/notes.txt"), 100);
    assert_eq!(store.gc(None).unwrap().leftovers, 2);
    let left = |folder: &str| fs::read_dir(scratch.path().join(folder)).unwrap().count();
    assert_eq!((left("quarantine"), left("kv")), (1, 2));
}
