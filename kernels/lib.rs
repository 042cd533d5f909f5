#![doc = "strand-kernels"]
