use std::borrow::Cow;

use strand_kernels::rope_reference;

use super::*;
use crate::store::testing::{DTYPES, FLOATS, Random, coding, rotation, shape};

fn rows(dtype: KvDtype, count: usize) -> Rows {
    Rows { shape: shape(dtype), count, first_position: 5 }
}

/// Encodes and decodes frame `frame`: how it was encoded, its length, what came back.
fn there_and_back(
    codec: Codec,
    frame: usize,
    raw: &[u8],
    rows: &Rows,
    coding: &Coding,
) -> (Encoding, usize, Vec<u8>) {
    let (encoding, stored) = encode(codec, frame, raw, rows, coding).unwrap();
    let mut back = vec![7; rows.bytes()];
    decode(encoding, &stored, rows, coding, &mut Scratch::default(), &mut back).unwrap();
    (encoding, stored.len(), back)
}

#[test]
fn lossless_codecs_give_back_every_bit() {
    let mut random = Random::new(1);
    for dtype in DTYPES {
        for count in [1, 2, 63, 64, 65, 300] {
            let rows = rows(dtype, count);
            let noise: Vec<u8> = (0..rows.bytes()).map(|_| random.next() as u8).collect();
            let normals = random.numbers(dtype, count * rows.shape.width());
            let zeros = vec![0; rows.bytes()];
            for raw in [noise, normals, zeros] {
                for codec in [Codec::Raw, Codec::Planes] {
                    let (_, _, back) = there_and_back(codec, 0, &raw, &rows, &Coding::default());
                    assert!(back == raw, "{dtype:?} {count} {codec:?}");
                }
            }
        }
    }
}

#[test]
fn every_16_bit_pattern_survives() {
    let raw: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let rows = rows(KvDtype::Bf16, raw.len() / 32);
    let (encoding, length, back) = there_and_back(Codec::Planes, 1, &raw, &rows, &coding(1));
    assert!(back == raw);
    assert_eq!((encoding, length < raw.len()), (Encoding::Planes, true));
}

#[test]
fn exponents_compress_and_noise_is_left_alone() {
    let mut random = Random::new(2);
    // the share of a frame of bell-shaped numbers that is left; an exponent has about 2.5 bits
    for (dtype, most) in [(KvDtype::Bf16, 0.72), (KvDtype::F16, 0.90), (KvDtype::F32, 0.86)] {
        let rows = rows(dtype, 1000);
        let raw = random.numbers(dtype, 1000 * rows.shape.width());
        let (encoding, length, _) = there_and_back(Codec::Planes, 0, &raw, &rows, &coding(1));
        assert_eq!(encoding, Encoding::Planes);
        assert!((length as f64) < most * raw.len() as f64, "{dtype:?}: {length} of {}", raw.len());

        let noise: Vec<u8> = (0..rows.bytes()).map(|_| random.next() as u8).collect();
        let (encoding, stored) = encode(Codec::Planes, 0, &noise, &rows, &coding(1)).unwrap();
        assert_eq!(encoding, Encoding::Raw);
        assert!(matches!(stored, Cow::Borrowed(_)), "it is not even copied");
    }
}

#[test]
fn planes_that_are_none_are_refused_without_harm() {
    let mut random = Random::new(3);
    for dtype in FLOATS {
        let rows = rows(dtype, 64);
        let raw = random.numbers(dtype, 64 * rows.shape.width());
        let (encoding, stored) = encode(Codec::Planes, 0, &raw, &rows, &coding(1)).unwrap();
        assert_eq!(encoding, Encoding::Planes);
        let mut scratch = Scratch::default();
        let mut decode = |bytes: &[u8]| {
            let mut out = vec![0; rows.bytes()];
            decode(encoding, bytes, &rows, &coding(1), &mut scratch, &mut out)
        };
        for length in (0..stored.len()).step_by(7) {
            assert!(decode(&stored[..length]).is_err(), "cut to {length}");
        }
        assert!(decode(&[&stored[..], &[0]].concat()).is_err(), "one byte more");
        for _ in 0..300 {
            let mut altered = stored.to_vec();
            let at = random.below(altered.len());
            altered[at] ^= 1 << random.below(8);
            // some flips only change numbers; the frame's checksum is what finds those
            drop(decode(&altered));
        }
        decode(&stored).expect("what fails leaves the scratch of use");
    }
}

