//! Attention over filtered views, against the plain loops.

use std::sync::Arc;

use super::*;
use crate::filter_view::{BlockTables, PageEntry, filter_view};
use crate::gpu::*;
use crate::paged_attention::{PagedAttention, PlainCache, paged_attention_reference};
use crate::rope::RotaryTable;
use crate::testing::{Random, assert_same_bits};
use crate::threads::Threads;
use crate::view::CacheShape;

/// Rows of a segment, the position its first one was rotated at, and whether it is switched on.
type Segment = (usize, u32, bool);

#[derive(Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
    /// Rows of a segment's first block that come before the segment.
    offset: usize,
    float: Float,
    window: Option<u32>,
    soft_cap: Option<f32>,
    /// Segments, and the logical positions that are queried.
    sequences: Vec<(Vec<Segment>, Vec<u32>)>,
}

impl Case {
    fn new(keys: usize, queries: impl IntoIterator<Item = u32>) -> Self {
        Self {
            heads: 4,
            kv_heads: 2,
            dim: 16,
            block_size: 16,
            offset: 0,
            float: Float::Bf16,
            window: None,
            soft_cap: None,
            sequences: vec![(vec![(keys, 0, true)], queries.into_iter().collect())],
        }
    }

    /// Chunks that moved, chunks that are off, a chunk of few rows, and a tail.
    fn moved(queries: impl IntoIterator<Item = u32>) -> Self {
        let segments = vec![
            (1, 0, true),
            (30, 1, true),
            (44, 1, false),
            (5, 1, true),
            (1, 9, true),
            (2, 1, false),
            (620, 900, true),
            (9, 1, true),
            (40, 666, true),
        ];
        let sequences = vec![
            (segments, queries.into_iter().collect()),
            (vec![(3, 0, false)], vec![]),
            (vec![(7, 3, false), (20, 7, true)], vec![19, 4]),
        ];
        Self { sequences, ..Self::new(0, []) }
    }

    fn rows(&self) -> usize {
        self.sequences.iter().map(|(_, queries)| queries.len()).sum()
    }
}

/// A case's numbers. Every row of the caches that no visible key was stored in is NaN.
struct Scene {
    op: PagedAttention,
    shape: CacheShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    pages: Vec<Vec<PageEntry>>,
}

/// The numbers depend on the seed, the sequences and the heads, not on how blocks lie.
fn scene(case: &Case, seed: u64) -> Scene {
    let mut random = Random::new(seed);
    let (size, width) = (case.block_size, case.kv_heads * case.dim);
    let segments = case.sequences.iter().flat_map(|(segments, _)| segments);
    let used: usize = segments.map(|(rows, _, _)| (case.offset + rows).div_ceil(size)).sum();
    let blocks = used * 2 + 1;
    let mut block = blocks;
    let [mut k, mut v] = [0, 1].map(|_| vec![f32::NAN; blocks * size * width]);
    let (mut q, mut positions, mut cu_seqlens_q) = (vec![], vec![], vec![0u32]);
    let mut tables = BlockTables { entries: vec![], cu_entries: vec![0] };
    let mut all_pages = vec![];
    for (segments, queries) in &case.sequences {
        let mut pages = vec![];
        for &(rows, stored, active) in segments {
            for row in 0..rows {
                let place = (case.offset + row) % size;
                if row == 0 || place == 0 {
                    block -= 2;
                    pages.push(PageEntry {
                        block: block as u32,
                        first_row: place as u16,
                        stored_position: stored + row as u32,
                        num_valid: (size - place).min(rows - row) as u16,
                        active,
                        segment: 0,
                    });
                }
                if active {
                    let at = (block * size + place) * width;
                    for cache in [&mut k, &mut v] {
                        let values = rounded(case.float, &random.normals(width));
                        cache[at..at + width].copy_from_slice(&values);
                    }
                }
            }
        }
        filter_view(&pages, size, &mut tables.entries);
        tables.cu_entries.push(tables.entries.len() as u32);
        all_pages.push(pages);
        q.extend(rounded(case.float, &random.normals(queries.len() * case.heads * case.dim)));
        positions.extend(queries);
        cu_seqlens_q.push(positions.len() as u32);
    }
    let half = case.dim / 2;
    let frequencies: Vec<f64> = (0..half).map(|i| 100f64.powf(-(i as f64) / half as f64)).collect();
    let op = PagedAttention {
        tables: Arc::new(tables),
        cu_seqlens_q: Arc::new(cu_seqlens_q),
        positions: Arc::new(positions),
        rotary: Arc::new(RotaryTable::new(&frequencies, 1.0, 1600)),
        num_heads: case.heads,
        scale: 1.0 / (case.dim as f32).sqrt(),
        sliding_window: case.window,
        soft_cap: case.soft_cap,
        threads: Threads::new(1),
    };
    let (kv_heads, head_dim, stored_dim) = (case.kv_heads, case.dim, case.dim);
    let shape = CacheShape { blocks, block_size: size, kv_heads, head_dim, stored_dim };
    Scene { op, shape, q, k, v, pages: all_pages }
}

