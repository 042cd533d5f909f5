//! The folder through its life: saves that are cut off, files that are altered, two owners.

use std::fs;

use sha2::{Digest, Sha256};

use super::codec::Encoding;
use super::testing::*;
use super::*;
use crate::ChunkId;
use crate::cache::{KvIdentity, KvVariant};
use crate::tenant::SHARED;

#[test]
fn what_is_saved_is_there_in_the_next_process() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(store.opened(), &OpenReport::default());
    let (record, kv) = fill(&store, 1);
    let saved = store.save(&record, &kv, Codec::Raw, &coding(1)).unwrap();
    assert_eq!((saved.raw_bytes, saved.payload_bytes), (kv.num_bytes(), kv.num_bytes()));
    assert_eq!(saved.kv_id, record.kv_id());
    drop(store);

    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(store.opened(), &OpenReport::default(), "nothing was left undone");
    assert_eq!(found(&store, &record), kv);
    let files = store.kv_files().unwrap();
    assert_eq!((files.len(), files[0].codec, files[0].uses), (1, Codec::Raw, 1));
    assert_eq!(files[0].bytes, fs::metadata(path_of(&store, saved.kv_id)).unwrap().len());
    assert_eq!((files[0].chunk, files[0].tokens), (record.chunk, 50));
    assert!(store.has(saved.kv_id).unwrap());
    let (other, _) = segment(2, BF16, 50);
    assert_eq!(load(&store, &other), Loaded::Absent);
    no_problems(&store);
}

#[test]
fn int8_has_a_file_of_its_own_and_is_never_encoded_again() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, kv) = fill(&store, 1);
    let saved = store.save(&record, &kv, Codec::Int8, &coding(1)).unwrap();
    assert_eq!((store.kv_files().unwrap().len(), found(&store, &record)), (2, kv));
    let approximate = KvRecord { variant: KvVariant::Int8, ..record };
    assert_eq!(approximate.kv_id(), saved.kv_id);
    let bytes = fs::read(path_of(&store, saved.kv_id)).unwrap();
    let kv = found(&store, &approximate);
    assert_eq!(store.save(&approximate, &kv, Codec::Int8, &coding(1)).unwrap(), saved);
    assert_eq!(fs::read(path_of(&store, saved.kv_id)).unwrap(), bytes);
    let refused = store.save(&approximate, &kv, Codec::Planes, &coding(1)).unwrap_err();
    assert!(matches!(refused, StoreError::NotLossless));
    fs::remove_file(path_of(&store, saved.kv_id)).unwrap();
    let refused = store.save(&approximate, &kv, Codec::Int8, &coding(1)).unwrap_err();
    assert!(matches!(refused, StoreError::NotLossless));
}

#[test]
fn one_process_has_it_open() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let refusal = Store::open(scratch.path()).err().expect("refused").to_string();
    let expected = format!("is in use by process {}; ", std::process::id());
    assert!(refusal.contains(&expected), "{refusal}");
    let second = store.another().unwrap();
    drop(store);
    let refusal = Store::open(scratch.path()).err().expect("refused");
    assert!(matches!(refusal, StoreError::InUse { .. }), "the other handle has it still");
    drop(second);
    Store::open(scratch.path()).unwrap();
}

#[test]
fn handles_of_two_threads_work_on_one_store() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let second = store.another().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let second = second;
            (0..10).for_each(|seed| drop(fill(&second, seed)));
        });
        (5..15).for_each(|seed| drop(fill(&store, seed)));
    });
    assert_eq!((store.kv_files().unwrap().len(), store.chunks().unwrap().len()), (15, 15));
    no_problems(&store);
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let scratch = Scratch::new();
    let file = scratch.path().join("file");
    fs::write(&file, "").unwrap();
    let refusal = Store::open(&file.join("store")).err().expect("refused").to_string();
    assert!(refusal.starts_with("cannot create") && refusal.contains("file"), "{refusal}");
}

