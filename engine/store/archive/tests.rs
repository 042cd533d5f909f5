use super::*;
use crate::store::Codec;
use crate::store::testing::*;

#[test]
fn an_import_without_room_brings_nothing() {
    let (here, there) = (Scratch::new(), Scratch::new());
    let store = Store::open(here.path()).unwrap();
    let (record, kv) = fill(&store, 1);
    store.save(&record, &kv, Codec::Int8, &coding(1)).unwrap();
    let file = here.path().join("export");
    store.export(record.chunk, &file).unwrap();
    let mut at = 0;
    loop {
        let failing = Failing::new(at, Failure::Full);
        let other = Store::open_with(there.path(), failing).unwrap();
        match other.import(&file) {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, StoreError::DiskFull { .. }), "{error}"),
        }
        assert_eq!((other.chunks().unwrap(), other.kv_files().unwrap()), (vec![], vec![]));
        assert_eq!(fs::read_dir(there.path().join("kv")).unwrap().count(), 0, "step {at}");
        at += 1;
    }
    assert_eq!(at, 2 * (1 + 1 + 1 + 1 + 1) + 1, "two files of one piece each, and the rows");
}

#[test]
fn an_export_brings_a_chunk_elsewhere() {
    let (here, there) = (Scratch::new(), Scratch::new());
    let store = Store::open(here.path()).unwrap();
    let (record, kv) = fill(&store, 1);
    store.add_tag(record.chunk, "tag").unwrap();
    store.save(&record, &kv, Codec::Int8, &coding(1)).unwrap();
    let file = here.path().join("export");
    let exported = store.export(record.chunk, &file).unwrap();
    let bytes = fs::metadata(&file).unwrap().len();
    assert_eq!(exported, Exported { files: 2, bytes, problems: vec![] });

    let other = Store::open(there.path()).unwrap();
    let imported = other.import(&file).unwrap();
    assert_eq!((imported.files, imported.already), (2, false));
    assert_eq!(other.chunk(record.chunk).unwrap(), store.chunk(record.chunk).unwrap());
    assert_eq!(found(&other, &record), kv);
    let again = other.import(&file).unwrap();
    assert_eq!((again.files, again.already), (0, true));
    no_problems(&other);
    // what is damaged is left out and told
    fs::write(path_of(&store, record.kv_id()), "short").unwrap();
    let exported = store.export(record.chunk, &file).unwrap();
    assert_eq!((exported.files, exported.problems.len()), (1, 1));
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
