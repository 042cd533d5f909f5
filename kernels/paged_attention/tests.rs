use super::*;
use crate::dtype::{SCALE_BYTES, quantize_vector};
use crate::filter_view::{PageEntry, filter_view};
use crate::isa::Isa;
use crate::testing::{Random, assert_same_bits};
use candle_core::{DType, Device, Tensor};

/// Keys of one sequence: segments of (rows, position they were stored from).
type Segments = Vec<(usize, u32)>;

#[derive(Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    d: usize,
    block_size: usize,
    dtype: DType,
    window: Option<u32>,
    soft_cap: Option<f32>,
    /// Rows of a segment's first block that come before the segment.
    offset: usize,
    /// Segments, and the logical positions that are queried.
    sequences: Vec<(Segments, Vec<u32>)>,
}

impl Case {
    fn new(keys: usize, queries: impl IntoIterator<Item = u32>) -> Self {
        Case {
            heads: 4,
            kv_heads: 2,
            d: 16,
            block_size: 16,
            dtype: DType::BF16,
            window: None,
            soft_cap: None,
            offset: 0,
            sequences: vec![(vec![(keys, 0)], queries.into_iter().collect())],
        }
    }
}

/// K as stored (not rotated back), V, the position it was stored at.
type Key = (Vec<f32>, Vec<f32>, u32);

/// A case as tensors. Every row that no key was stored in is NaN.
struct Built {
    op: PagedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: CacheShape,
    /// Per sequence, key by key.
    keys: Vec<Vec<Key>>,
}

fn table(d: usize, positions: usize) -> Arc<RotaryTable> {
    let half = d / 2;
    let frequency = |i| 100f64.powf(-(i as f64) / half as f64);
    Arc::new(RotaryTable::new(&(0..half).map(frequency).collect::<Vec<_>>(), 1.0, positions))
}

