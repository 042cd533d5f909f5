//! What tells one model from another: digests of everything its numbers come from.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::files::ModelFiles;

/// SHA-256.
pub type Fingerprint = [u8; 32];

/// Where a model's numbers come from.
pub enum WeightsSource<'a> {
    File {
        path: &'a Path,
        bytes: &'a [u8],
    },
    /// Part of the program.
    Static(&'a [u8]),
    /// Made from a seed.
    Seed(u64),
}

/// The digest of some bytes.
pub fn digest(bytes: &[u8]) -> Fingerprint {
    Sha256::digest(bytes).into()
}

impl ModelFiles {
    /// Of the configuration and every weight. Reads all files: `of_file` may know a file's digest
    /// from an earlier time and returns [`digest`] of the bytes otherwise.
    pub fn fingerprint(&self, of_file: &mut dyn FnMut(&Path, &[u8]) -> Fingerprint) -> Fingerprint {
        let mut all = Sha256::new_with_prefix(b"strand model 1");
        all.update(digest(format!("{:?}", self.config).as_bytes()));
        for source in self.weights.sources() {
            all.update(match source {
                WeightsSource::File { path, bytes } => of_file(path, bytes),
                WeightsSource::Static(bytes) => digest(bytes),
                WeightsSource::Seed(seed) => digest(&seed.to_le_bytes()),
            });
        }
        all.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::ModelSource;

    fn of(seed: u64, change: &str) -> Fingerprint {
        let config_json = include_str!("demo/config.json").replace("10000.0", change);
        let source = ModelSource::Random { config_json, seed, recipe: None };
        let files = ModelFiles::open(&source).expect("the config is sound");
        files.fingerprint(&mut |_, bytes| digest(bytes))
    }

    #[test]
    fn a_fingerprint_follows_config_and_weights() {
        assert_eq!(of(1, "10000.0"), of(1, "10000.0"));
        assert_ne!(of(1, "10000.0"), of(2, "10000.0"));
        assert_ne!(of(1, "10000.0"), of(1, "10001.0"));
        let demo = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
        let demo = demo.fingerprint(&mut |_, _| panic!("it lies in no file"));
        assert_ne!(demo, of(1, "10000.0"));
    }
}
