//! Norms, rotation and the KV write, rows by number, silu, moves.

use super::product::weight;
use super::*;
use crate::filter_view::{PageEntry, TableEntry, filter_view};
use crate::gpu::*;
use crate::math::silu;
use crate::rms_norm::rms_norm_reference;
use crate::rope::{RotaryTable, rope_reference};
use crate::testing::{Random, assert_same_bits};

const FLOATS: [Float; 2] = [Float::Bf16, Float::F16];

#[test]
fn rows_of_a_table_are_found_and_others_are_nan() {
    let values = Random::new(1).normals(7 * 56);
    for (gpu, float) in gpus().iter().flat_map(|gpu| FLOATS.map(|float| (gpu, float))) {
        let weight = &weight(gpu, float, &values, 56);
        let ids = upload_u32(gpu, &[6, 0, 7, 3]);
        let out = gpu.alloc(4 * 56 * 4).unwrap();
        let (ids, to) = (&ids.all(), &out.all());
        Embedding { ids, weight, out: to, count: 4 }.launch(gpu).unwrap();
        let found = download_f32(gpu, &out);
        let expected = rounded(float, &values);
        assert_same_bits(&expected[336..], &found[..56], "row 6");
        assert_same_bits(&expected[..56], &found[56..112], "row 0");
        assert!(found[112..168].iter().all(|x| x.is_nan()));
        assert_same_bits(&expected[168..224], &found[168..], "row 3");
    }
}

#[test]
fn activations_rows_are_gathered_as_they_are() {
    for gpu in gpus() {
        let x = upload_u32(&gpu, &(0..60).collect::<Vec<u32>>());
        let rows = upload_u32(&gpu, &[3, 3, 9, 0]);
        let out = gpu.alloc(4 * 12 * 4).unwrap();
        let (x, rows, to) = (&x.all(), &rows.all(), &out.all());
        GatherRows { x, rows, out: to, count: 4, limit: 5, width_bytes: 48 }.launch(&gpu).unwrap();
        let row = |start: u32| start..start + 12;
        let expected: Vec<u32> = row(36).chain(row(36)).chain([0; 12]).chain(row(0)).collect();
        assert_eq!(download_u32(&gpu, &out), expected);
    }
}

#[test]
fn norms_equal_the_reference_alone_and_behind_a_sum() {
    let mut random = Random::new(2);
    for (rows, width) in [(1, 2), (3, 48), (2, 512), (1, 1026)] {
        let (x, weight) = (random.normals(rows * width), random.normals(width));
        let added = random.normals(rows * width);
        for (gpu, float) in gpus().iter().flat_map(|gpu| FLOATS.map(|float| (gpu, float))) {
            let x_on = upload_f32(gpu, &x);
            let weight_on = upload_f32(gpu, &weight);
            let out = gpu.alloc(rows * width * 2).unwrap();
            let (on, weight_there, to) = (&x_on.all(), &weight_on.all(), &out.all());
            let eps = 1e-6;
            RmsNorm { x: on, weight: weight_there, eps, out: to, float, rows, width }
                .launch(gpu)
                .unwrap();
            let expected = rms_norm_reference(&x, &weight, 1e-6);
            assert_close(&expected, &download(gpu, float, &out), rounding(float), "alone");
            let added_on = upload(gpu, float, &added);
            AddRmsNorm {
                x: &added_on.all(),
                residual: &x_on.all(),
                weight: &weight_on.all(),
                eps: 1e-6,
                out: &out.all(),
                float,
                rows,
                width,
            }
            .launch(gpu)
            .unwrap();
            let sum: Vec<f32> =
                x.iter().zip(rounded(float, &added)).map(|(x, added)| added + x).collect();
            assert_same_bits(&sum, &download_f32(gpu, &x_on), "the sum");
            let expected = rms_norm_reference(&sum, &weight, 1e-6);
            assert_close(&expected, &download(gpu, float, &out), rounding(float), "behind");
        }
    }
}

