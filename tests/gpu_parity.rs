//! E2 on a GPU: logits within what transformers itself loses by computing in bf16, in both modes.

use strand_engine::EngineConfig;
use strand_kernels::gpu::{Gpu, PAGE_BYTES, Slice, page_bytes};
use strand_kernels::{KvDtype, PageEntry, Threads, WeightDtype};
use strand_layers::gpu_attention::{GpuSizes, GpuStep};
use strand_layers::gpu_kv_cache::GpuKvCache;
use strand_layers::kv_cache::KvCacheShape;
use strand_models::{GpuArithmetic, GpuDecoder, ModelFiles, ModelSource};

use crate::gpu::devices;
use crate::quantized::{deviation, gguf, in_f32, next_tokens_on, prompts};
use crate::{exactness, parity};

/// Those whose heads are as wide as there are kernels for: norms on q and k, biases, a window
/// shorter than the prompts, scaled rotations.
const MODELS: [&str; 5] = ["qwen3-wide", "qwen2-wide", "mistral-wide", "llama3", "yarn"];
const BLOCK_SIZE: usize = 16;

fn upload(gpu: &Gpu, words: &[u32]) -> Slice {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    gpu.uploaded(&bytes).expect("it fits").all()
}

/// A prompt as one step of a sequence of its own.
fn step(gpu: &Gpu, prompt: &[u32], max_pages: usize) -> GpuStep {
    let rows: Vec<u32> = (0..prompt.len() as u32).collect();
    let mut pages = Vec::new();
    for start in (0..prompt.len()).step_by(BLOCK_SIZE) {
        pages.extend(page_bytes(&PageEntry {
            block: (start / BLOCK_SIZE) as u32,
            first_row: 0,
            stored_position: start as u32,
            num_valid: BLOCK_SIZE.min(prompt.len() - start) as u16,
            active: true,
            segment: 0,
        }));
    }
    let num_pages = (pages.len() / PAGE_BYTES) as u32;
    pages.resize(max_pages * PAGE_BYTES, 0);
    GpuStep {
        ids: upload(gpu, prompt),
        positions: upload(gpu, &rows),
        slot_mapping: upload(gpu, &rows),
        row_sequence: upload(gpu, &vec![0; prompt.len()]),
        cu_seqlens_q: upload(gpu, &[0, prompt.len() as u32]),
        cu_pages: upload(gpu, &[0, num_pages]),
        pages: gpu.uploaded(&pages).expect("it fits").all(),
        outputs: upload(gpu, &rows),
        hidden: upload(gpu, &rows),
        rows: prompt.len(),
        sequences: 1,
        singles: usize::from(prompt.len() == 1),
        longest: prompt.len(),
        single_keys: prompt.len(),
        max_keys: prompt.len(),
    }
}

/// Logits of every position of a prompt, in one forward.
fn logits(gpu: &Gpu, files: &ModelFiles, deterministic: bool, prompt: &[u32]) -> Vec<Vec<f32>> {
    let config = &files.config;
    let sizes =
        GpuSizes { tokens: prompt.len(), sequences: 64, positions: config.max_position_embeddings };
    let num_blocks = prompt.len().div_ceil(BLOCK_SIZE);
    let arithmetic = GpuArithmetic { dtype: WeightDtype::Bf16, deterministic };
    let (threads, slots) = (Threads::new(1), num_blocks * BLOCK_SIZE);
    let from = (config, &files.weights);
    let mut decoder =
        GpuDecoder::load((gpu, &threads), from, arithmetic, (sizes, slots), &mut |_, _| {})
            .expect("the fixture is sound");
    let shape = KvCacheShape {
        layers: config.num_hidden_layers,
        num_blocks,
        block_size: BLOCK_SIZE,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    let cache = GpuKvCache::new(gpu, shape, KvDtype::Bf16).expect("it fits");
    decoder.make_room(num_blocks).expect("it fits");
    let step = step(gpu, prompt, decoder.max_pages());
    decoder.forward(&step, &cache, &mut |_| Ok(())).expect("it runs");
    let mut rows = Vec::new();
    for first in (0..prompt.len()).step_by(decoder.max_outputs()) {
        let count = decoder.max_outputs().min(prompt.len() - first);
        let logits = decoder.logits(&step, (first, count)).expect("it runs");
        let mut bytes = vec![0; 4 * count * config.vocab_size];
        gpu.download(&logits, &mut bytes).expect("it arrives");
        let values = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let values: Vec<f32> = values.collect();
        rows.extend(values.chunks_exact(config.vocab_size).map(<[f32]>::to_vec));
    }
    rows
}

#[test]
fn gpu_logits_are_within_the_reference_s_own_error() {
    for device in devices() {
        for (name, deterministic) in MODELS
            .into_iter()
            .flat_map(|name| [false, true].map(|deterministic| (name, deterministic)))
        {
            parity::within_the_reference_s_own_error(name, &|files, prompt| {
                let gpu = device.open().expect("it was there a moment ago").expect("it is a GPU");
                logits(&gpu, files, deterministic, prompt)
            });
        }
    }
}

/// Weights stay in their blocks, and what is multiplied with them has 11 bits instead of 8: a GPU
/// must be nearer to what the blocks are worth than the CPU, whose integers are near enough.
#[test]
fn gpu_quantized_files_deviate_less_than_on_the_cpu() {
    let of_recipe = |name| (name, exactness::source(&format!("Qwen3ForCausalLM:{name}"), 1024));
    let of_file = |name| (name, ModelSource::Gguf(gguf(name)));
    for device in devices() {
        for (name, source) in
            ["q4_0", "q4_k_m"].map(of_recipe).into_iter().chain(["q8_0", "q4_0"].map(of_file))
        {
            let files = ModelFiles::open(&source).expect("the model is sound");
            let prompts = prompts(files.config.vocab_size, 6);
            let exact = next_tokens_on(&source, &in_f32(Some(WeightDtype::F32)), &prompts);
            let here = deviation(&exact, &next_tokens_on(&source, &in_f32(None), &prompts));
            for deterministic in [false, true] {
                let base = EngineConfig { dtype: None, kv_dtype: None, ..in_f32(None) };
                let config = EngineConfig { device, deterministic, ..base };
                let there = deviation(&exact, &next_tokens_on(&source, &config, &prompts));
                println!("{name}: KL {:.1e} on {device}, {:.1e} on the CPU", there.0, here.0);
                assert!(there.0 < here.0 && there.0 < 1e-4, "{name}: {there:?}, {here:?}");
            }
        }
    }
}

#[test]
fn gpu_memory_holds_the_blocks_of_a_file_as_they_are() {
    for device in devices() {
        let source = exactness::source("Qwen3ForCausalLM:q4_k_m", 1024);
        let files = ModelFiles::open(&source).expect("the config is sound");
        let weights = files.weights.bytes(&files.config, WeightDtype::Quantized);
        let in_f16 = 2 * files.config.num_parameters();
        let config = EngineConfig { device, ..exactness::base() };
        let engine = strand_engine::load(files, &config, None, &mut |_, _| {}).expect("it fits");
        assert_eq!(engine.engine.plan().weight_bytes, weights);
        // 4.6 bits of most numbers, 6.6 of some, 16 of the norms'
        assert!(5 * weights < 2 * in_f16, "{weights} of {in_f16}");
    }
}