fn floats(dtype: KvDtype, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / dtype.size()];
    widen(dtype, bytes, &mut out);
    out
}

/// What a rounding to the type can add, as a share of the number.
fn rounding(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 1e-6,
        KvDtype::F16 => 0.0005,
        KvDtype::Bf16 => 0.004,
        KvDtype::Int8 => unreachable!("not in FLOATS"),
    }
}

#[test]
fn int8_keys_are_near_and_rotated_where_they_were() {
    let mut random = Random::new(4);
    // whole heads, YaRN's factor, and heads of which the first half turns
    for (table, factor) in
        [(rotation(8, 1.0), 1.0), (rotation(8, 1.3), 1.3), (rotation(4, 1.0), 1.0)]
    {
        for dtype in FLOATS {
            let rows = rows(dtype, 150);
            let width = rows.shape.width();
            let mut plain = Vec::new();
            let mut rotated = Vec::new();
            for row in 0..rows.count {
                // channels of very different sizes, as keys have
                let x: Vec<f32> =
                    (0..width).map(|c| random.normal() * (1.0 + (c % 8) as f32 * 10.0)).collect();
                for head in x.chunks_exact(8) {
                    let part = table.head_dim();
                    rotated.extend(rope_reference(&head[..part], &table, 5 + row));
                    rotated.extend(&head[part..]);
                }
                plain.extend(x);
            }
            let mut raw = vec![0; rows.bytes()];
            narrow(dtype, &rotated, &mut raw);
            let coding = Coding { rotary: Some(table.clone()), threads: 1, gpu: None };
            let (encoding, length, back) = there_and_back(Codec::Int8, 0, &raw, &rows, &coding);
            assert_eq!((encoding, length), (Encoding::Int8K, width * 150 + 3 * 2 * width));
            let (expected, found) = (floats(dtype, &raw), floats(dtype, &back));
            for row in 0..rows.count {
                let group = row / 64 * 64..(row / 64 * 64 + 64).min(rows.count);
                for channel in 0..width {
                    let other = match channel % 8 % table.head_dim() {
                        _ if channel % 8 >= table.head_dim() => channel,
                        c if c < table.head_dim() / 2 => channel + table.head_dim() / 2,
                        _ => channel - table.head_dim() / 2,
                    };
                    let step = |c: usize| {
                        let peak = group.clone().map(|r| plain[r * width + c].abs());
                        peak.fold(0.0, f32::max) / 127.0
                    };
                    let peaks = (step(channel) + step(other)) * 127.0;
                    let bound = factor * 0.58 * (step(channel) + step(other))
                        + 3.0 * factor * rounding(dtype) * peaks;
                    let (e, f) = (expected[row * width + channel], found[row * width + channel]);
                    assert!((e - f).abs() <= bound, "{dtype:?} {row} {channel}: {e} {f} {bound}");
                }
            }
        }
    }
}

#[test]
fn int8_values_are_within_half_a_step_of_their_row() {
    let mut random = Random::new(5);
    for dtype in FLOATS {
        let rows = rows(dtype, 70);
        let width = rows.shape.width();
        let raw = random.numbers(dtype, 70 * width);
        let (encoding, length, back) = there_and_back(Codec::Int8, 1, &raw, &rows, &coding(1));
        assert_eq!((encoding, length), (Encoding::Int8V, 70 * width + 2 * 70));
        let (expected, found) = (floats(dtype, &raw), floats(dtype, &back));
        for (e, f) in expected.chunks(width).zip(found.chunks(width)) {
            let peak = e.iter().fold(0f32, |peak, x| peak.max(x.abs()));
            let bound = peak / 127.0 * 0.58 + peak * rounding(dtype);
            assert!(e.iter().zip(f).all(|(e, f)| (e - f).abs() <= bound), "{e:?} {f:?}");
        }
    }
}