/// A scene on a device.
struct Placed<'a> {
    gpu: &'a Gpu,
    case: &'a Case,
    scene: &'a Scene,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    positions: Buffer,
    cu_seqlens_q: Buffer,
    row_sequence: Buffer,
    rotary: Rotary,
    tables: Tables,
    /// Values from a row of q to the next; what lies between is NaN.
    q_stride: usize,
}

impl<'a> Placed<'a> {
    fn new(gpu: &'a Gpu, case: &'a Case, scene: &'a Scene) -> Self {
        let width = case.heads * case.dim;
        let q_stride = width + 8;
        let padded: Vec<f32> = scene
            .q
            .chunks(width)
            .flat_map(|row| row.iter().copied().chain([f32::NAN; 8]))
            .collect();
        let cu = &scene.op.cu_seqlens_q;
        let row_sequence: Vec<u32> = (0..case.sequences.len() as u32)
            .flat_map(|i| vec![i; (cu[i as usize + 1] - cu[i as usize]) as usize])
            .collect();
        Self {
            gpu,
            case,
            scene,
            q: upload(gpu, case.float, &padded),
            k: upload(gpu, case.float, &scene.k),
            v: upload(gpu, case.float, &scene.v),
            positions: upload_u32(gpu, &scene.op.positions),
            cu_seqlens_q: upload_u32(gpu, cu),
            row_sequence: upload_u32(gpu, &row_sequence),
            rotary: Rotary::new(gpu, &scene.op.rotary).unwrap(),
            tables: tables(gpu, &scene.pages, case.block_size),
            q_stride,
        }
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape {
            num_heads: self.case.heads,
            kv_heads: self.case.kv_heads,
            head_dim: self.case.dim,
            slots: self.scene.shape.blocks * self.case.block_size,
            q_stride: self.q_stride,
            scale: self.scene.op.scale,
            sliding_window: self.case.window,
            soft_cap: self.case.soft_cap,
            float: self.case.float,
        }
    }

    /// Attention of rows `[start, start + count)`, one by one.
    fn decode(&self, (start, count): (usize, usize), split: u32) -> Vec<f32> {
        let (gpu, max_keys) = (self.gpu, 1600usize);
        let items = count * max_keys.div_ceil(split as usize);
        let plan = SplitPlan::new(gpu, count, items, split).unwrap();
        let partials = Partials::new(gpu, items, self.case.heads, self.case.dim).unwrap();
        let (sequences, positions) =
            (self.row_sequence.at(4 * start), self.positions.at(4 * start));
        plan.fill(
            gpu,
            &self.tables,
            (Some(&sequences), &positions),
            (count, max_keys),
            self.case.window,
        )
        .unwrap();
        let out = gpu.alloc(count * self.case.heads * self.case.dim * 2).unwrap();
        DecodeAttention {
            operands: AttentionOperands {
                q: &self.q.at(start * self.q_stride * 2),
                k_cache: &self.k.all(),
                v_cache: &self.v.all(),
                tables: &self.tables,
                positions: &positions,
                rotary: &self.rotary,
                partials: &partials,
                out: &out.all(),
                shape: self.shape(),
            },
            row_sequence: Some(&sequences),
            plan: &plan,
            rows: count,
            max_keys,
        }
        .launch(gpu)
        .unwrap();
        download(gpu, self.case.float, &out)
    }

