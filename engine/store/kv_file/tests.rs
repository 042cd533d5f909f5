use super::*;
use crate::store::testing::{DTYPES, Random, coding, identity, segment};

fn write(record: &KvRecord, kv: &SegmentKv, codec: Codec, threads: usize) -> Vec<u8> {
    let encoded = Encoded::new(record, kv, codec, &coding(threads)).unwrap();
    let mut bytes = Vec::new();
    encoded
        .write(|part| {
            bytes.extend(part);
            Ok(())
        })
        .unwrap();
    assert_eq!(encoded.file_bytes(), bytes.len() as u64, "the length is known before");
    bytes
}

fn read(bytes: &[u8], threads: usize) -> Result<(KvRecord, SegmentKv), ReadError> {
    let reader = KvReader::open(bytes, bytes.len() as u64)?;
    let record = reader.record.clone();
    Ok((record, reader.read(&coding(threads))?))
}

fn verify(bytes: &[u8]) -> Result<(), ReadError> {
    KvReader::open(bytes, bytes.len() as u64)?.verify()
}

/// What both who reads and who verifies find.
fn damage(bytes: &[u8]) -> Damage {
    match (read(bytes, 1), verify(bytes)) {
        (Err(ReadError::Damage(damage)), Err(ReadError::Damage(verified))) => {
            assert_eq!(damage, verified);
            damage
        }
        other => panic!("it should be found damaged: {other:?}"),
    }
}

#[test]
fn what_is_written_is_read() {
    for dtype in DTYPES {
        for tokens in [1, 16, 200] {
            let (record, kv) = segment(tokens as u64, dtype, tokens);
            for codec in [Codec::Raw, Codec::Planes] {
                let bytes = write(&record, &kv, codec, 1);
                assert!(write(&record, &kv, codec, 3) == bytes, "threads change no byte");
                for threads in [1, 4] {
                    assert_eq!(read(&bytes, threads).unwrap(), (record.clone(), kv.clone()));
                }
                let reader = KvReader::open(&bytes[..], bytes.len() as u64).unwrap();
                assert_eq!((reader.codec, reader.raw_bytes()), (codec, kv.num_bytes()));
                reader.verify().unwrap();
            }
        }
    }
}

#[test]
fn int8_is_another_kv_and_made_from_lossless_rows_only() {
    let (record, kv) = segment(1, KvDtype::Bf16, 100);
    let bytes = write(&record, &kv, Codec::Int8, 1);
    assert!(write(&record, &kv, Codec::Int8, 2) == bytes, "saving again writes the same bytes");
    let (again, approximate) = read(&bytes, 1).unwrap();
    assert_eq!(again, KvRecord { variant: KvVariant::Int8, ..record.clone() });
    assert_ne!(again.kv_id(), record.kv_id());
    assert_ne!(approximate, kv);
    for codec in Codec::ALL {
        let refused = Encoded::new(&again, &approximate, codec, &coding(1));
        assert!(matches!(refused, Err(StoreError::NotLossless)), "{codec:?}");
    }
    let reader = KvReader::open(&bytes[..], bytes.len() as u64).unwrap();
    reader.verify().unwrap();
    let reader = KvReader::open(&bytes[..], bytes.len() as u64).unwrap();
    let refused = reader.read(&Coding::default()).unwrap_err();
    let expected = matches!(refused, ReadError::Refused(StoreError::NoRotation));
    assert!(expected, "without the rotation the file is not at fault");
}

#[test]
fn the_layout_is_the_drawn_one() {
    let (record, kv) = segment(3, KvDtype::F16, 5);
    let bytes = write(&record, &kv, Codec::Raw, 1);
    assert_eq!((&bytes[..8], &bytes[8..12]), (&b"STRANDKV"[..], &[1, 0, 0, 0][..]));
    let manifest = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    assert_eq!(bytes[16..24], xxh3_64(&bytes[24..24 + manifest]).to_le_bytes());
    for (index, frame) in kv.frames().enumerate() {
        let start = 4096 * (index + 1);
        assert_eq!(&bytes[start..start + frame.len()], frame);
        assert!(bytes[start + frame.len()..start + 4096].iter().all(|&byte| byte == 0));
    }
    assert_eq!(bytes.len(), 4096 * 5 + 32);
    assert_eq!(Sha256::digest(&bytes[..4096 * 5])[..], bytes[4096 * 5..]);
}