/// Saves with a failure at every step in turn; `check` sees each store opened again, and whether
/// the save said it had worked.
fn at_every_step(failure: Failure, codec: Codec, check: impl Fn(&Store, bool)) -> usize {
    for at in 0.. {
        let scratch = Scratch::new();
        let store = Store::open(scratch.path()).unwrap();
        fill(&store, 1);
        put(&store, 2);
        let (record, kv) = segment(2, BF16, 50);
        // what the save is to replace
        store.save(&record, &kv, Codec::Planes, &coding(1)).unwrap();
        drop(store);

        let failing = Failing::new(at, failure);
        let store = Store::open_with(scratch.path(), failing).unwrap();
        let saved = store.save(&record, &kv, codec, &coding(1));
        let worked = saved.is_ok();
        if failure == Failure::Full && !worked {
            let error = saved.unwrap_err();
            assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
        }
        drop(store);
        let store = Store::open(scratch.path()).unwrap();
        assert_eq!(store.opened().quarantined, [], "step {at} left something half written");
        check(&store, worked);
        if worked {
            return at;
        }
    }
    unreachable!("some save works")
}

#[test]
fn a_save_cut_off_at_any_step_harms_nothing() {
    for codec in Codec::ALL {
        let steps = at_every_step(Failure::Crash, codec, |store, worked| {
            no_problems(store);
            let (first, kv) = segment(1, BF16, 50);
            assert_eq!(found(store, &first), kv, "what was there before is lost");
            let (second, kv) = segment(2, BF16, 50);
            assert_eq!(found(store, &second), kv, "neither the old file nor the new is there");
            assert_eq!(store.chunks().unwrap().len(), 2);
            let int8 = KvRecord { variant: KvVariant::Int8, ..second };
            let there = matches!(load(store, &int8), Loaded::Found { .. });
            assert!(there || !worked || codec != Codec::Int8, "it said that it was saved");
            let files = store.kv_files().unwrap();
            assert_eq!(files.len(), if there { 3 } else { 2 });
        });
        // create, write each part and its padding, the trailer, sync, rename, sync, commit
        assert_eq!(steps, 1 + 2 * 5 + 1 + 1 + 1 + 1 + 1, "{codec:?}");
    }
}

#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let steps = at_every_step(Failure::Full, Codec::Int8, |store, worked| {
        no_problems(store);
        assert_eq!(store.opened(), &OpenReport::default(), "it was cleaned up at once");
        assert_eq!(store.kv_files().unwrap().len(), if worked { 3 } else { 2 });
        let kept = fs::read_dir(store.path().join("kv")).unwrap().count();
        assert_eq!(kept, if worked { 3 } else { 2 });
    });
    assert_eq!(steps, 16);
    at_every_step(Failure::Full, Codec::Raw, |store, _| {
        let (second, kv) = segment(2, BF16, 50);
        assert_eq!(found(store, &second), kv, "what was to be replaced is lost");
    });
}

#[test]
fn an_altered_file_is_put_aside_told_and_absent() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    type Alter = fn(&mut Vec<u8>);
    let damages: [(&str, Alter); 5] = [
        ("is cut short", |bytes| bytes.truncate(bytes.len() / 2)),
        ("is cut short", |bytes| bytes.clear()),
        ("is altered", |bytes| bytes[4095] ^= 1),
        ("has version 9", |bytes| bytes[8] = 9),
        ("is altered", |bytes| bytes[5000] ^= 4),
    ];
    for (text, damage) in damages {
        let (record, kv) = fill(&store, 1);
        let path = path_of(&store, record.kv_id());
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let Loaded::Quarantined(quarantined) = load(&store, &record) else {
            panic!("it should be put aside: {text}")
        };
        let told = quarantined.damage.to_string();
        assert!(told.contains(text), "{told}: {text}");
        assert_eq!(fs::read(&quarantined.path).unwrap(), bytes, "it is moved, not changed");
        assert!(quarantined.path.starts_with(scratch.path().join("quarantine")));
        assert_eq!((load(&store, &record), path.exists()), (Loaded::Absent, false));
        assert_eq!(store.kv_files().unwrap(), []);
        // and it can be saved again
        store.save(&record, &kv, Codec::Raw, &coding(1)).unwrap();
        assert_eq!(found(&store, &record), kv);
    }
    assert_eq!(fs::read_dir(scratch.path().join("quarantine")).unwrap().count(), 5);
}