/// The numbers depend on the seed, the sequences and the heads, not on block size, offset or type.
fn build(case: &Case, seed: u64) -> Built {
    let mut random = Random::new(seed);
    let (d, bs, width) = (case.d, case.block_size, case.kv_heads * case.d);
    let segments = case.sequences.iter().flat_map(|(segments, _)| segments);
    let used: usize = segments.map(|(rows, _)| (case.offset + rows).div_ceil(bs)).sum();
    let blocks = used * 2 + 1;
    let (mut k, mut v) = (vec![f32::NAN; blocks * bs * width], vec![f32::NAN; blocks * bs * width]);
    let mut tables = BlockTables { entries: vec![], cu_entries: vec![0] };
    let (mut keys, mut q, mut positions) = (vec![], vec![], vec![]);
    let (mut cu_seqlens_q, mut block) = (vec![0u32], blocks - 1);
    for (segments, queries) in &case.sequences {
        let (mut pages, mut own) = (vec![], vec![]);
        for (rows, stored) in segments {
            for row in 0..*rows {
                let place = (case.offset + row) % bs;
                if row == 0 || place == 0 {
                    block -= 2;
                    pages.push(PageEntry {
                        block: block as u32,
                        first_row: place as u16,
                        stored_position: stored + row as u32,
                        num_valid: (bs - place).min(rows - row) as u16,
                        active: true,
                        segment: 0,
                    });
                }
                let (key, value) = (random.normals(width), random.normals(width));
                let at = (block * bs + place) * width;
                k[at..at + width].copy_from_slice(&key);
                v[at..at + width].copy_from_slice(&value);
                own.push((key, value, stored + row as u32));
            }
        }
        filter_view(&pages, bs, &mut tables.entries);
        tables.cu_entries.push(tables.entries.len() as u32);
        q.extend(random.normals(queries.len() * case.heads * d));
        positions.extend(queries);
        cu_seqlens_q.push(positions.len() as u32);
        keys.push(own);
    }
    let stored_dim = if case.dtype == DType::U8 { d + SCALE_BYTES } else { d };
    let kv_heads = case.kv_heads;
    let shape = CacheShape { blocks, block_size: bs, kv_heads, head_dim: d, stored_dim };
    let cache = |x: Vec<f32>| {
        let dims = (blocks, bs, kv_heads, stored_dim);
        if case.dtype != DType::U8 {
            let cache = Tensor::from_vec(x, dims, &Device::Cpu).unwrap();
            return cache.to_dtype(case.dtype).unwrap();
        }
        let mut stored = vec![0; x.len() / d * stored_dim];
        for (x, stored) in x.chunks_exact(d).zip(stored.chunks_exact_mut(stored_dim)) {
            quantize_vector(x, stored);
        }
        Tensor::from_vec(stored, dims, &Device::Cpu).unwrap()
    };
    let op = PagedAttention {
        tables: Arc::new(tables),
        cu_seqlens_q: Arc::new(cu_seqlens_q),
        rotary: table(d, 4000),
        num_heads: case.heads,
        scale: 1.0 / (d as f32).sqrt(),
        sliding_window: case.window,
        soft_cap: case.soft_cap,
        threads: Threads::new(2),
        positions: Arc::new(positions),
    };
    let q = Tensor::from_vec(q, (op.positions.len(), case.heads * d), &Device::Cpu).unwrap();
    Built { op, q, k: cache(k), v: cache(v), shape, keys }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

impl Built {
    fn fast(&self) -> Vec<f32> {
        flat(&self.q.apply_op3_no_bwd(&self.k, &self.v, &self.op).unwrap())
    }

    fn reference(&self) -> Vec<f32> {
        let [k, v] = [&self.k, &self.v].map(|cache| self.plain(cache));
        let [k, v] = [&k, &v].map(|(numbers, scales)| PlainCache { numbers, scales });
        paged_attention_reference(&self.op, &flat(&self.q), self.shape, k, v)
    }

    /// A cache's numbers and, where it has them, its scales.
    fn plain(&self, cache: &Tensor) -> (Vec<f32>, Vec<f32>) {
        if cache.dtype() != DType::U8 {
            return (flat(cache), vec![]);
        }
        let bytes: Vec<u8> = cache.flatten_all().unwrap().to_vec1().unwrap();
        let vectors = || bytes.chunks_exact(self.shape.stored_dim);
        let numbers = vectors().flat_map(|vector| &vector[..self.shape.head_dim]);
        let scale = |vector: &[u8]| {
            f32::from_le_bytes(*vector[self.shape.head_dim..].first_chunk().unwrap())
        };
        (numbers.map(|n| f32::from(n.cast_signed())).collect(), vectors().map(scale).collect())
    }
}

/// Same bits as the reference on every instruction set, with one thread and two; finite.
fn check(case: &Case) {
    let mut built = build(case, 41);
    let expected = built.reference();
    assert!(expected.iter().all(|x| x.is_finite()), "what must not be read was read");
    for isa in Isa::available() {
        for count in [1, 2] {
            built.op.threads = Threads::new(count).with_isa(isa);
            assert_same_bits(&expected, &built.fast(), &format!("{} x {count}", isa.name()));
        }
    }
}

#[test]
fn equals_the_reference_over_shapes() {
    for (heads, kv_heads, d) in
        [(1, 1, 2), (2, 2, 16), (3, 1, 24), (14, 2, 64), (8, 1, 6), (5, 5, 80), (4, 2, 128)]
    {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::U8] {
            check(&Case { heads, kv_heads, d, dtype, ..Case::new(45, [0, 1, 2, 3, 17, 40, 44]) });
            check(&Case { heads, kv_heads, d, dtype, ..Case::new(37, 0..37) });
        }
    }
}

#[test]
fn equals_the_reference_past_one_and_two_splits() {
    check(&Case::new(1100, [0, 510, 511, 512, 513, 1022, 1023, 1024, 1025, 1099]));
    check(&Case::new(600, 490..600));
    check(&Case { heads: 1, kv_heads: 1, d: 40, ..Case::new(1030, 1000..1030) });
}

