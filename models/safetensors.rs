//! Checkpoints in safetensors files: one file, or shards that an index lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ::safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;
use strand_kernels::WeightDtype;

use crate::error::{Error, check_shape};
use crate::stored::{Encoding, FileBytes, StoredMatrix};

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

pub(crate) struct Checkpoint {
    files: Vec<FileBytes>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies: its bytes are `start..start + ...` of `files[file]`.
struct Place {
    file: usize,
    start: usize,
    end: usize,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl Checkpoint {
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        let single = folder.join(SINGLE_FILE);
        let index = folder.join(INDEX_FILE);
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: BTreeMap::new() };
        if single.is_file() {
            checkpoint.add(FileBytes::map(&single)?)?;
        } else if index.is_file() {
            checkpoint.add_shards(folder, &index)?;
        } else {
            return Err(Error::NotAModel {
                path: folder.to_path_buf(),
                reason: format!("it holds neither {SINGLE_FILE} nor {INDEX_FILE}"),
            });
        }
        Ok(checkpoint)
    }

    pub(crate) fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, Error> {
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: BTreeMap::new() };
        checkpoint.add(FileBytes::from_static(name, bytes))?;
        Ok(checkpoint)
    }

    pub(crate) fn files(&self) -> &[FileBytes] {
        &self.files
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn dtype(&self, name: &str) -> Option<WeightDtype> {
        self.tensors.get(name).and_then(|place| weight_dtype(place.dtype))
    }

    /// Leaves out what older checkpoints carry along and nobody reads: rotary frequencies.
    pub(crate) fn unused(&self, used: &BTreeSet<String>) -> Vec<String> {
        let idle =
            |name: &&String| !used.contains(*name) && !name.ends_with(".rotary_emb.inv_freq");
        self.tensors.keys().filter(idle).cloned().collect()
    }

    pub(crate) fn find(&self, name: &str, shape: &[usize]) -> Result<StoredMatrix<'_>, Error> {
        let Some(place) = self.tensors.get(name) else {
            return Err(Error::TensorMissing { name: name.to_string(), place: self.described() });
        };
        let file = &self.files[place.file];
        let where_found = || file.path().display().to_string();
        check_shape(name, where_found, &place.shape, shape)?;
        let dtype = weight_dtype(place.dtype).ok_or_else(|| Error::TensorType {
            name: name.to_string(),
            place: where_found(),
            found: format!("{:?}", place.dtype),
            supported: "F32, F16 and BF16".to_string(),
        })?;
        Ok(StoredMatrix {
            file,
            range: place.start..place.end,
            columns: shape.get(1).copied().unwrap_or(1),
            encoding: Encoding::Plain(dtype),
            interleaved: None,
        })
    }

    /// Reads the header of one more file; a name that is known already keeps its first place.
    fn add(&mut self, file: FileBytes) -> Result<(), Error> {
        let (header, metadata) =
            SafeTensors::read_metadata(file.bytes()).map_err(|error| damaged(&file, error))?;
        let data = size_of::<u64>() + header;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let place = Place {
                file: self.files.len(),
                start: data + start,
                end: data + end,
                shape: info.shape.clone(),
                dtype: info.dtype,
            };
            self.tensors.entry(name).or_insert(place);
        }
        self.files.push(file);
        Ok(())
    }

    fn add_shards(&mut self, folder: &Path, index: &Path) -> Result<(), Error> {
        let map = read_index(index)?;
        let mut shards: Vec<&str> = map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            let path = folder.join(shard);
            if !path.is_file() {
                let promised = map.iter().find(|(_, file)| *file == shard);
                return Err(Error::ShardMissing {
                    index: index.to_path_buf(),
                    shard: shard.to_string(),
                    tensor: promised.map(|(tensor, _)| tensor.clone()).unwrap_or_default(),
                });
            }
            self.add(FileBytes::map(&path)?)?;
        }
        for (name, shard) in map {
            let place = self.tensors.get(&name).map(|place| self.files[place.file].path());
            if place != Some(folder.join(&shard).as_path()) {
                let place = folder.join(shard).display().to_string();
                return Err(Error::TensorMissing { name, place });
            }
        }
        Ok(())
    }

    fn described(&self) -> String {
        match self.files.as_slice() {
            [single] => single.path().display().to_string(),
            several => format!("the checkpoint's {} files", several.len()),
        }
    }
}

/// Tensor name to shard, out of a `model.safetensors.index.json`.
pub(crate) fn read_index(index: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = std::fs::read_to_string(index)
        .map_err(|source| Error::Io { path: index.to_path_buf(), source })?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|source| Error::Json { what: index.display().to_string(), source })?;
    let damaged =
        |reason: &str| Error::Damaged { path: index.to_path_buf(), reason: reason.to_string() };
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| damaged("it has no weight_map"))?;
    if map.is_empty() {
        return Err(damaged("its weight_map is empty"));
    }
    let mut shards = BTreeMap::new();
    for (tensor, shard) in map {
        // A shard lies beside its index: a path could lead anywhere.
        match shard.as_str() {
            Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                shards.insert(tensor.clone(), file.to_string());
            }
            _ => return Err(damaged(&format!("{shard} is not the name of a shard"))),
        }
    }
    Ok(shards)
}

fn weight_dtype(dtype: Dtype) -> Option<WeightDtype> {
    match dtype {
        Dtype::F32 => Some(WeightDtype::F32),
        Dtype::F16 => Some(WeightDtype::F16),
        Dtype::BF16 => Some(WeightDtype::Bf16),
        _ => None,
    }
}

fn damaged(file: &FileBytes, error: SafeTensorError) -> Error {
    let len = file.bytes().len();
    match error {
        SafeTensorError::MetadataIncompleteBuffer => file.damaged(format!(
            "its {len} bytes are not what its header describes, it may be cut short"
        )),
        SafeTensorError::HeaderTooLarge => {
            file.damaged("its header claims more than 100 MB, it is no safetensors file")
        }
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            file.damaged(format!("its header does not fit into its {len} bytes"))
        }
        other => file.damaged(other.to_string()),
    }
}