#[test]
fn a_file_of_another_model_or_name_is_put_aside() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, _) = fill(&store, 1);
    let (other, _) = segment(2, BF16, 50);
    fs::copy(path_of(&store, record.kv_id()), path_of(&store, other.kv_id())).unwrap();
    let Loaded::Quarantined(quarantined) = load(&store, &other) else { panic!("not its name") };
    assert_eq!(quarantined.damage, Damage::Name);

    let identity = KvIdentity { model: [8; 32], ..identity() };
    let foreign = Expected { identity: &identity, shape: record.shape };
    let loaded = store.load(record.kv_id(), &foreign, &coding(1)).unwrap();
    let Loaded::Quarantined(quarantined) = loaded else { panic!("not this model's") };
    assert_eq!(quarantined.damage, Damage::Foreign("the model"));

    fill(&store, 1);
    let wide = KvShape { kv_heads: 3, ..shape(BF16) };
    let foreign = Expected { identity: &record.identity, shape: wide };
    let loaded = store.load(record.kv_id(), &foreign, &coding(1)).unwrap();
    let Loaded::Quarantined(quarantined) = loaded else { panic!("not this shape") };
    assert_eq!(quarantined.damage, Damage::Foreign("the shape"));
}

#[test]
fn a_file_that_claims_to_be_huge_takes_no_memory() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, _) = segment(1, BF16, 1);
    let huge = KvShape { layers: 1, kv_heads: 1 << 30, head_dim: 1 << 20, dtype: BF16 };
    let raw = huge.frame_bytes(1).unwrap() as u64;
    let record = KvRecord { shape: huge, ..record };
    let frames = [4096, 8192].map(|at| manifest::Frame::new(at, b"bomb", raw, Encoding::Planes));
    let manifest = manifest::Manifest::new(&record, Codec::Planes, frames.to_vec());
    let manifest = manifest.to_bytes().unwrap();
    let mut bytes = [&b"STRANDKV"[..], &[1, 0, 0, 0]].concat();
    bytes.extend((manifest.len() as u32).to_le_bytes());
    bytes.extend(xxhash_rust::xxh3::xxh3_64(&manifest).to_le_bytes());
    bytes.extend(manifest);
    for end in [8192, 12_288] {
        bytes.resize(end - 4096, 0);
        bytes.extend(b"bomb");
        bytes.resize(end, 0);
    }
    bytes.extend(Sha256::digest(&bytes));
    fs::write(path_of(&store, record.kv_id()), bytes).unwrap();
    drop(store);

    // its header and checksums hold, so it is listed and verified; nothing decodes it
    let store = Store::open(scratch.path()).unwrap();
    assert_eq!((store.opened().indexed, store.verify(None).unwrap().problems), (1, vec![]));
    let expected = Expected { identity: &record.identity, shape: shape(BF16) };
    let loaded = store.load(record.kv_id(), &expected, &coding(1)).unwrap();
    let Loaded::Quarantined(quarantined) = loaded else { panic!("not this shape") };
    assert_eq!(quarantined.damage, Damage::Foreign("the shape"));
}

#[test]
fn opening_makes_files_and_rows_agree() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (kept, lost, damaged) = (fill(&store, 1), fill(&store, 2), fill(&store, 3));
    let kv = scratch.path().join("kv");
    fs::remove_file(path_of(&store, lost.0.kv_id())).unwrap();
    let bytes = fs::read(path_of(&store, damaged.0.kv_id())).unwrap();
    fs::write(path_of(&store, damaged.0.kv_id()), &bytes[..100]).unwrap();
    fs::write(kv.join(format!("{}.4.tmp", kept.0.kv_id())), "half").unwrap();
    fs::write(kv.join("notes.txt"), "mine").unwrap();
    drop(store);
    fs::remove_file(scratch.path().join("index.sqlite")).unwrap();

    let store = Store::open(scratch.path()).unwrap();
    let report = store.opened();
    assert_eq!((report.temporaries, report.indexed, report.forgotten), (1, 1, 0));
    assert_eq!((report.quarantined.len(), report.unreadable.len()), (1, 0));
    assert_eq!(report.quarantined[0].damage, Damage::Short);
    assert_eq!(found(&store, &kept.0), kept.1);
    assert_eq!(fs::read_to_string(kv.join("notes.txt")).unwrap(), "mine");
    fs::remove_file(path_of(&store, kept.0.kv_id())).unwrap();
    drop(store);
    assert_eq!(Store::open(scratch.path()).unwrap().opened().forgotten, 1);
}

