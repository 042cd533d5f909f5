//! Loading needs little more anonymous memory than the packed weights.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Map, json};
use strand_models::ModelConfig;

/// A model whose weights dwarf everything else the program holds; untied, so that two large
/// matrices are there.
const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": false,
    "hidden_act": "silu", "torch_dtype": "bfloat16"}"#;

/// Writes a checkpoint of zeros; returns the bytes of its tensors.
fn write_checkpoint(folder: &Path) -> usize {
    fs::create_dir_all(folder).expect("the folder can be made");
    fs::write(folder.join("config.json"), CONFIG).expect("written");
    let config = ModelConfig::from_json(CONFIG).expect("it is sound");
    let (mut header, mut at) = (Map::new(), 0);
    for (name, shape) in config.tensors() {
        let bytes = 2 * shape.iter().product::<usize>();
        let tensor = json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, at + bytes]});
        header.insert(name, tensor);
        at += bytes;
    }
    let header = serde_json::to_vec(&header).expect("it is JSON");
    let file = fs::File::create(folder.join("model.safetensors")).expect("it can be made");
    let mut file = BufWriter::new(file);
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
    file.write_all(&header).expect("written");
    let page = vec![0u8; 1 << 20];
    for start in (0..at).step_by(page.len()) {
        file.write_all(&page[..page.len().min(at - start)]).expect("written");
    }
    file.flush().expect("written");
    at
}

/// Anonymous memory of a process in bytes; `None` once it has ended.
fn anonymous(process: u32) -> Option<usize> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[test]
#[cfg(target_os = "linux")]
fn loading_takes_little_more_than_the_packed_weights() {
    let folder = std::env::temp_dir().join(format!("strand-memory-{}", std::process::id()));
    let weights = write_checkpoint(&folder);
    let mut process = Command::new(env!("CARGO_BIN_EXE_strand"))
        .args(["generate", "--prompt-ids", "1", "--max-tokens", "1", "--kv-memory", "8MiB"])
        .arg(&folder)
        .stdout(Stdio::null())
        .spawn()
        .expect("the program starts");
    let mut peak = 0;
    let status = loop {
        peak = peak.max(anonymous(process.id()).unwrap_or(0));
        if let Some(status) = process.try_wait().expect("it is our child") {
            break status;
        }
        std::thread::yield_now();
    };
    fs::remove_dir_all(&folder).expect("the folder can be removed");
    assert!(status.success(), "{status}");
    let share = peak as f64 / weights as f64;
    println!("peak {peak} bytes, {share:.3} of the weights' {weights}");
    assert!(share < 1.2, "peak {peak} bytes for {weights} bytes of weights");
    assert!(share > 0.9, "the weights were never seen in memory");
}