#[test]
fn silu_mul_equals_the_reference() {
    let (rows, inner) = (3, 86);
    let x: Vec<f32> = Random::new(3).normals(rows * 2 * inner).iter().map(|x| x * 4.0).collect();
    for (gpu, float) in gpus().iter().flat_map(|gpu| FLOATS.map(|float| (gpu, float))) {
        let gate_up = upload(gpu, float, &x);
        let out = gpu.alloc(rows * inner * 2).unwrap();
        SiluMul { gate_up: &gate_up.all(), out: &out.all(), float, rows, inner }
            .launch(gpu)
            .unwrap();
        let expected: Vec<f32> = rounded(float, &x)
            .chunks(2 * inner)
            .flat_map(|row| (0..inner).map(|i| silu(row[i]) * row[inner + i]))
            .collect();
        assert_close(&expected, &download(gpu, float, &out), rounding(float), "silu * up");
    }
}

/// One row of q, k and v against the plain references.
#[test]
fn q_is_normed_and_k_normed_turned_and_stored_with_v() {
    let mut random = Random::new(4);
    let (heads, kv_heads, rows, slots) = (6, 2, 5, 9);
    for (dim, has_norm) in [(16, true), (64, false), (96, true), (128, true), (256, false)] {
        let stride = (heads + 2 * kv_heads) * dim + 16;
        let x = random.normals(rows * stride);
        let norms = [random.normals(dim), random.normals(dim)];
        let table = RotaryTable::new(&vec![0.7; dim / 2], 1.0, 30);
        let (slot_mapping, stored) = ([4, 0, 9, u32::MAX, 8], [0, 29, 3, 4, 17]);
        for (gpu, float) in gpus().iter().flat_map(|gpu| FLOATS.map(|float| (gpu, float))) {
            let qkv = upload(gpu, float, &x);
            let caches = [0, 1].map(|_| upload(gpu, float, &vec![7.5; slots * kv_heads * dim]));
            let norms_on = norms.each_ref().map(|norm| upload_f32(gpu, norm).all());
            RopeStore {
                qkv: &qkv.all(),
                qk_norm: has_norm.then_some((&norms_on[0], &norms_on[1], 1e-6)),
                rotary: &Rotary::new(gpu, &table).unwrap(),
                stored_positions: &upload_u32(gpu, &stored).all(),
                slot_mapping: &upload_u32(gpu, &slot_mapping).all(),
                k_cache: &caches[0].all(),
                v_cache: &caches[1].all(),
                shape: AttentionShape {
                    num_heads: heads,
                    kv_heads,
                    head_dim: dim,
                    slots,
                    q_stride: stride,
                    scale: 1.0,
                    sliding_window: None,
                    soft_cap: None,
                    float,
                },
                rows,
            }
            .launch(gpu)
            .unwrap();
            let plain = rounded(float, &x);
            let norm = |x: &[f32], weight: &[f32]| match has_norm {
                true => rms_norm_reference(x, weight, 1e-6),
                false => x.to_vec(),
            };
            let mut expected = plain.clone();
            let mut kv = [0, 1].map(|_| vec![7.5; slots * kv_heads * dim]);
            for row in 0..rows {
                let start = row * stride;
                let q = start..start + heads * dim;
                expected[q.clone()].copy_from_slice(&norm(&plain[q.clone()], &norms[0]));
                let slot = slot_mapping[row] as usize;
                if slot < slots {
                    let width = kv_heads * dim;
                    let k = norm(&plain[q.end..q.end + width], &norms[1]);
                    let k = rope_reference(&k, &table, stored[row] as usize);
                    kv[0][slot * width..][..width].copy_from_slice(&k);
                    let v = &plain[q.end + width..q.end + 2 * width];
                    kv[1][slot * width..][..width].copy_from_slice(v);
                }
            }
            let what = format!("{float:?} {dim}");
            assert_close(&expected, &download(gpu, float, &qkv), rounding(float), &what);
            for (expected, cache) in kv.iter().zip(&caches) {
                assert_close(expected, &download(gpu, float, cache), rounding(float), &what);
            }
        }
    }
}

/// Views of `sizes` pages, some inactive, some empty.
fn views(sizes: &[usize]) -> Vec<Vec<PageEntry>> {
    let mut random = Random::new(5);
    let mut page = || PageEntry {
        block: random.below(1 << 20) as u32,
        first_row: random.below(8) as u16,
        stored_position: random.below(5000) as u32,
        num_valid: random.below(9) as u16,
        active: random.below(3) > 0,
        segment: random.below(9) as u16,
    };
    sizes.iter().map(|&size| (0..size).map(|_| page()).collect()).collect()
}