#[test]
fn counters_count() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    fill(&store, 1);
    fill(&store, 2);
    let bytes: u64 = store.kv_files().unwrap().iter().map(|file| file.bytes).sum();
    let expected = [("bytes written".to_owned(), bytes), ("files written".to_owned(), 2)];
    assert_eq!(store.statistics().unwrap(), expected);
}

#[test]
fn a_store_can_be_given_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Store>();
}

#[test]
fn tenants_have_chunks_contexts_and_files_of_their_own() {
    let scratch = Scratch::new();
    let nobody = Store::open(scratch.path()).unwrap();
    let anna = nobody.of_tenant("anna").unwrap();
    let (common, _) = fill(&nobody, 1);
    assert_eq!((anna.chunks().unwrap(), anna.kv_files().unwrap()), (vec![], vec![]));
    assert!(anna.find_chunk(&common.chunk.to_string()).is_err());
    let context = StoredContext { policy: "exact".into(), ..StoredContext::default() };
    nobody.put_context("c", &context).unwrap();
    assert_eq!(anna.context("c").unwrap(), None);
    assert!(!anna.remove_context("c").unwrap() && anna.contexts().unwrap().is_empty());

    // the same content, narrowed and not
    put(&anna, 1);
    let narrowed = [None, Some("x")].map(|word| fill_for(&anna, 1, word));
    assert_eq!((anna.kv_files().unwrap().len(), nobody.kv_files().unwrap().len()), (2, 1));
    assert_eq!(nobody.all_kv_files().unwrap().len(), 3);
    assert_eq!(nobody.kv_records(common.chunk).unwrap()[0], common);
    assert_eq!(anna.kv_records(common.chunk).unwrap().len(), 2);
    assert!(nobody.keeps("anna", common.chunk).unwrap());
    assert!(!nobody.keeps("ben", common.chunk).unwrap());

    let erased = nobody.erase(common.chunk).unwrap();
    assert_eq!((erased.chunk, erased.files), (true, 1));
    assert_eq!(load(&nobody, &common), Loaded::Absent);
    assert_eq!(anna.chunks().unwrap().len(), 1);
    narrowed.iter().for_each(|(record, kv)| assert_eq!(found(&anna, record), *kv));
    assert_eq!(nobody.gc(None).unwrap().removed, [], "they have a chunk, and are no orphans");
    drop((nobody, anna));
    let anna = Store::open(scratch.path()).unwrap().of_tenant("anna").unwrap();
    assert_eq!(anna.opened(), &OpenReport::default());
    assert_eq!(anna.erase(common.chunk).unwrap().files, 2);
    assert_eq!(anna.all_kv_files().unwrap(), []);
    no_problems(&anna);
}

#[test]
fn a_file_that_tenants_share_is_of_those_who_have_the_chunk() {
    let scratch = Scratch::new();
    let nobody = Store::open(scratch.path()).unwrap();
    let of = |tenant| nobody.of_tenant(tenant).unwrap();
    let [all, anna, ben, carl] = [SHARED, "anna", "ben", "carl"].map(of);
    let chunk = put(&anna, 1);
    put(&ben, 1);
    let (record, kv) = fill_for(&all, 1, None);
    let files = [&anna, &ben, &carl].map(|store| store.kv_files().unwrap().len());
    assert_eq!(files, [1, 1, 0]);
    assert!(all.keeps(SHARED, chunk).unwrap() && !all.keeps(SHARED, ChunkId::of(b"x")).unwrap());
    assert_eq!(nobody.gc(None).unwrap().removed, [], "it is somebody's");
    anna.lease(chunk, 60).unwrap();
    assert_eq!(nobody.gc(Some(0)).unwrap().removed, [], "leased by one of them");
    assert_eq!(found(&ben, &record), kv);

    assert_eq!(carl.erase(chunk).unwrap(), Erased::default(), "who doesn't have it erases nothing");
    assert_eq!(anna.erase(chunk).unwrap().files, 1);
    assert_eq!(load(&ben, &record), Loaded::Absent);
    assert_eq!((ben.chunks().unwrap().len(), all.all_kv_files().unwrap().len()), (1, 0));
    fill_for(&all, 1, None);
    assert!(ben.index().remove_chunk(chunk).unwrap());
    fill_for(&all, 1, None);
    assert_eq!(nobody.gc(None).unwrap().removed.len(), 1, "nobody has the chunk any more");
    no_problems(&anna);
}