    /// Attention of the rows of sequences `[start, start + count)`; elsewhere the result is NaN.
    fn prefill(&self, (start, count): (usize, usize), room: usize) -> Vec<f32> {
        let (gpu, cu) = (self.gpu, &self.scene.op.cu_seqlens_q);
        let lengths = (start..start + count).map(|i| cu[i + 1] - cu[i]);
        let first = cu[start] as usize;
        let out = gpu.alloc(self.case.rows() * self.case.heads * self.case.dim * 2).unwrap();
        PrefillAttention {
            operands: AttentionOperands {
                q: &self.q.all(),
                k_cache: &self.k.all(),
                v_cache: &self.v.all(),
                tables: &self.tables.at(start),
                positions: &self.positions.all(),
                rotary: &self.rotary,
                partials: &Partials::new(gpu, room, self.case.heads, self.case.dim).unwrap(),
                out: &out.all(),
                shape: self.shape(),
            },
            cu_seqlens_q: &self.cu_seqlens_q.at(4 * start),
            num_sequences: count,
            rows: (first, cu[start + count] as usize - first),
            max_rows: lengths.max().unwrap() as usize,
            max_keys: 1600,
        }
        .launch(gpu)
        .unwrap();
        download(gpu, self.case.float, &out)
    }
}

fn tables(gpu: &Gpu, views: &[Vec<PageEntry>], block_size: usize) -> Tables {
    let mut offsets = vec![0u32];
    for view in views {
        offsets.push(offsets.last().unwrap() + view.len() as u32);
    }
    let all: Vec<u8> = views.iter().flatten().flat_map(page_bytes).collect();
    let (pages, cu) = (gpu.uploaded(&all).unwrap(), upload_u32(gpu, &offsets));
    let tables = Tables {
        entries: gpu.alloc(all.len()).unwrap().all(),
        starts: cu.all(),
        num_entries: gpu.alloc(views.len() * 4).unwrap().all(),
        num_keys: gpu.alloc(views.len() * 4).unwrap().all(),
    };
    FilterView {
        pages: &pages.all(),
        starts: &cu.all(),
        ends: &cu.at(4),
        num_sequences: views.len(),
        max_pages: all.len() / PAGE_BYTES,
        block_size,
        tables: &tables,
    }
    .launch(gpu)
    .unwrap();
    tables
}

impl Scene {
    fn reference(&self) -> Vec<f32> {
        let [k, v] = [&self.k, &self.v].map(|numbers| PlainCache { numbers, scales: &[] });
        let found = paged_attention_reference(&self.op, &self.q, self.shape, k, v);
        assert!(found.iter().all(|x| x.is_finite()), "what must not be read was read");
        found
    }
}

/// The query and the weights are rounded: as many relative errors as there are bits less.
fn tolerance(float: Float) -> f32 {
    match float {
        Float::Bf16 => 0.02,
        Float::F16 => 0.0025,
    }
}

/// Decode attention of all rows is near the reference, and the same with threads backwards.
#[track_caller]
fn check_decode(case: &Case) {
    let scene = scene(case, 41);
    let expected = scene.reference();
    let [first, second] =
        gpus().map(|gpu| Placed::new(&gpu, case, &scene).decode((0, case.rows()), 512));
    let what = format!("{} heads on {} of {}", case.heads, case.kv_heads, case.dim);
    assert_close(&expected, &first, tolerance(case.float), &what);
    assert_same_bits(&first, &second, "threads in another order");
}

/// Prefill attention in one part and in several is near the reference, and the same with threads
/// backwards.
#[track_caller]
fn check_prefill(case: &Case) {
    let scene = scene(case, 51);
    let expected = scene.reference();
    let what = format!("{} heads on {} of {}", case.heads, case.kv_heads, case.dim);
    for room in [1, 8 * case.rows()] {
        let [first, second] = gpus()
            .map(|gpu| Placed::new(&gpu, case, &scene).prefill((0, case.sequences.len()), room));
        assert_close(&expected, &first, tolerance(case.float), &format!("{what}, room {room}"));
        assert_same_bits(&first, &second, "threads in another order");
    }
}

#[test]
fn prefilling_equals_the_reference_over_shapes() {
    for (heads, kv_heads, dim) in
        [(1, 1, 16), (4, 2, 16), (3, 1, 32), (14, 2, 64), (2, 2, 96), (10, 1, 128), (2, 1, 256)]
    {
        for float in [Float::Bf16, Float::F16] {
            check_prefill(&Case { heads, kv_heads, dim, float, ..Case::new(75, 53..75) });
        }
    }
    check_prefill(&Case { dim: 64, ..Case::new(150, 0..150) });
}

