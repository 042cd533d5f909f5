//! The arithmetic of Strand, one op per file: what it computes, a plain reference, a fast version.
//!
//! What this crate promises:
//!
//! - **One result.** A fast version equals its reference bit for bit, on every instruction set
//!   ([`Isa`]) and with any number of [`Threads`]. Loops are written once over sixteen lanes and
//!   compiled per instruction set; every sum has one order. Weights in bf16 alone are packed for
//!   what the processor has, and products with them differ in numbers too small to be normal.
//! - **Rows are independent.** A row's bits depend neither on the rows computed with it nor on
//!   how the KV cache is cut into blocks.
//! - **NaN is never hidden.** What is computed from a NaN is NaN; what must not be read (rows past
//!   `num_valid`, blocks no table lists) is not read.
//! - **Refusals.** Arguments outside an op's limits are an [`Error`] that names the value; nothing
//!   is written then.
//!
//! Ops enter candle as custom ops, on CPU tensors, activations in f32. All `unsafe` of the
//! workspace is here. [`NUMERICS`] names the arithmetic: results of two builds are comparable bit
//! for bit only if it is equal.

pub mod ceilings;
mod dtype;
mod embedding;
mod error;
mod filter_view;
pub mod gpu;
mod isa;
mod linear;
pub mod math;
mod memory;
mod mmap;
mod move_rows;
mod paged_attention;
mod pages;
mod poison;
mod quantized;
mod rms_norm;
mod rope;
mod silu_mul;
mod simd;
mod store_kv;
#[cfg(test)]
mod testing;
mod threads;
mod view;

pub use dtype::{KvDtype, WeightDtype};
pub use embedding::embedding;
pub use error::Error;
pub use filter_view::{BlockTables, PageEntry, TableEntry, filter_view};
pub use isa::Isa;
pub use linear::{Linear, PackedWeight, linear_reference};
pub use memory::keep_freed_memory;
pub use mmap::Mmap;
pub use move_rows::{ScatterRows, gather_rows};
pub use paged_attention::{PagedAttention, PlainCache, paged_attention_reference};
pub use pages::zeros;
pub use poison::PoisonBlocks;
pub use quantized::BlockFormat;
pub use rms_norm::{AddRmsNorm, RmsNorm, rms_norm_reference};
pub use rope::{Rope, RotaryTable, rope_reference};
pub use silu_mul::{SiluMul, silu_mul_reference};
pub use store_kv::StoreKv;
pub use threads::Threads;
pub use view::CacheShape;

/// The kernel family and its revision: f32 accumulation with fused multiply-add, k ascending.
pub const NUMERICS: &str = "f32-fma r1";

/// As [`NUMERICS`], where weights are bf16 and multiplied in pairs: numbers too small to be normal
/// are zeros there.
pub const PAIRS_NUMERICS: &str = "bf16-dp r1, f32-fma r1";

/// As [`NUMERICS`], where weights are quantized: sums of integers inside a group, f32 between.
pub const QUANTIZED_NUMERICS: &str = "int8-dp r1, f32-fma r1";

/// All that decides the bits of K and V but the model and its tokens: kernel family, revision,
/// the type weights compute in and the type KV is stored in. Neither threads nor block size nor
/// batch; of the instruction set, whether it multiplies bf16 in pairs.
pub fn numerics(isa: Isa, weights: WeightDtype, kv: KvDtype) -> String {
    let products = match weights {
        WeightDtype::Quantized => QUANTIZED_NUMERICS,
        WeightDtype::Bf16 if isa.has_bf16_pairs() => PAIRS_NUMERICS,
        _ => NUMERICS,
    };
    format!("{products}, {} weights, {} kv", weights.name(), kv.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numerics_are_told_apart_by_both_types() {
        let numerics = |weights, kv| numerics(Isa::detect(), weights, kv);
        let name = numerics(WeightDtype::F32, KvDtype::F16);
        assert_eq!(name, format!("{NUMERICS}, f32 weights, f16 kv"));
        assert_ne!(name, numerics(WeightDtype::F16, KvDtype::F32));
    }

    #[test]
    fn bf16_in_pairs_is_a_family_of_its_own() {
        for isa in Isa::available() {
            let name = numerics(isa, WeightDtype::Bf16, KvDtype::Bf16);
            assert_eq!(name.starts_with(PAIRS_NUMERICS), isa.has_bf16_pairs(), "{isa:?}");
        }
    }
}
