//! GGUF files: their tensors under Hugging Face names, and the config their header spells out.
//!
//! candle reads the header; everything a header could lie about is checked before a tensor is
//! touched. Blocks of quantized numbers become f32 strip by strip, as every other row does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use strand_kernels::{BlockFormat, WeightDtype};

use crate::config::ModelConfig;
use crate::error::{Error, check_shape};
use crate::stored::{Encoding, FileBytes, StoredMatrix};

mod header;

const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K";

/// The per-frequency divisors of a scaled rotation; read into the config.
const ROPE_FACTORS: &str = "rope_freqs.weight";

pub(crate) type Metadata = HashMap<String, Value>;

pub(crate) struct GgufFile {
    pub(crate) config: ModelConfig,
    pub(crate) tensors: GgufTensors,
    pub(crate) metadata: Metadata,
}

pub(crate) struct GgufTensors {
    file: FileBytes,
    /// By the names they have in the file.
    tensors: BTreeMap<String, Place>,
    /// Rows of q and k are stored pair by pair: llama.cpp's converter does so for this
    /// architecture, whose rotation it computes on neighbours instead of halves.
    interleaved_head: Option<usize>,
}

struct Place {
    start: usize,
    end: usize,
    shape: Vec<usize>,
    encoding: Result<Encoding, GgmlDType>,
}

impl GgufFile {
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and all that [`ModelConfig::from_json`] returns.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = FileBytes::map(path)?;
        refuse_zero_alignment(&file)?;
        let content = Content::read(&mut Cursor::new(file.bytes()))
            .map_err(|error| unreadable(&file, &error))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in &content.tensor_infos {
            let place = Place::new(&file, content.tensor_data_offset, name, info)?;
            tensors.insert(name.clone(), place);
        }
        let mut tensors = GgufTensors { file, tensors, interleaved_head: None };
        let config = header::config(&content.metadata, &tensors)?;
        tensors.interleaved_head =
            header::is_interleaved(config.architecture).then_some(config.head_dim);
        Ok(GgufFile { config, tensors, metadata: content.metadata })
    }
}

impl GgufTensors {
    pub(crate) fn file(&self) -> &FileBytes {
        &self.file
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        file_name(name).is_some_and(|name| self.tensors.contains_key(&name))
    }

    pub(crate) fn dtype(&self, name: &str) -> Option<WeightDtype> {
        match self.tensors.get(&file_name(name)?)?.encoding {
            Ok(Encoding::Plain(dtype)) => Some(dtype),
            _ => Some(WeightDtype::Quantized),
        }
    }

    /// Names as in the file.
    pub(crate) fn unused(&self, used: &BTreeSet<String>) -> Vec<String> {
        let used: BTreeSet<String> = used.iter().filter_map(|name| file_name(name)).collect();
        let idle = |name: &&String| !used.contains(*name) && *name != ROPE_FACTORS;
        self.tensors.keys().filter(idle).cloned().collect()
    }

    pub(crate) fn find(&self, name: &str, shape: &[usize]) -> Result<StoredMatrix<'_>, Error> {
        let stored_name = file_name(name).unwrap_or_else(|| name.to_string());
        let mut matrix = self.find_stored(&stored_name, shape)?;
        let (tensor, _) = name.rsplit_once('.').unwrap_or((name, ""));
        if tensor.ends_with("q_proj") || tensor.ends_with("k_proj") {
            matrix.interleaved = self.interleaved_head;
        }
        Ok(matrix)
    }

    fn find_stored(&self, name: &str, shape: &[usize]) -> Result<StoredMatrix<'_>, Error> {
        let where_found = || self.file.path().display().to_string();
        let Some(place) = self.tensors.get(name) else {
            return Err(Error::TensorMissing { name: name.to_string(), place: where_found() });
        };
        check_shape(name, where_found, &place.shape, shape)?;
        let columns = shape.get(1).copied().unwrap_or(1);
        let encoding = place.encoding.ok().filter(|e| columns.is_multiple_of(e.block_len()));
        let encoding = encoding.ok_or_else(|| Error::TensorType {
            name: name.to_string(),
            place: where_found(),
            found: place.type_name(),
            supported: SUPPORTED_TYPES.to_string(),
        })?;
        Ok(StoredMatrix {
            file: &self.file,
            range: place.start..place.end,
            columns,
            encoding,
            interleaved: None,
        })
    }

    fn has_stored(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn stored_shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| place.shape.as_slice())
    }

    fn rope_factors(&self, head_dim: usize) -> Result<Option<Vec<f32>>, Error> {
        if !self.has_stored(ROPE_FACTORS) {
            return Ok(None);
        }
        let matrix = self.find_stored(ROPE_FACTORS, &[head_dim / 2])?;
        let mut factors = vec![0.0; head_dim / 2];
        matrix.read(0..head_dim / 2, &mut factors);
        if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
            let reason = format!("{ROPE_FACTORS} holds numbers that are not above 0");
            return Err(self.file.damaged(reason));
        }
        Ok(Some(factors))
    }
}