#[test]
fn prefilling_equals_the_reference_over_moved_and_filtered_segments() {
    for (window, soft_cap) in
        [(None, None), (Some(50), None), (Some(560), Some(1.5)), (Some(1), None)]
    {
        check_prefill(&Case { window, soft_cap, ..Case::moved(600..706) });
    }
    check_prefill(&Case::moved([0, 1, 31, 36, 37, 100, 657, 705]));
    let one_by_one = (0..140).map(|i| (1, 3 * i, i % 3 > 0)).collect();
    let sequences = vec![(one_by_one, (20..93).collect())];
    check_prefill(&Case { sequences, ..Case::new(0, []) });
    check_prefill(&Case::new(1500, 1460..1500));
}

#[test]
fn a_range_of_sequences_is_prefilled_and_no_other_row_written() {
    let sequences = vec![
        (vec![(9, 0, true)], vec![8]),
        (vec![(70, 0, true)], (5..70).collect()),
        (vec![(3, 0, true)], (0..3).collect()),
        (vec![(9, 2, true)], vec![8, 7]),
    ];
    let case = Case { sequences, ..Case::new(0, []) };
    let built = scene(&case, 52);
    let (expected, width) = (built.reference(), case.heads * case.dim);
    let gpu = Gpu::emulated(MEMORY);
    for room in [1, 600] {
        let found = Placed::new(&gpu, &case, &built).prefill((1, 2), room);
        let own = width..69 * width;
        assert_close(&expected[own.clone()], &found[own], tolerance(case.float), "these");
        assert!(found[..width].iter().chain(&found[69 * width..]).all(|x| x.is_nan()));
    }
}

#[test]
fn no_bit_of_a_prefilled_row_depends_on_blocks_or_rows_beside() {
    let case = Case::moved(640..706);
    let built = scene(&case, 53);
    let gpu = Gpu::emulated(MEMORY);
    let expected = Placed::new(&gpu, &case, &built).prefill((0, 1), 1);
    for (block_size, offset) in [(1, 0), (8, 3), (64, 63)] {
        let case = Case { block_size, offset, ..case.clone() };
        let found = Placed::new(&gpu, &case, &scene(&case, 53)).prefill((0, 1), 1);
        assert_same_bits(&expected[..66 * 64], &found[..66 * 64], "other blocks");
    }
    let mut placed = Placed::new(&gpu, &case, &built);
    placed.cu_seqlens_q = upload_u32(&gpu, &[60, 66]);
    let found = placed.prefill((0, 1), 1);
    assert_same_bits(&expected[60 * 64..66 * 64], &found[60 * 64..66 * 64], "fewer rows");
}

#[test]
fn decoding_equals_the_reference_over_shapes() {
    for (heads, kv_heads, dim) in
        [(1, 1, 16), (4, 2, 16), (3, 1, 32), (14, 2, 64), (2, 2, 96), (10, 1, 128), (2, 1, 256)]
    {
        for float in [Float::Bf16, Float::F16] {
            check_decode(&Case { heads, kv_heads, dim, float, ..Case::new(45, [0, 15, 16, 44]) });
        }
    }
}

#[test]
fn decoding_equals_the_reference_past_one_and_two_splits() {
    check_decode(&Case::new(1100, [0, 510, 511, 512, 513, 1023, 1024, 1025, 1099]));
    check_decode(&Case { dim: 64, ..Case::new(640, [639, 512, 130]) });
}

#[test]
fn decoding_equals_the_reference_over_moved_and_filtered_segments() {
    for (window, soft_cap) in
        [(None, None), (Some(50), None), (Some(560), Some(1.5)), (Some(1), None)]
    {
        let queries = (666..706).step_by(13).chain([0, 1, 31, 36, 37, 100, 657]);
        check_decode(&Case { window, soft_cap, ..Case::moved(queries) });
    }
    let one_by_one = (0..40).map(|i| (1, 3 * i, i % 3 > 0)).collect();
    let sequences = vec![(one_by_one, vec![0, 7, 25])];
    check_decode(&Case { sequences, ..Case::new(0, []) });
}

/// The contract of the deterministic mode.
#[test]
fn no_bit_of_a_decoded_row_depends_on_other_rows_or_on_blocks() {
    let case = Case { window: Some(600), ..Case::moved((0..706).step_by(101)) };
    let built = scene(&case, 43);
    let gpu = Gpu::emulated(MEMORY);
    let expected = Placed::new(&gpu, &case, &built).decode((0, case.rows()), 512);
    let width = case.heads * case.dim;
    for row in [0, 3, 6, 8] {
        let found = Placed::new(&gpu, &case, &built).decode((row, 1), 512);
        assert_same_bits(&expected[row * width..][..width], &found, "a row alone");
    }
    for (block_size, offset) in [(1, 0), (8, 3), (64, 0), (64, 63), (256, 17)] {
        let case = Case { block_size, offset, ..case.clone() };
        let built = scene(&case, 43);
        let found = Placed::new(&gpu, &case, &built).decode((0, case.rows()), 512);
        assert_same_bits(&expected, &found, &format!("{offset} rows into {block_size}"));
    }
}

