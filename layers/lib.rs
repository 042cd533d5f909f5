//! Modules with weights, made of kernels: linear, norm, attention, MLP; and the sampler.
//!
//! What is absent here: names of checkpoints (they live in `models`), sequences, scheduling and
//! any other notion of serving.

#![forbid(unsafe_code)]

pub mod attention;
pub mod gpu_attention;
pub mod gpu_kv_cache;
pub mod gpu_linear;
pub mod kv_cache;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod sampler;