#[test]
fn equals_the_reference_for_rows_alone_over_many_heads() {
    let alone = |keys: usize| (vec![(keys / 2, 0), (keys - keys / 2, 900)], vec![keys as u32 - 1]);
    for (heads, kv_heads, d) in [(16, 8, 24), (10, 5, 16), (9, 3, 130)] {
        for sequences in
            [vec![alone(45)], vec![alone(1100)], [45, 3, 1100, 512, 513].map(alone).to_vec()]
        {
            for (window, dtype) in
                [(None, DType::BF16), (Some(520), DType::BF16), (None, DType::U8)]
            {
                let sequences = sequences.clone();
                check(&Case { heads, kv_heads, d, window, dtype, sequences, ..Case::new(0, []) });
            }
        }
    }
}

#[test]
fn equals_the_reference_with_windows_caps_and_moved_segments() {
    for window in [Some(1), Some(7), Some(513), Some(600), Some(5000)] {
        check(&Case { window, ..Case::new(700, 0..6) });
        check(&Case { window, ..Case::new(1200, 640..700) });
        check(&Case { window, ..Case::new(1200, [1199, 3, 600]) });
    }
    check(&Case { soft_cap: Some(1.5), ..Case::new(530, 500..530) });
    let segments = vec![(1, 0), (30, 1), (5, 1), (520, 900), (9, 1), (40, 605)];
    for window in [None, Some(50), Some(560)] {
        let sequences = vec![
            (segments.clone(), (565..605).chain([0, 1, 31, 36, 100]).collect()),
            (vec![(3, 0)], vec![]),
            (vec![(20, 7)], vec![19]),
        ];
        check(&Case { window, sequences, ..Case::new(0, []) });
    }
}

#[test]
fn no_bit_depends_on_block_size_or_on_the_rows_beside() {
    let segments = vec![(1, 0), (300, 1), (250, 77), (40, 551)];
    let sequences = vec![(segments, (540..591).collect::<Vec<u32>>())];
    let case = Case { sequences, window: Some(530), ..Case::new(0, []) };
    let expected = build(&case, 43).fast();
    for block_size in [1, 8, 32] {
        let found = build(&Case { block_size, ..case.clone() }, 43).fast();
        assert_same_bits(&expected, &found, &format!("block size {block_size}"));
    }
    let mut built = build(&case, 43);
    let (all, width) = (built.q.clone(), built.q.dim(1).unwrap());
    for row in [0, 1, 7, 50] {
        built.op.positions = Arc::new(vec![540 + row as u32]);
        built.op.cu_seqlens_q = Arc::new(vec![0, 1]);
        built.q = all.narrow(0, row, 1).unwrap();
        assert_same_bits(&expected[row * width..][..width], &built.fast(), "a row alone");
    }
}

#[test]
fn no_bit_depends_on_where_in_its_block_a_segment_starts() {
    let segments = vec![(1, 0), (300, 1), (5, 1), (250, 77), (40, 551)];
    let sequences = vec![(segments, (545..596).chain([0, 3, 301]).collect::<Vec<u32>>())];
    for (dtype, window) in [(DType::BF16, None), (DType::F32, Some(530)), (DType::F16, Some(9))] {
        let case = Case { sequences: sequences.clone(), dtype, window, ..Case::new(0, []) };
        let expected = build(&case, 43).fast();
        for (block_size, offset) in [(16, 1), (16, 5), (16, 15), (32, 31), (8, 7)] {
            let moved = Case { block_size, offset, ..case.clone() };
            let found = build(&moved, 43).fast();
            assert_same_bits(&expected, &found, &format!("{offset} rows into {block_size}"));
            check(&moved);
        }
    }
}

