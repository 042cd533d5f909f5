//! The folder through its life: saves that are cut off, files that are altered, two owners.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use strand_kernels::KvDtype;

use super::files::{Disk, Files};
use super::testing::{Scratch, coding, identity, segment, shape, text};
use super::*;
use crate::cache::{KvId, KvIdentity, KvVariant};
use crate::context::ChunkKind;
use crate::{ChunkId, SegmentKv};

const BF16: KvDtype = KvDtype::Bf16;

fn load(store: &Store, record: &KvRecord) -> Loaded {
    let expected = Expected { identity: &record.identity, shape: record.shape };
    store.load(record.kv_id(), &expected, &coding(2)).unwrap()
}

fn found(store: &Store, record: &KvRecord) -> SegmentKv {
    match load(store, record) {
        Loaded::Found { record: found, kv, .. } => {
            assert_eq!(*found, *record);
            kv
        }
        other => panic!("it should be there: {other:?}"),
    }
}

/// Puts the chunk of `segment(seed)` and its KV into the store.
fn fill(store: &Store, seed: u64) -> (KvRecord, SegmentKv) {
    let (record, kv) = segment(seed, BF16, 50);
    put(store, seed);
    store.save(&record, &kv, Codec::Planes, &coding(2)).unwrap();
    (record, kv)
}

fn put(store: &Store, seed: u64) -> ChunkId {
    let chunk = StoredChunk::new(&format!("{seed}.txt"), ChunkKind::File, &text(seed), Some(50));
    store.put_chunk(&chunk).unwrap();
    chunk.info.id
}

fn path_of(store: &Store, id: KvId) -> std::path::PathBuf {
    store.path().join("kv").join(format!("{id}.kv"))
}

fn no_problems(store: &Store) {
    assert_eq!(store.verify(None).unwrap().problems, []);
}

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

/// Files that fail from step `at` on: one step as a disk does, or all of them as a power cut does.
struct Failing {
    at: usize,
    step: Cell<usize>,
    failure: Failure,
}

#[derive(Clone, Copy, PartialEq)]
enum Failure {
    /// This step and all after it don't happen; a write gets half through.
    Crash,
    /// This step has no room.
    Full,
}

impl Failing {
    fn next(&self) -> io::Result<()> {
        let step = self.step.replace(self.step.get() + 1);
        match self.failure {
            Failure::Crash if step >= self.at => Err(io::Error::other("the power is gone")),
            Failure::Full if step == self.at => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl Files for Failing {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.next()?;
        Disk.create(path)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        self.next().inspect_err(|_| {
            if self.step.get() == self.at + 1 {
                Disk.write(file, &bytes[..bytes.len() / 2]).unwrap();
            }
        })?;
        Disk.write(file, bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.next()?;
        Disk.sync(file)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.next()?;
        Disk.rename(from, to)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.next()?;
        Disk.sync_folder(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.next()?;
        Disk.remove(path)
    }

    fn before_commit(&self) -> io::Result<()> {
        self.next()
    }
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

        let failing = Box::new(Failing { at, step: Cell::new(0), failure });
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
        ("is altered", |bytes| *bytes.last_mut().unwrap() ^= 1),
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
        let checksum = quarantined.damage == Damage::Checksum;
        assert!(told.contains(text) || (checksum && text == "is altered"), "{told}: {text}");
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
fn an_export_brings_a_chunk_elsewhere() {
    let (here, there) = (Scratch::new(), Scratch::new());
    let store = Store::open(here.path()).unwrap();
    let (record, kv) = fill(&store, 1);
    store.add_tag(record.chunk, "tag").unwrap();
    store.save(&record, &kv, Codec::Int8, &coding(1)).unwrap();
    let file = here.path().join("export");
    let (files, length) = store.export(record.chunk, &file).unwrap();
    assert_eq!((files, length), (2, fs::metadata(&file).unwrap().len()));

    let other = Store::open(there.path()).unwrap();
    let imported = other.import(&file).unwrap();
    assert_eq!((imported.files, imported.already), (2, false));
    assert_eq!(other.chunk(record.chunk).unwrap(), store.chunk(record.chunk).unwrap());
    assert_eq!(found(&other, &record), kv);
    let again = other.import(&file).unwrap();
    assert_eq!((again.files, again.already), (0, true));
    no_problems(&other);
    let none = other.export(ChunkId::of(b"none"), &file).unwrap_err();
    assert!(none.to_string().starts_with("No chunk found matching: "));
}

#[test]
fn a_damaged_export_changes_nothing() {
    let (here, there) = (Scratch::new(), Scratch::new());
    let store = Store::open(here.path()).unwrap();
    let (record, _) = fill(&store, 1);
    let file = here.path().join("export");
    store.export(record.chunk, &file).unwrap();
    let whole = fs::read(&file).unwrap();
    let other = Store::open(there.path()).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let error = other.import(&file).unwrap_err();
        assert!(matches!(error, StoreError::Unusable { .. }), "{error}");
        assert_eq!((other.chunks().unwrap(), other.kv_files().unwrap()), (vec![], vec![]));
        assert_eq!(fs::read_dir(there.path().join("kv")).unwrap().count(), 0);
    };
    for length in [0, 7, 8, 12, 31, 44, 60, 150, 300, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..length]);
    }
    for at in (0..whole.len()).step_by(97) {
        let mut altered = whole.clone();
        altered[at] ^= 16;
        refused(&altered);
    }
    refused(&fs::read(path_of(&store, record.kv_id())).unwrap());
    let missing = other.import(&here.path().join("none")).unwrap_err();
    assert!(matches!(missing, StoreError::Io { .. }), "{missing}");
    fs::write(&file, whole).unwrap();
    other.import(&file).unwrap();
}

#[test]
fn an_export_made_to_harm_is_refused() {
    use sha2::{Digest, Sha256};
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    let (record, _) = fill(&store, 1);
    let file = scratch.path().join("export");
    store.export(record.chunk, &file).unwrap();
    let whole = fs::read(&file).unwrap();
    let contents = &whole[..whole.len() - 32];
    let mut refusals = 0;
    for at in 12..300 {
        let mut altered = contents.to_vec();
        altered[at] = altered[at].wrapping_add(255);
        // its checksum is right, so that it is looked at
        altered.extend(Sha256::digest(&altered));
        fs::write(&file, altered).unwrap();
        match store.import(&file) {
            Err(StoreError::Unusable { .. }) => refusals += 1,
            // a name or a date may say anything
            Ok(_) => {}
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
    assert!(refusals > 200, "{refusals}");
    no_problems(&store);
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