#[test]
fn a_long_manifest_moves_the_frames() {
    // with each more token the manifest crosses the borders of pages
    for tokens in (800..1100).step_by(7) {
        let (record, kv) = segment(9, KvDtype::F16, tokens);
        let bytes = write(&record, &kv, Codec::Raw, 1);
        assert_eq!(read(&bytes, 1).unwrap().1, kv, "{tokens}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (record, kv) = segment(4, KvDtype::Bf16, 40);
    for codec in Codec::ALL {
        let bytes = write(&record, &kv, codec, 1);
        let manifest = 24 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let borders = (0..=bytes.len() / 4096).map(|page| page * 4096);
        let borders = borders.chain([8, 12, 16, 24, manifest, bytes.len() - 32, bytes.len()]);
        for border in borders.flat_map(|at| [at.saturating_sub(1), at, at + 1]) {
            if border < bytes.len() {
                damage(&bytes[..border]);
            }
        }
        assert_eq!(damage(&[&bytes[..], &[0]].concat()), Damage::Long);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let mut random = Random::new(6);
    let (record, kv) = segment(5, KvDtype::Bf16, 40);
    for codec in Codec::ALL {
        let bytes = write(&record, &kv, codec, 1);
        let end = bytes.len() - TRAILER;
        let expected = read(&bytes, 1).unwrap();
        let sampled: Vec<usize> = (0..300).map(|_| random.below(end)).collect();
        for at in (0..400).chain(sampled).chain(end - 5..bytes.len()) {
            let mut altered = bytes.clone();
            altered[at] ^= 1 << random.below(8);
            if at < end {
                damage(&altered);
            } else {
                // nothing is made of the SHA-256 itself: the rows are the right ones
                assert_eq!(read(&altered, 1).unwrap(), expected);
                let found = verify(&altered);
                assert!(matches!(found, Err(ReadError::Damage(Damage::Checksum))), "{found:?}");
            }
        }
    }
}

#[test]
fn what_it_is_not_is_told() {
    let (record, kv) = segment(6, KvDtype::F32, 3);
    let bytes = write(&record, &kv, Codec::Raw, 1);
    assert_eq!(damage(&[b"GGUF", &bytes[4..]].concat()), Damage::Magic("KV"));
    let future = [&bytes[..8], &[2, 0, 0, 0], &bytes[12..]].concat();
    assert_eq!(damage(&future), Damage::Version { found: 2, known: 1 });
    assert_eq!(damage(b""), Damage::Short);
    let huge = [&bytes[..12], &[255; 4], &bytes[16..]].concat();
    assert!(matches!(damage(&huge), Damage::Header(_)));
}

/// A file with this manifest, its hash right, and nothing behind it but zeros.
fn with_manifest(manifest: &[u8]) -> Vec<u8> {
    let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
    bytes.extend((manifest.len() as u32).to_le_bytes());
    bytes.extend(xxh3_64(manifest).to_le_bytes());
    bytes.extend(manifest);
    bytes.extend([0; 8192]);
    bytes
}

#[test]
fn a_manifest_made_to_harm_is_refused_without_large_allocations() {
    let (record, kv) = segment(7, KvDtype::F16, 4);
    let bytes = write(&record, &kv, Codec::Planes, 1);
    let end = 24 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let honest = &bytes[24..end];
    let mut random = Random::new(8);
    for _ in 0..4000 {
        let mut altered = honest.to_vec();
        for _ in 0..=random.below(3) {
            let at = random.below(altered.len());
            // 253: the next eight bytes are a length
            altered[at] = if random.below(3) == 0 { 253 } else { random.next() as u8 };
        }
        if altered != honest {
            damage(&with_manifest(&altered));
        }
        altered.truncate(random.below(altered.len()));
        damage(&with_manifest(&altered));
    }
}

#[test]
fn shapes_beyond_any_memory_are_refused() {
    let (record, _) = segment(7, KvDtype::F16, 4);
    let largest = u32::MAX as usize;
    for (layers, kv_heads, head_dim) in
        [(largest, 1, 1), (1, largest, largest), (2, 0, 8), (0, 1, 1), (1, 2, 8)]
    {
        let shape = KvShape { layers, kv_heads, head_dim, dtype: KvDtype::F32 };
        let record = KvRecord { shape, identity: identity(), ..record.clone() };
        let manifest = Manifest::new(&record, Codec::Raw, Vec::new()).to_bytes().unwrap();
        assert!(matches!(damage(&with_manifest(&manifest)), Damage::Header(_)));
    }
}

#[test]
fn rows_that_are_not_the_records_are_refused() {
    let (record, kv) = segment(8, KvDtype::F16, 4);
    let refusal = |kv: &SegmentKv| {
        Encoded::new(&record, kv, Codec::Raw, &coding(1)).err().expect("refused").to_string()
    };
    let frames: Vec<Vec<u8>> = kv.frames().map(<[u8]>::to_vec).collect();
    let fewer = SegmentKv::of_frames(&frames[..3]);
    assert_eq!(refusal(&fewer), "number of frames is 3, the record says 4");
    let shorter: Vec<Vec<u8>> = frames.iter().map(|frame| frame[1..].to_vec()).collect();
    let shorter = SegmentKv::of_frames(&shorter);
    assert_eq!(refusal(&shorter), "length of a frame is 127, the record says 128");
    let (empty, nothing) = segment(8, KvDtype::F16, 0);
    assert!(Encoded::new(&empty, &nothing, Codec::Raw, &coding(1)).is_err());
}
