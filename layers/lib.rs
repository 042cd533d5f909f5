#![doc = "strand-layers"]