#[test]
fn int8_rounds_half_to_even_and_holds_extremes() {
    let rows = rows(KvDtype::F32, 1);
    let x =
        [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 0.0, 3.4, 3.6, -2.5, 1.0, 0.0, 0.0, 0.0, 0.0];
    let raw: Vec<u8> = x.iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
    let (_, stored) = encode(Codec::Int8, 1, &raw, &rows, &coding(1)).unwrap();
    let numbers: Vec<i8> = stored[2..].iter().map(|&q| q as i8).collect();
    assert_eq!(numbers, [127, 0, 2, 2, 0, -2, -127, 0, 3, 4, -2, 1, 0, 0, 0, 0]);

    for largest in [f32::MAX / 4.0, 1e-30] {
        let raw: Vec<u8> = [largest; 16].iter().flat_map(|x| x.to_le_bytes()).collect();
        for frame in [0, 1] {
            let (_, _, back) = there_and_back(Codec::Int8, frame, &raw, &rows, &coding(1));
            assert!(floats(KvDtype::F32, &back).iter().all(|x| x.is_finite()), "{largest}");
        }
    }
}

#[test]
fn int8_refuses_what_it_cannot_hold() {
    let rows = rows(KvDtype::Bf16, 2);
    for number in [f32::NAN, f32::INFINITY] {
        let mut raw = vec![0; rows.bytes()];
        raw[6..8].copy_from_slice(&half::bf16::from_f32(number).to_le_bytes());
        for frame in [0, 1] {
            let refused = encode(Codec::Int8, frame, &raw, &rows, &coding(1)).unwrap_err();
            assert!(matches!(refused, StoreError::NotFinite), "{refused}");
        }
    }
    let raw = vec![0; rows.bytes()];
    let refusal = |coding: &Coding, rows: &Rows| {
        encode(Codec::Int8, 0, &raw, rows, coding).unwrap_err().to_string()
    };
    assert!(refusal(&Coding::default(), &rows).contains("needs the rotation"));
    let far = Rows { first_position: 4095, ..rows };
    assert_eq!(refusal(&coding(1), &far), "int8 needs 4097 positions, the rotation has 4096");
    let wide = Coding { rotary: Some(rotation(16, 1.0)), threads: 1, gpu: None };
    assert_eq!(refusal(&wide, &rows), "the rotation is 16 wide, heads are 8");
}

#[test]
fn codecs_have_names_and_variants() {
    for codec in Codec::ALL {
        assert_eq!(Codec::parse(codec.as_str()), Some(codec));
    }
    assert_eq!((Codec::parse("zip"), Codec::default()), (None, Codec::Planes));
    assert_eq!(Codec::ALL.map(Codec::variant)[1..], [KvVariant::Lossless, KvVariant::Int8]);
}

#[test]
fn int8_rows_are_not_made_int8_again() {
    let rows = rows(KvDtype::Int8, 3);
    let raw = Random::new(9).numbers(KvDtype::Int8, 3 * rows.shape.width());
    for frame in [0, 1] {
        let refusal = encode(Codec::Int8, frame, &raw, &rows, &coding(1)).unwrap_err();
        assert!(refusal.to_string().contains("held as int8 already"));
    }
    for encoding in [Encoding::Int8K, Encoding::Int8V] {
        let stored = vec![0; rows.int8_bytes(encoding)];
        let (mut scratch, mut out) = (Scratch::default(), vec![0; rows.bytes()]);
        assert!(decode(encoding, &stored, &rows, &coding(1), &mut scratch, &mut out).is_err());
    }
}
