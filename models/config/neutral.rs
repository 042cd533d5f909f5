//! Keys of a config.json that may be there without being understood.

use serde_json::Value;

/// Keys that leave the logits as they are whatever their value; and keys of other model families
/// at the value that switches them off.
pub(super) fn is_neutral(key: &str, value: &Value) -> bool {
    let off = |&(name, number): &(&str, f64)| name == key && value.as_f64() == Some(number);
    NEUTRAL.contains(&key) || SWITCHED_OFF.iter().any(off)
}

const NEUTRAL: &[&str] = &[
    // bookkeeping
    "_commit_hash",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "tokenizer_class",
    "transformers.js_config",
    "is_llama_config",
    "unsloth_fixed",
    "unsloth_version",
    "torchscript",
    "use_cache",
    "return_dict",
    "return_dict_in_generate",
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "use_flash_attention_2",
    "model_max_length",
    "max_sequence_length",
    "max_length",
    "min_length",
    "tie_encoder_decoder",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "finetuning_task",
    "use_bfloat16",
    "prefix",
    // training
    "initializer_range",
    "attention_dropout",
    "hidden_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "gradient_checkpointing",
    "router_aux_loss_coef",
    "neftune_noise_alpha",
    "rope_validation",
    // generation defaults that older configs carry
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "diversity_penalty",
    "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size",
    "early_stopping",
];

const SWITCHED_OFF: &[(&str, f64)] = &[
    ("pretraining_tp", 1.0),
    ("logits_scaling", 1.0),
    ("logit_scale", 1.0),
    ("embedding_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("attention_softcap", 0.0),
    ("final_logit_softcapping", 0.0),
    ("attn_logit_softcapping", 0.0),
];
