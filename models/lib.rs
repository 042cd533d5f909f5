#![doc = "strand-models"]