/// What `blend` reads: the first rows of a chunk from somewhere else.
#[test]
fn rows_that_a_view_takes_from_another_block_are_read_there() {
    let mut built = build(&Case::new(40, [0, 5, 6, 20, 39]), 48);
    let expected = built.fast();
    let first = built.op.tables.entries[0];
    let spare = first.row - 16; // blocks in use have an empty one below them
    let (width, count) = (built.shape.width(), 6);
    for cache in [&mut built.k, &mut built.v] {
        let mut values = flat(cache);
        let (from, to) = (first.row as usize * width, spare as usize * width);
        values.copy_within(from..from + count * width, to);
        values[from..from + count * width].fill(f32::NAN);
        let moved = Tensor::from_vec(values, cache.shape(), &Device::Cpu).unwrap();
        *cache = moved.to_dtype(DType::BF16).unwrap();
    }
    let tables = Arc::get_mut(&mut built.op.tables).unwrap();
    let rest = TableEntry {
        row: first.row + count as u32,
        first: count as u32,
        delta: 0,
        num_valid: 16 - count as u16,
    };
    let head = TableEntry { row: spare, num_valid: count as u16, ..first };
    tables.entries.splice(0..1, [head, rest]);
    tables.cu_entries[1] += 1;
    for isa in Isa::available() {
        built.op.threads = Threads::new(2).with_isa(isa);
        assert_same_bits(&expected, &built.fast(), isa.name());
    }
    assert_same_bits(&expected, &built.reference(), "the reference");
}

#[test]
fn strided_queries_read_the_same() {
    let mut built = build(&Case::new(50, 20..50), 44);
    let expected = built.fast();
    let wide = Tensor::cat(&[&built.q, &built.q, &built.q], 1).unwrap();
    built.q = wide.narrow(1, built.q.dim(1).unwrap(), built.q.dim(1).unwrap()).unwrap();
    assert_same_bits(&expected, &built.fast(), "narrowed");
}

/// One row and head in f64: keys brought to their positions in this view, query to its own.
fn dense(built: &Built, sequence: usize, row: usize, head: usize) -> Vec<f64> {
    let (op, d) = (&built.op, built.shape.head_dim);
    let turn = |x: &[f32], position: f64| -> Vec<f64> {
        let mut out: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for i in 0..d / 2 {
            let angle = position * 100f64.powf(-(i as f64) / (d / 2) as f64);
            let (a, b) = (f64::from(x[i]), f64::from(x[i + d / 2]));
            out[i] = a * angle.cos() - b * angle.sin();
            out[i + d / 2] = b * angle.cos() + a * angle.sin();
        }
        out
    };
    let start = head / (op.num_heads / built.shape.kv_heads) * d;
    let q: Vec<Vec<f32>> = built.q.to_vec2().unwrap();
    let position = op.positions[row];
    let q = turn(&q[row][head * d..][..d], f64::from(position));
    let mut weights = vec![];
    for j in op.visible(position) {
        let (k, _, stored) = &built.keys[sequence][j];
        let k = turn(&k[start..start + d], j as f64 - f64::from(*stored));
        let score: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(op.scale);
        let cap = op.soft_cap.map(f64::from);
        weights.push((j, cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()));
    }
    let sum: f64 = weights.iter().map(|(_, w)| w).sum();
    let value = |i: usize| {
        weights
            .iter()
            .map(|(j, w)| w / sum * f64::from(built.keys[sequence][*j].1[start + i]))
            .sum()
    };
    (0..d).map(value).collect()
}