#[test]
fn tables_on_the_device_are_those_of_the_reference() {
    let views = views(&[3, 0, 1, 255, 256, 257, 1100]);
    for gpu in gpus() {
        let mut offsets = vec![0u32];
        offsets.extend(views.iter().scan(0, |sum, view| {
            *sum += view.len() as u32;
            Some(*sum)
        }));
        let all: Vec<u8> = views.iter().flatten().flat_map(page_bytes).collect();
        let (pages, cu) = (gpu.uploaded(&all).unwrap(), upload_u32(&gpu, &offsets));
        let max_pages = all.len() / PAGE_BYTES;
        let entries = gpu.alloc(max_pages * 16).unwrap();
        let counts = [0, 1].map(|_| gpu.alloc(views.len() * 4).unwrap());
        let tables = Tables {
            entries: entries.all(),
            starts: cu.all(),
            num_entries: counts[0].all(),
            num_keys: counts[1].all(),
        };
        FilterView {
            pages: &pages.all(),
            starts: &cu.all(),
            ends: &cu.at(4),
            num_sequences: views.len(),
            max_pages,
            block_size: 16,
            tables: &tables,
        }
        .launch(&gpu)
        .unwrap();
        let words = download_u32(&gpu, &entries);
        let (num_entries, num_keys) =
            (download_u32(&gpu, &counts[0]), download_u32(&gpu, &counts[1]));
        for (i, view) in views.iter().enumerate() {
            let mut expected = vec![];
            assert_eq!(num_keys[i], filter_view(view, 16, &mut expected), "keys of view {i}");
            assert_eq!(num_entries[i] as usize, expected.len(), "entries of view {i}");
            let start = offsets[i] as usize;
            for (words, expected) in words.as_chunks::<4>().0[start..].iter().zip(&expected) {
                let &[row, first, delta, num_valid] = words;
                let (delta, num_valid) = (delta.cast_signed(), num_valid as u16);
                assert_eq!(*expected, TableEntry { row, first, delta, num_valid });
            }
        }
    }
}

#[test]
fn rows_of_kv_leave_the_pool_and_come_back_frame_by_frame() {
    for gpu in gpus() {
        let (slots, row_bytes, num_frames, frame_stride) = (10, 48, 6, 512);
        let before: Vec<u8> = (0..num_frames * frame_stride).map(|i| (i % 251) as u8).collect();
        let pool = gpu.uploaded(&before).unwrap();
        let frames = KvFrames { pool: pool.all(), frame_stride, num_frames, slots, row_bytes };
        let wanted = [7, 0, 10, 9];
        let rows = gpu.alloc(2 * 4 * row_bytes).unwrap();
        let slots_on = upload_u32(&gpu, &wanted);
        let moves = |frames, range, rows: &Buffer| {
            let (slots, rows) = (slots_on.all(), rows.all());
            MoveRows { frames, range, slots: &slots, num_slots: 4, rows: &rows }.gather(&gpu)
        };
        moves(&frames, (3, 2), &rows).unwrap();
        let mut expected = vec![];
        for frame in [3, 4] {
            for slot in wanted {
                let start = frame * frame_stride + slot as usize * row_bytes;
                match slot {
                    10 => expected.extend(vec![0; row_bytes]),
                    _ => expected.extend_from_slice(&before[start..start + row_bytes]),
                }
            }
        }
        assert_eq!(bytes(&gpu, &rows), expected);
        let other = gpu.zeros(before.len()).unwrap();
        let frames = KvFrames { pool: other.all(), ..frames };
        let (slots, num_slots) = (&slots_on.all(), 4);
        MoveRows { frames: &frames, range: (3, 2), slots, num_slots, rows: &rows.all() }
            .scatter(&gpu)
            .unwrap();
        moves(&frames, (3, 2), &rows).unwrap();
        assert_eq!(bytes(&gpu, &rows), expected);
        let moved: usize = bytes(&gpu, &other).iter().filter(|&&byte| byte != 0).count();
        assert_eq!(moved, expected.iter().filter(|&&byte| byte != 0).count(), "nothing else");
        assert!(moves(&frames, (5, 2), &rows).unwrap_err().to_string().contains("at most the"));
        PoisonRows { frames: &frames, slots, num_slots }.launch(&gpu).unwrap();
        let after = bytes(&gpu, &other);
        let nan = after
            .as_chunks::<2>()
            .0
            .iter()
            .filter(|x| widen(Float::F16, u16::from_le_bytes(**x)).is_nan());
        assert_eq!(nan.count(), num_frames * 3 * row_bytes / 2);
    }
}