impl Place {
    /// Checks that the tensor lies inside the file, where blocks can be read from.
    fn new(file: &FileBytes, data: u64, name: &str, info: &TensorInfo) -> Result<Self, Error> {
        let encoding = match info.ggml_dtype {
            GgmlDType::F32 => Ok(Encoding::Plain(WeightDtype::F32)),
            GgmlDType::F16 => Ok(Encoding::Plain(WeightDtype::F16)),
            GgmlDType::BF16 => Ok(Encoding::Plain(WeightDtype::Bf16)),
            other => block_format(other).map(Encoding::Blocks).ok_or(other),
        };
        let shape = info.shape.dims().to_vec();
        let start = data.checked_add(info.offset).and_then(|start| usize::try_from(start).ok());
        let numbers = shape.iter().try_fold(1usize, |all, &dim| all.checked_mul(dim));
        let (block_len, block_bytes) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        let bytes = numbers.and_then(|numbers| (numbers / block_len).checked_mul(block_bytes));
        let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file.bytes().len() => {
                if !start.is_multiple_of(8) {
                    return Err(file.damaged(format!("tensor {name} is not aligned")));
                }
                Ok(Place { start, end, shape, encoding })
            }
            _ => Err(file.damaged(format!(
                "tensor {name} of shape {shape:?} ends past its {} bytes, it may be cut short",
                file.bytes().len()
            ))),
        }
    }

    fn type_name(&self) -> String {
        match self.encoding {
            Ok(Encoding::Plain(dtype)) => dtype.name().to_string(),
            Ok(Encoding::Blocks(kind)) => format!("{kind:?} in rows that are no whole blocks"),
            Err(kind) => format!("{kind:?}"),
        }
    }
}

/// The kinds of blocks that are known. Q5_0 and its like stand in for Q4_K and Q5_K in rows that
/// are no multiple of 256.
fn block_format(dtype: GgmlDType) -> Option<BlockFormat> {
    Some(match dtype {
        GgmlDType::Q4_0 => BlockFormat::Q4_0,
        GgmlDType::Q4_1 => BlockFormat::Q4_1,
        GgmlDType::Q5_0 => BlockFormat::Q5_0,
        GgmlDType::Q5_1 => BlockFormat::Q5_1,
        GgmlDType::Q8_0 => BlockFormat::Q8_0,
        GgmlDType::Q4K => BlockFormat::Q4K,
        GgmlDType::Q5K => BlockFormat::Q5K,
        GgmlDType::Q6K => BlockFormat::Q6K,
        _ => return None,
    })
}

/// A Hugging Face tensor name as llama.cpp's converter writes it; `None` when it has none.
fn file_name(name: &str) -> Option<String> {
    let direct = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(direct) = direct {
        return Some(direct.to_string());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (tensor, kind) = rest.rsplit_once('.')?;
    let tensor = match tensor {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{tensor}.{kind}"))
}

/// candle divides by `general.alignment`. The key is among the first of a header.
fn refuse_zero_alignment(file: &FileBytes) -> Result<(), Error> {
    const KEY: &[u8] = b"general.alignment";
    let head = &file.bytes()[..file.bytes().len().min(1 << 20)];
    let found = head.windows(KEY.len()).position(|window| window == KEY);
    // Behind the key: its type in 4 bytes, then the value in at most 8.
    let value = found.and_then(|at| head.get(at + KEY.len() + 4..at + KEY.len() + 8));
    match value {
        Some([0, 0, 0, 0]) => Err(file.damaged("its alignment is 0")),
        _ => Ok(()),
    }
}

/// candle knows fewer types than GGUF has, and says so with a bare number.
fn unreadable(file: &FileBytes, error: &candle_core::Error) -> Error {
    const OTHER_TYPES: &[(u32, &str)] = &[
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    let text = error.to_string();
    let first_line = text.lines().next().unwrap_or_default();
    let Some((_, number)) = first_line.split_once("unknown dtype for tensor ") else {
        return file.damaged(first_line);
    };
    let name = OTHER_TYPES.iter().find(|(id, _)| id.to_string() == number.trim());
    Error::TensorType {
        name: "(its name is not known)".to_string(),
        place: file.path().display().to_string(),
        found: name.map_or_else(|| format!("ggml type {number}"), |(_, name)| name.to_string()),
        supported: SUPPORTED_TYPES.to_string(),
    }
}

#[cfg(test)]
mod tests;