#[test]
fn moved_segments_equal_dense_attention_over_keys_rotated_to_their_places() {
    let segments = vec![(1, 0), (200, 1), (150, 1), (300, 2000), (20, 651)];
    for (window, soft_cap) in [(None, None), (Some(100), None), (None, Some(2.0))] {
        let sequences = vec![
            (segments.clone(), vec![0, 1, 250, 500, 650, 670]),
            (vec![(40, 3)], (0..40).collect()),
        ];
        for (dtype, most) in [(DType::F32, 2e-5), (DType::U8, 2e-2)] {
            let sequences = sequences.clone();
            let case = Case { window, soft_cap, sequences, dtype, ..Case::new(0, []) };
            let built = build(&case, 45);
            let found = built.fast();
            for row in 0..built.op.positions.len() {
                for head in 0..case.heads {
                    let exact = dense(&built, usize::from(row >= 6), row, head);
                    let found = &found[(row * case.heads + head) * case.d..];
                    for (exact, found) in exact.iter().zip(found) {
                        let error = (exact - f64::from(*found)).abs();
                        assert!(error < most, "{dtype:?}, row {row}, head {head}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_nan_key_makes_those_nan_that_see_it() {
    let mut built = build(&Case::new(40, [3, 4, 5, 39]), 46);
    let entry = built.op.tables.entries[0];
    let mut k = flat(&built.k);
    let width = built.shape.width();
    k[(entry.row as usize + 4) * width] = f32::NAN; // KV head 0 of logical key 4
    built.k = Tensor::from_vec(k, built.k.shape(), &Device::Cpu).unwrap();
    built.k = built.k.to_dtype(DType::BF16).unwrap();
    for isa in Isa::available() {
        built.op.threads = Threads::new(2).with_isa(isa);
        for (row, out) in built.fast().chunks_exact(4 * 16).enumerate() {
            let (first, second) = out.split_at(2 * 16);
            assert!(first.iter().all(|x| x.is_nan() == (row > 0)));
            assert!(second.iter().all(|x| x.is_finite()));
        }
    }
}

fn refusal(change: impl Fn(&mut Built)) -> String {
    let mut built = build(&Case::new(40, [38, 39]), 47);
    change(&mut built);
    built.q.apply_op3_no_bwd(&built.k, &built.v, &built.op).unwrap_err().to_string()
}

#[track_caller]
fn refuses(expected: &str, change: impl Fn(&mut Built)) {
    let found = refusal(change);
    assert!(found.contains(expected), "{found}");
}

#[test]
fn what_lies_outside_the_limits_is_refused() {
    fn entry(built: &mut Built, i: usize) -> &mut TableEntry {
        &mut Arc::get_mut(&mut built.op.tables).unwrap().entries[i]
    }
    refuses("row is 112, must be below the cache's 112", |b| entry(b, 1).row = 112);
    refuses("num_valid is 17, must be at most 16, the rest of", |b| entry(b, 1).num_valid = 17);
    refuses("num_valid is 16, must be at most 15, the rest of", |b| entry(b, 1).row += 1);
    refuses("an entry's first is 17, must be 16", |b| entry(b, 1).first = 17);
    refuses("turned position is -1", |b| entry(b, 0).delta = 40);
    refuses("turned position is 4000", |b| entry(b, 2).delta = -3961);
    refuses("a position is 40", |b| b.op.positions = Arc::new(vec![40, 39]));
    refuses("positions' length is 1", |b| b.op.positions = Arc::new(vec![39]));
    refuses("offsets from 0 to 2", |b| b.op.cu_seqlens_q = Arc::new(vec![0, 1]));
    refuses("ascending", |b| b.op.cu_seqlens_q = Arc::new(vec![0, 3, 2]));
    refuses("cu_entries' length is 2", |b| b.op.cu_seqlens_q = Arc::new(vec![0, 1, 2]));
    refuses("sliding_window is 0", |b| b.op.sliding_window = Some(0));
    refuses("the rotary width is 8", |b| b.op.rotary = table(8, 50));
    refuses("q must be (rows, 8 * 16)", |b| b.op.num_heads = 8);
    refuses("the V cache must be bf16, got F32", |b| b.v = b.v.to_dtype(DType::F32).unwrap());
    refuses("must be f32, f16, bf16 or u8 (int8)", |b| b.k = b.k.to_dtype(DType::F64).unwrap());
    refuses("the V cache must be of the K cache's shape", |b| b.v = b.v.narrow(0, 0, 2).unwrap());
    refuses("the K cache must be contiguous", |b| b.k = b.k.transpose(1, 2).unwrap());
    refuses("q must be f32", |b| b.q = b.q.to_dtype(DType::F16).unwrap());
}