#[test]
fn smaller_splits_give_nearly_the_same() {
    let case = Case::moved([0, 200, 705]);
    let built = scene(&case, 44);
    let expected = built.reference();
    let gpu = Gpu::emulated(MEMORY);
    for split in [64, 128, 256] {
        let found = Placed::new(&gpu, &case, &built).decode((0, case.rows()), split);
        assert_close(&expected, &found, tolerance(case.float), &format!("splits of {split}"));
    }
}

#[test]
fn rows_of_padding_are_zeros_and_entries_outside_make_nan() {
    let case = Case::new(40, [39]);
    let built = scene(&case, 45);
    let gpu = Gpu::emulated(MEMORY);
    let mut placed = Placed::new(&gpu, &case, &built);
    placed.tables.num_keys = upload_u32(&gpu, &[0]).all();
    assert!(placed.decode((0, 1), 512).iter().all(|&x| x == 0.0));
    for page in [(1 << 20, 0), (1, 5000)] {
        let (block, stored_position) = page;
        let mut pages = built.pages.clone();
        pages[0][1] = PageEntry { block, stored_position, ..pages[0][1] };
        placed.tables = tables(&gpu, &pages, case.block_size);
        assert!(placed.decode((0, 1), 512).iter().all(|x| x.is_nan()), "{page:?}");
    }
}

#[test]
fn a_nan_key_makes_those_nan_that_see_it() {
    let case = Case::new(40, [3, 4, 5, 39]);
    let mut built = scene(&case, 46);
    let row = built.op.tables.entries[0].row as usize + 4;
    built.k[row * 2 * 16] = f32::NAN; // KV head 0 of logical key 4
    for gpu in gpus() {
        let found = Placed::new(&gpu, &case, &built).decode((0, 4), 512);
        for (row, out) in found.chunks(4 * 16).enumerate() {
            let (first, second) = out.split_at(2 * 16);
            assert!(first.iter().all(|x| x.is_nan() == (row > 0)), "row {row}");
            assert!(second.iter().all(|x| x.is_finite()), "row {row}");
        }
    }
}

#[test]
fn what_lies_outside_the_limits_is_refused() {
    let gpu = Gpu::emulated(MEMORY);
    let case = Case::new(20, [19]);
    let built = scene(&case, 47);
    let placed = Placed::new(&gpu, &case, &built);
    let plan = SplitPlan::new(&gpu, 2, 4, 512).unwrap();
    let partials = Partials::new(&gpu, 4, 4, 16).unwrap();
    let out = gpu.alloc(4 * 16 * 2).unwrap();
    let refusal = |shape: AttentionShape, rows, max_keys| {
        let op = DecodeAttention {
            operands: AttentionOperands {
                q: &placed.q.all(),
                k_cache: &placed.k.all(),
                v_cache: &placed.v.all(),
                tables: &placed.tables,
                positions: &placed.positions.all(),
                rotary: &placed.rotary,
                partials: &partials,
                out: &out.all(),
                shape,
            },
            row_sequence: None,
            plan: &plan,
            rows,
            max_keys,
        };
        op.launch(&gpu).unwrap_err().to_string()
    };
    let shape = placed.shape();
    let found = refusal(AttentionShape { head_dim: 80, ..shape }, 1, 512);
    assert!(found.contains("head_dim is 80, must be one of [16, 32, 64, 96, 128, 256]"), "{found}");
    let found = refusal(AttentionShape { kv_heads: 3, ..shape }, 1, 512);
    assert!(found.contains("num_heads is 4, must be a multiple of the 3 KV heads"), "{found}");
    let found = refusal(AttentionShape { q_stride: 60, ..shape }, 1, 512);
    assert!(found.contains("q_stride is 60"), "{found}");
    let found = refusal(AttentionShape { slots: 1 << 20, ..shape }, 1, 512);
    assert!(found.contains("the K cache's length in bytes is"), "{found}");
    assert!(refusal(shape, 3, 1).contains("rows is 3, must be at most the plan's 2"));
    assert!(refusal(shape, 2, 1025).contains("items is 6, must be at most the plan's 4"));
    assert!(SplitPlan::new(&gpu, 1, 1, 500).is_err());
}