#[test]
fn a_tenants_quarantine_is_left_by_others() {
    let scratch = Scratch::new();
    let nobody = Store::open(scratch.path()).unwrap();
    let anna = nobody.of_tenant("anna").unwrap();
    put(&anna, 1);
    let (record, _) = fill_for(&anna, 1, None);
    let path = path_of(&anna, record.kv_id());
    let mut bytes = fs::read(&path).unwrap();
    bytes[4095] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(load(&anna, &record), Loaded::Quarantined(_)));
    let left = || fs::read_dir(scratch.path().join("quarantine")).unwrap().count();
    nobody.erase(record.chunk).unwrap();
    assert_eq!(left(), 1);
    anna.erase(record.chunk).unwrap();
    assert_eq!(left(), 0);
}

#[test]
fn an_export_is_of_one_tenant() {
    let (here, there) = (Scratch::new(), Scratch::new());
    let store = Store::open(here.path()).unwrap();
    let anna = store.of_tenant("anna").unwrap();
    put(&anna, 1);
    fill_for(&anna, 1, None);
    let (record, _) = fill(&store, 1);
    let file = here.path().join("export");
    assert_eq!(anna.export(record.chunk, &file).unwrap().files, 1);
    let other = Store::open(there.path()).unwrap();
    let imported = other.import(&file).unwrap();
    assert_eq!((imported.files, other.all_kv_files().unwrap().len()), (0, 0));
    assert_eq!(other.of_tenant("anna").unwrap().import(&file).unwrap().files, 1);
}

#[test]
fn a_store_of_version_1_keeps_everything() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let anna = store.of_tenant("anna").unwrap();
    let (of_anna, kv) = fill_for(&anna, 2, None);
    let (record, _) = fill(&store, 1);
    drop((store, anna));
    // as that version left it: the files, and these rows
    let index = scratch.path().join("index.sqlite");
    fs::remove_file(&index).unwrap();
    let connection = rusqlite::Connection::open(&index).unwrap();
    connection.execute_batch(include_str!("index/schema_1.sql")).unwrap();
    connection.execute_batch(include_str!("index/tests/rows_1.sql")).unwrap();
    let insert = "INSERT INTO kv_files VALUES (?, ?, 'planes', 50, ?, 12800, 5, 6, 7)";
    for record in [&record, &of_anna] {
        let id = record.kv_id();
        let path = scratch.path().join("kv").join(format!("{id}.kv"));
        let length = fs::metadata(path).unwrap().len() as i64;
        let row = rusqlite::params![id.as_bytes(), record.chunk.as_bytes(), length];
        connection.execute(insert, row).unwrap();
    }
    let gone = rusqlite::params![[9u8; 32], record.chunk.as_bytes(), 1];
    connection.execute(insert, gone).unwrap();
    drop(connection);

    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(store.opened().quarantined, []);
    let chunk = store.chunk(record.chunk).unwrap().unwrap();
    assert_eq!((chunk.text, chunk.info.name.as_str()), (text(1), "1.txt"));
    assert_eq!((chunk.info.tags, chunk.info.metadata), (vec!["old".to_owned()], None));
    let context = store.context("talk").unwrap().unwrap();
    assert_eq!((context.label, context.blend_tokens), (None, None));
    assert_eq!((context.entries[0].chunk, context.turns[0].text.as_str()), (record.chunk, "hi"));
    let files = store.kv_files().unwrap();
    assert_eq!((files.len(), files[0].uses, files[0].created), (1, 7, 5));
    assert_eq!(store.all_kv_files().unwrap().len(), 2, "the file that is gone has no row");
    assert_eq!(found(&store.of_tenant("anna").unwrap(), &of_anna), kv);
    drop(store);
    assert_eq!(Store::open(scratch.path()).unwrap().opened(), &OpenReport::default());
}
