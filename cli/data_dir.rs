//! The folder for what outlives a run: chunks and their KV, contexts, history.

use std::env;
use std::path::PathBuf;

use strand_engine::store::Store;

use crate::args::CommonArgs;

/// `--data-dir`, else `$XDG_DATA_HOME/strand`, else `~/.local/share/strand`.
pub fn path(common: &CommonArgs) -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let absolute = |path: &PathBuf| path.is_absolute();
    let asked = common.data_dir.clone();
    asked.or_else(|| {
        let data = variable("XDG_DATA_HOME").filter(absolute);
        let home = || variable("HOME").filter(absolute).map(|home| home.join(".local/share"));
        Some(data.or_else(home)?.join("strand"))
    })
}

/// Opens the store in it; why not, where that fails. What opening had to put right is told on
/// standard error.
pub fn open_store(common: &CommonArgs) -> Result<Store, String> {
    let path = path(common).ok_or("there is no data folder; name one with --data-dir")?;
    let store = Store::open(&path).map_err(|error| error.to_string())?;
    for file in &store.opened().quarantined {
        let (name, path) = (&file.name, file.path.display());
        crate::note(&format!("{name} can't be used, {}; it now lies at {path}", file.damage));
    }
    for path in &store.opened().unreadable {
        crate::note(&format!("{} can't be read", path.display()));
    }
    Ok(store)
}

/// The store, or a word on standard error about going on without it.
pub fn open_store_or_tell(common: &CommonArgs) -> Result<Store, String> {
    open_store(common).inspect_err(|reason| {
        crate::note(&format!("nothing is kept on disk: {reason}"));
    })
}
